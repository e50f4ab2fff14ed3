"""Measures the trajectories of the embedded pipelines, which the profiles of their families ship.

    python -m eval.studies.emoji.trajectory --write     # both, into tofu_diffusers/profiles

On prompts that no table of this repository reports on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from eval.report.tables_rows import FAMILY
from pipelines.emoji import GUIDANCE, load_pipeline, weights_hash
from tofu_diffusers import Trajectory, measure_trajectory

PROMPTS = ("a purple guitar", "a dog face", "a hot dog", "an umbrella")
STEPS, SEED = 50, 1000


def measured(model: str, side: int) -> Trajectory:
    """The trajectory of an embedded pipeline."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return measure_trajectory(pipe, PROMPTS, seed=SEED, height=side, width=side, **call)


def mean_of(trajectories: Sequence[Trajectory]) -> Trajectory:
    """The mean of several denoisers, for those of which nothing is known."""
    levels = np.linspace(
        max(each.levels[0] for each in trajectories),
        min(each.levels[-1] for each in trajectories),
        STEPS,
    ).tolist()
    products = [each.at(levels) for each in trajectories]
    return Trajectory.from_products(levels, sum(each / np.trace(each) for each in products))


def profile_text(data: dict[str, Any]) -> str:
    """A profile as JSON, with a point of its trajectory in a line."""
    path = data["speedup"]["options"]["trajectory"]
    rows = {f"row {i}": row for i, row in enumerate([path["levels"], *path["points"]])}
    names = iter(rows)
    path = {"levels": next(names), "points": [*names]}
    speedup = {**data["speedup"], "options": {**data["speedup"]["options"], "trajectory": path}}
    text = json.dumps({**data, "speedup": speedup}, indent=2)
    for name, row in rows.items():
        text = text.replace(f'"{name}"', json.dumps(row))
    return text + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Print, or write into the profiles, what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--write", action="store_true", help="into tofu_diffusers/profiles")
    args = parser.parse_args(argv)
    models = {family: model for model, family in FAMILY.items()}
    found = {family: measured(model, args.side) for family, model in models.items()}
    found["any"] = mean_of(list(found.values()))
    for family, trajectory in found.items():
        path = Path(str(files("tofu_diffusers.profiles") / f"{family}.json"))
        data = json.loads(path.read_text(encoding="utf-8"))
        options = {"warmup_steps": 1, "rule": "trajectory", "trajectory": asdict(trajectory)}
        data["speedup"]["options"] = options
        if family in models:
            data["weights"] = weights_hash(models[family])
        if args.write:
            path.write_text(profile_text(data), encoding="utf-8")
        levels = trajectory.levels
        print(f"{family}: {len(levels)} levels from {levels[0]:.3f} to {levels[-1]:.3f}")


if __name__ == "__main__":
    main()
