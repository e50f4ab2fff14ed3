"""Keys and values of removed tokens.

Where queries and keys are not rotated, the projections are given all tokens, or remember their rows.

Where they are rotated by position, between projection and product, removed tokens must enter after that.
Their keys and values are made by the attention's own code, whatever its projections, norms and rotations are:

    fresh   the attention is given [.., kept, removed] tokens with the rotations in that order; its query
            projection skips the removed ones, and the product drops the empty queries again
    cached  the attention is given the kept tokens; at the product their keys and values are written into
            those of all tokens, and the queries see these

The product is found by a torch function mode for `scaled_dot_product_attention`, which is what the native
attention backends of diffusers end in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

from ..tokens.gather import scatter_rows_
from .patch import bind
from .state import ProjectionHook, QueryHook, RotaryAttentionHook

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def projection_forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Keys or values of all tokens, though the attention was given the kept ones."""
    here: ProjectionHook = module.__dict__["_tofu"]
    hook = here.hook
    unreduced = hook.inputs.get(here.attribute)
    if unreduced is not None:
        rows: Tensor = here.original(module, unreduced, *args, **kwargs)
        return rows
    rows = here.original(module, x, *args, **kwargs)
    cache = None if hook.probing else hook.runtime.rows_of(here.projection)
    if cache is None:
        return rows
    if hook.plan is None:
        cache.copy_(rows.detach())
        return rows
    scatter_rows_(cache, hook.plan.kept, rows.detach().to(cache.dtype))
    return cache.to(rows.dtype)


def check_unfused(attention: nn.Module, name: str, keys_values: str) -> None:
    """Raise ValueError if queries, keys and values of all rows are not each projected by one module."""
    processor = type(getattr(attention, "processor", None)).__name__
    if processor.startswith("PAG"):
        raise ValueError(
            f"{name} projects the rows of perturbed-attention guidance apart from the others ({processor}), "
            f"which keys_values {keys_values!r} cannot follow; use keys_values='dropped', or StepSkipping"
        )
    # Attentions that cannot be unfused keep the flag when their processors are put back.
    flag = getattr(attention, "fused_projections", False)
    if "Fused" in processor or (flag and hasattr(attention, "unfuse_projections")):
        raise ValueError(
            f"{name} has fused QKV projections, which hide what keys_values {keys_values!r} needs; call "
            "unfuse_qkv_projections() or use keys_values='dropped'"
        )


class SdpaPatch(TorchFunctionMode):
    """Changes what the first attention product of all tokens sees (and, for `skip`, every one).

    Args:
        skip: Empty queries at the end of the image's, to be left out.
        keys, values: Remembered ones of all image tokens [B, N, C], which this call's are written to.
        kept: [B, K], where in them this call's image tokens stand; None: it has all of them.
        first: How many image tokens this call has, where they stand in front; None: they are the last.

    Where every row of the batch has a product of its own, the first is that of each row.
    """

    def __init__(
        self,
        skip: int = 0,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        kept: Tensor | None = None,
        first: int | None = None,
    ) -> None:
        super().__init__()
        self.skip, self.keys, self.values, self.kept = skip, keys, values, kept
        self.first = first
        self.calls = self.entered = 0

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
            return self._without_empty(func, named)
        if self.keys is not None and self.values is not None:
            batch, rows = len(self.keys), named["key"].shape[0]
            tokens = self.keys.shape[1] if self.kept is None else self.kept.shape[1]
            # Others may come before, of what stands in front of the image alone.
            if named["key"].shape[2] >= tokens and self.entered + rows <= batch:
                self._add_remembered(named, slice(self.entered, self.entered + rows))
                self.entered += rows
        return func(**named)

    def _without_empty(self, func: Any, named: dict[str, Any]) -> Tensor:
        """The product without empty queries; where others stand behind them, their rows are 0."""
        whole = named["query"].shape[2]
        end = whole if self.first is None else self.first
        begin = end - self.skip
        # How many words stand behind may not be known while this is traced.
        last = statically_known_true(end == whole)

        def cut(rows: Tensor) -> Tensor:
            if last:
                return rows[:, :, :begin]
            return torch.cat([rows[:, :, :begin], rows[:, :, end:]], dim=2)

        named["query"] = cut(named["query"])
        mask = named.get("attn_mask")
        if mask is not None and mask.shape[-2] > 1:  # a row a query
            named["attn_mask"] = cut(mask)
        out: Tensor = func(**named)
        if last:
            return out
        empty = out.new_zeros(*out.shape[:2], self.skip, out.shape[3])
        return torch.cat([out[:, :, :begin], empty, out[:, :, begin:]], dim=2)

    def _add_remembered(self, named: dict[str, Any], rows: slice) -> None:
        """Give the product the keys and values of all tokens, of these rows of the batch."""
        assert self.keys is not None and self.values is not None
        kept = None if self.kept is None else self.kept[rows]
        tokens = self.keys.shape[1] if kept is None else kept.shape[1]
        others, mask = named["key"].shape[2] - tokens, named.get("attn_mask")
        if kept is not None and mask is not None:
            named["attn_mask"] = self._mask_of_all(mask, others, kept)
        for name, cache in (("key", self.keys), ("value", self.values)):
            named[name] = self._remember(named[name], cache[rows], kept, others)

    def _joined(self, image: Tensor, others: Tensor, dim: int) -> Tensor:
        """Image tokens and others in the product's order."""
        return torch.cat([others, image] if self.first is None else [image, others], dim=dim)

    def _parted(self, rows: Tensor, others: int, dim: int) -> tuple[Tensor, Tensor]:
        """(image tokens, others) of what stands in the product's order."""
        image = rows.shape[dim] - others
        if self.first is None:
            return rows.narrow(dim, others, image), rows.narrow(dim, 0, others)
        return rows.narrow(dim, 0, image), rows.narrow(dim, image, others)

    def _mask_of_all(self, mask: Tensor, others: int, kept: Tensor) -> Tensor:
        """A mask for the keys of all tokens.  [.., Q or 1, S].

        others: Keys beside the image's.
        """
        assert self.keys is not None
        tokens = self.keys.shape[1]
        if mask.shape[-1] == others + tokens:  # the family gave all columns, and all rows
            if mask.shape[-2] == 1:
                return mask
            places = torch.arange(others + tokens, device=mask.device)
            image, beside = self._parted(places, others, 0)
            rows = self._joined(image[kept], beside.expand(kept.shape[0], -1), 1)
            # One mask may be that of all rows of the batch.
            mask = mask.expand(len(rows), *mask.shape[1:])
            index = rows[:, None, :, None].expand(*mask.shape[:-2], -1, mask.shape[-1])
            return mask.gather(-2, index)
        # The attention made it of what it was given: image tokens are all seen alike.
        image, beside = self._parted(mask, others, mask.ndim - 1)
        return self._joined(image[..., :1].expand(*mask.shape[:-1], tokens), beside, mask.ndim - 1)

    def _remember(self, rows: Tensor, cache: Tensor, kept: Tensor | None, others: int) -> Tensor:
        """Write the image rows of [B, H, S, D] to the cache; put all it holds in their place."""
        heads, depth = rows.shape[1], rows.shape[3]
        image, beside = self._parted(rows, others, 2)
        image = image.transpose(1, 2).flatten(2).detach().to(cache.dtype)
        if kept is None:
            cache.copy_(image)
            return rows
        scatter_rows_(cache, kept, image)
        all_rows = cache.view(*cache.shape[:2], heads, depth).transpose(1, 2).to(rows.dtype)
        return self._joined(all_rows, beside, 2)


def with_keys_values(here: RotaryAttentionHook, module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Run an attention on the tokens that its site's plan keeps, with the keys_values of the others.

    Raises:
        RuntimeError: if the attention's product is not `scaled_dot_product_attention`.
    """
    hook, runtime = here.hook, here.hook.runtime
    plan, family = hook.plan, runtime.setup.family
    if family.leaves_product_out(kwargs):
        return here.original(module, **kwargs)
    if runtime.setup.keys_values == "fresh":
        if plan is None:
            return here.original(module, **kwargs)
        removed = hook.inputs[here.attribute]
        x = torch.cat([family.hidden(kwargs), removed], dim=1)
        kwargs, here.skip = family.with_hidden(kwargs, x), removed.shape[1]
        here.end = x.shape[1] if family.image_first else None
        product = SdpaPatch(skip=here.skip, first=here.end)
    else:
        keys, values = runtime.rows_of(here.keys), runtime.rows_of(here.values)
        if keys is None or values is None:
            return here.original(module, **kwargs)
        if hook.row is not None:
            keys, values = keys[hook.row : hook.row + 1], values[hook.row : hook.row + 1]
        tokens = keys.shape[1] if plan is None else plan.kept.shape[1]
        product = SdpaPatch(
            keys=keys,
            values=values,
            kept=None if plan is None else plan.kept,
            first=tokens if family.image_first else None,
        )
    with product:
        out = here.original(module, **kwargs)
    if here.skip and isinstance(out, tuple) and family.image_first:
        image, *others = out
        out = (image[:, : -here.skip], *others)
    here.skip = 0
    if product.calls == 0:
        raise RuntimeError(
            f"{here.name} does not end in torch's scaled_dot_product_attention, where keys_values "
            f"{runtime.setup.keys_values!r} enters; call set_attention_backend('native') on the denoiser, or "
            "use keys_values='dropped'"
        )
    return out


def rotary_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of such an attention where its block shrinks."""
    here: RotaryAttentionHook = module.__dict__["_tofu"]
    return with_keys_values(here, module, bind(here.names, args, kwargs))


def query_forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Queries of the tokens that have one, empty rows for the others."""
    here: QueryHook = module.__dict__["_tofu"]
    skip, end = here.rotary.skip, here.rotary.end
    rows = gate_forward(module, x, *args, **kwargs)
    if not skip:
        return rows
    begin = rows.shape[1] if end is None else end - skip
    return torch.cat([F.pad(rows[:, :begin], (0, 0, 0, skip)), rows[:, begin:]], dim=1)


def gate_forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Rows of the tokens that have a query, and nothing for the others."""
    here: QueryHook = module.__dict__["_tofu"]
    skip = here.rotary.skip
    if skip:
        end = here.rotary.end or x.shape[1]
        # Where text and image are projected together, the text stands behind.
        x = torch.cat([x[:, : end - skip], x[:, end:]], dim=1)
    rows: Tensor = here.original(module, x, *args, **kwargs)
    return rows
