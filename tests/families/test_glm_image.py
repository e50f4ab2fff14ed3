"""GLM-Image with pictures to edit, whose keys are written before the steps and read in them."""

import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

from tests import tiny
from tests.denoisers import DENOISERS
from tofu_diffusers import TokenReduction, apply_tofu

ENTRY = DENOISERS["GlmImageTransformer2DModel"]


@pytest.fixture
def model():
    return tiny.randomise(ENTRY.build())


def write(model, pictures):
    """A cache of one picture a sample, as the pipeline fills it."""
    caches, inputs = GlmImageKVCache(2), ENTRY.arguments(seed=5)
    caches.set_mode("write")
    for sample in range(pictures):
        row = {
            name: value[sample : sample + 1] if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        row["encoder_hidden_states"] = row["encoder_hidden_states"][:, :0]
        model(**row | {"attention_mask": None, "kv_caches": caches})
        caches.next_sample()
    caches.set_mode("read")
    return caches


@torch.no_grad()
def test_pictures_are_written_whole(model):
    expected = write(model, 2)
    for options in ({"ratio": 0.5}, {"ratio": 0.5, "method": "tofu"}):
        with apply_tofu(model, **options):
            found = write(model, 2)
        for one, other in zip(found.caches, expected.caches, strict=True):
            for first, second in zip(one.k_caches, other.k_caches, strict=True):
                assert torch.equal(first, second)


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("keys_values", ["fresh", "cached"])
@torch.no_grad()
def test_nothing_changes_while_the_input_does_not(model, keys_values, pictures):
    inputs = ENTRY.arguments() | {"kv_caches": write(model, pictures), "attention_mask": None}
    (expected,) = model(**inputs, return_dict=False)
    config = TokenReduction(
        0.5,
        method="tome",
        unmerge="temporal",
        merge="prune",
        warmup_steps=1,
        keys_values=keys_values,
    )
    handle = apply_tofu(model, config)
    for step in range(3):
        handle.step(step, 3)
        (found,) = model(**inputs, return_dict=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
