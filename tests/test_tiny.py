"""The tiny pipelines are fit to test on: quick, reproducible, and no layer is idle."""

import time

import pytest
import torch
from torch import nn

from tests.tiny import generate, randomise, tiny_sd, tiny_sd2, tiny_sd3, tiny_sdxl

BUILDERS = {
    "sd": tiny_sd,
    "sd2": tiny_sd2,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3.5": lambda: tiny_sd3(dual=True),
}
every_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def denoiser(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def transformer_blocks(pipe):
    return [
        block
        for block in denoiser(pipe).modules()
        if type(block).__name__ in ("BasicTransformerBlock", "JointTransformerBlock")
    ]


@every_builder
def test_runs_on_square_and_other_sizes(build):
    pipe = build()  # offline: see conftest
    assert generate(pipe).isfinite().all()
    latents = generate(pipe, ["a cat", "two dogs"], height=96, width=160)
    assert latents.shape == (2, 4, 12, 20)
    assert latents.isfinite().all()
    image = pipe("a cat", num_inference_steps=2, height=96, width=64, output_type="np").images
    assert image.shape == (1, 96, 64, 3)


def test_an_odd_grid_runs():
    assert generate(tiny_sd(), height=120, width=72).shape == (1, 4, 15, 9)


@every_builder
def test_the_same_every_time_and_no_draw_from_the_global_generator(build):
    before = torch.get_rng_state()
    first = denoiser(build()).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = denoiser(build()).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_builder
def test_seed_prompt_and_every_transformer_block_matter(build):
    pipe = build()
    latents = generate(pipe)
    assert torch.equal(latents, generate(pipe))
    assert not torch.allclose(latents, generate(pipe, seed=1), atol=1e-3)
    assert not torch.allclose(latents, generate(pipe, "two dogs"), atol=1e-3)
    for block in transformer_blocks(pipe):
        kept = {name: value.clone() for name, value in block.state_dict().items()}
        randomise(block, seed=99)
        assert not torch.allclose(latents, generate(pipe), atol=1e-3)
        block.load_state_dict(kept)


def test_an_image_does_not_depend_on_its_neighbour_in_the_batch():
    pipe = tiny_sd()
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
