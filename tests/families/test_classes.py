"""The laws of token reduction on a tiny model of every class that a family lists.

A new family needs a tiny model in tests/denoisers, which step skipping needs anyway, and nothing here.
"""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tests import tiny
from tests.denoisers import DENOISERS
from tofu_diffusers import FAMILIES, apply_tofu, remove_tofu
from tofu_diffusers.families import known_family
from tofu_diffusers.steps.outputs import tensors_in

CLASSES = sorted(
    name for family in FAMILIES.values() for name in family.classes if name in DENOISERS
)
# Of a class that are built or called otherwise: changes of the tiny model's configuration and arguments.
# Where a picture is the first frame, each token of LTX has a time of its own, which is 0 there.
TIMES = torch.tensor([0.0, 500.0, 500.0]).repeat_interleave(24).expand(2, -1)
VARIANTS = {
    "HunyuanVideoTransformer3DModel-token_replace": (
        {"image_condition_type": "token_replace"},
        {},
    ),
    "LTX2VideoTransformer3DModel-first_frame": (
        {},
        {
            "timestep": TIMES,
            "audio_timestep": torch.full((2,), 500.0),
            "audio_sigma": torch.full((2,), 500.0),
            "use_cross_timestep": False,
        },
    ),
    "LTXVideoTransformer3DModel-first_frame": ({}, {"timestep": TIMES}),
    "MotifVideoTransformer3DModel-no_decoder": ({"num_decoder_layers": 0}, {}),
}
# Between their stacks, kept tokens see others: norms and convolutions over the grid, attention over time.
MORE_THAN_ATTENTION = {
    "I2VGenXLUNet",
    "LatteTransformer3DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNet3DConditionModel",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
}
# Their attention is a sum over keys, without the product that others end in.
LINEAR = {"SanaTransformer2DModel"}
PRUNED = {"ratio": 0.5, "method": "tome", "merge": "prune", "share": "resolution"}


@pytest.fixture(scope="module", params=[*CLASSES, *VARIANTS])
def built(request):
    """(denoiser, arguments of one call of a batch of two different images, its family)"""
    described = DENOISERS[request.param.partition("-")[0]]
    config, arguments = VARIANTS.get(request.param, ({}, {}))
    described = replace(described, config={**described.config, **config})
    model = tiny.randomise(described.build())
    return model, described.arguments() | arguments, known_family(model)


@pytest.fixture
def case(built):
    yield built
    remove_tofu(built[0])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def output_of(model, inputs):
    """The first of what is returned: a tensor, or a list of one a row.  -> [B, ...]"""
    out = model(**inputs, return_dict=False)
    first = out if isinstance(out, torch.Tensor) else out[0]
    return torch.stack(first) if isinstance(first, list) else first


def run(model, inputs, steps=1, **options):
    """The last of some steps with the same inputs, and the handle."""
    handle = apply_tofu(model, **options)
    for step in range(steps):
        handle.step(step, steps)
        out = output_of(model, inputs)
    return out, handle


def drift(out, expected):
    """Largest difference in units of the expected spread."""
    return float((out - expected).abs().max() / expected.std())


def plans_of(handle):
    """Plans over the whole batch, by resolution."""
    return {
        cache.resolution: plan
        for cache in handle._generations[0][1].runtime.setup.plan_caches
        for key, plan in cache.plans.items()
        if "/" in key
    }


def keys_values_of(family):
    return [
        each for each in ("dropped", "fresh", "cached") if each not in family.keys_values_refused
    ]


def scope_of(family):
    """The widest scope that it has."""
    return next(each for each in ("block", "attention") if each not in family.scopes_refused)


def observed(family, block):
    """The module of a block whose tokens shrink, in that scope."""
    if scope_of(family) == "block":
        return block
    return next(iter(family.attentions(block).values()))


def refuses(model, family, scope):
    """Whether the family refuses a scope, which it then says."""
    if scope not in family.scopes_refused:
        return False
    with pytest.raises(ValueError, match=f"scope '{scope}' cannot be had .*; use scope="):
        apply_tofu(model, ratio=0.5, method="random", scope=scope)
    return True


# ---- nothing to remove, and removed -------------------------------------------------------------


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_without_anything_to_remove_and_after_removal_the_output_is_the_original(case, scope):
    model, inputs, family = case
    if refuses(model, family, scope):
        return
    expected = output_of(model, inputs)
    for keys_values in keys_values_of(family):
        options = {"method": "random", "scope": scope, "keys_values": keys_values}
        out, _ = run(model, inputs, 2, ratio=0.001, warmup_steps=1, **options)
        assert torch.equal(out, expected)
        out, handle = run(model, inputs, 2, ratio=0.5, warmup_steps=1, **options)
        rows = handle.stats()
        assert rows and all(row["tokens_kept"] < row["tokens_in"] for row in rows)
        assert torch.isfinite(out).all() and not torch.equal(out, expected)
        remove_tofu(model)
        assert torch.equal(output_of(model, inputs), expected)
    assert not any("_tofu" in module.__dict__ for module in model.modules())


# ---- the kept-token oracle ----------------------------------------------------------------------


class Unseen(TorchFunctionMode):
    """Hides keys of the first attention product from all queries, by the product's own mask.

    gone: [B, S], True where a key is hidden; shorter than the product's keys, its tokens come last, or first.
    """

    def __init__(self, gone, image_first):
        super().__init__()
        self.gone, self.image_first, self.calls = gone, image_first, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, *_ = args + tuple(
            kwargs[k] for k in ("query", "key", "value") if k in kwargs
        )
        # Others may come before, of what stands in front of the image alone.
        if key.shape[2] < self.gone.shape[1]:
            return func(*args, **kwargs)
        # Of the whole batch, or one of each row.
        gone = self.gone[self.calls * len(key) : (self.calls + 1) * len(key)]
        self.calls += 1
        if not len(gone):
            return func(*args, **kwargs)
        mask = kwargs.pop("attn_mask", args[3] if len(args) > 3 else None)
        others = key.shape[2] - gone.shape[1]
        seen = F.pad(~gone, (0, others) if self.image_first else (others, 0), value=True)
        seen = seen[:, None, None].expand(-1, 1, query.shape[2], -1)
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
        for name in ("query", "key", "value"):
            kwargs.pop(name, None)
        return func(query, key, value, attn_mask=mask, **kwargs)


def hide(attention, gone, name):
    """Make an attention's calls run under `Unseen`; what takes it off again."""
    if name in LINEAR:
        # Rows of 0 add nothing to its sums.
        hook = attention.to_k.register_forward_hook(
            lambda module, args, out: out.masked_fill(gone[..., None], 0)
        )
        return hook.remove
    stack, image_first = ExitStack(), name in IMAGE_FIRST

    def before(module, args):
        stack.enter_context(Unseen(gone, image_first))

    def after(module, args, out):
        stack.pop_all().close()

    hooks = [attention.register_forward_pre_hook(before), attention.register_forward_hook(after)]
    return lambda: [hook.remove() for hook in hooks]


IMAGE_FIRST = {
    "HiDreamImageTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "MochiTransformer3DModel",
    "MotifVideoTransformer3DModel",
    "SD3Transformer2DModel",
}
"""Classes whose joint attention has the text behind the image."""
READS_REMOVED = {"MotifVideoTransformer3DModel": "num_decoder_layers"}
"""Classes whose last stack, if they have this, attends to what an earlier one left of all tokens."""


def test_the_model_on_its_kept_tokens_is_the_model_that_cannot_see_the_others(case):
    """The unmodified model, with removed tokens as keys of no query, computes the same kept tokens.

    So everything follows the kept tokens: positions, masks, modulation, whatever the block takes.
    """
    model, inputs, family = case
    name = type(model).__name__
    first, stacks, scope = {}, family.block_stacks(model), scope_of(family)
    if name in MORE_THAN_ATTENTION or scope == "attention":
        stacks = stacks[:1]
    if getattr(model, READS_REMOVED.get(name, ""), 0):
        stacks = stacks[:-1]

    def note(module, args, kwargs, out):
        first["left"] = family.output(out)

    _, block = stacks[-1].blocks[-1 if scope == "block" else 0]
    hook = observed(family, block).register_forward_hook(note, with_kwargs=True)
    # What one stack removed another must not keep.
    method = "tome" if len({stack.resolution for stack in stacks}) == 1 else "random"
    _, handle = run(model, inputs, **PRUNED | {"scope": scope, "unmerge": "copy", "method": method})
    plans, left = plans_of(handle), first["left"]
    remove_tofu(model)
    takes_off = []
    for stack in stacks:
        plan = plans[stack.resolution]
        gone = torch.ones_like(plan.assign, dtype=torch.bool).scatter(1, plan.kept, False)
        assert gone.any()
        for _, each in stack.blocks:
            for attention in (family.attentions(each) | family.listeners(each)).values():
                takes_off.append(hide(attention, gone, name))
    output_of(model, inputs)
    for take_off in takes_off:
        take_off()
    hook.remove()
    plan = plans[stacks[-1].resolution]
    torch.testing.assert_close(plan.rows(left), plan.rows(first["left"]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(left, first["left"], atol=1e-3)


# ---- keys and values ----------------------------------------------------------------------------


def test_fresh_keys_and_values_compute_kept_tokens_as_the_unreduced_block_would(case):
    model, inputs, family = case
    if "fresh" in family.keys_values_refused:
        return
    noted, scope = [], scope_of(family)
    _, block = family.block_stacks(model)[0].blocks[0]
    hook = observed(family, block).register_forward_hook(
        lambda module, args, out: noted.append(family.output(out))
    )
    output_of(model, inputs)
    _, handle = run(model, inputs, scope=scope, keys_values="fresh", **PRUNED)
    hook.remove()
    whole, reduced = noted
    plan = plans_of(handle)[family.block_stacks(model)[0].resolution]
    torch.testing.assert_close(plan.rows(reduced), plan.rows(whole), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(reduced, whole, atol=1e-3)


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_nothing_changes_while_the_input_does_not(case, scope):
    """Own last update, own keys and values: still inputs are reproduced with half of the tokens."""
    model, inputs, family = case
    if refuses(model, family, scope):
        return
    expected = output_of(model, inputs)
    for keys_values in keys_values_of(family):
        options = {"ratio": 0.5, "method": "random", "unmerge": "temporal", "warmup_steps": 1}
        out, _ = run(model, inputs, 3, scope=scope, keys_values=keys_values, **options)
        assert (drift(out, expected) < 1e-4) is (keys_values != "dropped"), keys_values


@pytest.mark.parametrize("keys_values", ["dropped", "fresh", "cached"])
def test_what_is_computed_shrinks(case, keys_values):
    """Rows that the blocks' linear layers are given, seen from outside."""
    model, inputs, family = case
    if keys_values in family.keys_values_refused:
        with pytest.raises(
            ValueError, match=f"keys_values '{keys_values}'|keys_values={keys_values!r}"
        ):
            run(
                model,
                inputs,
                2,
                ratio=0.5,
                method="random",
                keys_values=keys_values,
                scope=scope_of(family),
            )
        return
    layers = {}
    for stack in family.block_stacks(model):
        for path, block in stack.blocks:
            for name, module in block.named_modules():
                if isinstance(module, torch.nn.Linear):
                    layers[module] = (f"{path}.{name}", stack.resolution)
    given = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args: given.setdefault(module, []).append(args[0].shape)
        )
        for layer in layers
    ]
    handle = apply_tofu(
        model,
        ratio=0.5,
        method="random",
        merge="prune",
        keys_values=keys_values,
        warmup_steps=1,
        scope=scope_of(family),
    )
    handle.step(0, 2)
    output_of(model, inputs)
    whole = {layer: shapes for layer, shapes in given.items()}
    given.clear()
    handle.step(1, 2)
    output_of(model, inputs)
    for hook in hooks:
        hook.remove()
    grids = handle._generations[0][1].runtime.call.grids
    shrunk = 0
    for layer, shapes in whole.items():
        _, resolution = layers[layer]
        grid = grids[resolution]
        reduced = given[layer]
        if len(shapes[0]) < 3 or shapes[0][1] < grid.tokens:
            continue  # of the text, or of the time
        less = shapes[0][1] - reduced[0][1]
        assert less in (0, grid.tokens // 2), layers[layer]
        shrunk += less > 0
    assert shrunk


def test_flops_are_counted_and_fewer(case):
    model, inputs, family = case
    _, handle = run(model, inputs, ratio=0.5, method="random", scope=scope_of(family))
    assert handle.summary().speedup > 1


# ---- images of a batch --------------------------------------------------------------------------


@pytest.mark.parametrize("keys_values", ["dropped", "fresh", "cached"])
def test_images_of_a_batch_do_not_know_of_each_other(case, keys_values):
    model, inputs, family = case
    if keys_values in family.keys_values_refused:
        return
    options = PRUNED | {"share": None, "keys_values": keys_values, "scope": scope_of(family)}
    together, _ = run(model, inputs, **options)
    for image in range(2):
        alone, _ = run(model, row_of(inputs, image), **options)
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-3, atol=1e-4)


def row_of(inputs, image):
    """The arguments of one image of the two."""

    def one(leaf):
        of_batch = isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == 2
        return leaf[image : image + 1] if of_batch else leaf

    row = {
        name: value[image : image + 1]
        if isinstance(value, list) and len(value) == 2
        else tree_map(one, value)
        for name, value in inputs.items()
    }
    text = inputs.get("encoder_hidden_states")
    if isinstance(text, torch.Tensor):  # of a video, perhaps a row for each frame
        row["encoder_hidden_states"] = text.chunk(2)[image]
    layers = inputs.get("encoder_hidden_states_llama3")
    if layers is not None:  # layers before rows
        row["encoder_hidden_states_llama3"] = layers[:, image : image + 1]
    return row


def test_gradients_reach_the_latents(case):
    model, inputs, family = case
    with torch.enable_grad():
        first = tensors_in(inputs)[0].requires_grad_()
        out, _ = run(model, inputs, ratio=0.5, method="tofu", scope=scope_of(family))
        (gradient,) = torch.autograd.grad(out.square().mean(), first)
    first.requires_grad_(False)
    assert gradient.abs().sum() > 0
