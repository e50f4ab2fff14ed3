"""Real pipelines around tiny denoisers: tokens and steps go, and come back when tofu is removed.

A class is here once `tests.tiny_pipelines` knows how to build a pipeline around it, and it must, unless there
is none.
"""

import inspect

import pytest
import torch

from tests import families_table, tiny
from tests.tiny_pipelines import NO_PIPELINES, OF_32, PICTURE, PIPELINES
from tofu_diffusers import apply_tofu
from tofu_diffusers.families import known_family

STEPS = 4
MEASURED = {"SD3Transformer2DModel", "UNet2DConditionModel"}
"""Of which this repository has a trained model; others skip by the profile of one of them, provisionally."""
TAKE_32 = {"GlmImagePipeline", "LTX2Pipeline", "LTXPipeline", "SanaPipeline"}
"""Those that take multiples of 32 pixels alone."""
pytestmark = pytest.mark.filterwarnings("ignore:4 steps")


def test_every_class_has_a_pipeline_here_unless_diffusers_has_none():
    assert {*PIPELINES}.isdisjoint(NO_PIPELINES)
    assert {*PIPELINES, *NO_PIPELINES} == {*families_table.CLASSES}
    assert not any(families_table.pipelines_of(name) for name in NO_PIPELINES)


def generate(pipe):
    """Of an odd size, where the pipeline takes any."""
    torch.manual_seed(0)  # from which I2VGen-XL draws, and which tofu must leave alone
    takes = inspect.signature(pipe.__call__).parameters
    size = OF_32 if type(pipe).__name__ in TAKE_32 else PICTURE
    return tiny.generate(pipe, steps=STEPS, **(size if "height" in takes else {}))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_with_half_of_its_tokens_and_with_half_of_its_steps(name):
    pipe = PIPELINES[name]()
    denoisers = tiny.denoisers(pipe)
    assert {type(denoiser).__name__ for denoiser in denoisers} == {name}
    before = generate(pipe)
    with apply_tofu(pipe, ratio=0, **tiny.SHORT):
        assert torch.equal(generate(pipe), before)
    with apply_tofu(pipe, ratio=0.5, **tiny.SHORT) as handle:
        reduced = generate(pipe)
        assert all(0 < row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
        assert [seen.denoiser for seen in handle.inspect()] == [name] * len(denoisers)
        # Computed at every step were some of the tokens.
        assert all(0 < float(shares.mean()) < 1 for shares in handle.computed().values())
    with apply_tofu(pipe, speedup=2) as handle:
        skipped = generate(pipe)
        summary = handle.summary()
        assert [(each.steps, each.computed) for each in summary.steps] == [
            (STEPS, STEPS // 2)
        ] * len(denoisers)
        assert f"default profile, {'measured' if name in MEASURED else 'that of '}" in str(summary)
        assert ("provisional)" in str(summary)) == (name not in MEASURED)
    if all(known_family(denoiser).texts for denoiser in denoisers):
        with apply_tofu(pipe, drop_text_padding=True) as handle:
            torch.testing.assert_close(generate(pipe), before, rtol=1e-3, atol=1e-3)
            text = handle._all[0].runtime.text
            assert any(dropped for _, dropped in text.counts.values()) != bool(text.why_not)
    for changed in (reduced, skipped):
        assert changed.shape == before.shape and torch.isfinite(changed).all()
        assert not torch.equal(changed, before)
    assert torch.equal(generate(pipe), before)
