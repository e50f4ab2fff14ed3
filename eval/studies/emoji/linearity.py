"""Does ToFu's choice by linearity hold? MLERP where blocks are near linear, prune elsewhere, and the reverse.

    python -m eval.studies.emoji.linearity --model unet --out eval/results/linearity.jsonl

Measures the linearity of an embedded pipeline's blocks on a few prompts. Then on others, at half of the
tokens: prune everywhere, MLERP everywhere, by depth, MLERP in the most linear 25, 50 and 75 % of the blocks,
and in the least linear ones. These rows say what they are worth on the first prompts too, by which a
threshold is chosen. Goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.generate import run
from eval.generate.prompts import first, load_prompts
from eval.jsonl import append, read
from eval.studies.emoji.trajectory import PROMPTS, SEED
from eval.studies.stages import Trial, tofu
from eval.studies.study import Study
from pipelines.emoji import GUIDANCE, MODELS
from tofu_diffusers import Linearity, measure_linearity

RATIO, CALLS = 0.5, 4
SHARES = (0.25, 0.5, 0.75)
"""Of the blocks that merge."""
SCOPES = ("block", "attention")


def switches(linearity: Linearity) -> Iterator[tuple[str, float | list[float]]]:
    """The name and option `switch` of everything that is compared."""
    yield "prune", []
    yield "mlerp", 0.0
    yield "depth", 0.5
    ordered = sorted(linearity.means)
    for share in SHARES:
        count = round(share * len(ordered))
        yield f"most-{share:g}", linearity.merges(ordered[-count])["switch"]
        # The others would be merged by the threshold; turned over, these are.
        switch = linearity.merges(ordered[count])["switch"]
        yield f"least-{share:g}", switch[1:] if switch[:1] == [0.0] else [0.0, *switch]


def trials(linearity: Linearity, scope: str, steps: int) -> Iterator[Trial]:
    """All that is compared in one scope."""
    for name, switch in switches(linearity):
        options: dict[str, Any] = {"method": "tofu", "ratio": RATIO, "scope": scope}
        options["method_options"] = {"switch": switch}
        yield Trial(tofu(f"{scope}-{name}", **options), steps)


def about(study: Study, steps: int) -> dict[str, Any]:
    """What tells the row of the linearity from others."""
    return study.about(Trial(tofu("linearity", method="tofu", ratio=RATIO), steps))


def measured(study: Study, steps: int) -> dict[str, Any]:
    """The row of the linearity itself."""
    linearity = measure_linearity(
        study.loaded.pipe,
        study.prompts,
        ratio=RATIO,
        calls=CALLS,
        seed=study.seed,
        num_inference_steps=steps,
        **study.call,
    )
    return {
        **about(study, steps),
        **study.provenance,
        "calls": CALLS,
        "blocks": linearity.blocks,
        "depths": linearity.depths,
        "levels": linearity.levels,
        "values": linearity.values,
        "means": linearity.means,
    }


def linearity_of(row: dict[str, Any]) -> Linearity:
    """What a row holds."""
    values = tuple(map(tuple, row["values"]))
    return Linearity(*(tuple(row[name]) for name in ("blocks", "depths", "levels")), values)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, compare, and add the rows that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--scope", choices=SCOPES, nargs="+", default=SCOPES)
    parser.add_argument("--steps", type=int, default=25, help="(%(default)s)")
    parser.add_argument("--side", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("-n", type=int, default=32, help="prompts to report on (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to add to")
    args = parser.parse_args(argv)
    loaded = run.load(args.model)
    call = {"guidance_scale": GUIDANCE, "height": args.side, "width": args.side}
    few = Study(loaded, list(PROMPTS), SEED, len(PROMPTS), call)
    prompts = first(load_prompts("emoji"), args.n, least=2)
    many = Study(loaded, prompts, 0, 8, call)
    done = {row["id"]: row for row in read(args.out)} if args.out.exists() else {}
    row = done.get(about(few, args.steps)["id"])
    if row is None:
        row = measured(few, args.steps)
        append(args.out, row)
    linearity = linearity_of(row)
    print(linearity)
    for scope in args.scope:
        for trial in tqdm([*trials(linearity, scope, args.steps)], desc=scope, unit=" rows"):
            if many.about(trial)["id"] not in done:
                searched = few.row(trial)["metrics"]["psnr_db"]
                append(args.out, {**many.row(trial), "searched_psnr_db": searched})


if __name__ == "__main__":
    main()
