"""torch.compile: fullgraph, equal to eager, few graphs, none new from step to step."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests import tiny
from tests.inputs import unet_inputs
from tofu_diffusers import apply_tofu, remove_tofu

SKIPPING = {"speedup": 1.5, "warmup_steps": 2}
SETTINGS = {
    "tome": {"ratio": 0.5, "method": "tome"},
    "step": {**SKIPPING, "corrector": True},
    "step_plain": {**SKIPPING, "corrector": False},
    # The token profile.
    "fresh": {"ratio": 0.5, **tiny.SHORT, "keys_values": "fresh", "corrector": True},
    "cached": {"ratio": 0.5, **tiny.SHORT, "keys_values": "cached", "corrector": True},
    "fresh_plain": {"ratio": 0.5, **tiny.SHORT, "keys_values": "fresh", "corrector": False},
    "attention": {"ratio": 0.5, "method": "tofu", "scope": "attention"},
    "span_temporal": {
        "ratio": 0.5,
        "method": "random",
        "unmerge": "temporal",
        "scope": "span",
        "keys_values": "cached",
    },
}


REDUCED_AT_ONCE = ("tome", "attention", "span_temporal")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Tracing takes as long as there are layers.
TRANSFORMERS = {
    "pixart": partial(tiny.tiny_pixart, num_layers=1),
    "dit": partial(tiny.tiny_dit, num_layers=1),
    "flux": partial(tiny.tiny_flux, num_layers=1, num_single_layers=1),
    "qwen": partial(tiny.tiny_qwen, num_layers=1),
    "wan": partial(tiny.tiny_wan, num_layers=1),
    "unet2d": partial(tiny.tiny_ddpm, channels=(16,)),
}


def small(family, layers=1):
    if family == "unet":
        return tiny.small_sd(transformer_layers=layers)
    if family in TRANSFORMERS:
        return TRANSFORMERS[family]()
    return tiny.tiny_sd3(num_layers=2)


def run(pipe):
    return tiny.generate(pipe, ["a cat", "a dog"], steps=6)


@pytest.mark.parametrize("family", ["unet", "sd3"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_whole_model_fullgraph(family, setting):
    options = SETTINGS[setting]
    # A span is of two layers.
    pipe = small(family, layers=2 if "scope" in options else 1)
    model = getattr(pipe, "unet", None) or pipe.transformer
    with apply_tofu(pipe, **options):
        eager = run(pipe)
    apply_tofu(pipe, **options)
    counter = CompileCounter()
    model.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(run(pipe), eager, rtol=1e-3, atol=1e-3)
    # The first call, in which caches are made; later ones that are whole; those that are reduced or skipped.
    graphs = 2 if setting in REDUCED_AT_ONCE else 3
    assert counter.frame_count == graphs
    torch.testing.assert_close(run(pipe), eager, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        *((family, "fresh") for family in TRANSFORMERS),
        ("flux", "step"),
        ("wan", "step"),
        ("wan", "cached"),
        ("flux", "tome"),
    ],
)
def test_every_family_fullgraph(family, setting):
    """No graph break and no new graph from step to step, in a first and a second generation."""
    pipe = small(family)
    model = tiny.denoisers(pipe)[0]
    # A compiled FLUX reads its grid after its first step, which runs whole.
    options = tiny.SHORT | SETTINGS[setting]
    with apply_tofu(pipe, **options):
        eager = run(pipe)
    apply_tofu(pipe, **options)
    counter = CompileCounter()
    model.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(run(pipe), eager, rtol=1e-3, atol=1e-3)
    graphs = counter.frame_count
    calls = 2 if family in ("qwen", "wan") else 1  # guidance in two calls, a graph for each
    assert graphs <= 4 * calls
    torch.testing.assert_close(run(pipe), eager, rtol=1e-3, atol=1e-3)
    assert counter.frame_count <= graphs + calls


@pytest.mark.parametrize(
    ("family", "setting", "graphs"),
    [("flux", "tome", 7), ("flux", "cached", 6), ("wan", "cached", 5), ("qwen", "fresh", 7)],
)
def test_repeated_blocks_of_transformers_fullgraph(family, setting, graphs):
    """One graph a class of blocks and kind of step serves all three blocks, not one a block."""
    options = tiny.SHORT | SETTINGS[setting]
    extra = {"num_single_layers": 3} if family == "flux" else {}
    pipe = TRANSFORMERS[family](num_layers=3, **extra)
    with apply_tofu(pipe, **options):
        eager = run(pipe)
    apply_tofu(pipe, **options)
    counter = CompileCounter()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(run(pipe), eager, rtol=1e-3, atol=1e-3)
    found = counter.frame_count
    assert found <= graphs
    run(pipe)
    assert counter.frame_count == found


@torch.no_grad()
def test_a_compiled_bare_flux_that_is_not_told_its_steps():
    """Its grid cannot be read in one graph: refused there, read in between where graphs may break."""
    model = small("flux").transformer
    inputs = tiny.model_inputs(model)
    apply_tofu(model, ratio=0.5, method="tome")
    expected = model(**inputs)[0]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs)[0], expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="must be told its steps"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    remove_tofu(model)


@pytest.mark.parametrize("setting", ["tome", "fresh", "cached"])
def test_repeated_blocks_fullgraph(setting):
    """One graph a kind of step serves all nine blocks; longer generations need no more graphs."""
    # With six layers two of ToMe's similarities are so close that a machine's rounding decides.
    pipe = tiny.small_sd(transformer_layers=3)
    with apply_tofu(pipe, **SETTINGS[setting]):
        eager = run(pipe)
    apply_tofu(pipe, **SETTINGS[setting])
    counter = CompileCounter()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(run(pipe), eager, rtol=1e-3, atol=1e-3)
    graphs = counter.frame_count
    assert graphs <= 8
    run(pipe)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("family", ["unet", "flux", "wan"])
def test_skipped_steps_need_no_graphs_of_repeated_blocks(family):
    graphs = []
    for options in ({}, SETTINGS["step"]):
        torch._dynamo.reset()
        pipe = small(family)
        if options:
            apply_tofu(pipe, **options)
        counter = CompileCounter()
        tiny.denoisers(pipe)[0].compile_repeated_blocks(fullgraph=True, backend=counter)
        run(pipe)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


def test_compiled_before_applying_and_removed_again():
    pipe = small("sd3")
    baseline = run(pipe)
    counter = CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    torch.testing.assert_close(run(pipe), baseline, rtol=1e-4, atol=1e-4)
    with apply_tofu(pipe, ratio=0.5, method="tome") as handle:
        reduced = run(pipe)
        assert handle.summary().flops_saved > 0.2
    assert not torch.allclose(reduced, baseline)
    torch.testing.assert_close(run(pipe), baseline, rtol=1e-4, atol=1e-4)
    with apply_tofu(pipe.transformer, ratio=0.5, method="tome"):
        torch.testing.assert_close(run(pipe), reduced, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_compiled_bare_model_refuses_what_needs_steps():
    unet = small("unet").unet
    apply_tofu(unet, ratio=0.5, keys_values="cached")
    compiled = torch.compile(unet, backend="eager")
    with pytest.raises(Exception, match="must know the denoising step"):
        compiled(**unet_inputs())
    remove_tofu(unet)


@torch.no_grad()
def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        for family in ("unet", "sd3"):
            pipe = small(family)
            for setting in SETTINGS.values():
                with apply_tofu(pipe, **setting):
                    assert torch.equal(run(pipe), run(pipe))
    finally:
        torch.use_deterministic_algorithms(False)
