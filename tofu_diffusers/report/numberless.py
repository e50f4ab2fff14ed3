"""Runs a denoiser on the meta device though it asks for numbers, of which there are none, only shapes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.fx.experimental._config as shapes_config
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# What is replaced meanwhile is everybody's: two threads by turns would put back each other's.
_REPLACING = threading.RLock()


@contextmanager
def without_numbers() -> Iterator[None]:
    """Let a denoiser run on the meta device, whatever it asks of its numbers that does not change FLOPs.

    Of a mask all is taken for true, as of a prompt that fills its length; torch 2.4 cannot.
    """
    flag = "meta_nonzero_assume_all_nonzero"
    patch: Any = shapes_config.patch  # type: ignore[attr-defined]
    full = patch(**{flag: True}) if hasattr(shapes_config, flag) else nullcontext()
    with _REPLACING:
        autocast = torch.autocast
        torch.autocast = _Autocast  # type: ignore[misc]
        try:
            with full, Numberless():
                yield
        finally:
            torch.autocast = autocast  # type: ignore[misc]


class Numberless(TorchFunctionMode):
    """Answers for tensors on the meta device: of a mask all is true, so of its opposite nothing.

    Numbers that a shape follows from, such as the size of a picture, are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opposites: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__":  # a shape, a dtype, a device: half of all calls
            return func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in SAME_SHAPE:
                return torch.empty_like(args[0])
            if func in SHORTER:
                return SHORTER[func](*args, **kwargs)
        if func is torch.tensor:
            return func(*args, **{**kwargs, "device": "cpu"})
        if func is Tensor.bincount and args[0].is_meta:
            return torch.tensor([args[0].numel()])  # of experts, who are alike: one has all tokens
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        if func is Tensor.__setitem__ and args[0].is_meta:
            return None
        if func is Tensor.__getitem__:
            if any(args[1] is each for each in self.opposites):
                return args[0][:0]
            args = (args[0], _to_the_end(args[1]))
        # One real number is as good as any.
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mixed = len({each.is_meta for each in tensors if each.is_meta or each.ndim}) > 1
        if mixed and not (func in TAKES_REAL and tensors[0].is_meta):
            # Asked of both, kernels of the CPU read numbers where there are none.
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        out = func(*args, **kwargs)
        if func is Tensor.__invert__ and out.is_meta and out.ndim == 1:
            self.opposites.append(out)
        return out


# With a type; torch gives it none.
broadcast: Callable[..., torch.Size] = torch.broadcast_shapes


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Its two matrix products; a head of keys may serve several of queries."""
    outer = broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    batch = math.prod(outer + query.shape[-3:-2])
    queries, keys = query.shape[-2], key.shape[-2]
    scores = torch.bmm(
        query.new_empty(batch, queries, query.shape[-1]), key.new_empty(batch, key.shape[-1], keys)
    )
    torch.bmm(scores, value.new_empty(batch, keys, value.shape[-1]))
    return query.new_empty(*outer, *query.shape[-3:-1], value.shape[-1])


def _pointwise(x: Tensor, other: Any, **_: Any) -> Tensor:
    shape = broadcast(x.shape, getattr(other, "shape", ()))
    return torch.empty(shape, dtype=torch.result_type(x, other), device="meta")


SAME_SHAPE = {
    *(functional.group_norm, functional.layer_norm, functional.silu, functional.gelu),
    *(Tensor.clamp, Tensor.clamp_),
}
"""What no FLOPs are counted of, and whose kernels for shapes alone took a third of the time."""

SHORTER: dict[Any, Callable[..., Tensor]] = {
    functional.linear: _linear,
    functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys((Tensor.add, Tensor.sub, Tensor.mul), _pointwise),
}
"""What has the same FLOPs, and kernels for shapes alone that take half of the time."""

TAKES_REAL = (Tensor.__getitem__, Tensor.repeat_interleave)
"""What gives a tensor without numbers another shape by numbers of another one."""


class _Autocast(torch.autocast):
    """Autocast, which knows nothing of the meta device."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


def _to_the_end(index: Any) -> Any:
    """An index with slices up to a tensor (the length of a prompt) made whole."""
    if isinstance(index, tuple):
        return tuple(_to_the_end(each) for each in index)
    if isinstance(index, slice) and isinstance(index.stop, Tensor):
        return slice(index.start, None, index.step)
    return index


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf
