"""One call of an encoder: which tokens are left, how many each stands for, and who leaves next.

All of it may be traced: shapes follow from the configuration alone, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import EncoderReduction
from ..kernels.reference import normalise
from ..tokens.gather import gather_rows
from ..tokens.grid import TokenGrid
from ..tokens.merge import merge_tokens, sums
from ..tokens.methods import Evidence, Method
from ..tokens.plan import Plan, complement, highest, make_plan
from ..tokens.sources import SOURCES, BlockReading


def depth_of(block: int, blocks: int) -> float:
    """The position of a block: 0 is the first, 1 the last."""
    return block / max(1, blocks - 1)


@dataclass(eq=False)
class EncoderCall:
    """The tokens of one call.

    Attributes:
        method: The configuration's, made beforehand: options are not for tracing.
        merges: The merge of each block.
        weights: [B, K] float32, how many tokens went into each row, merged or pruned; 0: padding. None: one
            each.
        positions: [B, K], where the kept tokens stood; None: all are left.
        assign: [B, N], for every token the slot of the kept one that it went into.
        history: `assign` behind each block so far.
        tokens: How many came to each block so far, by its name, and how many it kept.
    """

    config: EncoderReduction
    method: Method
    merges: tuple[str, ...]
    prefix: int
    causal: bool
    kept: Tensor | None = None
    padded: bool = False
    weights: Tensor | None = None
    positions: Tensor | None = None
    assign: Tensor | None = None
    history: list[Tensor | None] = field(default_factory=list)
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, tokens: int, block: int) -> int:
        """How many of the call's tokens leave at a block.

        Raises:
            ValueError: if the method cannot let so many go.
        """
        free = tokens - self.prefix - (0 if self.kept is None else 1)
        removed = self.config.removed(max(0, free), len(self.merges))
        left = max(0, free) - sum(removed[:block])
        remove = removed[block]
        if remove == 0:
            return 0
        most = self.method.max_remove(TokenGrid(1, left))
        if remove > most:
            others = "" if self.config.schedule == "share" else ", or take schedule 'share'"
            raise ValueError(
                f"ratio {self.config.ratio:g} lets {remove} of the {left} tokens that are left go at block "
                f"{block}, and method {self.config.method!r} can let {most} go; lower the ratio or "
                f"first_block{others}"
            )
        return remove

    @property
    def _weighed(self) -> bool:
        """Whether tokens count unequally: as many as went into each, or padding nothing."""
        return self.padded or (self.weights is not None and self.config.proportional_attention)

    def bias(self, given: Tensor | None, x: Tensor) -> Tensor | None:
        """What attention among the kept tokens adds to its logits.  -> [B, 1, 1 or K, K], or None."""
        if self.positions is None:
            return given
        # Of causal attention without a mask the attention itself knows.
        return None if given is None and not self._weighed else self.added(x)

    def added(self, x: Tensor) -> Tensor | None:
        """The same, made anew from what is left at any block.  -> [B, 1, 1 or K, K], or None for nothing."""
        weights = self.weights if self._weighed else None
        least = torch.finfo(x.dtype).min
        if weights is None and not self.causal:
            return None
        if weights is None:
            weights = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        counts = weights.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.proportional_attention:
            logs = counts.clamp(min=1.0).log()
        else:
            logs = torch.zeros_like(counts)
        bias = torch.where(weights > 0, logs.to(x.dtype), least)[:, None, None, :]
        if self.causal:
            # Kept positions ascend, so that who comes before whom is told by the slots.
            before = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            bias = torch.where(before, bias, least)
        return bias

    def leave(
        self, x: Tensor, remove: int, block: int, heads: int, reading: Callable[[], BlockReading]
    ) -> Tensor:
        """Let tokens leave behind a block's attention.  [B, K, C] -> [B, K - remove, C]."""
        if remove == 0:
            self.history.append(self.assign)
            return x
        plan = self._plan(x, remove, block, heads, reading())
        merge = self.merges[block]
        merged = merge_tokens(x, plan, merge, self.weights)
        weights = self.weights
        if weights is None:
            weights = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        self.weights = sums(weights, plan)
        if merge == "prune":
            # A row of padding stays padding, whatever went into it.
            self.weights = self.weights * (weights.gather(1, plan.kept) > 0)
        here = plan.kept if self.positions is None else self.positions.gather(1, plan.kept)
        self.positions = here
        self.assign = plan.assign if self.assign is None else plan.assign.gather(1, self.assign)
        self.history.append(self.assign)
        return merged

    def _plan(self, x: Tensor, remove: int, block: int, heads: int, reading: BlockReading) -> Plan:
        method, (batch, tokens) = self.method, x.shape[:2]
        keys = reading.keys()
        fixed = torch.arange(self.prefix, device=x.device).expand(batch, -1)
        if self.kept is not None:
            own = self.kept if self.assign is None else self.assign.gather(1, self.kept)
            fixed = torch.cat([fixed, own], dim=1)
        free = complement(fixed, tokens)
        # Heads are averaged, as ToMe does.
        metric = gather_rows(keys.view(batch, tokens, heads, -1).mean(dim=2), free)
        scores = {name: SOURCES[name].score for name in method.sources}
        importance = {
            name: score(reading).gather(1, free)
            for name, score in scores.items()
            if score is not None
        }
        real = None
        if self.padded and self.weights is not None:
            real = self.weights.gather(1, free) > 0
            # Padding is like padding, and at right angles to everything else.
            apart = torch.where(real[..., None], normalise(metric), 0.0)
            metric = torch.cat([apart, (~real[..., None]).to(apart.dtype)], dim=2)
            importance = {name: score * real for name, score in importance.items()}
        evidence = Evidence(
            metric=metric,
            grid=TokenGrid(1, free.shape[1]),
            remove=remove,
            depth=depth_of(block, len(self.merges)),
            importance=importance,
            # Another draw at every block.
            seed=self.config.seed + block,
        )
        chosen = method.plan(evidence)
        if real is not None:
            chosen = _padding_first(chosen, real, remove)
        keep = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
        match = torch.zeros(batch, tokens, dtype=torch.int64, device=x.device)
        to = free.gather(1, chosen.kept.gather(1, chosen.assign))
        return make_plan(
            keep.scatter(1, free, chosen.is_kept()), match.scatter(1, free, to), tokens - remove
        )

    def broadcast(self, x: Tensor, assign: Tensor | None) -> Tensor:
        """To every token the row of the kept one that it went into.  [B, K, C] -> [B, N, C]."""
        return x if assign is None else gather_rows(x, assign)


def _padding_first(plan: Plan, real: Tensor, remove: int) -> Plan:
    """The plan in which a row with padding enough loses padding alone, from its end on."""
    place = torch.arange(1, real.shape[1] + 1, device=real.device)
    out = highest((~real * place).float(), remove)
    alone = make_plan(~out, None, real.shape[1] - remove)
    enough = (~real).sum(dim=1, keepdim=True) >= remove
    return Plan(
        torch.where(enough, alone.kept, plan.kept), torch.where(enough, alone.assign, plan.assign)
    )
