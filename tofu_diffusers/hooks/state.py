"""What is kept on each module that tofu changes.

All forwards are module-level functions with their state on the module, so that a deepcopy of a model
carries its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..runtime.runtime import Runtime
from ..runtime.sites import Projection, Site
from ..tokens.plan import Plan


@dataclass(eq=False)
class BlockHook:
    """State on a block.

    Args:
        names: Its forward's parameters, in order.
        span: The site it belongs to; `first` and `last` say where in it the block stands.
        own_site: The site it is when its stack must be split.
        probe: Of the block, where importance is read with one; see `sensitivity`.

    While the block runs on kept tokens, `plan` says which, `unreduced` is what it would have been given,
    `inputs` what its attentions would read of tokens that they are not given (keys_values "fresh"), and `row`
    which row of the batch it is, if only one.
    """

    name: str
    runtime: Runtime
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    span: Site
    first: bool
    last: bool
    own_site: Site
    probe: Tensor | None = None
    plan: Plan | None = None
    unreduced: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    row: int | None = None
    metric: Tensor | None = None
    importance: Callable[[int], dict[str, Tensor]] | None = None
    probing: bool = False

    def forget(self) -> None:
        """Drop what belongs to one call."""
        self.plan = self.unreduced = self.row = self.metric = self.importance = None
        self.inputs, self.probing = {}, False


@dataclass(eq=False)
class AttentionHook:
    """State on a block's attention (scope "attention")."""

    name: str
    attribute: str
    hook: BlockHook
    site: Site
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    rotary: RotaryAttentionHook | None = None


@dataclass(eq=False)
class ProjectionHook:
    """State on the key or value projection of an attention (keys_values "fresh" and "cached")."""

    name: str
    attribute: str
    hook: BlockHook
    projection: Projection
    module: nn.Module
    original: Callable[..., Any]
    forward: Callable[..., Any]


@dataclass(eq=False)
class NormHook:
    """State on a group norm inside a block, whose statistics run over the tokens."""

    hook: BlockHook
    original: Callable[..., Any]
    forward: Callable[..., Any]


@dataclass(eq=False)
class RotaryAttentionHook:
    """State on an attention whose keys and values are made around its product.

    Args:
        keys, values: What is remembered of it (keys_values "cached").
        skip: How many rows of the query projection's input are no queries.
        end: Where they end; None: they are the last.
    """

    name: str
    attribute: str
    hook: BlockHook
    keys: Projection
    values: Projection
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    skip: int = 0
    end: int | None = None

    def forget(self) -> None:
        """Drop what belongs to one call."""
        self.skip, self.end = 0, None


@dataclass(eq=False)
class QueryHook:
    """State on the query projection of such an attention, or one like it (keys_values "fresh")."""

    name: str
    rotary: RotaryAttentionHook
    module: nn.Module
    original: Callable[..., Any]
    forward: Callable[..., Any]
