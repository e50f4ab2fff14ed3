"""Samplers, and models of few steps."""

from collections.abc import Callable
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from tests import tiny

from .base import FLUX, TRANSFORMER, UNET, Combination

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def sampler(
    cls: Any, flow_cls: Any = None, flow: Any = None, **options: Any
) -> Callable[[Any], None]:
    """Gives a pipeline another scheduler, of its own kind of noise."""

    def put(pipe: Any) -> None:
        if hasattr(pipe, "unet"):
            pipe.scheduler = cls(**tiny.NOISE, **options)
        else:
            pipe.scheduler = flow_cls(**flow)

    return put


def take(pipe: Any) -> None:
    """The scheduler that the tiny pipelines have."""
    if hasattr(pipe, "unet"):
        pipe.scheduler = DDIMScheduler(
            **tiny.NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
    else:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def swapped(name: str, *classes: Any, **options: Any) -> Combination:
    """A row of a scheduler that takes the place of the pipeline's own."""
    known = {"unet": UNET, "transformer": TRANSFORMER if len(classes) > 1 else {}}
    kept = {
        key: options.pop(key)
        for key in ("call", "count", "tokens", "steps", "note")
        if key in options
    }
    return Combination(name, **known, put=sampler(*classes, **options), take=take, **kept)


SECOND = "calls the denoiser twice a step, which drifts more"
SAMPLERS = (
    swapped("Euler", EulerDiscreteScheduler),
    swapped("Euler, trailing (Lightning)", EulerDiscreteScheduler, timestep_spacing="trailing"),
    swapped("Euler ancestral", EulerAncestralDiscreteScheduler, note="its noise drifts more"),
    swapped(
        "Heun",
        HeunDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        flow={"shift": 3.0},
        note=SECOND,
    ),
    swapped("DPM++ 2M", DPMSolverMultistepScheduler, DPMSolverMultistepScheduler, flow=FLOW),
    swapped(
        "DPM++ 2M SDE",
        DPMSolverMultistepScheduler,
        algorithm_type="sde-dpmsolver++",
        note="its noise drifts more",
    ),
    swapped("UniPC", UniPCMultistepScheduler, UniPCMultistepScheduler, flow=FLOW),
    Combination("DDIM with `eta=0.5`", unet=UNET, call={"eta": 0.5}, note="its noise drifts more"),
    swapped("LCM", LCMScheduler, note="its noise drifts more"),
    swapped(
        "LCM of 4 steps",
        LCMScheduler,
        count=4,
        note="`ratio` runs without memory",
    ),
    swapped(
        "Turbo and Lightning of 4 steps",
        EulerDiscreteScheduler,
        timestep_spacing="trailing",
        call={"guidance_scale": 0.0},
        count=4,
        note="`ratio` runs without memory",
    ),
    Combination(
        "4 steps (FLUX.1-schnell)",
        transformer=FLUX,
        count=4,
        note="`ratio` runs without memory",
    ),
)
