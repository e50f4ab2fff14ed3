"""Contexts where queries and keys are rotated by position between projection and product.

Removed tokens must enter the attention after that. Their keys and values are made by the attention's own
code, whatever its projections, norms and rotations are:

    fresh   the attention is given [.., kept, removed] tokens with the rotations in that order; its query
            projection skips the removed ones, and the product drops the empty queries again
    cached  the attention is given the kept tokens; at the product their keys and values are written into
            those of all tokens, and the queries see these

The product is found by a torch function mode for `scaled_dot_product_attention`, which is what the native
attention backends of diffusers end in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..runtime.units import Projection
from ..tokens.gather import put_
from .patch import bind

if TYPE_CHECKING:
    from .sites import Site

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(eq=False)
class RotarySite:
    """State on an attention whose keys_values is made around its product.

    Args:
        keys, values: What the session remembers of it (keys_values "cached").
        skip: How many rows at the end of the query projection's input are no queries.
    """

    name: str
    attribute: str
    site: Site
    keys: Projection
    values: Projection
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    skip: int = 0

    def forget(self) -> None:
        """Drop what belongs to one call."""
        self.skip = 0


@dataclass(eq=False)
class QuerySite:
    """State on the query projection of such an attention (keys_values "fresh")."""

    name: str
    rotary: RotarySite
    module: nn.Module
    original: Callable[..., Any]
    forward: Callable[..., Any]


class Product(TorchFunctionMode):
    """Changes what the first attention product inside it sees (and, for `skip`, every one).

    Args:
        skip: Empty queries at the end, to be dropped.
        keys, values: Remembered ones of all image tokens [B, N, C], which this call's are written to.
        kept: [B, K], where in them this call's image tokens stand; None: it has all of them.
    """

    def __init__(
        self,
        skip: int = 0,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.skip, self.keys, self.values, self.kept = skip, keys, values, kept
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.unflatten:
            # The method is Python around a call to its parent class, which Dynamo cannot trace from here.
            return torch.unflatten(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(PARAMETERS, args, strict=False)) | (kwargs or {})
        self.calls += 1
        if self.skip:
            named["query"] = named["query"][:, :, : -self.skip]
        elif self.calls == 1 and self.keys is not None and self.values is not None:
            tokens = self.keys.shape[1] if self.kept is None else self.kept.shape[1]
            mask = named.get("attn_mask")
            if self.kept is not None and mask is not None:
                # Image tokens come last and are all seen alike.
                seen = mask[..., -1:].expand(*mask.shape[:-1], self.keys.shape[1])
                named["attn_mask"] = torch.cat([mask[..., :-tokens], seen], dim=-1)
            named["key"] = self._remember(named["key"], self.keys, tokens)
            named["value"] = self._remember(named["value"], self.values, tokens)
        return func(**named)

    def _remember(self, rows: Tensor, cache: Tensor, tokens: int) -> Tensor:
        """Write the image rows of [B, H, S, D] to the cache; put all it holds in their place."""
        heads, depth = rows.shape[1], rows.shape[3]
        image = rows[:, :, -tokens:].transpose(1, 2).flatten(2).detach().to(cache.dtype)
        if self.kept is None:
            cache.copy_(image)
            return rows
        put_(cache, self.kept, image)
        whole = cache.view(*cache.shape[:2], heads, depth).transpose(1, 2).to(rows.dtype)
        return torch.cat([rows[:, :, :-tokens], whole], dim=2)


def with_context(here: RotarySite, module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Run an attention on the tokens that its site's plan keeps, with the keys_values of the others.

    Raises:
        RuntimeError: if the attention's product is not `scaled_dot_product_attention`.
    """
    site, session = here.site, here.site.session
    plan = site.plan
    if session.keys_values == "fresh":
        if plan is None:
            return here.original(module, **kwargs)
        removed = site.inputs[here.attribute]
        x = kwargs["hidden_states"]
        kwargs = {**kwargs, "hidden_states": torch.cat([x, removed], dim=1)}
        here.skip = removed.shape[1]
        product = Product(skip=here.skip)
    else:
        keys, values = session.context_cache(here.keys), session.context_cache(here.values)
        if keys is None or values is None:
            return here.original(module, **kwargs)
        if site.row is not None:
            keys, values = keys[site.row : site.row + 1], values[site.row : site.row + 1]
        product = Product(keys=keys, values=values, kept=None if plan is None else plan.kept)
    with product:
        out = here.original(module, **kwargs)
    here.skip = 0
    if product.calls == 0:
        raise RuntimeError(
            f"{here.name} does not end in torch's scaled_dot_product_attention, where keys_values "
            f"{session.keys_values!r} enters; call set_attention_backend('native') on the denoiser, or "
            "use keys_values='dropped'"
        )
    return out


def rotary_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of such an attention where its block shrinks."""
    here: RotarySite = module.__dict__["_tofu"]
    return with_context(here, module, bind(here.names, args, kwargs))


def query_forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Queries of the tokens that have one, empty rows for the others."""
    here: QuerySite = module.__dict__["_tofu"]
    skip = here.rotary.skip
    rows: Tensor = here.original(module, x[:, :-skip] if skip else x, *args, **kwargs)
    return F.pad(rows, (0, 0, 0, skip)) if skip else rows
