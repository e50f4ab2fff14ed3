"""Is there a better choice of steps than rule "trajectory" makes? Searches whole schedules.

    python -m eval.studies.emoji.search --model mmdit --speedup 3 --out eval/results/searched.jsonl

On an embedded pipeline, from the rule's own choice on. A candidate moves a computed step, or exchanges a
computed with a skipped one, and is kept by annealing. It is scored by the latents of the prompts that the
profile's trajectory was measured on; what was found is then compared with the rule on others.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.baselines.fewer_steps import add_scheduler_argument, scheduler_like
from eval.bench.pipeline import one_batch
from eval.generate.prompts import first, load_prompts
from eval.jsonl import append
from eval.metrics.paired import psnr_db
from eval.provenance import provenance
from eval.report.tables_rows import FAMILY
from eval.statistics import difference, of_mean
from eval.studies.emoji.trajectory import PROMPTS, SEED
from pipelines.emoji import GUIDANCE, MODELS, load_pipeline, weights_hash
from tofu_diffusers import SKIP_RULES, StepSkipping, Trajectory, apply_tofu, profile

TEMPERATURE_DB = 0.6
"""At which worse candidates are kept, falling to 0 in the course of the search."""


class Search:
    """Schedules of one pipeline at one size and number of steps.

    Args:
        pipe: The pipeline.
        trajectory: Of its denoiser, to which forecasts are fitted.
        steps: Of a generation.
        side: In pixels.
    """

    def __init__(self, pipe: Any, trajectory: Trajectory, steps: int, side: int) -> None:
        self.pipe, self.trajectory = pipe, trajectory
        self.call = {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
        self.call |= {"height": side, "width": side}
        self.steps = steps

    def made(
        self, computed: Iterable[int] | None, prompts: Sequence[str], seed: int, kind: str
    ) -> Tensor:
        """Latents or pictures, with these steps computed; None: with all.  [B, C, H, W]."""
        call = {**self.call, "output_type": kind}
        if computed is None:
            return torch.as_tensor(one_batch(self.pipe, prompts, seed, call).images)
        chosen = sorted(computed)
        # A rule of its own for every schedule: what a rule says is remembered by its name.
        name = " ".join(map(str, chosen))
        SKIP_RULES[name] = lambda steps: {*range(len(steps.levels))} - {*chosen}
        try:
            config = StepSkipping(
                speedup=self.steps / len(chosen),
                rule=name,
                warmup_steps=1,
                trajectory=self.trajectory,
            )
            with apply_tofu(self.pipe, config):
                return torch.as_tensor(one_batch(self.pipe, prompts, seed, call).images)
        finally:
            del SKIP_RULES[name]

    def planned(self, speedup: float) -> list[int]:
        """The steps that rule "trajectory" computes."""
        config = StepSkipping(
            speedup=speedup, rule="trajectory", warmup_steps=1, trajectory=self.trajectory
        )
        with apply_tofu(self.pipe, config) as handle:
            self.pipe(PROMPTS[0], **self.call, output_type="latent")
            plan = handle.summary().steps[0].plan
        return [i for i, mark in enumerate(plan) if mark == "#"]

    def best(self, start: Sequence[int], candidates: int, seed: int = 0) -> tuple[list[int], float]:
        """The best schedule found with as many computed steps, and how many dB it is ahead of the start."""
        draw, whole = random.Random(seed), self.made(None, PROMPTS, SEED, "latent")

        def score(computed: Sequence[int]) -> float:
            made = self.made(computed, PROMPTS, SEED, "latent")
            error = (made - whole).double().square().flatten(1).mean(1)
            return float(-10 * error.log10().mean())

        begun = last = most = score(start)
        here = found = [*start]
        for n in tqdm(range(candidates), desc="search", unit=" schedules"):
            tried = moved(here, self.steps, draw)
            reached = score(tried)
            heat = TEMPERATURE_DB * (1 - n / candidates)
            if reached > last or draw.random() < math.exp((reached - last) / heat):
                here, last = tried, reached
            if reached > most:
                found, most = tried, reached
        return found, most - begun


def moved(computed: Sequence[int], steps: int, draw: random.Random) -> list[int]:
    """Another schedule with as many steps: one is moved or exchanged, never the first one."""
    while True:
        gone = draw.choice([*computed[1:]])
        if draw.random() < 0.6:
            new = gone + draw.choice((-2, -1, 1, 2))
        else:
            new = draw.randrange(1, steps)
        if 0 < new < steps and new not in computed:
            return sorted({*computed, new} - {gone})


def main(argv: Sequence[str] | None = None) -> None:
    """Search at one speed-up, and add a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--speedup", type=float, required=True)
    parser.add_argument("--steps", type=int, default=25, help="(%(default)s)")
    parser.add_argument("--side", type=int, default=64, help="pixels (%(default)s)")
    add_scheduler_argument(parser)
    parser.add_argument("--candidates", type=int, default=150, help="(%(default)s)")
    parser.add_argument("-n", type=int, default=8, help="prompts to report on (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to add to")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.scheduler is not None:
        pipe.scheduler = scheduler_like(pipe.scheduler, args.scheduler)
    about = provenance()
    trajectory = Trajectory.of(profile(FAMILY[args.model])["speedup"]["options"]["trajectory"])
    search = Search(pipe, trajectory, args.steps, args.side)
    planned = search.planned(args.speedup)
    found, ahead = search.best(planned, args.candidates)
    prompts = first(load_prompts("emoji"), args.n, least=2)
    whole = search.made(None, prompts, 0, "pt").mul(255).round().byte()
    drift = {}
    for name, computed in (("planned", planned), ("found", found)):
        pictures = search.made(computed, prompts, 0, "pt").mul(255).round().byte()
        drift[name] = of_mean(psnr_db(pictures, whole))
    gain = difference(drift["found"], drift["planned"])
    size = f"{args.model}-{args.side}px-{args.steps}steps-n{args.n}"
    other = {} if args.scheduler is None else {"scheduler": args.scheduler}
    append(
        args.out,
        {
            "id": "/".join([size, *other.values(), f"searched-{args.speedup:g}"]),
            "pipeline": args.model,
            "weights": weights_hash(args.model),
            "n": args.n,
            "seed": 0,
            "steps": args.steps,
            "call": search.call,
            "speedup": args.speedup,
            **other,
            "candidates": args.candidates,
            "searched_on": len(PROMPTS),
            **about,
            **{name: mean.entry() for name, mean in drift.items()},
            "schedules": {"planned": planned, "found": found},
            "ahead_db": {
                "searched": ahead,
                "held_out": gain.value,
                "low": gain.low,
                "high": gain.high,
            },
        },
    )
    print(
        f"{gain.value:+.1f} dB ({gain.low:+.1f} to {gain.high:+.1f}), {ahead:+.1f} where searched"
    )


if __name__ == "__main__":
    main()
