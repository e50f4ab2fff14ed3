"""What must be measured on a model before a method can use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import only_denoiser
from ..families import Family, find_family
from ..families.base import Kwargs, gather_rows
from ..hooks.patch import bind, compiled_alone, parameters_of
from ..runtime.runtime import first_of
from ..steps.pipelines import components
from ..tokens.sources.gradient import log_norm, sensitivity
from .encoder_calls import MeasuredEncoder
from .probes import Fit, rank_correlation, save_probes, signed_sum

Gradients = Iterator[tuple[str, Tensor, Tensor]]
"""By block its name, its tokens [B, N, C] and their gradient."""


def calibrate_gradient(
    pipe: Any,
    prompts: str | Sequence[Any],
    path: str | Path,
    *,
    calls: int = 6,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """Fit the probes that importance source "gradient" reads, and write them to a file.

    Every prompt is generated once, without tofu. At some calls of the denoiser the gradient of the
    prediction with respect to each block's input is taken, and a linear probe is fitted to its norm at each
    token. Those of the last quarter of the prompts (one at least) are left out, and tell how good the probes
    are. Takes the memory of a backward pass, and 8 (C + 1)^2 bytes for a block of C channels.

    An encoder is called once with every input, and its first output is the prediction.

    Example:
        >>> calibrate_gradient(pipe, ["a cat", "a red apple"], "probe.safetensors")
        >>> how = {"source": "gradient", "probe": "probe.safetensors"}
        >>> apply_tofu(pipe, method="importance", method_options=how)

    Args:
        pipe: A pipeline with one denoiser of a known family, without tofu; or a model that is or holds one
            encoder.
        prompts: Two or more, each what the pipeline takes as its first argument; of an encoder the model's
            arguments by name, without padding.
        path: Of the safetensors file.
        calls: The most calls of the denoiser that are looked at in each generation, evenly spread; an encoder
            has one.
        seed: Of the images; the n-th prompt has seed + n.
        options: Further arguments of the pipeline, or of the model.

    Returns:
        By block, the rank correlation of its probe with the gradient norms of the images left out, averaged
        over images.

    Raises:
        TypeError: if `pipe` is no pipeline and holds no encoder, or an encoder's input is not by name.
        ValueError: if there are fewer than two prompts, the pipeline has tofu or several denoisers, or its
            denoiser is compiled or was not called; if an encoder's input has padding.
    """
    prompts = as_prompts(prompts)
    if len(prompts) < 2:
        raise ValueError(
            f"{len(prompts)} prompts are too few: one at least is left out to judge the probes by; give two "
            "or more"
        )
    if calls < 1:
        raise ValueError(f"calls is {calls}; give 1 or more")
    encoder = MeasuredEncoder.of(pipe)
    found = (
        partial(_of_pipeline, pipe, watchable(pipe), calls)
        if encoder is None
        else partial(_of_encoder, encoder)
    )
    held_out = max(1, len(prompts) // 4)
    fits: dict[str, Fit] = {}
    agreement: dict[str, list[float]] = {}
    probes: dict[str, Tensor] = {}
    for n, prompt in enumerate(prompts):
        if n == len(prompts) - held_out:
            probes = {name: fit.probe() for name, fit in fits.items()}
        for name, x, gradient in found(prompt, seed + n, options):
            if name in probes:
                guess = sensitivity(x, probes[name].to(x.device))
                value = rank_correlation(guess, log_norm(gradient))
                agreement.setdefault(name, []).append(value)
            else:
                fits.setdefault(name, Fit(x.shape[2])).add(x, gradient)
    save_probes(path, probes)
    return {name: sum(values) / len(values) for name, values in agreement.items()}


def _of_pipeline(
    pipe: Any, model: nn.Module, calls: int, prompt: Any, seed: int, options: Kwargs
) -> Gradients:
    """Those of one generation."""
    family = find_family(model, None)
    for named in calls_of(pipe, model, prompt, seed, calls, options):
        yield from gradients(model, family, named, seed)


def _of_encoder(encoder: MeasuredEncoder, given: Any, seed: int, options: Kwargs) -> Gradients:
    """Those of one call."""
    found = gradients_at(
        encoder.blocks,
        itemgetter("hidden_states"),
        lambda named, x: {**named, "hidden_states": x},
        partial(encoder, given, options),
        seed,
    )
    for name, x, gradient in found:
        yield name, x[:, encoder.family.prefix :], gradient[:, encoder.family.prefix :]


def watchable(pipe: Any) -> nn.Module:
    """The only denoiser of a pipeline, whose calls and blocks can be watched.

    Raises:
        TypeError: if `pipe` is no pipeline.
        ValueError: if it has tofu or several denoisers, or its denoiser is compiled.
    """
    model = only_denoiser(pipe, None)
    if compiled_alone(model) or all(part is not model for part in components(pipe).values()):
        raise ValueError(
            "the denoiser is compiled, and compiled calls cannot be watched; calibrate first, then compile"
        )
    return model


def calls_of(
    pipe: Any, model: nn.Module, prompt: Any, seed: int, count: int, options: Kwargs
) -> list[Kwargs]:
    """The arguments of so many calls of the denoiser in one generation, evenly spread.

    Raises:
        ValueError: if it was not called.
    """
    with recorded(model) as seen:
        latents(pipe, prompt, seed, options)
    if not seen:
        raise ValueError(f"{type(pipe).__name__} never called its {type(model).__name__}")
    spread = torch.linspace(0, len(seen) - 1, min(count, len(seen))).round().long()
    return [seen[call] for call in spread.tolist()]


def as_prompts(given: str | Sequence[Any]) -> Sequence[Any]:
    """One string is one prompt; as a sequence it would be its letters.

    Raises:
        TypeError: if it is neither that nor a list of them.
    """
    # What shows its progress (tqdm) has a length, too; a mapping would be its keys, a tensor its rows.
    if not isinstance(given, Sized) or isinstance(given, Mapping | Tensor):
        raise TypeError(
            f"prompts are a list, or one text, not {type(given).__name__}; give [prompt]"
        )
    return [given] if isinstance(given, str) else given


def latents(pipe: Any, prompt: Any, seed: int, options: Kwargs) -> Any:
    """What one generation ends with, before it is decoded where the pipeline can leave that out."""
    given = {"output_type": "latent", "return_dict": False} | options
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **given)[0]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Kwargs]]:
    """The arguments of every call of a denoiser, by name."""
    seen: list[Kwargs] = []
    names = parameters_of(model)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        seen.append(bind(names, args, kwargs))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def gradients(model: nn.Module, family: Family, named: Kwargs, seed: int) -> Gradients:
    """Name, image tokens and their gradient [B, N, C] of every block, for one call of the denoiser."""
    stacks = family.block_stacks(model)

    def hidden(given: Kwargs) -> Tensor:
        raw: Tensor | None = given.get("hidden_states")
        # A map stays one.
        return raw if raw is not None and raw.ndim == 4 else family.hidden(given)

    def with_hidden(given: Kwargs, x: Tensor) -> Kwargs:
        return {**given, "hidden_states": x} if x.ndim == 4 else family.with_hidden(given, x)

    def predict() -> Tensor:
        out = first_of(model(**{**named, "return_dict": False}))
        # Some return a list of one a row.
        return torch.stack(out) if isinstance(out, list) else out

    blocks = [block for stack in stacks for block in stack.blocks]
    found = gradients_at(blocks, hidden, with_hidden, predict, seed)
    grids, starts = family.grids(model, named), family.image_starts(named)
    resolutions = {name: stack.resolution for stack in stacks for name, _ in stack.blocks}
    for name, x, gradient in found:
        resolution = resolutions[name]
        grid = grids[resolution]
        places = torch.arange(grid.tokens, device=gradient.device).expand(len(gradient), -1)
        places = places + starts.get(resolution, places.new_tensor([grid.text_before]))[:, None]
        rows, change = (
            gather_rows(family.hidden({"hidden_states": each}) if each.ndim == 4 else each, places)
            for each in (x, gradient)
        )
        yield name, rows, change


def gradients_at(
    blocks: Iterable[tuple[str, nn.Module]],
    hidden: Callable[[Kwargs], Tensor],
    with_hidden: Callable[[Kwargs, Tensor], Kwargs],
    predict: Callable[[], Tensor],
    seed: int,
) -> list[tuple[str, Tensor, Tensor]]:
    """By block its name, what comes to it, and the gradient with respect to that of a random sum.

    Args:
        hidden: What comes to a block, from its arguments by name.
        with_hidden: The arguments with it replaced.
        predict: Calls the model, and gives what is summed.
        seed: Of the signs in the sum.
    """
    inputs: dict[str, Tensor] = {}

    def note(
        name: str, block: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[()], Kwargs]:
        given = bind(parameters_of(block), args, kwargs)
        x = hidden(given)
        # Numbers of words have no gradient, and weights may want none.
        inputs[name] = x = x if x.requires_grad else x.detach().requires_grad_()
        return (), with_hidden(given, x)

    hooks = [
        block.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, block in blocks
    ]
    try:
        with torch.enable_grad():
            found = torch.autograd.grad(signed_sum(predict(), seed), list(inputs.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (name, x.detach(), gradient)
        for (name, x), gradient in zip(inputs.items(), found, strict=True)
    ]
