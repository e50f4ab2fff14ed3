"""Is more to be had from forecasts than `tune` fits? Weights by token, and fitted in one batch.

    python -m eval.studies.emoji.forecasts --model unet --out eval/results/forecasts.jsonl

At the default's own steps, on the prompts that `eval.studies.emoji.tuned` tunes on: fitted to one prompt
after the other as `tune` does, to all of them in one batch, and with weights of its own for each third of
the tokens. These are told apart by the curvature of their predictions, as in WorldCache (arXiv 2603.06331),
or at random, for comparison. WorldCache itself repeats, extrapolates or damps, each a choice of such weights.
Goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.bench.pipeline import one_batch
from eval.generate import run
from eval.generate.prompts import first, load_prompts
from eval.jsonl import append, read
from eval.studies.emoji.trajectory import SEED
from eval.studies.emoji.tuned import BATCH, FIRST
from eval.studies.study import Study, Trial, tofu
from pipelines.emoji import GUIDANCE, MODELS
from tofu_diffusers import Handle, apply_tofu
from tofu_diffusers.steps.fitted import POINTS, past_of
from tofu_diffusers.steps.outputs import tensors_in
from tofu_diffusers.steps.sampler import Sampling
from tofu_diffusers.tuning.fit import Fit, handing_on, missing, tried_step
from tofu_diffusers.tuning.search import plan_of
from tofu_diffusers.tuning.trajectory import stepping_by, told_of_steps

SEARCHED, THIRDS = 4, 3
DEFAULT = "default"


def curvature(predictions: Sequence[Tensor], steps: Sequence[int]) -> Tensor:
    """How much a token's predictions bend: |a| / |v|^2.  3 of [B, C, H, W] -> [B, H, W]."""
    (new, mid, old), (last, before, first_) = predictions, steps
    speed = (new - mid) / (last - before)
    bend = (speed - (mid - old) / (before - first_)) * 2 / (last - first_)
    return bend.norm(dim=1) / speed.square().sum(dim=1).clamp(min=1e-12)


def at_random(predictions: Sequence[Tensor], steps: Sequence[int]) -> Tensor:
    """The same number for a token at every step.  3 of [B, C, H, W] -> [B, H, W]."""
    draw = torch.Generator().manual_seed(0)
    return torch.rand(predictions[0][:, 0].shape, generator=draw)


Order = Callable[[Sequence[Tensor], Sequence[int]], Tensor]
SETTINGS: dict[str, tuple[Order | None, bool]] = {
    "fitted": (None, False),
    "fitted-batch": (None, True),
    "fitted-curvature": (curvature, True),
    "fitted-random": (at_random, True),
}
"""By what tokens are told apart (None: not at all), and whether all prompts are in one batch."""


@dataclass
class Forecasts:
    """Forecasts of a choice of steps, with weights of each group of tokens.

    Args:
        plan: "#" for a computed step, "." for a skipped one.
        order: Ranks tokens: a group is a third of them; None: all are in one.
    """

    plan: str
    order: Order | None
    fits: list[Fit] = field(init=False)

    def __post_init__(self) -> None:
        groups = 1 if self.order is None else THIRDS
        self.fits = [Fit(self.computed, len(self.plan)) for _ in range(groups)]

    @property
    def computed(self) -> list[int]:
        """The computed steps."""
        return [step for step, sign in enumerate(self.plan) if sign == "#"]

    @contextmanager
    def stepping(self, scheduler: Any, wanted: Sequence[Tensor] = ()) -> Iterator[None]:
        """Give a scheduler what its denoiser's predictions are made into.

        Args:
            scheduler: Must be given the last computed prediction at skipped steps.
            wanted: The unreduced latents behind every step, to fit to; empty: fitted already.
        """
        before = scheduler.step
        past: list[Tensor] = []
        index = 0

        def step(
            prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            nonlocal index
            if index in self.computed:
                past.insert(0, prediction)
            steps = past_of(self.computed, index)
            known = past[: len(steps)]
            basis = torch.stack([known[0], *(each - known[0] for each in known[1:])]).double()
            masks = self._groups(known, steps)
            if wanted:

                def after(given: Tensor) -> Tensor:
                    return tried_step(scheduler, given, timestep, sample, args, kwargs)

                lacking = missing(after, known[0], wanted[index])
                for fit, mask in zip(self.fits, masks, strict=False):
                    for row in range(len(prediction)):
                        here = slice(row, row + 1)
                        fit.add(index, (basis * mask)[:, here], (lacking * mask)[here])
            total = known[0].double()
            for fit, mask in zip(self.fits, masks, strict=False):
                total = total + mask * torch.einsum("k,k...->...", fit.weights(index), basis)
            index += 1
            return before(total.to(prediction.dtype), timestep, sample, *args, **kwargs)

        with stepping_by(scheduler, step):
            yield

    def fit(self, pipe: Any, prompts: Sequence[str], seed: int, call: dict[str, Any]) -> None:
        """Fit to the unreduced generations of a batch, of whose n-th the seed is seed + n."""
        wanted: list[Tensor] = []

        def note(prediction: Tensor, timestep: Any, after: Any) -> None:
            wanted.append(tensors_in(after)[0].clone())

        with told_of_steps(pipe.scheduler, note):
            one_batch(pipe, prompts, seed, call)
        with self._computing(pipe), self.stepping(pipe.scheduler, wanted):
            one_batch(pipe, prompts, seed, call)

    def pictures(self, study: Study, steps: int) -> Tensor:
        """Of all prompts of a study, uint8 [n, 3, H, W]."""
        pipe, call = study.loaded.pipe, {**study.call, "num_inference_steps": steps}
        parts = []
        with self._computing(pipe):
            for start in range(0, len(study.prompts), study.batch_size):
                batch = study.prompts[start : start + study.batch_size]
                with self.stepping(pipe.scheduler):
                    made = one_batch(pipe, batch, study.seed + start, {**call, "output_type": "pt"})
                parts.append(made.images.mul(255).round().to(torch.uint8))
        return torch.cat(parts)

    def _computing(self, pipe: Any) -> Handle:
        """Its steps, at which alone the denoiser runs."""
        sampling = Sampling.of(pipe.scheduler)
        return apply_tofu(pipe, handing_on(self.computed, len(self.plan), sampling))

    def _groups(self, known: Sequence[Tensor], steps: Sequence[int]) -> list[Tensor]:
        """Masks [B, 1, H, W]; before there are three predictions, all tokens are in one group."""
        if self.order is None or len(known) < POINTS:
            return [torch.ones_like(known[0][:, :1])]
        score = self.order(known, steps)
        places = score.flatten(1).argsort(dim=1).argsort(dim=1).view_as(score)
        group = places * THIRDS // score[0].numel()
        return [(group == each)[:, None].to(known[0].dtype) for each in range(THIRDS)]


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, and add the rows that are not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument(
        "--speedup", type=float, nargs="+", default=[1.5, 2, 3], help="(%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=25, help="(%(default)s)")
    parser.add_argument("--side", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("-n", type=int, default=32, help="prompts to report on (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to add to")
    args = parser.parse_args(argv)
    loaded = run.load(args.model)
    prompts = load_prompts("emoji")
    searched = prompts[FIRST : FIRST + SEARCHED]
    call = {"guidance_scale": GUIDANCE, "height": args.side, "width": args.side}
    study = Study(loaded, first(prompts, args.n, least=2), 0, BATCH, call)
    whole = {**call, "num_inference_steps": args.steps, "output_type": "latent"}
    done = {row["id"] for row in read(args.out)}
    for speedup in tqdm(args.speedup, desc=args.model):
        named = {
            name: Trial(tofu(f"{name}-{speedup:g}", speedup=speedup), args.steps)
            for name in (DEFAULT, *SETTINGS)
        }
        todo = {name: each for name, each in named.items() if study.about(each)["id"] not in done}
        if DEFAULT in todo:
            append(args.out, study.row(todo.pop(DEFAULT)))
        for name, trial in todo.items():
            order, together = SETTINGS[name]
            with apply_tofu(loaded.pipe, speedup=speedup) as handle:
                one_batch(loaded.pipe, searched[:1], SEED, whole)
                forecasts = Forecasts(plan_of(handle), order)
            batches = [(searched, SEED)]
            if not together:
                batches = [([prompt], SEED + n) for n, prompt in enumerate(searched)]
            for batch, seed in batches:
                forecasts.fit(loaded.pipe, batch, seed, whole)
            images = forecasts.pictures(study, args.steps)
            saving = args.steps / len(forecasts.computed)
            append(args.out, study.entry(trial, study.reference(args.steps), images, saving))


if __name__ == "__main__":
    main()
