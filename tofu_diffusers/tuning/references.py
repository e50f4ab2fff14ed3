"""Unreduced generations that settings are compared with, and how far a setting's are from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..steps.outputs import tensors_in
from .ledger import damaged, written_whole
from .trajectory import PredictionPath, followed, told_of_steps

OTHER_SEED = 2**40
EQUAL_DB, BROKEN_DB = 150.0, -50.0
"""Of latents that are the same to the bit, and of NaN: means stay numbers."""


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt, whatever a pipeline takes for one, and the seed of its picture."""

    prompt: Any
    seed: int


@dataclass(frozen=True)
class Workload:
    """A pipeline, as its user calls it.

    Args:
        generate: The pipeline, or what calls it; takes a prompt, `generator`, `output_type`, `return_dict`
            and the options.
        scheduler: That is told its steps.
        denoisers: Whose calls are counted.
        options: Of every call.
    """

    generate: Callable[..., Any]
    scheduler: Any
    denoisers: Sequence[nn.Module]
    options: Mapping[str, Any]

    def generated(self, example: Example, decoded: bool = False, **changes: Any) -> Generated:
        """Run a generation.

        Args:
            decoded: Whether pictures are made of the latents, where the pipeline makes any.
            changes: Other options for this call.

        Raises:
            ValueError: if the scheduler was told no step.
        """
        generator = torch.Generator().manual_seed(example.seed)
        last: list[Tensor] = []
        states: list[Tensor] = []
        calls = 0

        def note(prediction: Tensor, timestep: Any, after: Any) -> None:
            last[:] = tensors_in(after)[:1]
            states.append(torch.cat([generator.get_state(), torch.get_rng_state()]))

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        hooks = [each.register_forward_pre_hook(count) for each in self.denoisers]
        try:
            with told_of_steps(self.scheduler, note):
                pictures = self.run(example, decoded, generator, **changes)
        finally:
            for hook in hooks:
                hook.remove()
        if not last:
            raise ValueError(
                f"{type(self.scheduler).__name__} was told no step of this generation; give a pipeline that "
                "denoises with its own scheduler, and generate=... a function that calls it"
            )
        draws = not torch.equal(states[0], states[-1])
        return Generated(_kept(last[0]), pictures, len(states), calls, draws)

    def run(
        self,
        example: Example,
        decoded: bool = False,
        generator: torch.Generator | None = None,
        **changes: Any,
    ) -> Tensor | None:
        """The pictures of a generation if they are asked for, and it makes any."""
        generator = generator or torch.Generator().manual_seed(example.seed)
        given: dict[str, Any] = {"output_type": "pt" if decoded else "latent", "return_dict": False}
        given |= {**self.options, **changes}
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        # What is not drawn from the generator is drawn from the global one, which is the user's; with another
        # seed, or the noise of the first step would be the latents that it begins with.
        with torch.random.fork_rng(devices):
            torch.manual_seed(example.seed + OTHER_SEED)
            made = self.generate(example.prompt, generator=generator, **given)
        if not decoded or made is None:
            return None
        # What is called instead of the pipeline may return the pictures alone.
        found = tensors_in(made if isinstance(made, Tensor) else made[0])
        # Sound has fewer axes.
        return _kept(found[0]) if len(found) == 1 and found[0].dim() > 3 else None

    def reference(self, example: Example, decoded: bool, file: Path) -> Reference:
        """Run the unreduced generation, and keep it in a file."""
        behind: list[Tensor] = []

        def note(prediction: Tensor, timestep: Any, after: Any) -> None:
            behind.append(_kept(tensors_in(after)[0]))

        with told_of_steps(self.scheduler, note):
            made, path = followed(self.scheduler, partial(self.generated, example, decoded))
        tensors = {f"behind.{step}": each for step, each in enumerate(behind)}
        tensors |= {"latents": made.latents, "products": path.products}
        tensors["levels"] = torch.tensor(path.levels, dtype=torch.float64)
        tensors["facts"] = torch.tensor([made.steps, made.calls, int(made.draws_noise)])
        if made.pictures is not None:
            tensors["pictures"] = made.pictures
        with written_whole(file) as part:
            # One tensor in two places would be refused.
            save_file({name: each.clone().contiguous() for name, each in tensors.items()}, part)
        return Reference.load(file)


@dataclass(frozen=True)
class Generated:
    """What is kept of a generation, on the CPU in float32.

    Attributes:
        latents: That its last step ended with.
        pictures: Decoded from them, values in [0, 1]; None: not asked for, or none made.
        steps: That the scheduler was told.
        calls: Of the denoisers.
        draws_noise: Whether the steps drew random numbers.
    """

    latents: Tensor
    pictures: Tensor | None
    steps: int
    calls: int
    draws_noise: bool


@dataclass(frozen=True)
class Reference:
    """An unreduced generation.

    Attributes:
        made: What it ended with.
        path: Of its predictions.
        behind: The latents behind every step, one at a time in memory.
        nbytes: Of its file.
    """

    made: Generated
    path: PredictionPath
    behind: LatentsOfSteps
    nbytes: int

    @classmethod
    def load(cls, file: Path) -> Reference:
        """Read what `Workload.reference` wrote; raises ValueError if the file is damaged."""
        try:
            with safe_open(file, framework="pt") as stored:
                names = [*stored.keys()]
                found = {name: stored.get_tensor(name) for name in names if "." not in name}
        except SafetensorError as error:
            raise ValueError(damaged(file, error)) from error
        steps, calls, draws = found["facts"].tolist()
        return cls(
            Generated(found["latents"], found.get("pictures"), steps, calls, bool(draws)),
            PredictionPath(tuple(found["levels"].tolist()), found["products"]),
            LatentsOfSteps(file, steps),
            file.stat().st_size,
        )


@dataclass(frozen=True)
class LatentsOfSteps:
    """The latents behind every step of a generation, in its file."""

    file: Path
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        with safe_open(self.file, framework="pt") as stored:
            latents: Tensor = stored.get_tensor(f"behind.{step}")
            return latents


def _kept(latents: Tensor) -> Tensor:
    return latents.detach().float().cpu()


def latents_db(made: Tensor, wanted: Tensor) -> float:
    """How far latents stand out of their error: 10 log10 of their mean square over the error's."""
    if made.shape != wanted.shape:
        return BROKEN_DB
    error = (made.double() - wanted.double()).square().mean()
    return _db(float(wanted.double().square().mean()), float(error))


def psnr_db(made: Tensor, wanted: Tensor) -> float:
    """PSNR of pictures with values in [0, 1]."""
    return _db(1.0, float((made.double() - wanted.double()).square().mean()))


def _db(power: float, error: float) -> float:
    if not error >= 0 or not power > 0:  # NaN
        return BROKEN_DB
    if error == 0:
        return EQUAL_DB
    ratio = torch.tensor(power / error, dtype=torch.float64)
    return float((10 * ratio.log10()).clamp(BROKEN_DB, EQUAL_DB))
