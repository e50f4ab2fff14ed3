"""What is measured on denoisers is measured on encoders too: gradients, linearity, schedules."""

from itertools import accumulate, pairwise

import pytest
import torch
from torch import nn

from tests.tiny_encoders import BUILDERS, arguments, build
from tofu_diffusers import (
    EncoderReduction,
    TokenReduction,
    apply_tofu,
    calibrate_gradient,
    learn_schedule,
    measure_linearity,
)
from tofu_diffusers.hooks.patch import bind, parameters_of, state_of
from tofu_diffusers.tokens.sources.attention import received_attention
from tofu_diffusers.tokens.sources.gradient import sensitivity
from tofu_diffusers.tuning.calibrate import _of_encoder
from tofu_diffusers.tuning.encoder_calls import MeasuredEncoder
from tofu_diffusers.tuning.probes import load_probes, signed_sum
from tofu_diffusers.tuning.schedule_search import spread_over_blocks

CONFIG = EncoderReduction(method="tome", schedule="share")


@pytest.fixture(scope="module")
def models():
    return {name: build(name).double() for name in BUILDERS}


@pytest.fixture(params=BUILDERS)
def case(request, models):
    """A model in float64, its encoder, and inputs of one row without padding."""
    model = models[request.param]
    given = arguments(request.param, model, torch.float64)
    given.pop("attention_mask", None)
    rows = [{name: each[i : i + 1] for name, each in given.items()} for i in range(2)]
    encoder = MeasuredEncoder.of(model)
    assert encoder is not None
    return model, encoder, rows


def test_a_gradient_is_how_much_the_output_moves_with_a_token(case):
    """Against central differences: the signed sum of the output while one token moves."""
    model, encoder, rows = case
    prefix, token = encoder.family.prefix, 7
    found = {name: (x, change) for name, x, change in _of_encoder(encoder, rows[0], 5, {})}
    assert [*found] == [name for name, _ in encoder.blocks]
    for name, block in encoder.blocks:
        x, gradient = found[name]
        direction = gradient[:, token] / gradient[:, token].norm()

        def signed(step, block=block, direction=direction):
            def moved(module, args, kwargs):
                named = bind(parameters_of(module), args, kwargs)
                tokens = named["hidden_states"].clone()
                tokens[:, prefix + token] += step * direction
                return (), {**named, "hidden_states": tokens}

            hook = block.register_forward_pre_hook(moved, with_kwargs=True)
            with torch.no_grad():
                out = signed_sum(encoder(rows[0], {}), 5)
            hook.remove()
            return out

        assert x.shape == gradient.shape
        slope = (signed(1e-4) - signed(-1e-4)) / 2e-4
        # T5 and BERT have parts in float32.
        torch.testing.assert_close(slope, gradient[:, token].norm(), rtol=0.02, atol=1e-7)
    assert all(each.grad is None for each in model.parameters())


def test_probes_choose_the_tokens(case, tmp_path):
    model, encoder, rows = case
    path = tmp_path / "probes.safetensors"
    agreement = calibrate_gradient(model, rows, path)
    assert [*agreement] == [name for name, _ in encoder.blocks]
    assert all(-1 <= value <= 1 for value in agreement.values())
    first, block = encoder.blocks[0]
    seen = []
    hook = block.register_forward_pre_hook(
        lambda each, args, kwargs: seen.append(
            bind(parameters_of(each), args, kwargs)["hidden_states"]
        ),
        with_kwargs=True,
    )
    how = {"source": "gradient", "probe": str(path)}
    weights = (1.0, *[0.0] * (len(encoder.blocks) - 1))
    kept = []
    with (
        apply_tofu(model, ratio=0.5, method="importance", method_options=how, schedule=weights),
        torch.no_grad(),
    ):
        last = encoder.blocks[-1][1].register_forward_hook(
            lambda *_: kept.append(state_of(encoder.root).call.positions)
        )
        model(**rows[0])
        last.remove()
    hook.remove()
    probe = load_probes(path, {first: seen[0].shape[2]})[first]
    prefix = encoder.family.prefix
    scores = sensitivity(seen[0], probe)[0]
    free = kept[0][0][kept[0][0] >= prefix]
    assert not torch.equal(free, torch.arange(len(free)) + prefix)
    if encoder.family.name != "clip_text":  # where one more stays, whatever its score
        best = scores[prefix:].topk(len(free)).values
        assert torch.equal(scores[free].sort(descending=True).values, best)


def test_probes_of_another_model_and_missing_ones_are_refused(models, tmp_path):
    path = tmp_path / "probes.safetensors"
    calibrate_gradient(models["vit"], one_by_one("vit", models), path)
    how = {"source": "gradient", "probe": str(path)}
    with apply_tofu(models["dinov2"], ratio=0.5) as handle:
        with pytest.raises(ValueError, match="another model"):
            apply_tofu(models["dinov2"], ratio=0.5, method="importance", method_options=how)
        how["probe"] = "none.safetensors"
        with pytest.raises(FileNotFoundError, match="calibrate_gradient"):
            apply_tofu(models["dinov2"], ratio=0.5, method="importance", method_options=how)
        assert not handle.removed


def one_by_one(name, models):
    given = arguments(name, models[name], torch.float64)
    given.pop("attention_mask", None)
    return [{key: each[i : i + 1] for key, each in given.items()} for i in range(2)]


def test_linearity_chooses_where_tofu_merges(case):
    model, encoder, rows = case
    found = measure_linearity(model, rows)
    assert found.blocks == tuple(name for name, _ in encoder.blocks)
    assert found.levels == (0.0,) and all(0 < mean <= 1 for mean in found.means)
    middle = sorted(found.means)[2]
    config = EncoderReduction(method="tofu", method_options=found.merges(middle))
    merges = [config.merge_at(depth) for depth in found.depths]
    assert merges == ["mlerp" if mean >= middle else "prune" for mean in found.means]


def test_linear_blocks_have_linearity_1(models):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = nn.Linear(32, 32).double()

        def forward(self, hidden_states, attention_mask=None, **_):
            return hidden_states + self.of(hidden_states)

    model = build("vit").double()
    model.vit.layers[1] = Linear()
    found = measure_linearity(model, one_by_one("vit", models))
    means = dict(zip(found.blocks, found.means, strict=True))
    assert means.pop("layers.1") == pytest.approx(1.0) and max(means.values()) < 0.9999


def test_a_learned_schedule_computes_no_more_and_drifts_no_more(models):
    model, rows = models["vit"], one_by_one("vit", models)
    learned = learn_schedule(model, rows, CONFIG, rounds=2, candidates=3)
    assert learned.error <= learned.constant_error
    assert learn_schedule(model, rows, CONFIG, rounds=2, candidates=3) == learned
    with torch.no_grad():
        want = [model(**row)[0] for row in rows]
        with apply_tofu(model, learned.config):
            pairs = zip((model(**row)[0] for row in rows), want, strict=True)
            error = sum(float((a - b).square().mean()) for a, b in pairs) / 2
    assert error == pytest.approx(learned.error, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schedule", ["constant", "share"])
def test_what_is_spread_leaves_out_no_less_and_little_more(seed, schedule):
    config = CONFIG.replace(schedule=schedule, ratio=0.6)
    logits = 2 * torch.randn(6, generator=torch.Generator().manual_seed(seed))
    found = spread_over_blocks(config, 0.4, logits)
    gone, before = (sum(accumulate(each.removed(10_000, 6))) for each in (found, config))
    assert before <= gone <= before * 1.001
    left = [10_000 - each for each in accumulate(found.removed(10_000, 6), initial=0)]
    shares = torch.tensor([1 - after / of for of, after in pairwise(left)])
    assert shares.max() <= 0.401 and torch.equal(shares.argsort(), logits.argsort())


def test_weights_of_a_schedule():
    share = EncoderReduction(ratio=0.7, schedule="share")
    assert share.replace(schedule=[2.0] * 6).removed(196, 6) == share.removed(196, 6)
    late = share.replace(schedule=(0, 0, 1, 0, 0, 3))
    removed = late.removed(1000, 6)
    assert removed[2] == round(1000 * (1 - 0.3**0.25)) and sum(removed) == 700
    assert [bool(each) for each in removed] == [False, False, True, False, False, True]
    assert EncoderReduction.from_json(late.to_json()) == late


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": (1, -1)}, "weight of every block, 0 or more"),
        ({"schedule": ()}, "one above 0"),
        ({"schedule": (0, 0)}, "one above 0"),
        ({"schedule": (1, float("inf"))}, "0 or more"),
        ({"schedule": (1, 1), "first_block": 1}, "leave first_block out"),
    ],
)
def test_weights_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderReduction(**options)
    with pytest.raises(TypeError, match="a weight of every block"):
        EncoderReduction(schedule=3)


def test_what_cannot_be_measured_is_refused(models, tmp_path):
    vit, rows = models["vit"], one_by_one("vit", models)
    with pytest.raises(ValueError, match="schedule has 2 weights, and ViTModel has 4 blocks"):
        apply_tofu(vit, ratio=0.5, schedule=(1, 1))
    with pytest.raises(TypeError, match="give EncoderReduction"):
        learn_schedule(vit, rows, TokenReduction(method="tome", ratio=0.4))
    with pytest.raises(ValueError, match="says already where tokens leave"):
        learn_schedule(vit, rows, CONFIG.replace(schedule=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"cannot be spread up to 0\.6.* can reach \(0\.5\)"):
        learn_schedule(vit, rows, CONFIG, most=0.6)
    with pytest.raises(ValueError, match="no prompts"):
        learn_schedule(vit, [], CONFIG)
    with pytest.raises(TypeError, match="arguments by name"):
        measure_linearity(vit, [rows[0]["pixel_values"]])
    padded = arguments("bert", models["bert"])
    with pytest.raises(ValueError, match="4 tokens of an input are padding"):
        calibrate_gradient(models["bert"], [padded, padded], tmp_path / "probes.safetensors")
    with apply_tofu(vit, ratio=0.5), pytest.raises(ValueError, match="has tofu"):
        measure_linearity(vit, rows)
    two = nn.ModuleList([vit, models["dinov2"]])
    with pytest.raises(ValueError, match="has 2 encoders"):
        measure_linearity(two, rows)
    with pytest.raises(ValueError, match="is compiled"):
        measure_linearity(torch.compile(vit, backend="eager"), rows)


@pytest.mark.parametrize("name", ["bert", "clip_text", "vit"])
def test_received_attention_is_what_the_model_attends(name, models):
    """Where nothing has left: the mean over heads and real queries of the model's own maps."""
    model = models[name]
    given = arguments(name, model, torch.float64)
    encoder = MeasuredEncoder.of(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions[0].double()
    model.set_attn_implementation("sdpa")
    real = given.get("attention_mask", torch.ones(maps.shape[::3])).double()
    received = torch.einsum("bhqk,bq->bk", maps, real) / maps.shape[1] / real.sum(1, keepdim=True)
    scores = []

    def spied(queries, keys, heads, **more):
        scores.append(received_attention(queries, keys, heads, **more))
        return scores[-1]

    how = {"source": "attention"}
    with (
        pytest.MonkeyPatch.context() as patch,
        apply_tofu(encoder.model, ratio=0.4, method="importance", method_options=how),
        torch.no_grad(),
    ):
        patch.setattr("tofu_diffusers.tokens.sources.attention.received_attention", spied)
        model(**given)
    torch.testing.assert_close(scores[0].double(), received, rtol=1e-4, atol=1e-6)
    assert len(scores) == len(encoder.blocks)
