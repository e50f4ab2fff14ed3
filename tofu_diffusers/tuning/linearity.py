"""How near linear each block is between tokens that would merge: the question of Token Fusion.

ToFu (WACV 2024, arXiv 2312.01026) calls a function f linear between x1 and x2 as far as its path between them
is straight: with x(t) = (1 - t) x1 + t x2,

    linearity = ||f(x1) - f(x2)|| / sum_i ||f(x(t_i+1)) - f(x(t_i))||,

in (0, 1], and 1 where f is linear. It prunes where that is low, and merges by MLERP where it is high.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.call import depth_of
from ..families import Family, depths_of, find_family
from ..families.base import Kwargs
from ..hooks.patch import bind, parameters_of
from ..steps.pipelines import schedulers
from ..steps.sampler import Sampling, timesteps_of
from ..tokens.grid import TokenGrid
from ..tokens.methods import Evidence, make_method
from .calibrate import as_prompts, calls_of, watchable
from .encoder_calls import MeasuredEncoder

SEGMENTS = 8
"""Of a path: with more of them, linearity falls no further in two digits."""
TOME = make_method("tome")


@dataclass(frozen=True)
class Linearity:
    """Result of `measure_linearity`.

    Attributes:
        blocks: Names, in the order of execution.
        depths: Of the blocks: 0 is the first, 1 the last.
        levels: Noise levels, falling from 1 (pure noise) to 0; of an encoder 0 alone.
        values: A row a block, a number in (0, 1] a level.
    """

    blocks: tuple[str, ...]
    depths: tuple[float, ...]
    levels: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def means(self) -> tuple[float, ...]:
        """Of every block, over the levels."""
        return tuple(sum(row) / len(row) for row in self.values)

    def merges(self, threshold: float) -> dict[str, Any]:
        """Options of method "tofu": MLERP in blocks whose mean reaches the threshold, prune in the others.

        Example:
            >>> apply_tofu(pipe, method="tofu", method_options=linearity.merges(0.8))

        Raises:
            ValueError: if the threshold is no number.
        """
        if math.isnan(threshold):
            raise ValueError("threshold is nan; give a linearity, such as 0.8")
        switches: list[float] = []
        merged, before = False, 0.0
        for depth, mean in zip(self.depths, self.means, strict=True):
            if (mean >= threshold) != merged:
                merged = not merged
                # Between two blocks, where no site can be.
                switches.append((before + depth) / 2)
            before = depth
        return {"switch": switches}

    def __str__(self) -> str:
        width = max(map(len, ("noise level", *self.blocks)))
        head = "".join(f"{level:7.2f}" for level in self.levels)
        lines = [f"{'noise level':{width}}  depth{head}   mean"]
        for name, depth, row, mean in zip(
            self.blocks, self.depths, self.values, self.means, strict=True
        ):
            numbers = "".join(f"{value:7.3f}" for value in (*row, mean))
            lines.append(f"{name:{width}}{depth:7.2f}{numbers}")
        return "\n".join(lines)


def measure_linearity(
    pipe: Any,
    prompts: str | Sequence[Any],
    *,
    ratio: float = 0.5,
    calls: int = 4,
    seed: int = 0,
    **options: Any,
) -> Linearity:
    """Measure how near linear every block of a denoiser or encoder is between tokens that ToMe would merge.

    Every prompt is generated once, without tofu. At some calls of the denoiser the tokens that ToMe removes
    are moved, in each block's input, all at once and step by step to the tokens that they fold into; what is
    looked at is the update that the block adds to each of them. Each such call takes the time of ten. An
    encoder is called once with every input.

    Of the update and not of the output, whose larger part is the moved token itself: that is linear, and
    brings all blocks near 1.

    Example:
        >>> linearity = measure_linearity(pipe, ["a cat", "a red apple"])
        >>> print(linearity)
        >>> apply_tofu(pipe, method="tofu", method_options=linearity.merges(0.8))

    Args:
        pipe: A pipeline with one denoiser of a known family, without tofu; or a model that is or holds one
            encoder.
        prompts: One or more, each what the pipeline takes as its first argument; of an encoder the model's
            arguments by name, without padding.
        ratio: Fraction of the tokens that are moved, above 0 and at most 0.75; grids of which that is less
            than one are left out.
        calls: The most calls of the denoiser that are looked at in each generation, evenly spread; an encoder
            has one.
        seed: Of the images; the n-th prompt has seed + n. An encoder draws nothing.
        options: Further arguments of the pipeline, or of the model.

    Raises:
        TypeError: if `pipe` is no pipeline and holds no encoder, or an encoder's input is not by name.
        ValueError: if there is no prompt, a number is out of range, the pipeline has tofu or several
            denoisers, or its denoiser is compiled, was not called or has no tokens to move; if an encoder's
            input has padding.
    """
    prompts = as_prompts(prompts)
    if not prompts:
        raise ValueError("no prompts to measure linearity on; give at least one")
    if calls < 1:
        raise ValueError(f"calls is {calls}; give 1 or more")
    if not 0 < ratio <= TOME.max_ratio:
        raise ValueError(f"ratio is {ratio}; give one above 0, and at most {TOME.max_ratio:g}")
    found: dict[str, dict[float, list[float]]] = {}

    def note(level: float, values: dict[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(name, {}).setdefault(level, []).append(value)

    encoder = MeasuredEncoder.of(pipe)
    if encoder is not None:
        model = encoder.model
        names = [name for name, _ in encoder.blocks]
        depths = {name: depth_of(i, len(names)) for i, name in enumerate(names)}
        for given in prompts:
            note(0.0, encoder_linearities(encoder, given, ratio, options))
    else:
        model = watchable(pipe)
        family = find_family(model, None)
        depths = depths_of(family.block_stacks(model))
        for n, prompt in enumerate(prompts):
            for named in calls_of(pipe, model, prompt, seed + n, calls, options):
                note(noise_of(pipe, family, named), linearities(model, family, named, ratio))
    if not found:
        raise ValueError(f"ratio {ratio:g} moves no token of {type(model).__name__}; raise it")
    levels = sorted(next(iter(found.values())), reverse=True)
    return Linearity(
        tuple(found),
        tuple(depths[name] for name in found),
        tuple(levels),
        tuple(
            tuple(sum(rows[level]) / len(rows[level]) for level in levels)
            for rows in found.values()
        ),
    )


def noise_of(pipe: Any, family: Family, named: Kwargs) -> float:
    """The noise level of a call in a generation just over, as the angle of noise against signal."""
    scheduler = schedulers(pipe)[0]
    assert family.timestep_scale is not None
    at = float(torch.as_tensor(named[family.timestep_name]).max()) / family.timestep_scale
    places = timesteps_of(scheduler)
    nearest = min(range(len(places)), key=lambda i: abs(places[i] - at))
    return Sampling.of(scheduler).angles[nearest]


def linearities(model: nn.Module, family: Family, named: Kwargs, ratio: float) -> dict[str, float]:
    """The linearity of every block's update in one call of the denoiser, by block name.

    Raises:
        ValueError: if images of a batch begin in different places, behind texts of their own lengths.
    """
    grids = family.grids(model, named)
    for starts in family.image_starts(named).values():
        if len({*starts.tolist()}) > 1:
            raise ValueError(
                f"one batch has texts of {sorted({*starts.tolist()})} tokens, behind which its images begin "
                "in different places; give each text as a prompt of its own"
            )
    found: dict[str, float] = {}

    def measure(
        name: str, grid: TokenGrid, block: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> None:
        given = bind(parameters_of(block), args, kwargs)
        # Past the hooks, this one among them.
        found[name] = linearity(
            family.hidden(given),
            grid,
            moved(grid, ratio),
            lambda tokens: family.output(block.forward(**family.with_hidden(given, tokens))),
        )

    hooks = [
        block.register_forward_pre_hook(partial(measure, name, grid), with_kwargs=True)
        for stack in family.block_stacks(model)
        for grid in [grids[stack.resolution]]
        for name, block in stack.blocks
        if moved(grid, ratio)
    ]
    try:
        with torch.no_grad():
            model(**{**named, "return_dict": False})
    finally:
        for hook in hooks:
            hook.remove()
    return found


def encoder_linearities(
    encoder: MeasuredEncoder, given: Any, ratio: float, options: Kwargs
) -> dict[str, float]:
    """The linearity of every block's update in one call of an encoder, by block name."""
    found: dict[str, float] = {}

    def measure(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        named = bind(parameters_of(block), args, kwargs)
        x = named["hidden_states"]
        grid = encoder.grid(x)

        def run(tokens: Tensor) -> Tensor:
            out = block.forward(**{**named, "hidden_states": tokens})
            y: Tensor = out if isinstance(out, Tensor) else out[0]
            return y

        if moved(grid, ratio):
            found[name] = linearity(x, grid, moved(grid, ratio), run)

    hooks = [
        block.register_forward_pre_hook(partial(measure, name), with_kwargs=True)
        for name, block in encoder.blocks
    ]
    try:
        with torch.no_grad():
            encoder(given, options)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def linearity(x: Tensor, grid: TokenGrid, count: int, block: Callable[[Tensor], Tensor]) -> float:
    """That of a block's update, on the way of so many tokens to their matches.  x: [B, N, C]."""
    at, towards = moves(x, grid, count)

    def update(t: float) -> Tensor:
        """Of the moved tokens.  -> [B, M, C] float32."""
        tokens = torch.lerp(x, towards, t)
        return (block(tokens).float() - tokens.float()).gather(1, at)

    path = torch.stack([update(i / SEGMENTS) for i in range(SEGMENTS + 1)])
    return float(straightness(path).mean())


def moved(grid: TokenGrid, ratio: float) -> int:
    """How many of a grid's tokens are moved."""
    return min(int(grid.tokens * ratio), TOME.max_remove(grid))


def moves(x: Tensor, grid: TokenGrid, count: int) -> tuple[Tensor, Tensor]:
    """Where the tokens are that ToMe removes, and all tokens with these at their matches.

    [B, N, C] -> [B, M, C] int64 positions, [B, N, C]
    """
    image = x[:, grid.text_before : grid.text_before + grid.tokens]
    plan = TOME.plan(Evidence(image, grid, count)).padded(grid.text_before, grid.text_after)
    at = plan.removed()[..., None].expand(-1, -1, x.shape[2])
    return at, plan.broadcast(plan.rows(x))


def straightness(path: Tensor) -> Tensor:
    """The distance of a path's ends over its length; 1 of a point.  [T, ..., C] -> [...]."""
    length = path.diff(dim=0).norm(dim=-1).sum(dim=0)
    distance = (path[-1] - path[0]).norm(dim=-1)
    # Rounding can make a straight path shorter than the way from end to end.
    return torch.where(length > 0, (distance / length).clamp(max=1.0), 1.0)
