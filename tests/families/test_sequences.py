"""Calls that single classes are given, beside those of their tiny models."""

from dataclasses import replace

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline

from tests import tiny
from tests.denoisers import DENOISERS
from tests.tiny_pipelines import PIPELINES, plain_texts
from tofu_diffusers import StepSkipping, apply_tofu


def of(name):
    return tiny.randomise(DENOISERS[name].build()), DENOISERS[name].arguments()


@pytest.mark.parametrize("scope", ["attention", "block"])
@pytest.mark.parametrize("keys_values", ["fresh", "cached"])
@torch.no_grad()
def test_a_square_image_of_hidream_has_no_padding(scope, keys_values):
    model, inputs = of("HiDreamImageTransformer2DModel")
    inputs["hidden_states"] = inputs["hidden_states"][..., :8]
    (expected,) = model(**inputs, return_dict=False)
    options = {"method": "random", "unmerge": "temporal", "warmup_steps": 1, "scope": scope}
    handle = apply_tofu(model, ratio=0.5, keys_values=keys_values, **options)
    for step in range(3):
        handle.step(step, 3)
        (found,) = model(**inputs, return_dict=False)
    assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_texts_of_hidream_stand_between_its_blocks():
    model, inputs = of("HiDreamImageTransformer2DModel")
    apply_tofu(model, ratio=0.5, method="tofu", scope="span")
    with pytest.raises(ValueError, match="scope 'span' cannot run with a text for every block"):
        model(**inputs)


def test_hidream_refuses_patches():
    model, inputs = of("HiDreamImageTransformer2DModel")
    apply_tofu(model, ratio=0.5, method="tofu")
    with pytest.raises(ValueError, match=r"give latents \[B, C, H, W\]"):
        model(**inputs, hidden_states_masks=torch.ones(2, 24))


@torch.no_grad()
def test_z_image_refuses_rows_of_other_lengths():
    model, inputs = of("ZImageTransformer2DModel")
    inputs["x"][1] = inputs["x"][1][..., :8]
    apply_tofu(model, ratio=0.5, method="tofu")
    with pytest.raises(ValueError, match="must have one size"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"omni mode.*speedup=2.0"):
        model(**inputs | {"x": [[each] for each in inputs["x"]]})
    # Steps of them are skipped all the same.
    with apply_tofu(
        model, StepSkipping(1.5, warmup_steps=1, rule="even", corrector=False)
    ) as handle:
        for step in range(4):
            handle.step(step, 4)
            (found,) = model(**inputs, return_dict=False)
        assert any(each.skipped for each in handle.inspect()[0].steps)
    assert [each.shape[-1] for each in found] == [12, 8]


def test_prx_refuses_fresh_keys_and_values():
    model, _ = of("PRXTransformer2DModel")
    words = r"keys_values 'fresh' cannot be had in PRXTransformer2DModel: one projection .*use keys_values="
    with pytest.raises(ValueError, match=words):
        apply_tofu(model, ratio=0.5, method="random", keys_values="fresh")


@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"speedup": 2}], ids=str)
def test_frames_with_schedulers_of_their_own_are_refused_and_the_pipeline_without_is_named(amount):
    """Diffusion forcing steps a copy of its scheduler for each frame, which tells nobody."""
    plain = PIPELINES["SkyReelsV2Transformer3DModel"]()
    pipe = SkyReelsV2DiffusionForcingPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    plain_texts(pipe)

    def generate(**options):
        options |= tiny.CALLS[type(plain)] | {"num_inference_steps": 3, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt="a cat", generator=generator, **options).frames

    orders = {
        "at a second timestep": {},
        "for 5 steps, more than the 3": {"ar_step": 1, "causal_block_size": 1},  # frames by turns
    }
    for words, order in orders.items():
        before = generate(**order)
        named = f"{words}.* SkyReelsV2Pipeline takes the same components"
        with apply_tofu(pipe, **amount), pytest.raises(RuntimeError, match=named):
            generate(**order)
        assert torch.equal(generate(**order), before)


@torch.no_grad()
def test_the_sound_of_ltx2_keeps_its_tokens():
    """And hears those of the picture that were removed, from memory."""
    model, inputs = of("LTX2VideoTransformer3DModel")
    _, expected = model(**inputs, return_dict=False)
    rows = []
    for block in model.transformer_blocks:
        for layer in (block.audio_attn1.to_q, block.video_to_audio_attn.to_q, block.audio_ff):
            layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    options = {"method": "random", "unmerge": "temporal", "keys_values": "cached"}
    handle = apply_tofu(model, ratio=0.5, warmup_steps=1, **options)
    for step in range(3):
        handle.step(step, 3)
        _, sound = model(**inputs, return_dict=False)
    assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
    assert rows == [7] * (3 * len(model.transformer_blocks) * 3)
    torch.testing.assert_close(sound, expected, rtol=1e-4, atol=1e-4)


OVER_TIME = {
    "I2VGenXLUNet": "TransformerTemporalModel",
    "LatteTransformer3DModel": "temporal_transformer_blocks",
    "UNet3DConditionModel": "TransformerTemporalModel",
    "UNetMotionModel": "AnimateDiffTransformer3D",
    "UNetSpatioTemporalConditionModel": "TemporalBasicTransformerBlock",
}
"""Of classes whose frames keep tokens of their own, what attends over time: its class, or where it stands."""


@pytest.mark.parametrize("name", OVER_TIME)
@torch.no_grad()
def test_what_attends_over_time_has_all_tokens(name):
    model, inputs = of(name)
    over_time, given = OVER_TIME[name], []
    for path, module in model.named_modules():
        if over_time in (type(module).__name__, path.rpartition(".")[0]):
            module.register_forward_pre_hook(lambda module, args: given.append(args[0].shape))
    model(**inputs)
    whole = given.copy()
    given.clear()
    with apply_tofu(model, ratio=0.5, method="tome") as handle:
        model(**inputs)
        assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
    assert whole and given == whole


def test_attention_on_maps_is_refused():
    """Of Kandinsky 2 and DeepFloyd IF, whose UNet is of Stable Diffusion's class, and of Kandinsky 3."""
    described = DENOISERS["UNet2DConditionModel"]
    changes = {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    }
    on_maps = replace(described, config={**described.config, **changes}).build()
    for model, words in (
        (on_maps, "its attention may work on maps"),
        (DENOISERS["Kandinsky3UNet"].build(), "Kandinsky3UNet"),
    ):
        with pytest.raises(ValueError, match=rf"{words}.*speedup=2"):
            apply_tofu(model, ratio=0.5)
