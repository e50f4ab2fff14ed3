"""Every method on trained encoders, at the same FLOPs saved: what it costs, and how much time it saves.

    python -m eval.studies.encoders.study --subject vit --out eval/results/encoders.jsonl

Subjects: "vit" tells what an emoji shows, "noisy" under much noise, "keywords" finds its name by MiniLM,
"pairs" ranks pairs of sentences by MiniLM. Of each method the ratio is found that saves 20, 40 and 60 % of
the encoder's FLOPs, counted on the largest batch. Probes, linearity and schedules are measured on other
inputs than those reported on. Times are of one batch, by turns with the unreduced model, in processor time.
Goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.jsonl import append, read
from eval.provenance import provenance
from eval.statistics import spread
from eval.studies.encoders.subjects import SEED, SUBJECTS, Subject
from pipelines.emoji.scorer import EmojiScorer
from tofu_diffusers import (
    EncoderReduction,
    apply_tofu,
    calibrate_gradient,
    learn_schedule,
    measure_linearity,
)

SAVED = (0.2, 0.4, 0.6)
BATCH, TURNS = 32, 5
"""Of the times."""
MOST = 97
"""Hundredths of the tokens that leave: more than that, and an encoder has one left."""
Options = dict[str, Any]
UNCOUNTED: Options = {"proportional_attention": False}
"""Pruning as it was published: what is pruned counts nothing in attention."""


def importance(source: Any, merge: str, read_by: Options | None = None, **more: Any) -> Options:
    """Options that keep the tokens with the highest score."""
    options = {"source": source, **(read_by or {})}
    return {"method": "importance", "method_options": options, "merge": merge, **more}


def settings(subject: Subject, probe: Path) -> Iterator[tuple[str, Options, bool]]:
    """Name, options, and whether its schedule is learned, of everything that is compared."""
    linearity = measure_linearity(subject.model, subject.tuning)
    # As many blocks merge as by depth.
    threshold = sorted(linearity.means)[len(linearity.means) // 2]
    calibrate_gradient(subject.model, subject.tuning, probe)
    read_by = {"probe": str(probe)}
    both = {"attention": 1, "gradient": 1}
    linear = {"method": "tofu", "method_options": linearity.merges(threshold)}
    # What was published first, and what it was compared with; then the other merges.
    yield "tome-mean", {"method": "tome", "merge": "mean"}, False
    yield "tofu-depth", {"method": "tofu"}, False
    yield "pitome-mean", {"method": "pitome", "merge": "mean"}, False
    yield "attention-prune", importance("attention", "prune", **UNCOUNTED), False
    yield "random-prune", {"method": "random", "merge": "prune", **UNCOUNTED}, False
    yield "tofu-linearity", linear, False
    yield "policy-tome", {"method": "tome", "merge": "mean"}, True
    yield "gradient-prune", importance("gradient", "prune", read_by, **UNCOUNTED), False
    yield "hybrid-prune", importance(both, "prune", read_by, **UNCOUNTED), False
    yield "policy-attention", importance("attention", "prune", **UNCOUNTED), True
    # What it is that loses: the merge, or what tokens count afterwards.
    yield "tome-prune", {"method": "tome", "merge": "prune"}, False
    yield "tome-uncounted", {"method": "tome", "merge": "mean", **UNCOUNTED}, False
    yield "tofu-uncounted", {"method": "tofu", **UNCOUNTED}, False
    yield "attention-counted", importance("attention", "prune"), False
    yield "random-counted", {"method": "random", "merge": "prune"}, False
    yield "random-mean", {"method": "random", "merge": "mean"}, False
    yield "tome-mlerp", {"method": "tome", "merge": "mlerp"}, False
    yield "pitome-mlerp", {"method": "pitome", "merge": "mlerp"}, False
    yield "attention-mean", importance("attention", "mean"), False
    yield "gradient-mean", importance("gradient", "mean", read_by), False
    yield "hybrid-mean", importance(both, "mean", read_by), False


def saving(subject: Subject, config: EncoderReduction) -> float:
    """Share of the encoder's FLOPs that a configuration saves over all inputs, counted."""
    whole, run = 0.0, 0.0
    counted: dict[tuple[int, ...], tuple[int, int]] = {}
    with apply_tofu(subject.model, config) as handle:
        for given in subject.inputs:
            (named,) = given.values()
            shape = (1, *named.shape[1:])
            if shape not in counted:
                with torch.no_grad():
                    subject.model(**{name: each[:1] for name, each in given.items()})
                summary = handle.summary()
                counted[shape] = (summary.flops_unreduced, summary.flops_run)
            whole += len(named) * counted[shape][0]
            run += len(named) * counted[shape][1]
    return 1.0 - run / whole


def at_saving(
    subject: Subject, config: EncoderReduction, wanted: float, near: float = 0.5
) -> EncoderReduction:
    """The configuration with the least ratio, in hundredths, that saves as much on the largest batch.

    near: Where to look first.
    """
    alone = replace(subject, inputs=[max(subject.inputs, key=_rows)])

    def enough(hundredths: int) -> bool:
        return saving(alone, config.replace(ratio=hundredths / 100)) >= wanted

    # Bounds move away from there twice as far each time, and are then halved.
    high, step = round(near * 100), 1
    while high < MOST and not enough(high):
        high, step = min(MOST, high + step), step * 2
    low, step = high, 1
    while low > 0 and (low == high or enough(low)):
        low, high, step = max(0, low - step), low, step * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return config.replace(ratio=high / 100)


def timed(subject: Subject, config: EncoderReduction) -> dict[str, float]:
    """How many times less processor time one batch takes, by turns with a copy that is not reduced."""
    plain, largest = copy.deepcopy(subject.model), max(subject.inputs, key=_rows)
    given = {name: each[:BATCH] for name, each in largest.items()}
    with apply_tofu(subject.model, config), torch.no_grad():

        def seconds(model: nn.Module) -> float:
            # Of one thread, its own: whatever else the machine does is left out.
            start = time.process_time()
            model(**given)
            return time.process_time() - start

        seconds(plain), seconds(subject.model)
        return spread([seconds(plain) / seconds(subject.model) for _ in range(TURNS)])


def _rows(given: dict[str, Tensor]) -> int:
    return len(next(iter(given.values())))


def row_of(
    subject: Subject, name: str, saved: float, config: EncoderReduction | None, about: Options
) -> dict[str, Any]:
    """What a setting costs and saves; None is the unreduced model."""
    if config is None:
        scores, reached, speed = subject.score(subject.outputs()), 0.0, None
    else:
        reached = saving(subject, config)
        with apply_tofu(subject.model, config):
            scores = subject.score(subject.outputs())
        speed = timed(subject, config)
    options = {} if config is None else _options(config)
    return {
        "id": f"{subject.name}/{name}" + ("" if config is None else f"-{saved * 100:.0f}"),
        "subject": subject.name,
        "weights": subject.weights,
        "setting": {"name": name, "kind": "tofu" if config else "none", "options": options},
        "n": len(next(iter(scores.values()))),
        "seed": SEED,
        **about,
        "flops_ratio": round(1 / (1 - reached), 4),
        "flops_saved": round(reached, 4),
        "speed": speed,
        "metrics": subject.metrics(scores),
        "scores": {key: _rounded(each) for key, each in scores.items()},
    }


def _options(config: EncoderReduction) -> Options:
    options = {name: getattr(config, name) for name in config.field_names()}
    # A file that is gone when the rows are read.
    options["method_options"] = {
        name: value for name, value in options["method_options"].items() if name != "probe"
    }
    default = EncoderReduction()
    return {name: value for name, value in options.items() if value != getattr(default, name)}


def _rounded(scores: Tensor) -> list[Any]:
    if scores.ndim == 1:
        return [int(each) for each in scores.tolist()]
    return [[round(value, 4) for value in each] for each in scores.tolist()]


def rows(
    subject: Subject,
    done: set[str],
    probe: Path,
    saved: Sequence[float] = SAVED,
    rounds: int = 4,
) -> Iterator[dict[str, Any]]:
    """Those that are not done yet."""
    about = provenance()
    if f"{subject.name}/unreduced" not in done:
        yield row_of(subject, "unreduced", 0.0, None, about)
    near = dict.fromkeys(saved, 0.5)
    for name, options, learned in settings(subject, probe):
        base = EncoderReduction(schedule="share", **options)
        for each in saved:
            if f"{subject.name}/{name}-{each * 100:.0f}" in done:
                continue
            config = at_saving(subject, base, each, near[each])
            near[each] = config.ratio
            if learned:
                found = learn_schedule(subject.model, subject.tuning, config, rounds=rounds)
                assert isinstance(found.config, EncoderReduction)
                config = at_saving(subject, found.config, each, found.config.ratio)
            yield row_of(subject, name, each, config, about)


def main(argv: Sequence[str] | None = None) -> None:
    """Add the rows that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", choices=[*SUBJECTS], nargs="+", default=[*SUBJECTS])
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to add to")
    args = parser.parse_args(argv)
    done = {row["id"] for row in read(args.out)}
    scorer = EmojiScorer.load()
    for name in args.subject:
        subject = SUBJECTS[name](scorer)
        with tempfile.TemporaryDirectory() as folder:
            found = rows(subject, done, Path(folder) / "probes.safetensors")
            for row in tqdm(found, desc=name, unit=" rows"):
                append(args.out, row)


if __name__ == "__main__":
    main()
