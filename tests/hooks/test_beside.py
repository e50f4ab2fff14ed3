"""ControlNets rest at the steps that skip the denoiser."""

import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from tests import tiny
from tofu_diffusers import TokenReduction, apply_tofu, remove_tofu

STEPS = 12
PICTURE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def with_noise(model, seed=1):
    """Weights that are zero when a ControlNet is new are not."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def sd(cls=StableDiffusionControlNetPipeline, nets=1):
    pipe = tiny.tiny_sd()
    found = [with_noise(ControlNetModel.from_unet(pipe.unet), seed) for seed in range(nets)]
    net = found[0] if nets == 1 else MultiControlNetModel(found)
    parts = {**pipe.components, "controlnet": net}
    parts.pop("image_encoder")
    pipe = cls(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3():
    pipe = tiny.tiny_sd3()
    net = SD3ControlNetModel.from_transformer(
        pipe.transformer, num_layers=2, num_extra_conditioning_channels=0
    )
    net = with_noise(net)
    parts = {**pipe.components, "controlnet": net}
    pipe = StableDiffusion3ControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl():
    pipe = tiny.tiny_sdxl(channels=(32, 32), transformer_layers=(1, 2))
    net = with_noise(ControlNetModel.from_unet(pipe.unet))
    parts = {**pipe.components, "controlnet": net}
    parts.pop("image_encoder")
    pipe = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux():
    pipe = tiny.tiny_flux()
    net = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2,
    )  # fmt: skip
    pipe = FluxControlNetPipeline(**{**pipe.components, "controlnet": with_noise(net)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


FLUX = {"height": 128, "width": 128, "max_sequence_length": 16}


def generate(pipe, **arguments):
    """SD3's pipeline encodes the control picture with the global generator's noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny.generate(pipe, **arguments)


def counted(model):
    """Counts how often a network's first layer runs."""
    calls = []
    first = next(each for each in model.modules() if not list(each.children()))
    first.register_forward_hook(lambda *_: calls.append(1))
    return calls


CASES = {
    "sd": (sd, {"image": PICTURE}, 1),
    "guess mode": (sd, {"image": PICTURE, "guess_mode": True}, 1),
    "ends at half": (sd, {"image": PICTURE, "control_guidance_end": 0.5}, 1),
    "two nets": (lambda: sd(nets=2), {"image": [PICTURE, PICTURE]}, 1),
    "img2img": (
        lambda: sd(StableDiffusionControlNetImg2ImgPipeline),
        {"image": PICTURE, "control_image": PICTURE, "strength": 0.75},
        0.75,
    ),
    "sd3": (sd3, {"control_image": PICTURE}, 1),
    "sdxl": (sdxl, {"image": PICTURE}, 1),
    "flux": (flux, {"control_image": PICTURE, **FLUX}, 1),
    # The denoiser is called twice a step, and the network once.
    "flux, guided": (
        flux,
        {"control_image": PICTURE, "negative_prompt": "a dog", "true_cfg_scale": 3.0, **FLUX},
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_controlnet_runs_where_the_denoiser_does(name):
    build, arguments, share = CASES[name]
    pipe = build()
    denoised = counted(tiny.denoisers(pipe)[0])
    unreduced = generate(pipe, steps=STEPS, **arguments)
    each = len(denoised) / (STEPS * share)
    denoised.clear()
    calls = counted(pipe.controlnet)
    with apply_tofu(pipe, speedup=2.0) as handle:
        reduced = generate(pipe, steps=STEPS, **arguments)
        (steps,) = handle.summary().steps
    assert steps.steps == STEPS * share and steps.computed < steps.steps
    assert len(calls) == steps.computed and len(denoised) == each * steps.computed
    calls.clear()
    assert torch.equal(generate(pipe, steps=STEPS, **arguments), unreduced)
    assert len(calls) == steps.steps and not torch.equal(reduced, unreduced)
    # A network that does not rest makes no difference.
    handle = apply_tofu(pipe, speedup=2.0)
    for hook in handle._roots[0][1].beside:
        hook.__dict__["_tofu"].returned = _Never()
    calls.clear()
    assert torch.equal(generate(pipe, steps=STEPS, **arguments), reduced)
    assert len(calls) == steps.steps
    remove_tofu(pipe)


class _Never(dict):
    """Remembers nothing, so that the network runs at every step."""

    def __setitem__(self, key, value):
        pass


def test_it_runs_at_every_step_that_reduces_tokens():
    pipe = sd()
    calls = counted(pipe.controlnet)
    with apply_tofu(pipe, TokenReduction(ratio=0.5, method="tome")):
        generate(pipe, steps=4, image=PICTURE)
    assert len(calls) == 4
    assert "_tofu" not in pipe.controlnet.__dict__ and "forward" not in pipe.controlnet.__dict__


def test_it_runs_for_a_pipeline_and_a_loop_that_skip_nothing():
    pipe = sd()
    other = StableDiffusionControlNetPipeline(
        **{
            **pipe.components,
            "unet": copy.deepcopy(pipe.unet),
            "scheduler": copy.deepcopy(pipe.scheduler),
        },
        requires_safety_checker=False,
    )
    other.set_progress_bar_config(disable=True)
    expected = generate(other, steps=6, image=PICTURE)
    calls = counted(pipe.controlnet)
    with apply_tofu(pipe, speedup=2.0):
        generate(pipe, steps=6, image=PICTURE)
        calls.clear()
        assert torch.equal(generate(other, steps=6, image=PICTURE), expected)
        assert len(calls) == 6


def test_a_copy_rests_by_itself_and_takes_no_denoiser_along():
    pipe = sd()
    with apply_tofu(pipe, speedup=2.0):
        expected = generate(pipe, steps=STEPS, image=PICTURE)
        alone = copy.deepcopy(pipe.controlnet)
        twin = copy.deepcopy(pipe)
    calls = counted(twin.controlnet)
    assert torch.equal(generate(twin, steps=STEPS, image=PICTURE), expected)
    assert len(calls) == STEPS // 2
    remove_tofu(twin)
    assert "_tofu" not in twin.controlnet.__dict__
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(5), torch.randn(2, 7, 32), PICTURE
    assert not alone.__dict__["_tofu"].denoiser()
    with torch.no_grad():
        assert torch.equal(alone(*inputs)[1], pipe.controlnet(*inputs)[1])


def test_saving_writes_the_plain_network(tmp_path):
    pipe = sd()
    with apply_tofu(pipe, speedup=2.0):
        pipe.controlnet.save_pretrained(tmp_path)
    again = ControlNetModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), pipe.controlnet.parameters(), strict=True)
    )
