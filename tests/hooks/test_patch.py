"""What others put on a model before, after and around tofu: hooks, casting, LoRA, FreeU, modular."""

import inspect
import itertools

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook, apply_layerwise_casting
from diffusers.modular_pipelines import QwenImageAutoBlocks, StableDiffusionXLAutoBlocks
from peft import LoraConfig

from tests import tiny
from tests.hooks.test_beside import sd as with_controlnet
from tests.inputs import unet_inputs
from tests.test_apply import fingerprint
from tofu_diffusers import apply_tofu, remove_tofu

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TOFU = {"ratio": 0.5, "method": "tome"}


class Doubling(ModelHook):
    """Doubles what the block returns."""

    def post_forward(self, module, output):
        return output * 2


class Halving(AccelerateHook):
    """Halves what the block returns."""

    def post_forward(self, module, output):
        return output / 2


def actions(unet):
    """Pairs of (do, undo) that can be done in any order."""
    block = unet.get_submodule(BLOCK)
    registry = HookRegistry.check_if_exists_or_initialize(block)
    return {
        "tofu": (lambda: apply_tofu(unet, **TOFU), lambda: remove_tofu(unet)),
        "diffusers": (
            lambda: registry.register_hook(Doubling(), "doubling"),
            lambda: registry.remove_hook("doubling", recurse=False),
        ),
        "accelerate": (
            lambda: add_hook_to_module(block, Halving()),
            lambda: remove_hook_from_module(block),
        ),
    }


@torch.no_grad()
def test_any_order_of_adding_and_removing():
    inputs = unet_inputs()
    unet = tiny.tiny_sd().unet
    expected = {}
    expected[frozenset()] = unet(**inputs)[0]
    with apply_tofu(unet, **TOFU):
        expected[frozenset({"tofu"})] = unet(**inputs)[0]
    names = ("tofu", "diffusers", "accelerate")
    for added in itertools.permutations(names):
        for removed in itertools.permutations(names):
            # diffusers and accelerate hooks come off in the reverse order of their own; tofu in any.
            others = [name for name in added if name != "tofu"]
            if [name for name in removed if name != "tofu"] != others[::-1]:
                continue
            unet = tiny.tiny_sd().unet
            do = actions(unet)
            for name in added:
                do[name][0]()
            # Doubled and halved: the original, with tofu inside of both.
            assert torch.equal(unet(**inputs)[0], expected[frozenset({"tofu"})]), added
            present = set(names)
            for name in removed:
                do[name][1]()
                present.discard(name)
                if present in ({"tofu"}, set()):
                    assert torch.equal(unet(**inputs)[0], expected[frozenset(present)]), (
                        added,
                        removed,
                    )
            block = unet.get_submodule(BLOCK)
            assert "_tofu" not in block.__dict__
            assert getattr(block.forward, "__func__", None) is type(block).forward


def test_layerwise_casting_and_cached_keys_and_values():
    pipe = tiny.tiny_sd()
    apply_layerwise_casting(pipe.unet, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    baseline = tiny.generate(pipe, steps=4)
    for when in ("after", "before"):
        pipe = tiny.tiny_sd()
        if when == "before":
            apply_tofu(pipe, ratio=0.5, keys_values="cached", **tiny.SHORT)
        apply_layerwise_casting(
            pipe.unet, storage_dtype=torch.bfloat16, compute_dtype=torch.float32
        )
        if when == "after":
            apply_tofu(pipe, ratio=0.5, keys_values="cached", **tiny.SHORT)
        assert torch.isfinite(tiny.generate(pipe, steps=4)).all()
        remove_tofu(pipe)
        assert torch.equal(tiny.generate(pipe, steps=4), baseline)


@pytest.mark.parametrize("keys_values", ["dropped", "fresh", "cached"])
def test_lora_loaded_before_or_after_is_the_same(keys_values):
    def add_lora(pipe):
        # PEFT draws its weights from the global generator.
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        )
        pipe.unet.add_adapter(config, "style")

    options = {"ratio": 0.5, "method": "random", "unmerge": "temporal", "keys_values": keys_values}
    before = tiny.tiny_sd()
    add_lora(before)
    plain = tiny.generate(before, steps=4)
    apply_tofu(before, **options)
    expected = tiny.generate(before, steps=4)
    after = tiny.tiny_sd()
    handle = apply_tofu(after, **options)
    without = tiny.generate(after, steps=4)
    add_lora(after)
    assert torch.equal(tiny.generate(after, steps=4), expected)
    assert not torch.equal(expected, without)
    after.unet.delete_adapters("style")
    torch.testing.assert_close(tiny.generate(after, steps=4), without, rtol=1e-3, atol=1e-3)
    handle.remove()
    remove_tofu(before)
    assert torch.equal(tiny.generate(before, steps=4), plain)
    for pipe in (before, after):
        assert not any("_tofu" in module.__dict__ for module in pipe.unet.modules())


def test_forward_replaced_by_someone_else_is_refused():
    pipe = tiny.tiny_sd()
    block = pipe.unet.get_submodule(BLOCK)
    block.forward = lambda *args, **kwargs: args[0]
    before = fingerprint(pipe)
    with pytest.raises(RuntimeError, match="forward of BasicTransformerBlock was replaced"):
        apply_tofu(pipe, **TOFU)
    assert fingerprint(pipe) == before


def test_freeu_keeps_working():
    pipe = tiny.tiny_sd()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with apply_tofu(pipe, **TOFU):
        assert torch.isfinite(tiny.generate(pipe)).all()


def test_sd3_chunked_feed_forward_keeps_working():
    pipe = tiny.tiny_sd3()
    with apply_tofu(pipe, **TOFU):
        plain = tiny.generate(pipe)
        pipe.transformer.enable_forward_chunking(1, dim=0)
        torch.testing.assert_close(tiny.generate(pipe), plain, rtol=1e-3, atol=1e-3)


def test_a_modular_pipeline_with_guidance_in_two_calls():
    parts = tiny.tiny_sdxl()
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = [name for name in pipe.components if name != "feature_extractor"]
    pipe.update_components(
        **{name: parts.components[name] for name in names if parts.components.get(name) is not None}
    )

    def run():
        return pipe(
            prompt="a cat",
            num_inference_steps=4,
            height=128,
            width=128,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            output="images",
        )

    baseline = run()
    with apply_tofu(pipe, ratio=0.5, keys_values="cached", **tiny.SHORT) as handle:
        assert not torch.equal(run(), baseline)
        steps = handle.inspect()[0].steps
        assert [(step.calls, step.ratios[0]) for step in steps] == [
            (2, "0.0"),
            (2, "0.0"),
            (2, "0.5"),
            (2, "0.5"),
        ]
    assert torch.equal(run(), baseline)


def test_a_denoiser_and_a_controlnet_say_what_they_take():
    """Modular pipelines leave out what a forward does not name: Qwen-Image's the shapes of pictures."""
    parts = tiny.tiny_qwen()
    pipe = QwenImageAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.components.items() if part})

    def run():
        return pipe(
            prompt="a cat",
            num_inference_steps=9,
            height=128,
            width=128,
            generator=torch.Generator().manual_seed(0),
            output="latents",
        )

    baseline = run()
    for options in ({"ratio": 0.5}, {"speedup": 2.0}):
        with apply_tofu(pipe, **options):
            assert not torch.equal(run(), baseline)
    assert torch.equal(run(), baseline)
    pipe = with_controlnet()
    models = pipe.unet, pipe.controlnet
    taken = [inspect.signature(model.forward) for model in models]
    with apply_tofu(pipe, speedup=2.0):
        assert [inspect.signature(model.forward) for model in models] == taken
