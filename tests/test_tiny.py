"""The tiny pipelines are fit to test on: quick, reproducible, and no layer is idle."""

import time

import pytest
import torch
from diffusers import DDPMPipeline, DiTTransformer2DModel
from torch import nn

from tests.tiny import (
    denoisers,
    generate,
    model_inputs,
    randomise,
    tiny_ddpm,
    tiny_dit,
    tiny_flux,
    tiny_pixart,
    tiny_qwen,
    tiny_sd,
    tiny_sd2,
    tiny_sd3,
    tiny_sdxl,
    tiny_wan,
)

BUILDERS = {
    "sd": tiny_sd,
    "sd2": tiny_sd2,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3.5": lambda: tiny_sd3(dual=True),
    "flux": tiny_flux,
    "flux dev": lambda: tiny_flux(guidance_embeds=True),
    "pixart": tiny_pixart,
    "dit": tiny_dit,
    "wan": tiny_wan,
    "wan two": lambda: tiny_wan(two=True),
    "wan per token": lambda: tiny_wan(per_token=True),
    "qwen": tiny_qwen,
    "ddpm": tiny_ddpm,
}
every_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
# Of an image of 96 x 160 pixels; the others are of one size.
LATENTS = {
    **dict.fromkeys(("sd", "sd2", "sdxl", "sd3", "sd3.5", "pixart"), (4, 12, 20)),
    **dict.fromkeys(("flux", "flux dev"), (6 * 10, 4)),
    **dict.fromkeys(("wan", "wan two", "wan per token"), (16, 2, 12, 20)),
    "qwen": (6 * 10, 64),
}


def transformer_blocks(pipe):
    """Or the attentions of a U-Net that has no such blocks."""
    modules = [module for model in denoisers(pipe) for module in model.modules()]
    blocks = [module for module in modules if type(module).__name__.endswith("TransformerBlock")]
    return blocks or [module for module in modules if type(module).__name__ == "Attention"]


def weights(pipe):
    models = {name: it for name, it in pipe.components.items() if isinstance(it, nn.Module)}
    return {
        f"{name}.{key}": value
        for name, model in models.items()
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("name", LATENTS)
def test_runs_on_square_and_other_sizes(name):
    pipe = BUILDERS[name]()  # offline: see conftest
    assert generate(pipe).isfinite().all()
    latents = generate(pipe, ["a cat", "two dogs"], steps=6, height=96, width=160)
    assert latents.shape == (2, *LATENTS[name])
    assert latents.abs().amax() < 200  # also finite
    images = generate(pipe, height=96, width=64, output_type="np")
    assert images.shape == ((1, 5, 96, 64, 3) if "wan" in name else (1, 96, 64, 3))


def test_those_of_one_size_run():
    for pipe, shape in (
        (tiny_dit(), (4, 16, 16)),
        (tiny_ddpm(), (3, 16, 16)),
        (tiny_ddpm(sample_size=(12, 20)), (3, 12, 20)),
    ):
        latents = generate(pipe, ["a cat", "two dogs"], steps=6)
        assert latents.shape == (2, *shape)
        assert latents.abs().amax() < 200
    assert generate(tiny_dit(), [7, 1000], output_type="np").shape == (2, 128, 128, 3)


def test_an_odd_grid_runs():
    assert generate(tiny_sd(), height=120, width=72).shape == (1, 4, 15, 9)


@every_builder
def test_the_same_every_time_and_no_draw_from_the_global_generator(build):
    before = torch.get_rng_state()
    first = weights(build())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = weights(build())
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_builder
def test_seed_prompt_and_every_transformer_block_matter(build):
    pipe = build()
    latents = generate(pipe)
    assert torch.equal(latents, generate(pipe))
    assert not torch.allclose(latents, generate(pipe, seed=1), atol=1e-3)
    prompt_matters = not torch.allclose(latents, generate(pipe, "two dogs"), atol=1e-3)
    assert prompt_matters != isinstance(pipe, DDPMPipeline)
    for block in transformer_blocks(pipe):
        kept = {name: value.clone() for name, value in block.state_dict().items()}
        randomise(block, seed=99)
        assert not torch.allclose(latents, generate(pipe), atol=1e-3)
        block.load_state_dict(kept)


@every_builder
def test_an_image_does_not_depend_on_its_neighbour_in_the_batch(build):
    pipe = build()
    pair = generate(pipe, ["a cat", "two dogs"])
    assert torch.allclose(pair[1:], generate(pipe, "two dogs", seed=1), atol=1e-4)


@every_builder
def test_builds_in_a_second(build):
    build()  # imports are not the builder's
    times = []
    for _ in range(3):
        start = time.perf_counter()
        build()
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


def test_shapes_of_the_real_models():
    assert not any(hasattr(block, "attentions") for block in tiny_sdxl().unet.down_blocks[:1])
    sd3 = tiny_sd3(dual=True).transformer
    assert [i for i, block in enumerate(sd3.transformer_blocks) if block.use_dual_attention] == [
        0,
        1,
    ]
    assert isinstance(sd3.transformer_blocks[0].attn.norm_q, nn.Module)
    assert tiny_sd3().transformer.transformer_blocks[0].attn.norm_q is None
    projections = [
        module.proj_in for module in tiny_sd2().unet.modules() if hasattr(module, "proj_in")
    ]
    assert projections and all(isinstance(layer, nn.Linear) for layer in projections)


@every_builder
@torch.no_grad()
def test_inputs_of_a_direct_call(build):
    for model in denoisers(build()):
        inputs = model_inputs(model, batch=3)
        names = inputs.keys() & {"sample", "hidden_states", "encoder_hidden_states"}
        for rows in (model(**inputs)[0], *(inputs[name] for name in names)):
            assert rows.isfinite().all()
            assert len(rows) == 3
            assert not torch.allclose(rows[0], rows[1], atol=1e-3)
            assert not torch.allclose(rows[1], rows[2], atol=1e-3)
        (first,) = names - {"encoder_hidden_states"}
        shape = inputs[first].shape
        if len(shape) > 3:
            assert (shape[-2] == shape[-1]) == isinstance(model, DiTTransformer2DModel)
        assert torch.equal(inputs[first], model_inputs(model, batch=3)[first])
        assert not torch.equal(inputs[first], model_inputs(model, batch=3, seed=1)[first])


def test_wan_with_two_denoisers_takes_turns():
    pipe, turns = tiny_wan(two=True), []
    for model in denoisers(pipe):
        model.register_forward_pre_hook(lambda module, args: turns.append(module))
    for steps, high in ((2, 1), (4, 2), (5, 2), (6, 2)):
        generate(pipe, steps=steps)
        guided = [pipe.transformer] * (2 * high) + [pipe.transformer_2] * (2 * (steps - high))
        assert turns == guided
        turns.clear()
    inputs = model_inputs(pipe.transformer)
    assert not torch.allclose(pipe.transformer(**inputs)[0], pipe.transformer_2(**inputs)[0])


@pytest.mark.parametrize(("per_token", "shape"), [(False, (2,)), (True, (2, 2 * 4 * 6))])
def test_wan_with_a_timestep_for_every_token(per_token, shape):
    pipe, seen = tiny_wan(per_token=per_token), set()
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.add(kwargs["timestep"].shape), with_kwargs=True
    )
    generate(pipe, ["a cat", "two dogs"])
    assert seen == {shape}


def test_qwen_is_guided_by_a_second_call():
    pipe, calls = tiny_qwen(), []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(module))
    guided = generate(pipe)
    assert len(calls) == 2 * 2
    assert not torch.allclose(guided, generate(pipe, negative_prompt=["a dog"]), atol=1e-3)
    calls.clear()
    assert not torch.allclose(guided, generate(pipe, true_cfg_scale=1.0), atol=1e-3)
    assert len(calls) == 2


def test_qwen_drops_what_comes_before_the_prompt():
    pipe = tiny_qwen()
    ids = pipe.tokenizer(pipe.prompt_template_encode.format("a cat")).input_ids
    kept = pipe.tokenizer.decode(ids[pipe.prompt_template_encode_start_idx :])
    assert kept.startswith("a cat<|im_end|>")


def test_flux_dev_is_told_the_guidance_scale():
    for pipe, told in ((tiny_flux(), False), (tiny_flux(guidance_embeds=True), True)):
        assert torch.allclose(generate(pipe), generate(pipe, guidance_scale=7.0)) != told
