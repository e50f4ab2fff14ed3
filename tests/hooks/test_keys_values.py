"""Keys and values: what attention sees of removed tokens, against direct evaluations."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from tests import tiny
from tests.inputs import sd3_inputs, unet_inputs
from tofu_diffusers import apply_tofu, remove_tofu
from tofu_diffusers.tokens.methods import matching

UNET_SITE = "down_blocks.0.attentions.0.transformer_blocks.0"
CACHED_UNMERGES = ("temporal", "taylor", "blend")


def models():
    yield tiny.tiny_sd().unet, unet_inputs()
    yield tiny.tiny_sd3().transformer, sd3_inputs()
    yield tiny.tiny_sd3(dual=True).transformer, sd3_inputs()


@pytest.mark.parametrize("keys_values", ["fresh", "cached"])
@pytest.mark.parametrize("scope", ["attention", "block"])
@torch.no_grad()
def test_with_every_token_kept_the_output_is_the_original(keys_values, scope):
    for model, inputs in models():
        expected = model(**inputs)[0]
        # One token of 280 and fewer would go: ratio 0.001 removes int(0.28) = 0.
        handle = apply_tofu(
            model, ratio=0.001, method="random", scope=scope, keys_values=keys_values
        )
        for step in range(3):
            handle.step(step, 3)
            assert torch.equal(model(**inputs)[0], expected)


@torch.no_grad()
def test_fresh_is_kept_queries_against_all_keys_and_values():
    """On a plain block: unmerged by copy, compared with an evaluation written out by hand."""
    unet = tiny.tiny_sd().unet
    block = unet.get_submodule(UNET_SITE)
    plain = copy.deepcopy(block)
    inputs = unet_inputs()
    seen = {}
    block.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(
            x=args[0], text=kwargs["encoder_hidden_states"], out=out
        ),
        with_kwargs=True,
    )
    handle = apply_tofu(unet, ratio=0.5, method="random", scope="block", keys_values="fresh")
    unet(**inputs)
    generation = handle._generations[0][1]
    plan = next(
        p
        for u in generation.runtime.setup.sites
        for p in u.plan_cache.plans.values()
        if p.assign.shape[1] == 140
    )
    x, text = seen["x"], seen["text"]
    kept = plan.rows(x)
    normed = plain.norm1(x)
    attention = plain.attn1
    heads = lambda rows: rows.unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # noqa: E731
    query = heads(attention.to_q(plain.norm1(kept)))
    key, value = heads(attention.to_k(normed)), heads(attention.to_v(normed))
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    hidden = kept + attention.to_out[0](mixed)
    hidden = hidden + plain.attn2(plain.norm2(hidden), encoder_hidden_states=text)
    hidden = hidden + plain.ff(plain.norm3(hidden))
    expected = x + plan.broadcast(hidden - kept)
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-5)
    # Without them the same plan gives something else: the test can tell.
    assert not torch.allclose(plain(kept, encoder_hidden_states=text), hidden, atol=1e-3)


@pytest.mark.parametrize("scope", ["attention", "block"])
@torch.no_grad()
def test_cached_equals_fresh_on_unchanged_inputs_after_an_unreduced_step(scope):
    for model, inputs in models():
        outputs = {}
        for keys_values in ("fresh", "cached"):
            # Temporal unmerge of unchanged inputs gives every block its own unchanged input.
            handle = apply_tofu(
                model,
                ratio=0.5,
                method="random",
                unmerge="temporal",
                scope=scope,
                keys_values=keys_values,
                warmup_steps=1,
            )
            for step in range(2):
                handle.step(step, 4)
                outputs[keys_values] = model(**inputs)[0]
            assert any(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
        torch.testing.assert_close(outputs["cached"], outputs["fresh"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unmerge", CACHED_UNMERGES)
@pytest.mark.parametrize("keys_values", ["fresh", "cached"])
@torch.no_grad()
def test_nothing_changes_while_the_input_does_not(unmerge, keys_values):
    """Own last update and own keys and values: a static input is reproduced with half the tokens."""
    for model, inputs in models():
        expected = model(**inputs)[0]
        handle = apply_tofu(
            model,
            ratio=0.5,
            method="random",
            unmerge=unmerge,
            keys_values=keys_values,
            warmup_steps=2,
        )
        for step in range(4):
            handle.step(step, 4)
            out = model(**inputs)[0]
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        remove_tofu(model)
        assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("method", ["importance", "random"])
@pytest.mark.parametrize("unmerge", ["taylor", "temporal", "blend", "copy"])
@torch.no_grad()
def test_a_match_is_sought_only_where_it_is_read(unmerge, method, monkeypatch):
    """A token with a past of its own needs no other's; that it is not sought changes nothing."""
    sought, match = [], matching.match
    monkeypatch.setattr(matching, "match", lambda *given: sought.append(1) or match(*given))
    options = {"method": method, "unmerge": unmerge, "merge": "prune", "keys_values": "fresh"}
    for model, inputs in models():
        draws = [
            {**inputs, (name := next(iter(inputs))): torch.roll(inputs[name], step, -1)}
            for step in range(5)
        ]
        outputs = []
        for forced in (False, True):
            sought.clear()
            handle = apply_tofu(model, ratio=0.5, warmup_steps=2, **options)
            generation = handle._generations[0][1]
            assert generation.runtime.setup.needs_assignment == (unmerge in ("blend", "copy"))
            setup = generation.runtime.setup
            object.__setattr__(setup, "needs_assignment", setup.needs_assignment or forced)
            made = []
            for step, given in enumerate(draws):
                handle.step(step, 5)
                made.append(model(**given)[0])
            assert bool(sought) == generation.runtime.setup.needs_assignment
            outputs.append(torch.stack(made))
        assert torch.equal(*outputs)
        remove_tofu(model)


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
@pytest.mark.parametrize("keys_values", ["dropped", "fresh", "cached"])
def test_any_attention_backend_gives_the_same(processor, keys_values):
    """Also with classic and sliced attention, set before or after applying."""
    options = {"ratio": 0.5, "method": "random", "unmerge": "temporal", "keys_values": keys_values}
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, **options):
        fused = tiny.generate(pipe, steps=4)
        pipe.unet.set_attn_processor(processor)
        torch.testing.assert_close(tiny.generate(pipe, steps=4), fused, rtol=1e-3, atol=1e-3)
    with apply_tofu(pipe, **options):
        torch.testing.assert_close(tiny.generate(pipe, steps=4), fused, rtol=1e-3, atol=1e-3)


def test_fused_projections_are_refused_with_keys_and_values_and_run_without():
    pipe = tiny.tiny_sd()
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
        apply_tofu(pipe, ratio=0.5, keys_values="cached")
    with apply_tofu(pipe, ratio=0.5, method="tome"):
        tiny.generate(pipe)
    pipe.unet.unfuse_qkv_projections()
    with apply_tofu(pipe, ratio=0.5, keys_values="cached"):
        tiny.generate(pipe)
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5, keys_values="fresh"):
        pipe.unet.fuse_qkv_projections()
        with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
            tiny.generate(pipe)


def test_cache_memory_is_counted_and_limited():
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5, keys_values="cached", **tiny.SHORT) as handle:
        generation, seen = handle._generations[0][1], []

        def look(module, args):
            tensors = [
                tensor
                for site in generation.runtime.setup.sites
                for cache in site.updates.values()
                for tensor in (cache.value, cache.slope, cache.last)
            ]
            tensors += [
                rows for p in generation.runtime.setup.projections for rows in p.rows.values()
            ]
            tensors += [
                t
                for state in generation.runtime.caches.corrector.states.values()
                for t in vars(state).values()
            ]
            seen.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

        hook = pipe.unet.conv_out.register_forward_pre_hook(look)
        tiny.generate(pipe, steps=4)
        hook.remove()
        held = seen[-1]
        assert held == handle.summary().cache_bytes > 0
        # Nothing is kept while the latents are decoded.
        assert not any(site.updates for site in generation.runtime.setup.sites)
        assert not any(projection.rows for projection in generation.runtime.setup.projections)
        assert not generation.runtime.caches.corrector.states
    gib = held / 2**30
    with apply_tofu(pipe, ratio=0.5, keys_values="cached", **tiny.SHORT, memory_limit=gib * 1.01):
        tiny.generate(pipe, steps=4)
    ran = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: ran.append(module))
    with (
        apply_tofu(pipe, ratio=0.5, keys_values="cached", **tiny.SHORT, memory_limit=gib * 0.99),
        pytest.raises(
            MemoryError, match=r"caches need 0.00\d+ GiB, above memory_limit 0.00\d+ GiB"
        ),
    ):
        tiny.generate(pipe, steps=4)
    assert not ran
