"""What tofu relies on in diffusers, accelerate, peft and torch that none of them promises, name by name.

Each message says what of tofu depends on it: after an upgrade, read these failures before all others.
"""

import copy
import inspect

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry, LayerSkipConfig, ModelHook, apply_layer_skip
from diffusers.utils import BaseOutput
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tests import tiny
from tests.denoisers import DENOISERS
from tests.test_refusals import CACHES
from tofu_diffusers.families import FAMILIES, known_classes, known_family
from tofu_diffusers.hooks.patch import ATTENTION_CACHES
from tofu_diffusers.steps.pipelines import generating
from tofu_diffusers.steps.sampler import MULTISTEP, NOISY

PIPELINES = {
    "unet": tiny.tiny_sd,
    "unet2d": tiny.tiny_ddpm,
    "sd3": tiny.tiny_sd3,
    "flux": tiny.tiny_flux,
    "pixart": tiny.tiny_pixart,
    "dit": tiny.tiny_dit,
    "wan": tiny.tiny_wan,
    "qwen": tiny.tiny_qwen,
}
BASIC = ("attn1", "norm1", "norm_type", "only_cross_attention", "pos_embed")
# Of each family: what its blocks take by name, and what they have.
BLOCKS = {
    "unet": (("hidden_states", "attention_mask", "timestep", "class_labels"), BASIC),
    "pixart": (
        ("hidden_states", "attention_mask", "timestep", "class_labels"),
        (*BASIC, "scale_shift_table"),
    ),
    "dit": (("hidden_states", "attention_mask", "timestep", "class_labels"), BASIC),
    "unet2d": (("hidden_states",), ("group_norm", "spatial_norm")),
    "sd3": (("hidden_states", "temb"), ("attn", "norm1", "use_dual_attention")),
    "flux": (("hidden_states", "temb", "image_rotary_emb"), ("attn",)),
    "wan": (("hidden_states", "temb", "rotary_emb"), ("attn1", "norm1", "scale_shift_table")),
    "qwen": (
        ("hidden_states", "temb", "image_rotary_emb", "modulate_index"),
        ("attn", "img_mod", "img_norm1", "_modulate"),
    ),
}


def block_of(pipe):
    """A denoiser's family and the first block of each of its stacks, with the self-attentions inside."""
    (model, *_) = tiny.denoisers(pipe)
    family = known_family(model)
    blocks = [stack.blocks[0][1] for stack in family.block_stacks(model)]
    return family, blocks, [each for block in blocks for each in family.attentions(block).values()]


def method(function):
    return getattr(function, "__func__", None)


# ---- hooks --------------------------------------------------------------------------------------


def test_accelerate_keeps_the_forward_that_it_wraps_as_old_forward():
    module = nn.Linear(2, 2)
    add_hook_to_module(module, AccelerateHook())
    who = "hooks/patch.py puts tofu's forward below offloading"
    assert "_hf_hook" in vars(module), f"accelerate's hook is no longer `_hf_hook`: {who}"
    kept = vars(module).get("_old_forward")
    assert method(kept) is nn.Linear.forward, f"`_old_forward` is no longer the own forward: {who}"
    assert "forward" in vars(module), f"accelerate no longer wraps the instance's forward: {who}"
    remove_hook_from_module(module)
    left = {"_hf_hook", "_old_forward"} & {*vars(module)}
    assert not left, f"accelerate leaves {left} behind, so that removal of tofu is not exact"


def test_diffusers_keeps_the_forwards_that_its_hooks_wrap_in_references():
    module = nn.Linear(2, 2)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(ModelHook(), "a hook")
    who = "hooks/patch.py puts tofu's forward below caches, guiders and group offloading"
    assert vars(module).get("_diffusers_hook") is registry, f"no `_diffusers_hook`: {who}"
    assert [*registry.hooks] == ["a hook"], f"a registry's `hooks` no longer go by name: {who}"
    kept = [
        vars(reference).get(name)
        for reference in registry._fn_refs
        for name in ("forward", "original_forward")
    ]
    assert any(method(each) is nn.Linear.forward for each in kept), (
        f"no `_fn_refs[i].forward` or `.original_forward` is the own forward: {who}"
    )


@pytest.mark.parametrize("name", ATTENTION_CACHES)
def test_caches_of_attentions_hook_them_under_their_names(name):
    pipe = tiny.tiny_flux()
    pipe.transformer.enable_cache(CACHES[name](lambda: 0))
    registries = [getattr(each, "_diffusers_hook", None) for each in pipe.transformer.modules()]
    found = {hook for each in registries if each is not None for hook in each.hooks}
    assert name in found, (
        f"its hooks are {found}: hooks/denoiser.py no longer refuses this cache, and pictures are wrong"
    )


def test_a_guider_that_perturbs_attentions_says_so_on_its_hook():
    unet = tiny.tiny_sd().unet
    blocks = "mid_block.attentions.0.transformer_blocks"
    what = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    apply_layer_skip(unet, LayerSkipConfig([0], fqn=blocks, **what))
    attention = unet.get_submodule(f"{blocks}.0.attn1")
    hooks = attention._diffusers_hook.hooks.values()
    assert any(getattr(each, "skip_attention_scores", False) for each in hooks), (
        "no hook has `skip_attention_scores`: hooks/denoiser.py no longer refuses such guiders"
    )


# ---- attentions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_attentions_project_by_three_modules_and_end_in_torchs_product(name):
    pipe = PIPELINES[name]()
    family, _, attentions = block_of(pipe)
    for attention in attentions:
        for key in ("to_q", "to_k", "to_v"):
            projection = getattr(attention, key, None)
            assert hasattr(projection, "in_features") and hasattr(projection, "out_features"), (
                f"{type(attention).__name__} of {name} has no linear `{key}`: keys and values of removed "
                "tokens (hooks/keys_values.py) and widths of caches (hooks/layout.py) are read there"
            )
        assert hasattr(attention, "heads") and hasattr(attention, "processor"), (
            f"{type(attention).__name__} of {name} has no `heads` (importance by attention) or "
            "`processor` (fused and PAG attentions are known by its name)"
        )
    if family.rotary:
        products = []

        class Products(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                products.append(func is functional.scaled_dot_product_attention)
                return func(*args, **(kwargs or {}))

        (model, *_) = tiny.denoisers(pipe)
        with torch.no_grad(), Products():
            model(**tiny.model_inputs(model))
        assert any(products), (
            f"no attention of {name} calls torch.nn.functional.scaled_dot_product_attention by that "
            "name, where removed tokens' keys and values enter (hooks/keys_values.py)"
        )


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_fused_projections_are_known_by_a_name_or_a_flag(name):
    pipe = PIPELINES[name]()
    (model, *_) = tiny.denoisers(pipe)
    model.fuse_qkv_projections()
    attention = block_of(pipe)[2][0]
    flagged = getattr(attention, "fused_projections", False) and hasattr(
        attention, "unfuse_projections"
    )
    assert flagged or "Fused" in type(attention.processor).__name__, (
        "fused QKV is seen neither by `fused_projections` nor by its processor's name: "
        "hooks/keys_values.py no longer refuses it"
    )


def test_processors_of_perturbed_attention_guidance_are_named_pag():
    module = pytest.importorskip("diffusers.models.attention_processor")
    names = {name for name in vars(module) if "PAG" in name and "Processor" in name}
    assert names and all(name.startswith("PAG") for name in names), (
        f"{names}: hooks/keys_values.py refuses processors whose names start with PAG"
    )


def test_lora_stands_in_the_place_of_a_projection_and_leaves_it_again():
    unet = tiny.tiny_sd().unet
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    own = attention.to_k
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    who = "hooks/denoiser.py moves its forwards from a projection to what takes its place"
    assert getattr(attention.to_k, "base_layer", None) is own, f"peft has no `base_layer`: {who}"
    assert attention.to_k.out_features == own.out_features, f"LoRA has no `out_features`: {who}"
    unet.unload_lora()
    assert attention.to_k is own, f"the projection is another one without LoRA: {who}"


# ---- blocks and models ----------------------------------------------------------------------------


def test_every_family_and_class_is_looked_at_here_and_is_in_diffusers():
    assert {*PIPELINES} == {*BLOCKS}
    # The others are looked at whole, in tests/families/test_classes.py.
    for name in {*FAMILIES} - {*PIPELINES}:
        assert {*FAMILIES[name].classes} <= {*DENOISERS}
    missing = [name for name in known_classes() if not hasattr(diffusers, name)]
    assert not missing, f"diffusers has no {missing}: families/ must name their new classes"


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_take_and_have_what_their_family_names(name):
    _, blocks, _ = block_of(PIPELINES[name]())
    taken, had = BLOCKS[name]
    for block in blocks:
        parameters = inspect.signature(type(block).forward).parameters
        missing = [each for each in taken if each not in parameters]
        assert not missing, f"{type(block).__name__} takes no {missing}: see families/{name}.py"
        missing = [each for each in had if not hasattr(block, each)]
        assert not missing, f"{type(block).__name__} has no {missing}: see families/{name}.py"


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_joint_blocks_return_text_and_then_the_image(name):
    pipe, seen = PIPELINES[name](), []
    (model, *_) = tiny.denoisers(pipe)
    for block in block_of(pipe)[1]:
        block.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"], out)),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(**tiny.model_inputs(model))
    assert all(out[1].shape == image.shape for image, out in seen), (
        f"output 1 of a block is not the image: `output_index` of families/{name}.py"
    )


def test_models_keep_marks_that_tofu_reads():
    unet = tiny.tiny_sd().unet
    unet.enable_gradient_checkpointing()
    assert any(getattr(each, "gradient_checkpointing", False) for each in unet.modules()), (
        "no module has `gradient_checkpointing`: runtime/runtime.py no longer refuses caches under it"
    )
    assert unet.down_blocks[0].attentions[0].is_input_continuous, (
        "families/unet.py takes Transformer2DModels whose `is_input_continuous`"
    )
    assert hasattr(unet.config, "downsample_padding"), "families/stages.py: grids of odd sides"
    assert getattr(ModelMixin, "_parallel_config", 0) is None, (
        "models have no `_parallel_config`: hooks/denoiser.py no longer refuses context parallelism"
    )


def test_torch_marks_compiled_modules_and_keeps_hooks_in_two_dicts():
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile()
    assert module._compiled_call_impl is not None, (
        "`_compiled_call_impl` no longer tells a module compiled by itself (hooks/patch.py)"
    )
    own = nn.Linear(2, 2)
    assert torch.compile(own)._orig_mod is own, (
        "a compiled model has no `_orig_mod`: steps/pipelines.py no longer finds the denoiser"
    )
    own.register_forward_hook(lambda *_: None)
    own.register_forward_pre_hook(lambda *_: None)
    assert len(own._forward_hooks) == len(own._forward_pre_hooks) == 1, (
        "hooks/patch.py copies a denoiser without `_forward_hooks` and `_forward_pre_hooks` to count FLOPs"
    )


# ---- pipelines and schedulers ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_calls_its_denoiser_below_a_method_of_its_own(name):
    pipe, seen = PIPELINES[name](), []
    (model, *_) = tiny.denoisers(pipe)
    parts = pipe.components
    assert isinstance(parts, dict) and model in [*parts.values()], (
        "a pipeline's `components` do not hold its denoiser: steps/pipelines.py finds nothing"
    )
    model.register_forward_pre_hook(lambda *_: seen.append(generating(model)))
    tiny.generate(pipe, steps=2)
    assert seen and all(each is pipe for each in seen), (
        "the pipeline is not the `self` of a method on the call stack: steps/pipelines.py cannot "
        "tell who generates"
    )
    family = known_family(model)
    if family.guidance_in_batch and name not in ("pixart", "dit"):
        assert isinstance(pipe.do_classifier_free_guidance, bool), (
            "`do_classifier_free_guidance` no longer tells the branches in a batch "
            "(runtime/generation.py)"
        )
    if name not in ("dit", "unet2d", "pixart"):
        assert pipe.num_timesteps == 2, (
            "`num_timesteps` is not the number of executed steps, by which runtime/generation.py "
            "knows where image-to-image begins"
        )


@pytest.mark.parametrize(
    ("pipeline", "mark"),
    [
        ("StableDiffusionInstructPix2PixPipeline", "image_guidance_scale"),
        ("StableDiffusionPAGPipeline", "do_perturbed_attention_guidance"),
    ],
)
def test_pipelines_of_three_branches_are_known_by_a_property(pipeline, mark):
    assert hasattr(getattr(diffusers, pipeline), mark), (
        f"{pipeline} has no `{mark}`, by which runtime/generation.py counts branches of guidance"
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_schedulers_take_a_timestep_second_and_hold_what_is_read(name):
    scheduler = copy.deepcopy(PIPELINES[name]().scheduler)
    _, output, timestep, *_ = inspect.signature(type(scheduler).step).parameters
    assert (output, timestep) == ("model_output", "timestep"), (
        "`step` does not take (model_output, timestep): steps/clock.py reads the second"
    )
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(4, **shift)
    assert len(scheduler.timesteps) >= 4 and scheduler.config.num_train_timesteps, (
        "steps/sampler.py reads `timesteps` as shares of `config.num_train_timesteps`"
    )
    levels = ("sigmas", "alphas_cumprod")
    assert any(hasattr(scheduler, each) for each in levels), (
        f"no noise levels in {levels}: steps/sampler.py chooses by timesteps which steps run"
    )


def test_kinds_of_schedulers_are_told_by_words_in_their_names():
    schedulers = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    gone = [
        word
        for word in (*NOISY, *MULTISTEP, "FlowMatch")
        if not any(word in name for name in schedulers)
    ]
    assert not gone, f"no scheduler is named {gone}, by which steps/sampler.py tells their kind"
    config = diffusers.DPMSolverMultistepScheduler().config
    keys = ("solver_order", "algorithm_type", "prediction_type", "use_flow_sigmas")
    missing = [key for key in keys if key not in config]
    assert not missing, f"configurations have no {missing}, which steps/sampler.py reads"


def test_outputs_are_dataclasses_and_dicts_in_one():
    assert issubclass(BaseOutput, dict), "steps/outputs.py takes outputs apart as dataclasses first"
