"""What a step takes with as many tokens for free: the ceilings that `denoisers` compares tofu with.

The same sites on their first K tokens:

- scope "block" with keys_values "dropped": the blocks run on x[:, :K], and what they do not see is put
  behind what they return. Nothing chooses, merges or unmerges; of tofu's work there is only one concatenation
  a stack of blocks.
- otherwise (attention sees the keys and values of all tokens, or is itself what shrinks): tofu itself with a
  plan made once that keeps the first K tokens, pruned, unmerged by a copy. Still in it are the taking of K
  rows, of rotary rows where there are any, the keys and values themselves, and one pass over the tokens that
  writes the copies: less than any other way to unmerge, not nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tofu_diffusers import METHODS, Evidence, Method, Plan


@dataclass(frozen=True)
class First(Method):
    """The first tokens stay. For ceilings: it costs nothing to choose so."""

    name: ClassVar[str] = "first"
    same_for_all: ClassVar[bool] = True

    def choose(self, evidence: Evidence) -> Plan:
        """Keep the first tokens, whatever the evidence."""
        metric, tokens = evidence.metric, evidence.grid.tokens
        return first_plan(metric.shape[0], tokens, tokens - evidence.remove, metric.device)


def first_plan(batch: int, tokens: int, kept: int, device: torch.device) -> Plan:
    """Keeps the first tokens; all others go to the last of these."""
    place = torch.arange(tokens, device=device)
    return Plan(
        place[:kept].expand(batch, -1).contiguous(),
        place.clamp(max=kept - 1).expand(batch, -1).contiguous(),
    )


@contextmanager
def first_method() -> Iterator[None]:
    """Inside it `apply_tofu` knows the method "first"."""
    METHODS[First.name] = First
    try:
        yield
    finally:
        del METHODS[First.name]


@dataclass(eq=False)
class Held:
    """From the first to the last block of a stack: tokens not computed, and arguments cut to the others."""

    rest: Tensor | None = None
    cut: dict[str, Any] = field(default_factory=dict)


def run_on_first(model: nn.Module, family: Any, ratio: float) -> None:
    """Make the blocks of a denoiser run on x[:, :K], for good, and hand the rest of x through."""
    for stack in family.block_stacks(model):
        held = Held()
        for i, (_, block) in enumerate(stack.blocks):
            _cut(block, family, ratio, held, i == 0, i == len(stack.blocks) - 1)


def _cut(block: Any, family: Any, ratio: float, held: Held, first: bool, last: bool) -> None:
    inner = block.forward
    code = type(block).forward.__code__
    names = code.co_varnames[1 : code.co_argcount]

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args, strict=False)) | kwargs
        x = family.hidden(named)
        if first:
            tokens = x.shape[1]
            kept = tokens - int(tokens * ratio)
            plan = first_plan(x.shape[0], tokens, kept, x.device)
            # Rotary rows, once a stack: they are the same for all of its blocks.
            following = family.slice_block_arguments(named, plan, "dropped", None)
            held.cut = {name: v for name, v in following.items() if v is not named.get(name)}
            x, held.rest = x[:, :kept], x[:, kept:]
        out = inner(**family.with_hidden({**named, **held.cut}, x))
        if not last:
            return out
        full = torch.cat([family.output(out), held.rest], dim=1)
        held.rest, held.cut = None, {}
        return family.with_output(out, full, named)

    block.forward = forward
