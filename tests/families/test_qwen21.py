"""Qwen-Image 2.1 as its pipeline runs it: the whole sequence first, the image alone in later steps."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from tests import tiny
from tests.denoisers import DENOISERS
from tofu_diffusers import StepSkipping, TokenReduction, apply_tofu

STEPS = 5


@pytest.fixture
def model():
    return tiny.randomise(DENOISERS["QwenImage21Transformer2DModel"].build())


def generate(model, handle=None, moving=False, references=False):
    """The image's predictions, by step."""
    inputs = DENOISERS["QwenImage21Transformer2DModel"].arguments()
    if references:  # of 2 x 4 tokens, for 2 places in the text
        first = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3))
        inputs["hidden_states"] = torch.cat([first, inputs["hidden_states"]], dim=1)
        inputs["img_shapes"] = [[(1, 2, 4), (1, 4, 6)]] * 2
        inputs["img_mask"][:, 1:3] = True
    inputs["kv_cache"] = QwenImage21KVCache(2)
    image, found = inputs["hidden_states"], []
    for step in range(STEPS):
        if handle is not None:
            handle.step(step, STEPS)
        inputs["kv_cache_mode"] = "cached" if step else "extract"
        inputs["hidden_states"] = image * (1 + 0.1 * step * moving)
        found.append(model(**inputs, return_dict=False)[0][:, -24:])
    return found


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("scope", ["attention", "block"])
@pytest.mark.parametrize("keys_values", ["fresh", "cached"])
@pytest.mark.parametrize("warmup", [1, 3])
@torch.no_grad()
def test_nothing_changes_while_the_input_does_not(model, warmup, keys_values, scope, references):
    expected = generate(model, references=references)
    config = TokenReduction(
        0.5,
        method="random",
        unmerge="temporal",
        warmup_steps=warmup,
        keys_values=keys_values,
        scope=scope,
    )
    rows, out = [], model.transformer_blocks[-1].attn.to_out[0]
    out.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    found = generate(model, apply_tofu(model, config), references=references)
    # What is remembered of the whole sequence is of no use to the image alone.
    whole = max(1, warmup - 1)
    before = 7 - 2 + 8 if references else 7
    assert rows == [before + 24] + [24] * whole + [12] * (STEPS - 1 - whole)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys_values", ["fresh", "cached", "dropped"])
@torch.no_grad()
def test_the_text_does_not_see_the_image(model, keys_values):
    """What is kept of it in a first step of few tokens is that of one of all."""
    warmup = int(keys_values == "cached")
    caches = []
    for ratio in (0, 0.5):
        inputs = DENOISERS["QwenImage21Transformer2DModel"].arguments()
        handle = apply_tofu(
            model,
            ratio=ratio,
            method="random",
            keys_values=keys_values,
            warmup_steps=warmup,
            unmerge="temporal" if warmup else "copy",
        )
        for step in range(2):
            handle.step(step, 2)
            model(**inputs)
        caches.append(inputs["kv_cache"])
    for one, other in zip(*(each.layer_caches for each in caches), strict=True):
        torch.testing.assert_close(one.k, other.k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.v, other.v, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_texts_without_padding_share_one_mask(model):
    """Both images of the batch keep the same tokens, and reproduce a still input."""
    inputs = DENOISERS["QwenImage21Transformer2DModel"].arguments()
    for name in ("kv_cache", "kv_cache_mode", "encoder_hidden_states_mask"):
        del inputs[name]
    expected = model(**inputs)[0]
    handle = apply_tofu(
        model, ratio=0.5, method="random", keys_values="cached", unmerge="temporal", warmup_steps=1
    )
    for step in range(2):
        handle.step(step, 2)
        out = model(**inputs)[0]
    assert handle.stats()[0]["tokens_kept"] < handle.stats()[0]["tokens_in"]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_steps_are_skipped_where_the_output_changes_its_shape(model):
    with apply_tofu(
        model, StepSkipping(1.5, warmup_steps=1, rule="even", corrector=False)
    ) as handle:
        found = generate(model, handle, moving=True)
        assert any(each.skipped for each in handle.inspect()[0].steps)
    assert all(each.shape == (2, 24, 16) and each.isfinite().all() for each in found)


@torch.no_grad()
def test_the_first_step_counts_though_it_returns_more_than_the_image(model):
    """What comes next is forecast from its image alone, on a straight line, and no step more is computed."""
    before = generate(model, moving=True)
    config = StepSkipping(1.6, warmup_steps=2, rule="even", corrector=False)
    with apply_tofu(model, config) as handle:
        found = generate(model, handle, moving=True)
        assert handle.summary().steps[0].plan == "##..#"
    for step, (one, other) in enumerate(zip(found, before, strict=True)):
        ahead = {2: 1, 3: 2}.get(step)
        expected = other if ahead is None else before[1] + ahead * (before[1] - before[0])
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
