"""The operations that `growth` times: plans, merges and unmerges, with what each must at least do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import tofu_diffusers as tofu
from eval.bench.models import here

CHANNELS = 640
WINDOW = 16


@dataclass(frozen=True)
class Operation:
    """What is timed, the fewest bytes that it must move, and its products' FLOPs.

    sorts: whether its plan turns on the order of energies. Those of some tokens are closer than they are
        rounded, so two implementations make different plans of them; their tests compare the energies.
    """

    call: Callable[[], Any]
    bytes: int
    flops: int = 0
    sorts: bool = False


def operations(tokens: int) -> dict[str, Operation]:
    """Half of the tokens removed, by one image's random tokens.

    "match" finds the best kept token of all removed ones (method random, whose own choice costs next to
    nothing); "energy" is PiToMe's, and a match behind it; both over the whole grid and inside windows.
    Merges and unmerges take a plan drawn at random, whose groups lie as far apart as those of such a match.
    """
    device, dtype = here()
    draw = torch.Generator(device).manual_seed(tokens)

    def drawn(count: int) -> torch.Tensor:
        return torch.randn(1, count, CHANNELS, generator=draw, device=device, dtype=dtype)

    removed = tokens // 2
    kept, width = tokens - removed, CHANNELS * dtype.itemsize
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    grid = tofu.TokenGrid(height, tokens // height)
    x, update = drawn(tokens), drawn(kept)
    evidence = tofu.Evidence(x, grid, removed)
    indices = 8 * (tokens + kept)
    found = {}
    for window in (None, WINDOW):
        random, pitome = (tofu.METHODS[name](window=window) for name in ("random", "pitome"))
        matched = pairs(grid, window, removed, kept)
        weighed = pairs(grid, window, tokens, tokens) + pairs(grid, window, removed, removed)
        for name, method, count in (("match", random, matched), ("energy", pitome, weighed)):
            found[name if window is None else f"{name} window {window}"] = Operation(
                lambda method=method: method.plan(evidence),
                tokens * width + indices,
                2 * count * CHANNELS,
                name == "energy",
            )
    plan = drawn_plan(tokens, kept, draw)
    moved = (tokens + kept) * width + indices
    for merge in tofu.MERGES:
        # Pruning does not look at what it removes.
        least = 2 * kept * width + 8 * kept if merge == "prune" else moved
        found[f"merge {merge}"] = Operation(
            lambda merge=merge: tofu.merge_tokens(x, plan, merge), least
        )
    found["unmerge copy"] = Operation(lambda: tofu.unmerge_tokens(update, plan, "copy"), moved)
    cache = tofu.UpdateCache.empty(tofu.CacheKind.SLOPE, 1, tokens, CHANNELS, dtype, device)
    step = torch.zeros((), device=device)
    for _ in range(2):
        cache.record(drawn(tokens), step)
        step += 1
    taylor = {"cache": cache, "step": step}
    found["unmerge taylor"] = Operation(
        lambda: tofu.unmerge_tokens(update, plan, "taylor", **taylor),
        # Value and slope of all read, of the kept ones written; the update in, the whole out.
        (3 * tokens + 3 * kept) * width + indices,
    )
    return found


def pairs(grid: tofu.TokenGrid, window: int | None, queries: int, candidates: int) -> int:
    """Of how many pairs of tokens the similarity is computed: inside tiles, of all of a tile's tokens."""
    if window is None or max(grid.height, grid.width) <= window:
        return queries * candidates
    # Where a side is no multiple of the window, the last tile overlaps the one before.
    tiles = math.ceil(grid.height / window) * math.ceil(grid.width / window)
    inside = min(window, grid.height) * min(window, grid.width)
    return tiles * inside**2


def drawn_plan(tokens: int, kept: int, draw: torch.Generator) -> tofu.Plan:
    """Which tokens stay and where the others go, at random; the same in every process."""
    own = {"generator": draw, "device": draw.device}
    stay = torch.randperm(tokens, **own)[:kept].sort().values
    assign = torch.randint(kept, (tokens,), **own)
    assign[stay] = torch.arange(kept, device=draw.device)
    return tofu.Plan(stay[None], assign[None])
