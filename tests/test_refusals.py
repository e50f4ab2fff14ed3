"""What reduces nothing must ask for nothing; what cannot be right is refused in words."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FasterCacheConfig,
    ParallelConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionInstructPix2PixPipeline,
    TaylorSeerCacheConfig,
    UNet2DConditionModel,
)
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

from tests import tiny
from tofu_diffusers import apply_tofu


def words(caught):
    return [str(each.message) for each in caught if "removes nothing" in str(each.message)]


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({"warmup_steps": 30}, 20, "30 at the start"),
        ({"cooldown_steps": 30}, 20, "30 at the end"),
        ({"method": "tome", "min_tokens": 10**6}, 20, "min_tokens 1000000"),
        ({"method": "tome", "warmup_steps": 30}, 20, "in these 20 steps"),
    ],
    ids=str,
)
def test_options_that_leave_nothing_to_reduce_are_named(options, steps, said):
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, ratio=0.5, **options), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.generate(pipe, steps=steps)
    (message,) = words(caught)
    assert said in message and "8x8 (64 tokens)" in message


@pytest.mark.parametrize(("steps", "nothing"), [(2, True), (3, False)])
def test_so_few_steps_that_guidance_is_never_known_are_named(steps, nothing):
    pipe = tiny.tiny_dit()
    with apply_tofu(pipe, ratio=0.5, method="tome"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.generate(pipe, steps=steps)
    assert bool(words(caught)) == nothing


def test_masks_of_an_ip_adapter_are_refused_only_where_tokens_shrink():
    pipe = tiny.tiny_sd()
    inputs = tiny.model_inputs(pipe.unet)
    inputs["cross_attention_kwargs"] = {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}
    with torch.no_grad():
        plain = pipe.unet(**inputs)[0]
        with apply_tofu(pipe.unet, ratio=0.0, method="tome"):
            assert torch.equal(pipe.unet(**inputs)[0], plain)
        with apply_tofu(pipe.unet, speedup=2.0) as handle:
            handle.step(0, 9)
            assert torch.equal(pipe.unet(**inputs)[0], plain)
        with (
            apply_tofu(pipe.unet, ratio=0.5, method="tome"),
            pytest.raises(ValueError, match="ip_adapter_masks"),
        ):
            pipe.unet(**inputs)


def test_positions_that_are_no_grid_are_refused_only_where_tokens_shrink():
    model = tiny.tiny_flux().transformer
    inputs = tiny.model_inputs(model)
    draw = torch.Generator().manual_seed(0)
    inputs["img_ids"] = torch.randn(inputs["img_ids"].shape, generator=draw)
    with torch.no_grad():
        plain = model(**inputs)[0]
        for options in ({"ratio": 0.0, "method": "tome"}, {"speedup": 2.0}):
            with apply_tofu(model, **options) as handle:
                handle.step(0, 9)
                assert torch.equal(model(**inputs)[0], plain)
        with apply_tofu(model, ratio=0.5, method="tome"), pytest.raises(ValueError, match="grid"):
            model(**inputs)


def test_a_ratio_that_a_video_cannot_reach_names_its_frames():
    model = tiny.tiny_wan().transformer
    inputs = tiny.model_inputs(model)
    channels = inputs["hidden_states"].shape[1]
    inputs["hidden_states"] = torch.randn(2, channels, 3, 2, 2)
    with (
        torch.no_grad(),
        apply_tofu(model, ratio=0.5, method="tofu"),
        pytest.raises(ValueError, match="of 3 tokens on the 3x1x1 grid"),
    ):
        model(**inputs)


def test_caches_and_gradient_checkpointing_are_refused_in_words():
    model = tiny.tiny_sd3().transformer.train().requires_grad_(True)
    model.enable_gradient_checkpointing()
    inputs = tiny.model_inputs(model)
    with apply_tofu(model, ratio=0.5, method="tofu"):
        model(**inputs)[0].mean().backward()
    options = {"method": "tome", "merge": "prune", "unmerge": "taylor"}
    with apply_tofu(model, ratio=0.5, **options) as handle:
        handle.step(6, 20)
        with pytest.raises(ValueError, match="'taylor' cannot be trained through with gradient"):
            model(**inputs)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": 0.5, "method": "tome"}], ids=str)
def test_a_family_of_another_build_is_refused_before_anything_is_changed(options):
    model = tiny.tiny_pixart().transformer
    for family in ("unet", "flux", "sd3", "wan", "qwen"):
        with pytest.raises(ValueError, match=f"not built like family '{family}'"):
            apply_tofu(model, family=family, **options)
    assert not any("_tofu" in module.__dict__ for module in model.modules())


def test_with_guidance_by_text_and_picture_the_plan_is_of_the_row_that_has_both():
    """InstructPix2Pix has its rows the other way round: both, the picture alone, neither."""
    pipe = tiny.tiny_sd()
    with torch.random.fork_rng(devices=[]):
        config = {**pipe.unet.config, "in_channels": 8, "_use_default_values": []}
        unet = UNet2DConditionModel.from_config(config).eval()
    pipe = StableDiffusionInstructPix2PixPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, unet, DDIMScheduler(), None, None, None, False
    )
    pipe.set_progress_bar_config(disable=True)
    seen = []
    with apply_tofu(pipe, ratio=0.5, method="tome") as handle:

        def look(module, args):
            runtime = handle._roots[0][1].runtime
            rows = args[0][:, 4:].abs().amax((1, 2, 3)) > 0
            seen.append((runtime.call.images, rows.tolist(), runtime.conditional(rows).tolist()))

        unet.conv_in.register_forward_pre_hook(look)
        draw = torch.Generator().manual_seed(0)
        picture = torch.rand(1, 3, 128, 128, generator=draw)
        pipe("a cat", image=picture, num_inference_steps=2, generator=draw, output_type="latent")
        assert handle.inspect()[0].cfg_branches == 3
    assert seen[0] == (1, [True, True, False], [True])


def test_a_guider_that_perturbs_attention_is_refused_where_keys_outnumber_queries():
    model = tiny.tiny_sd().unet
    inputs = tiny.model_inputs(model)
    config = LayerSkipConfig(
        [0],
        fqn="mid_block.attentions.0.transformer_blocks",
        skip_attention=False,
        skip_attention_scores=True,
        skip_ff=False,
    )
    fresh = {"ratio": 0.5, "method": "random", "keys_values": "fresh", "warmup_steps": 1}
    with torch.no_grad():
        plain = model(**inputs)[0]
        apply_layer_skip(model, config)
        perturbed = model(**inputs)[0]
        assert not torch.equal(perturbed, plain)
        with apply_tofu(model, **fresh) as handle:
            handle.step(0, 9)
            assert torch.equal(model(**inputs)[0], perturbed)
            handle.step(1, 9)
            with pytest.raises(ValueError, match="a guider perturbs attentions"):
                model(**inputs)
        for options in ({**fresh, "keys_values": "dropped"}, {"speedup": 2.0}):
            with apply_tofu(model, **options) as handle:
                for step in range(3):
                    handle.step(step, 9)
                    assert model(**inputs)[0].isfinite().all()
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("layer_skip_hook")
        assert torch.equal(model(**inputs)[0], plain)


def test_tokens_that_are_split_between_processes_are_not_reduced():
    """tests/compatibility/parallel.py has two processes; what they are refused by is seen here."""
    pipe = tiny.tiny_flux()
    plain = tiny.generate(pipe, steps=9)
    pipe.transformer._parallel_config = ParallelConfig()
    for options in ({"ratio": 0.5}, {"ratio": 0.5, "method": "tome"}):
        with apply_tofu(pipe, **options), pytest.raises(ValueError, match="between processes"):
            tiny.generate(pipe, steps=9)
    with apply_tofu(pipe, speedup=2.0):
        assert tiny.generate(pipe, steps=9).isfinite().all()
    assert torch.equal(tiny.generate(pipe, steps=9), plain)


CACHES = {
    "pyramid_attention_broadcast": lambda now: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=now,
    ),
    "faster_cache_block": lambda now: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=now,
    ),
    "taylorseer_cache": lambda now: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, max_order=1
    ),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("first", ["tofu", "cache"])
def test_caches_of_attention_outputs_run_with_skipped_steps_and_not_with_fewer_tokens(name, first):
    pipe = tiny.tiny_flux()
    config = CACHES[name](lambda: pipe._current_timestep or 0)
    plain = tiny.generate(pipe, steps=12)
    for options in ({"ratio": 0.5}, {"ratio": 0.5, "method": "tome"}, {"speedup": 2.0}):
        if first == "cache":
            pipe.transformer.enable_cache(config)
        handle = apply_tofu(pipe, **options)
        if first == "tofu":
            pipe.transformer.enable_cache(config)
        if "ratio" in options:
            with pytest.raises(ValueError, match=f"diffusers' cache '{name}' gives again"):
                tiny.generate(pipe, steps=12)
        else:
            assert tiny.generate(pipe, steps=12).isfinite().all()
            assert handle.summary().steps[0].computed == 6
        pipe.transformer.disable_cache()
        handle.remove()
        assert torch.equal(tiny.generate(pipe, steps=12), plain)


def test_a_denoiser_in_data_parallel_is_asked_for_what_it_wraps():
    pipe = tiny.tiny_sd()
    pipe.unet = torch.nn.DataParallel(pipe.unet)
    with pytest.raises(ValueError, match=r"unet: DataParallel.*; give the pipeline its \.module"):
        apply_tofu(pipe, speedup=2.0)
