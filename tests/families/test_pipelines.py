"""Real pipelines around tiny denoisers: tokens and steps go, and come back when tofu is removed.

A class is here once `tests.tiny.PIPELINES` knows how to build a pipeline around it.
"""

import pytest
import torch

from tests import tiny
from tofu_diffusers import apply_tofu

STEPS = 6
EARLY = {"warmup_steps": 2}  # generations here are short
pytestmark = pytest.mark.filterwarnings("ignore:6 steps")


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_pipeline_with_half_of_its_tokens_and_with_half_of_its_steps(name):
    pipe = tiny.PIPELINES[name]()
    (denoiser,) = tiny.denoisers(pipe)
    assert type(denoiser).__name__ == name
    before = tiny.generate(pipe, steps=STEPS)
    with apply_tofu(pipe, ratio=0.5, **EARLY) as handle:
        reduced = tiny.generate(pipe, steps=STEPS)
        assert all(0 < row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
        (seen,) = handle.inspect()
        assert seen.denoiser == name
        # Computed at every step were some of the tokens.
        assert all(0 < float(shares.mean()) < 1 for shares in handle.computed().values())
    with apply_tofu(pipe, speedup=2, **EARLY) as handle:
        skipped = tiny.generate(pipe, steps=STEPS)
        (steps,) = handle.summary().steps
        assert (steps.steps, steps.computed) == (STEPS, STEPS // 2)
    for changed in (reduced, skipped):
        assert changed.shape == before.shape and torch.isfinite(changed).all()
        assert not torch.equal(changed, before)
    assert torch.equal(tiny.generate(pipe, steps=STEPS), before)
