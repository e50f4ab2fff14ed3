"""tofu_diffusers.tuning.calibrate and .probes: gradients, the probes fitted to them, what reads those."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

from eval.__main__ import main
from eval.generate.prompts import load_prompts
from pipelines.emoji import GUIDANCE
from tests import tiny
from tests.denoisers import DENOISERS
from tests.families.test_classes import CLASSES
from tests.families.test_families import BUILDERS, plans_of, run
from tests.tiny_pipelines import PIPELINES
from tofu_diffusers import apply_tofu, calibrate_gradient, remove_tofu
from tofu_diffusers.families import find_family
from tofu_diffusers.hooks.patch import bind, parameters_of
from tofu_diffusers.tokens.random_bits import uniform
from tofu_diffusers.tokens.sources.gradient import features, log_norm, sensitivity
from tofu_diffusers.tuning.calibrate import gradients
from tofu_diffusers.tuning.linearity import linearities
from tofu_diffusers.tuning.probes import (
    Fit,
    load_probes,
    rank_correlation,
)

PROMPTS = {"dit": [[1], [2], [3]], "unet2d": [1, 1, 1]}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(name, path, pipe=None, **options):
    """The pipeline of a family and what its calibration says."""
    pipe = BUILDERS[name]() if pipe is None else pipe
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, **tiny.CALLS.get(type(pipe), {}), **options}
    return pipe, calibrate_gradient(
        pipe, PROMPTS.get(name, ["a", "b", "c"]), path, calls=2, **given
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_a_gradient_is_how_much_the_prediction_moves_with_a_token(name):
    """Against central differences: the signed sum of the prediction while one token moves."""
    model = tiny.denoisers(BUILDERS[name]())[0]
    family, named, token = find_family(model, None), tiny.model_inputs(model), 7
    found = {each[0]: each[1:] for each in gradients(model, family, named, seed=5)}
    grids = family.grids(model, named)

    def signed_sum(block, before, move):
        def moved(module, args, kwargs):
            given = bind(parameters_of(module), args, kwargs)
            x = given["hidden_states"]
            tokens = family.hidden(given).clone()
            tokens[:, before + token] += move
            tokens = tokens.mT.reshape(x.shape) if x.ndim == 4 else tokens
            return (), {**given, "hidden_states": tokens}

        hook = block.register_forward_pre_hook(moved, with_kwargs=True)
        with torch.no_grad():
            out = model(**named, return_dict=False)[0]
        hook.remove()
        signs = (uniform(5, None, torch.arange(out.numel())) < 0.5).double() * 2 - 1
        return (out.double().flatten() * signs).sum()

    names = []
    for level, block_name, block in (
        (each.resolution, *block) for each in family.block_stacks(model) for block in each.blocks
    ):
        names.append(block_name)
        x, gradient = found[block_name]
        assert x.shape == gradient.shape and x.shape[1] == grids[level].tokens
        before = grids[level].text_before
        direction = gradient[:, token] / gradient[:, token].norm(dim=-1, keepdim=True)
        up, down = (signed_sum(block, before, step * direction) for step in (5e-3, -5e-3))
        slope = gradient[:, token].norm(dim=-1).sum().double()
        torch.testing.assert_close((up - down) / 1e-2, slope, rtol=0.03, atol=1e-3)
    assert names == list(found)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_gives_tokens_and_gradients(name):
    """Whatever its blocks call their tokens, and however these lie."""
    model, named = DENOISERS[name].build(), DENOISERS[name].arguments()
    family = find_family(model, None)
    grids = family.grids(model, named)
    sides = {
        block: grids[stack.resolution]
        for stack in family.block_stacks(model)
        for block, _ in stack.blocks
    }
    found = {block: (x, gradient) for block, x, gradient in gradients(model, family, named, seed=5)}
    assert {*found} == {*sides}
    for block, (x, gradient) in found.items():
        assert x.shape == gradient.shape and x.shape[1] == sides[block].tokens
        assert torch.isfinite(gradient).all() and (gradient.norm(dim=-1) > 0).all()


def test_images_behind_texts_of_their_own_lengths():
    """Lumina 2, in a batch: each row's image begins where its own text ends."""
    described = DENOISERS["Lumina2Transformer2DModel"]
    model, named = tiny.randomise(described.build()), described.arguments()
    family = find_family(model, None)
    starts = named["encoder_attention_mask"].sum(1)
    assert len({*starts.tolist()}) == 2
    block, noted = model.layers[1], []
    hook = block.register_forward_pre_hook(lambda module, args: noted.append(args[0]))
    found = {each[0]: each[1:] for each in gradients(model, family, named, seed=5)}
    hook.remove()
    x, gradient = found["layers.1"]
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(x[row], noted[0][row, start : start + 24])

    def signed_sum(row, move):
        def moved(module, args):
            tokens = args[0].clone()
            tokens[row, starts[row] + 7] += move
            return tokens, *args[1:]

        hook = block.register_forward_pre_hook(moved)
        with torch.no_grad():
            out = model(**named, return_dict=False)[0]
        hook.remove()
        signs = (uniform(5, None, torch.arange(out.numel())) < 0.5).double() * 2 - 1
        return (out.double().flatten() * signs).sum()

    for row in range(2):
        step = 5e-3 * gradient[row, 7] / gradient[row, 7].norm()
        slope = (signed_sum(row, step) - signed_sum(row, -step)) / 1e-2
        torch.testing.assert_close(slope, gradient[row, 7].norm().double(), rtol=0.03, atol=1e-3)
    with pytest.raises(ValueError, match=r"texts of \[3, 5\] tokens.*a prompt of its own"):
        linearities(model, family, named, 0.5)


def test_probes_of_lumina_2(tmp_path):
    """Whose prompts have texts of their own lengths."""
    pipe = PIPELINES["Lumina2Transformer2DModel"]()
    call = tiny.CALLS[type(pipe)] | {"num_inference_steps": 3}
    path = tmp_path / "probe.safetensors"
    agreement = calibrate_gradient(pipe, ["a", "a cat", "two dogs"], path, calls=2, **call)
    blocks = {
        name for stack in ("noise_refiner", "layers") for name in (f"{stack}.0", f"{stack}.1")
    }
    assert {*agreement} == blocks
    how = {"source": "gradient", "probe": str(path)}
    with apply_tofu(pipe, ratio=0.5, method="importance", method_options=how) as handle:
        assert torch.isfinite(tiny.generate(pipe, steps=3)).all()
        assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())


def test_a_linear_law_is_found_whatever_images_have_in_common():
    law = drawn(0, 9)
    fit = Fit(8)
    for seed in range(1, 5):
        x = drawn(seed, 2, 40, 8) * (1 + drawn(seed + 50, 2, 40, 1).abs())
        norm = (features(x) @ law + 10 * seed).exp()
        fit.add(x, drawn(seed + 100, 2, 40, 1).sign() * norm[..., None])
    x = drawn(9, 2, 40, 8)
    guess, want = sensitivity(x, fit.probe(ridge=1e-9)), features(x) @ law
    assert guess.shape == (2, 40) and guess.dtype == torch.float32 and (guess > 0).all()
    want = want - want.mean(dim=1, keepdim=True)
    torch.testing.assert_close(guess.log(), want, rtol=1e-3, atol=1e-3)


def test_rank_correlation_is_spearmans():
    a, b = drawn(0, 3, 50), drawn(1, 3, 50) + drawn(0, 3, 50)
    want = sum(spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)) / 3
    assert rank_correlation(a, b) == pytest.approx(want)


def test_tokens_and_gradients_of_zero_have_finite_numbers():
    probe = torch.ones(5)
    for x in (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4, dtype=torch.float16)):
        assert torch.isfinite(sensitivity(x, probe)).all() and torch.isfinite(log_norm(x)).all()


@pytest.mark.parametrize("name", BUILDERS)
def test_probes_choose_the_tokens_of_every_family(name, tmp_path):
    path = tmp_path / "probes.safetensors"
    pipe, agreement = calibrated(name, path)
    model = tiny.denoisers(pipe)[0]
    blocks = {
        block for each in find_family(model, None).block_stacks(model) for block, _ in each.blocks
    }
    assert set(agreement) == blocks
    assert all(-1 <= value <= 1 for value in agreement.values())
    inputs = tiny.model_inputs(model)
    with torch.no_grad():
        for source in ("gradient", {"gradient": 0.5, "change": 1}):
            options = {"source": source, "probe": str(path)}
            out, handle = run(
                model, inputs, 4, True, ratio=0.5, method="importance", method_options=options
            )
            assert torch.isfinite(out).all()
            for plan in plans_of(handle).values():
                plan.check()
            remove_tofu(model)


@pytest.mark.parametrize("scope", ["attention", "block", "span"])
def test_the_tokens_kept_are_those_the_probe_ranks_highest(scope, tmp_path):
    path = tmp_path / "probes.safetensors"
    model = tiny.denoisers(BUILDERS["sd3"]())[0]
    calibrated("sd3", path, BUILDERS["sd3"]())
    inputs = tiny.model_inputs(model)
    first = find_family(model, None).block_stacks(model)[0].blocks[0][1]
    seen = []
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(bind(parameters_of(module), args, kwargs)),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        options = {"source": "gradient", "probe": str(path)}
        handle = apply_tofu(
            model,
            ratio=0.5,
            method="importance",
            method_options=options,
            scope=scope,
            unmerge="copy",
        )
        model(**inputs)
    probe = load_probes(path, {"transformer_blocks.0": seen[0]["hidden_states"].shape[2]})
    score = sensitivity(seen[0]["hidden_states"], probe["transformer_blocks.0"])
    want = score.topk(score.shape[1] // 2, dim=1).indices.sort(dim=1).values
    assert torch.equal(next(iter(plans_of(handle).values())).kept, want)


def test_calibrating_leaves_no_trace(tmp_path):
    pipe = tiny.tiny_sd()
    before, state = tiny.generate(pipe), torch.get_rng_state()
    hooks = [len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    calibrated("unet", tmp_path / "probes.safetensors", pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(module._forward_pre_hooks) for module in pipe.unet.modules()] == hooks
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    assert torch.equal(tiny.generate(pipe), before)


def test_the_command_writes_probes_and_how_good_they_are(tmp_path):
    folder, out = tmp_path / "pipe", tmp_path / "probes.safetensors"
    tiny.tiny_sd().save_pretrained(folder)
    words = ["--pipeline", str(folder), "--out", str(out), "--steps", "2", "-n", "3"]
    assert main(["calibrate", *words, "--seed", "7", "--guidance", str(GUIDANCE)]) == 0
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["n"] == 3 and about["seed"] == 7 and about["weights"]
    again = tmp_path / "again.safetensors"
    last = load_prompts("emoji")[-3:]
    agreement = calibrate_gradient(
        tiny.tiny_sd(), last, again, seed=7, num_inference_steps=2, guidance_scale=GUIDANCE
    )
    assert about["rank_correlation"] == {name: round(value, 3) for name, value in agreement.items()}
    assert again.read_bytes() == out.read_bytes()


def test_what_cannot_be_calibrated_is_refused(tmp_path):
    path = tmp_path / "probes.safetensors"
    pipe = tiny.tiny_sd()
    with pytest.raises(ValueError, match=r"1 prompts are too few: .* two or more"):
        calibrate_gradient(pipe, ["a cat"], path)
    with pytest.raises(ValueError, match="calls is 0; give 1 or more"):
        calibrate_gradient(pipe, ["a cat", "a dog"], path, calls=0)
    with (
        apply_tofu(pipe, ratio=0.5),
        pytest.raises(ValueError, match=r"call remove_tofu\(pipe\) before"),
    ):
        calibrate_gradient(pipe, ["a cat", "a dog"], path)
    with pytest.raises(ValueError, match=r"has 2 denoisers; .* give a pipeline with one"):
        calibrate_gradient(tiny.tiny_wan(two=True), ["a cat", "a dog"], path)
    with pytest.raises(TypeError, match="takes a diffusers pipeline, not UNet2DCond"):
        calibrate_gradient(pipe.unet, ["a cat", "a dog"], path)
    wrapped, in_place = tiny.tiny_sd(), pipe
    wrapped.unet = torch.compile(wrapped.unet, backend="eager")
    in_place.unet.compile(backend="eager")
    for compiled in (wrapped, in_place):
        with pytest.raises(ValueError, match="calibrate first, then compile"):
            calibrate_gradient(compiled, ["a cat", "a dog"], path)
    assert not path.exists()


def test_probes_that_do_not_fit_are_refused_before_anything_is_touched(tmp_path):
    path = tmp_path / "probes.safetensors"
    calibrated("sd3", path)
    pipe = tiny.tiny_sd()

    def apply(file):
        options = {"source": "gradient", "probe": str(file)}
        return apply_tofu(pipe, ratio=0.5, method="importance", method_options=options)

    with pytest.raises(FileNotFoundError, match=r"no probe file .*calibrate_gradient\(pipe"):
        apply(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"another model: for down_blocks.* it has none"):
        apply(path)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="holds no gradient probes"):
        apply(other)
    other.write_text("nothing of that kind")
    with pytest.raises(ValueError, match="is no safetensors file"):
        apply(other)
    calibrated("unet", other, tiny.tiny_sd(channels=(32, 32)))
    with pytest.raises(ValueError, match="with 64 channels it has one for 32 channels"):
        apply(other)
    assert "_tofu" not in pipe.unet.__dict__


SMALL = {
    "unet": partial(tiny.tiny_sd, channels=(32,), middle=False),
    "sd3": partial(tiny.tiny_sd3, num_layers=2),
}


@pytest.mark.parametrize("name", SMALL)
def test_compiled_without_a_graph_break(name, tmp_path):
    torch._dynamo.reset()
    path = tmp_path / "probes.safetensors"
    pipe, _ = calibrated(name, path, SMALL[name]())
    options = {"source": {"gradient": 1, "change": 1}, "probe": str(path)}
    part = "unet" if name == "unet" else "transformer"
    model = getattr(pipe, part)
    apply_tofu(pipe, ratio=0.5, method="importance", method_options=options)
    eager = tiny.generate(pipe, steps=5)
    setattr(pipe, part, torch.compile(model, fullgraph=True, backend="eager"))
    torch.testing.assert_close(tiny.generate(pipe, steps=5), eager, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
