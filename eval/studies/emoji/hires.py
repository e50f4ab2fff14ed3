"""Does merging pay where tokens are many and alike? Half of the tokens in a pass over upscaled pictures.

    python -m eval.studies.emoji.hires --model unet --out eval/results/hires_unet.jsonl

The first pass makes small pictures from the prompts, which are upscaled; the second redraws them with
image-to-image. The same again from pictures that were made at full size: as many tokens, less alike. Goes on
where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image

from eval.bench.pipeline import one_batch
from eval.generate import run
from eval.generate.prompts import first, load_prompts
from eval.generate.run import Loaded
from eval.generate.settings import Setting
from eval.studies.stages import MERGING, Trial, around, tofu
from eval.studies.study import Study, measured
from pipelines.emoji import GUIDANCE, MODELS

STRENGTH, STEPS, SIDE = 0.5, 24, 128
"""Half of these steps run, of as many fewer, too: all counts are even."""
FIRST_STEPS = 25
SECOND: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (StableDiffusionImg2ImgPipeline, {}),
    # For the T5 that is not there it would append zeros, which this transformer never saw.
    "mmdit": (
        StableDiffusion3Img2ImgPipeline,
        {"height": SIDE, "width": SIDE, "max_sequence_length": 0},
    ),
}
"""The pipelines of the second pass, and what their calls need besides."""


class Redrawn(Study):
    """A study of a second pass, which begins with the pictures of a first."""

    def __init__(self, loaded: Loaded, prompts: list[str], side: int, batch_size: int) -> None:
        self.side, pictures = side, []
        small = {"num_inference_steps": FIRST_STEPS, "guidance_scale": GUIDANCE}
        small |= {"height": side, "width": side}
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            pictures += one_batch(loaded.pipe, batch, start, small).images
        self.first = [each.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in pictures]
        made, self.besides = SECOND[loaded.name]
        checker = {"requires_safety_checker": False} if loaded.name == "unet" else {}
        second = made(**loaded.pipe.components, **checker)
        second.set_progress_bar_config(disable=True)
        call = {"guidance_scale": GUIDANCE, "strength": STRENGTH}
        super().__init__(replace(loaded, pipe=second), prompts, 0, batch_size, call)

    def given(self, start: int, count: int | None = None) -> dict[str, Any]:
        """The pictures of the first pass, which a call begins with."""
        return {"image": self.first[start : start + (count or self.batch_size)], **self.besides}

    def about(self, trial: Trial) -> dict[str, Any]:
        """With the sides of both passes."""
        own = super().about(trial)
        stage, _, name = own["id"].partition("/")
        return {**own, "id": f"{stage}-from{self.side}px/{name}", "sides": [self.side, SIDE]}


def trials(model: str) -> Iterator[Trial]:
    """Fewer steps, half of the tokens by each method, in blocks and around attention."""
    for count in range(STEPS - 2, STEPS // 3 - 1, -2):
        yield Trial(Setting(f"steps-{count}", "fewer_steps", {"steps": count}), STEPS)
    yield Trial(tofu("ratio-0.5", ratio=0.5), STEPS)
    for name, options in MERGING.items():
        yield Trial(tofu(f"{name}-0.5", **options, ratio=0.5), STEPS)
        yield around(name, STEPS)
    if model == "unet":
        yield Trial(Setting("tomesd-0.5", "tomesd", {"ratio": 0.5}), STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    """Add the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("-n", type=int, default=16, help="prompts (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(%(default)s)")
    parser.add_argument(
        "--side", type=int, nargs="+", default=[64, SIDE], help="of the first pass (%(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to add to")
    args = parser.parse_args(argv)
    prompts = first(load_prompts("emoji"), args.n, least=2)
    for side in args.side:
        study = Redrawn(run.load(args.model), prompts, side, args.batch_size)
        measured(study, [*trials(args.model)], args.out, f"from {side} px", run.processes())


if __name__ == "__main__":
    main()
