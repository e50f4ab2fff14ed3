"""What happens to a pipeline with tofu: copies, files, changing sizes, errors, training."""

import copy
import tempfile
from typing import Any

import pytest
import torch

from tests import tiny
from tofu_diffusers import apply_tofu, remove_tofu

from .adapters import add_lora
from .base import (
    FLUX,
    STEPS,
    TRANSFORMER,
    UNET,
    Course,
    Refused,
    denoiser,
    generate,
    is_active,
)

Amount = dict[str, float]


def copied(pipe: Any, amount: Amount) -> None:
    """A copy has tofu of its own, which comes off by itself."""
    plain = generate(pipe, steps=STEPS)
    apply_tofu(pipe, **amount)
    expected = generate(pipe, steps=STEPS)
    twin = copy.deepcopy(pipe)
    remove_tofu(pipe)
    assert torch.equal(generate(twin, steps=STEPS), expected)
    assert torch.equal(generate(pipe, steps=STEPS), plain)
    remove_tofu(twin)
    assert torch.equal(generate(twin, steps=STEPS), plain)


def saved(pipe: Any, amount: Amount) -> None:
    """What is written with tofu on is the plain pipeline."""
    plain = generate(pipe, steps=STEPS)
    with apply_tofu(pipe, **amount), tempfile.TemporaryDirectory() as folder:
        generate(pipe, steps=STEPS)
        pipe.save_pretrained(folder)
        again = type(pipe).from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again, steps=STEPS), plain)


# Of generations in turn: pixels, prompts, steps.
TURNS = ((128, 128, 1, 9), (96, 160, 2, 9), (128, 128, 3, 11), (160, 96, 1, 4), (128, 128, 1, 9))


def in_turn(pipe: Any, amount: Amount) -> None:
    """Each generation is what it is alone."""
    calls = [
        {"height": height, "width": width, "prompts": ["a cat", "a dog", "a hat"][:images]}
        | {"steps": steps}
        for height, width, images, steps in TURNS
    ]
    alone = []
    for call in calls:
        with apply_tofu(pipe, **amount):
            alone.append(generate(pipe, **call))
    with apply_tofu(pipe, **amount) as handle:
        for call, expected in zip(calls, alone, strict=True):
            assert torch.equal(generate(pipe, **call), expected)
        assert is_active(handle)


def broken_off(pipe: Any, amount: Amount) -> None:
    """The generation after one that raised is an undisturbed one."""
    plain = generate(pipe, steps=STEPS)
    handle = apply_tofu(pipe, **amount)
    expected = generate(pipe, steps=STEPS)

    def stop(pipe: Any, index: int, timestep: Any, kwargs: Any) -> Any:
        if index == 7:
            raise KeyError("the user's own")
        return kwargs

    with pytest.raises(KeyError, match="the user's own"):
        generate(pipe, steps=STEPS, callback_on_step_end=stop)
    assert torch.equal(generate(pipe, steps=STEPS), expected)
    with pytest.raises(KeyError, match="the user's own"):
        generate(pipe, steps=STEPS, callback_on_step_end=stop)
    handle.remove()
    assert torch.equal(generate(pipe, steps=STEPS), plain)


def trained(pipe: Any, amount: Amount) -> None:
    """One step of a LoRA through reduced tokens, with gradient checkpointing and without it."""
    model = denoiser(pipe)
    add_lora(pipe)
    model.train()
    inputs = tiny.model_inputs(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        method = {"method": "tofu"} if "ratio" in amount else {}
        with apply_tofu(model, **amount, **method) as handle:
            model(**inputs)[0].square().mean().backward()
            assert is_active(handle)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found and all("lora" in name for name in found)
        assert all(each.isfinite().all() for each in found.values())
        assert any(each.abs().max() > 0 for each in found.values())
        gradients.append(found)
        model.zero_grad(set_to_none=True)
    for name, each in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], each)


BOTH = TRANSFORMER | FLUX
LIFETIMES = (
    Course(
        "`copy.deepcopy`", unet=UNET, transformer=BOTH, happens=copied, note="carries its own tofu"
    ),
    Course(
        "`save_pretrained` and `from_pretrained` with tofu on",
        unet=UNET,
        transformer=BOTH,
        happens=saved,
        note="writes the plain pipeline",
    ),
    Course("sizes, batches and step counts in turn", unet=UNET, transformer=BOTH, happens=in_turn),
    Course(
        "an exception in the middle, then another generation",
        unet=UNET,
        transformer=BOTH,
        happens=broken_off,
    ),
    Course(
        "a LoRA training step, with gradient checkpointing",
        unet=UNET,
        transformer=BOTH,
        happens=trained,
        steps=Refused("must know the denoising step"),
        note='`TokenReduction(method="tofu")`; one call has no steps to skip',
    ),
)
