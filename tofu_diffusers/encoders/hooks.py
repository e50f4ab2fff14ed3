"""The forwards that are put on an encoder, its blocks and their projections, and their state.

All forwards are module-level functions with their state on the module, so that a deepcopy of a model
carries its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..config import EncoderReduction
from ..hooks.patch import (
    attach,
    bind,
    check_within_reach,
    detach,
    parameters_of,
    state_of,
    with_signature_of,
)
from ..tokens.methods import Method
from ..tokens.sources import BlockReading
from ..tuning.probes import load_probes
from .base import EncoderFamily, Kwargs
from .call import EncoderCall, depth_of

IMPLEMENTATIONS = ("sdpa", "eager")
"""Of attention, those that take a bias for every pair of tokens."""


@dataclass(eq=False)
class EncoderHook:
    """State on an encoder.

    While it runs, `call` holds its tokens. `calls` counts those so far that ended well and were not
    compiled; `tokens` and `inputs`, which are shapes, are of the last one.
    """

    config: EncoderReduction
    family: EncoderFamily
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    blocks: tuple[str, ...]
    method: Method
    merges: tuple[str, ...]
    call: EncoderCall | None = None
    removed: bool = False
    calls: int = 0
    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: Kwargs | None = None

    def __reduce__(self) -> Any:
        # Its forwards would be looked for on the classes, and only when it is read back.
        raise pickle.PicklingError(
            "an encoder with tofu cannot be pickled; call remove_tofu first, or write its weights by "
            "save_pretrained"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderHook:
        # It tells of no calls yet.
        twin = replace(self, call=None, removed=False, calls=0, tokens={}, inputs=None)
        memo[id(self)] = twin
        return twin


@dataclass(eq=False)
class EncoderBlockHook:
    """State on a block; `keys` and `queries` are those of the running block, `probe` is fitted to it."""

    root: EncoderHook
    index: int
    original: Callable[..., Any]
    forward: Callable[..., Any]
    names: tuple[str, ...]
    probe: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None


@dataclass(eq=False)
class NoteHook:
    """State on a projection whose output is kept until its block's tokens leave."""

    block: EncoderBlockHook
    attribute: str
    original: Callable[..., Any]
    forward: Callable[..., Any]


Modules = list[tuple[str, nn.Module]]
Probes = dict[str, Tensor]


def lay_out(
    model: Any, family: EncoderFamily, config: EncoderReduction
) -> tuple[Modules, Modules, Probes]:
    """The encoder's blocks and their attentions, and their probes if any are read. Changes nothing.

    Raises:
        FileNotFoundError: if there is no file of probes where the configuration says.
        ValueError: if it is not built as its family says, cannot be reduced, or the probes are of another
            model.
    """
    try:
        refusal = family.refusal(model)
        blocks = [*model.get_submodule(family.blocks).named_children()]
        attentions = [(name, block.get_submodule(family.attention)) for name, block in blocks]
        for _, attention in attentions:
            attention.get_submodule(family.keys), getattr(attention, family.heads)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} is not built like family {family.name!r}: {error}; name the family "
            "whose blocks are the same, give the part of the model that holds them, or update transformers"
        ) from error
    if refusal is not None:
        raise ValueError(refusal)
    if config.first_block >= len(blocks) and config.ratio > 0:
        raise ValueError(
            f"first_block {config.first_block} is behind the last of {len(blocks)} blocks; lower it"
        )
    if not isinstance(config.schedule, str) and len(config.schedule) != len(blocks):
        raise ValueError(
            f"schedule has {len(config.schedule)} weights, and {type(model).__name__} has {len(blocks)} "
            "blocks; give one for each, or schedule 'share'"
        )
    return blocks, attentions, _probes(attentions, family, config)


def _probes(attentions: Modules, family: EncoderFamily, config: EncoderReduction) -> Probes:
    """The probe of every block, by its name; none if the method reads none."""
    path = config.method_options.get("probe")
    if path is None:
        return {}
    widths: dict[str, Any] = {
        f"{family.blocks}.{name}": attention.get_submodule(family.keys).in_features
        for name, attention in attentions
    }
    return load_probes(path, widths)


def attach_encoder(model: Any, family: EncoderFamily, config: EncoderReduction) -> EncoderHook:
    """Put tofu on an encoder.

    Raises:
        FileNotFoundError: if there is no file of probes where the configuration says.
        ValueError: if `lay_out` refuses.
        RuntimeError: if a forward that must change was replaced by another. It is then as it was.
    """
    blocks, attentions, probes = lay_out(model, family, config)
    original = type(model).forward
    names = tuple(f"{family.blocks}.{name}" for name, _ in blocks)
    root = EncoderHook(
        config,
        family,
        original,
        with_signature_of(original, encoder_forward),
        parameters_of(model),
        names,
        config.make_method(),
        tuple(config.merge_at(depth_of(i, len(names))) for i in range(len(names))),
    )
    noted = {"keys": family.keys}
    if "attention" in root.method.sources:
        noted["queries"] = family.queries
    try:
        attach(model, root.forward, root)
        for i, (_, block) in enumerate(blocks):
            forwards = (type(block).forward, block_forward)
            hook = EncoderBlockHook(root, i, *forwards, parameters_of(block), probes.get(names[i]))
            attach(block, block_forward, hook)
            for attribute, name in noted.items():
                projection = attentions[i][1].get_submodule(name)
                note = NoteHook(hook, attribute, type(projection).forward, note_forward)
                attach(projection, note_forward, note)
    except BaseException:
        detach_encoder(model)
        raise
    return root


def detach_encoder(model: nn.Module) -> None:
    """Give back the exact original of an encoder with tofu.

    Raises:
        RuntimeError: if a forward was replaced since. The encoder is then as it was.
    """
    modules = [module for module in model.modules() if state_of(module) is not None]
    for module in modules:
        check_within_reach(module)
    for module in modules:
        state = state_of(module)
        detach(module)
        if isinstance(state, EncoderHook):
            state.removed = True


def encoder_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one call of the encoder, whose tokens become fewer.

    Raises:
        RuntimeError: if another thread is in a call of it.
        ValueError: if something is asked for that cannot be done with fewer tokens.
    """
    hook: EncoderHook = module.__dict__["_tofu"]
    if hook.call is not None:
        raise RuntimeError(
            f"{type(module).__name__} with tofu is in another thread's call; hold a lock around its calls, "
            "or give each thread a copy.deepcopy of it"
        )
    named = bind(hook.names, args, kwargs)
    _check(hook, module, named)
    mask = named.get("attention_mask") if hook.config.ratio > 0 else None
    hook.call = EncoderCall(
        hook.config,
        hook.method,
        hook.merges,
        hook.family.prefix,
        hook.family.causal,
        kept=hook.family.kept(module, named) if hook.config.ratio > 0 else None,
        padded=mask is not None,
        weights=None if mask is None else mask.to(torch.float32).ne(0).float(),
    )
    try:
        out = hook.original(module, *args, **kwargs)
        states = getattr(out, "hidden_states", None)
        if states is not None and hook.call.positions is not None:
            # The first is the blocks' input, the last was given its rows already.
            history = [None, *hook.call.history[:-1], None]
            out.hidden_states = tuple(
                None if x is None else hook.call.broadcast(x, assign)
                for x, assign in zip(states, history, strict=True)
            )
        if not torch.compiler.is_compiling():
            hook.calls += 1
            hook.tokens = hook.call.tokens
            # What is captured costs nothing, and a copy without hooks captures nothing.
            hook.inputs = {
                name: tree_map(_shape, value)
                for name, value in named.items()
                if not name.startswith("output_")
            }
        return out
    except BaseException:
        if not torch.compiler.is_compiling():
            _forget_readings(module)
        raise
    finally:
        hook.call = None


def _forget_readings(module: nn.Module) -> None:
    """Drop what blocks noted in a call that failed, and with it all activations of its gradients."""
    for part in module.modules():
        state = state_of(part)
        if isinstance(state, EncoderBlockHook):
            state.keys = state.queries = None


def _check(hook: EncoderHook, module: Any, named: Kwargs) -> None:
    """Refuse what cannot be done with fewer tokens.

    Raises:
        ValueError: if it is asked for.
    """
    if hook.config.ratio == 0:
        return

    def asked(name: str) -> Any:
        value = named.get(name)
        return getattr(module.config, name, None) if value is None else value

    implementation = module.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention {implementation!r} takes no bias by token, which merged tokens need; call "
            "model.set_attn_implementation('sdpa') first"
        )
    if asked("output_attentions"):
        raise ValueError(
            "output_attentions=True asks for maps over all tokens, and blocks have fewer; leave it out, or "
            "call remove_tofu(model) first"
        )
    if asked("output_hidden_states") and asked("return_dict") is False:
        raise ValueError(
            "output_hidden_states=True with return_dict=False cannot be told apart in a tuple; leave "
            "return_dict out"
        )
    mask = named.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {shape}; give [batch, tokens] with 0 at padding, from which the mask of the "
            "tokens that are left is made"
        )


def block_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one block: attention, then tokens leave, then its feed-forward."""
    hook: EncoderBlockHook = module.__dict__["_tofu"]
    root, family, call = hook.root, hook.root.family, hook.root.call
    if call is None:  # the block alone
        return hook.original(module, *args, **kwargs)
    given = bind(hook.names, args, kwargs)
    x, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
    tokens = x.shape[1] if call.assign is None else call.assign.shape[1]
    remove = call.count(tokens, hook.index)
    if hook.index == 0 and call.kept is not None:
        # Of a text without an end, any other token will do.
        call.kept = torch.where(call.kept < call.prefix, tokens - 1, call.kept)
    before = x
    named = given if call.positions is None else family.follow(given, call.positions)
    x, *beside = family.attend(module, x, call.bias(mask, x), named)
    heads = int(getattr(module.get_submodule(family.attention), family.heads))
    call.tokens[root.blocks[hook.index]] = (x.shape[1], x.shape[1] - remove)
    x = call.leave(x, remove, hook.index, heads, lambda: _reading(hook, before, heads))
    hook.keys = hook.queries = None
    x = family.feed_forward(module, x)
    if hook.index == len(root.blocks) - 1:
        x = call.broadcast(x, call.assign)
    return family.output(x, tuple(beside), given)


def _reading(hook: EncoderBlockHook, x: Tensor, heads: int) -> BlockReading:
    """What importance is read from."""
    keys, queries = hook.keys, hook.queries
    assert keys is not None

    def scaled() -> Tensor:
        assert queries is not None
        scale: float = (queries.shape[2] // heads) ** hook.root.family.query_scale
        return queries * scale

    call = hook.root.call
    assert call is not None
    # Of use to attention alone, which needs queries.
    bias = None if queries is None else call.added(x)
    probe = None if hook.probe is None else hook.probe.to(x.device)
    return BlockReading(x, lambda: keys, scaled, lambda: heads, probe, bias, call.weights)


def note_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a projection and keep what it gave."""
    hook: NoteHook = module.__dict__["_tofu"]
    out = hook.original(module, *args, **kwargs)
    if hook.block.root.call is not None:
        setattr(hook.block, hook.attribute, out)
    return out


def _shape(leaf: Any) -> Any:
    """A tensor's shape alone; numbers in float32, as the copy that is counted on has them."""
    if not isinstance(leaf, Tensor):
        return leaf
    dtype = torch.float32 if leaf.is_floating_point() else leaf.dtype
    return torch.empty(leaf.shape, dtype=dtype, device="meta")
