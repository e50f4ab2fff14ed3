"""Finds out, on the user's own model and prompts, which settings drift least at a speed-up."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import denoisers_of
from ..hooks.patch import compiled_alone
from ..steps.pipelines import components
from ..tuned import Tuned
from .calibrate import as_prompts
from .ledger import Ledger
from .references import Example, Workload
from .search import Search, processes
from .trajectory import scheduler_without_tofu

MOST_PROMPTS = 16
OWN = ("prompt", "generator", "output_type", "return_dict")
"""Arguments of the pipeline that a search gives itself."""

ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


def tune(
    pipe: Any,
    prompts: str | Sequence[Any],
    *,
    speedup: float | Sequence[float] = 2.0,
    held_out: Sequence[Any] | None = None,
    minutes: float = 10.0,
    behind_db: float = 1.0,
    generate: Callable[..., Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Tuned:
    """Find the settings that drift least at each speed-up, on the pipeline as it is called.

    The prompts are generated once without tofu; from that follows the pipeline's trajectory
    (`measure_trajectory`). Then settings are tried: which steps run, how the others are forecast, with and
    without corrector, and tokens reduced inside the steps that run. To the best choices of steps, forecasts
    are fitted (`FittedForecasts`; as solvers are in S4S, arXiv 2502.17423). A setting is judged by its final
    latents, the mean over the prompts in dB. The best, the default and as many steps fewer are then compared
    on prompts kept apart. Where the default is ahead there by more than it was behind in the search, it is
    taken.

    Started by `torchrun` or `accelerate launch` with torch.distributed set up, each process takes its share
    of the prompts' references and of the settings.

    Example:
        >>> tuned = tune(pipe, ["a cat", "a red apple", "a blue car"], speedup=(2.0, 3.0), guidance_scale=4.0)
        >>> print(tuned)
        >>> tuned.save("my-model")
        >>> apply_tofu(pipe, "my-model", speedup=2.0)

    Args:
        pipe: A pipeline without tofu, whose scheduler is told its steps. It is left as it was.
        prompts: To search on, 1 to 16 (four are plenty), each what the pipeline takes as its first argument.
        speedup: How many times fewer FLOPs of the denoiser, one or several, above 1. Higher drifts more.
            Of several, those that so few steps cannot reach are left out with a warning.
        held_out: Prompts to compare on in the end. None: every third of `prompts`, which is then not searched
            on; of fewer than three, the same with other seeds.
        minutes: From the call on, after which no further setting is begun. The default, the own trajectory
            and one fit for each speed-up are tried in any case, and the comparison takes its own time.
        behind_db: A setting is broken off once it is so many dB behind the best on the prompts that it has
            generated. More compares more settings and takes longer.
        generate: Called instead of the pipeline, with the same arguments: a prompt, `generator=`,
            `output_type=`, `return_dict=`, the options and `num_inference_steps=`, which it passes on.
            Pictures and control inputs it adds itself. It returns what the pipeline does, or its pictures.
        folder: Keeps what was measured; stopped anywhere, the same call goes on. None: nothing is kept.
        seed: Of the pictures; the n-th prompt has seed + n.
        progress: Whether a bar is shown.
        options: Further arguments of the pipeline, as it will be called: guidance, steps, a smaller size.

    Raises:
        TypeError: if `pipe` is no pipeline with a scheduler.
        ValueError: if the pipeline has tofu or a compiled denoiser, there are no prompts or too many, a
            number is out of range, an option is one that a search sets, the folder holds another search, or
            no setting reaches any speed-up.
    """
    prompts = as_prompts(prompts)
    speedups = _speedups(speedup)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts to search on; give 1 to {MOST_PROMPTS}")
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes}; give more than 0")
    if not behind_db >= 0:
        raise ValueError(f"behind_db is {behind_db}; give 0 or more")
    if wrong := [name for name in options if name in OWN]:
        raise ValueError(
            f"{', '.join(wrong)} cannot be given: a search sets it for every picture; generate=... can call "
            "the pipeline with more"
        )
    scheduler = scheduler_without_tofu(pipe)
    searched, kept_apart = _split(prompts, held_out, seed)
    found = denoisers_of(pipe)
    models = [model for model, _ in found]
    parts = [*components(pipe).values()]
    if any(compiled_alone(each) or all(part is not each for part in parts) for each in models):
        raise ValueError(
            "the denoiser is compiled, and would be compiled again for every setting that is tried; tune "
            "first, then compile"
        )
    workload = Workload(pipe if generate is None else generate, scheduler, models, options)
    about = {
        "pipeline": type(pipe).__name__,
        "denoisers": [type(model).__name__ for model, _ in found],
        "scheduler": [
            type(scheduler).__name__,
            {name: str(value) for name, value in scheduler.config.items() if name[0] != "_"},
        ],
        "generate": "the pipeline" if generate is None else described(generate),
        "options": {name: described(value) for name, value in options.items()},
        "prompts searched on": [[described(each.prompt), each.seed] for each in searched],
        "prompts kept apart": [[described(each.prompt), each.seed] for each in kept_apart],
    }
    if folder is None and processes() > 1:
        raise ValueError(
            f"{processes()} processes need a folder that all of them see; give folder=..."
        )
    with closing(Ledger(folder, about)) as ledger:
        search = Search(pipe, workload, ledger, searched, kept_apart, behind_db, progress)
        return search.run(speedups, minutes)


def described(value: Any) -> str:
    """What tells a value from others, in this process and the next."""
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous()
        data = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()[:16]}"
    if hasattr(value, "tobytes"):  # pictures and arrays
        return f"{type(value).__name__} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if isinstance(value, dict):
        return str({name: described(each) for name, each in value.items()})
    if isinstance(value, (list, tuple)):
        return str([described(each) for each in value])
    return ADDRESS.sub("", str(value))


def _speedups(given: float | Sequence[float]) -> list[float]:
    several: list[Any] = [*given] if isinstance(given, Sequence) else [given]
    for each in several:
        number = isinstance(each, (int, float)) and not isinstance(each, bool)
        if not number or not 1 < each < math.inf:
            raise ValueError(
                f"speedup {each!r} is no number above 1; give one or a list of them: 2.0 asks for half of "
                "the FLOPs"
            )
    if not several:
        raise ValueError("no speedup to tune for; give one above 1, such as 2.0")
    return sorted({float(each) for each in several})


def _split(
    prompts: Sequence[Any], held_out: Sequence[Any] | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """The pictures to search on, and those kept apart."""
    examples = [Example(prompt, seed + n) for n, prompt in enumerate(prompts)]
    later = seed + len(prompts)
    if held_out is not None:
        others = as_prompts(held_out)
        if not others:
            raise ValueError("held_out is empty; give at least one prompt, or leave it out")
        return examples, [Example(prompt, later + n) for n, prompt in enumerate(others)]
    if len(examples) < 3:
        return examples, [Example(prompt, later + n) for n, prompt in enumerate(prompts)]
    return (
        [each for n, each in enumerate(examples) if n % 3 != 2],
        [each for n, each in enumerate(examples) if n % 3 == 2],
    )
