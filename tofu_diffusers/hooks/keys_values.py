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
            mask = named.get("attn_mask")
            if mask is not None and mask.shape[-2] > 1:  # a row a query
                named["attn_mask"] = mask[..., : -self.skip, :]
        elif self.calls == 1 and self.keys is not None and self.values is not None:
            tokens = self.keys.shape[1] if self.kept is None else self.kept.shape[1]
            mask = named.get("attn_mask")
            if self.kept is not None and mask is not None:
                named["attn_mask"] = self._mask_of_all(mask, named["key"].shape[2] - tokens)
            named["key"] = self._remember(named["key"], self.keys, tokens)
            named["value"] = self._remember(named["value"], self.values, tokens)
        return func(**named)

    def _mask_of_all(self, mask: Tensor, others: int) -> Tensor:
        """A mask for the keys of all tokens, of which the image's are the last.  [.., Q or 1, S].

        others: Keys in front of the image's.
        """
        assert self.keys is not None and self.kept is not None
        tokens = self.keys.shape[1]
        if mask.shape[-1] == others + tokens:  # the family gave all columns, and all rows
            if mask.shape[-2] == 1:
                return mask
            front = torch.arange(others, device=mask.device).expand(self.kept.shape[0], -1)
            rows = torch.cat([front, self.kept + others], dim=1)[:, None, :, None]
            return mask.gather(-2, rows.expand(*mask.shape[:-2], -1, mask.shape[-1]))
        # The attention made it of what it was given: image tokens are all seen alike.
        seen = mask[..., -1:].expand(*mask.shape[:-1], tokens)
        return torch.cat([mask[..., : -self.kept.shape[1]], seen], dim=-1)

    def _remember(self, rows: Tensor, cache: Tensor, tokens: int) -> Tensor:
        """Write the image rows of [B, H, S, D] to the cache; put all it holds in their place."""
        heads, depth = rows.shape[1], rows.shape[3]
        image = rows[:, :, -tokens:].transpose(1, 2).flatten(2).detach().to(cache.dtype)
        if self.kept is None:
            cache.copy_(image)
            return rows
        scatter_rows_(cache, self.kept, image)
        all_rows = cache.view(*cache.shape[:2], heads, depth).transpose(1, 2).to(rows.dtype)
        return torch.cat([rows[:, :, :-tokens], all_rows], dim=2)


def with_keys_values(here: RotaryAttentionHook, module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Run an attention on the tokens that its site's plan keeps, with the keys_values of the others.

    Raises:
        RuntimeError: if the attention's product is not `scaled_dot_product_attention`.
    """
    hook, runtime = here.hook, here.hook.runtime
    plan = hook.plan
    if runtime.setup.family.leaves_product_out(kwargs):
        return here.original(module, **kwargs)
    if runtime.setup.keys_values == "fresh":
        if plan is None:
            return here.original(module, **kwargs)
        removed = hook.inputs[here.attribute]
        x = kwargs["hidden_states"]
        kwargs = {**kwargs, "hidden_states": torch.cat([x, removed], dim=1)}
        here.skip = removed.shape[1]
        product = SdpaPatch(skip=here.skip)
    else:
        keys, values = runtime.rows_of(here.keys), runtime.rows_of(here.values)
        if keys is None or values is None:
            return here.original(module, **kwargs)
        if hook.row is not None:
            keys, values = keys[hook.row : hook.row + 1], values[hook.row : hook.row + 1]
        product = SdpaPatch(keys=keys, values=values, kept=None if plan is None else plan.kept)
    with product:
        out = here.original(module, **kwargs)
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
    skip = here.rotary.skip
    rows: Tensor = here.original(module, x[:, :-skip] if skip else x, *args, **kwargs)
    return F.pad(rows, (0, 0, 0, skip)) if skip else rows
