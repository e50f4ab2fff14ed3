"""measure_linearity: a known function has its linearity, and what ToFu merges by it."""

import math
from itertools import pairwise

import pytest
import torch

from tests import tiny
from tests.families.test_families import BUILDERS, generation_of
from tofu_diffusers import Linearity, TokenReduction, apply_tofu, measure_linearity, remove_tofu
from tofu_diffusers.families import depths_of, find_family
from tofu_diffusers.hooks.patch import bind, parameters_of
from tofu_diffusers.steps.sampler import Sampling
from tofu_diffusers.tokens.methods import Evidence, make_method
from tofu_diffusers.tuning.linearity import SEGMENTS, linearities, straightness

PROMPTS = {"dit": [[1], [2]], "unet2d": [1, 1]}
FOUR = Linearity(
    ("a", "b", "c", "d"),
    (0.0, 1 / 3, 2 / 3, 1.0),
    (0.9, 0.1),
    ((0.9, 0.7), (0.5, 0.5), (1.0, 0.8), (0.3, 0.1)),
)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(name, pipe=None, **more):
    pipe = BUILDERS[name]() if pipe is None else pipe
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, **tiny.CALLS.get(type(pipe), {}), **more}
    return pipe, measure_linearity(pipe, PROMPTS.get(name, ["a", "b"]), calls=2, **options)


# ---- the measure -----------------------------------------------------------------------------------


def test_straightness_is_distance_over_length():
    ends = drawn(0, 2, 3, 5, 8)
    line = torch.stack([torch.lerp(ends[0], ends[1], t) for t in torch.linspace(0, 1, 9)])
    torch.testing.assert_close(straightness(line), torch.ones(3, 5))
    angle = torch.linspace(0, math.pi, 201)
    half_circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    assert float(straightness(half_circle)) == pytest.approx(2 / math.pi, rel=1e-4)
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert float(straightness(corner)) == pytest.approx(math.sqrt(0.5))
    there_and_back = torch.tensor([[0.0], [1.0], [0.0]])
    assert float(straightness(there_and_back)) == 0
    assert float(straightness(torch.zeros(4, 3))) == 1


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_a_linear_block_has_1_and_a_bent_one_what_its_pairs_say(name, monkeypatch):
    model = tiny.denoisers(BUILDERS[name]())[0]
    family, named = find_family(model), tiny.model_inputs(model)
    blocks = [block for stack in family.block_stacks(model) for block in stack.blocks]
    seen = {}

    def stand_in(name, block, bend):
        """A block that adds `bend` of each token to it."""

        def forward(*args, **kwargs):
            given = bind(parameters_of(block), args, kwargs)
            seen.setdefault(name, given["hidden_states"])
            x = given["hidden_states"]
            out = (given["encoder_hidden_states"], x) if family.output_index else x
            return family.with_output(out, x + bend(x), given)

        monkeypatch.setattr(block, "forward", forward)

    bends = {0: lambda x: 3 * x.roll(1, dims=-1), 1: torch.square}
    for i, bend in bends.items():
        stand_in(*blocks[i], bend)
    with torch.no_grad():
        model(**named)  # what each block is given
    found = linearities(model, family, named, 0.5)
    assert list(found) == [each for each, _ in blocks]
    assert found[blocks[0][0]] == pytest.approx(1, abs=1e-5)
    resolution = next(
        stack.resolution for stack in family.block_stacks(model) if blocks[1] in stack.blocks
    )
    x, grid = seen[blocks[1][0]], family.grids(model, named)[resolution]
    plan = make_method("tome").plan(Evidence(x, grid, grid.tokens // 2))
    values = []
    for row in range(x.shape[0]):
        for i in plan.removed()[row].tolist():
            a, b = x[row, i], x[row, plan.kept[row, plan.assign[row, i]]]
            path = [
                ((1 - n / SEGMENTS) * a + n / SEGMENTS * b).square() for n in range(SEGMENTS + 1)
            ]
            length = sum(float((q - p).norm()) for p, q in pairwise(path))
            values.append(float((path[-1] - path[0]).norm()) / length)
    wanted = sum(values) / len(values)
    assert found[blocks[1][0]] == pytest.approx(wanted, abs=1e-4) and wanted < 0.99


@pytest.mark.parametrize("name", BUILDERS)
def test_every_block_of_every_family_is_measured(name):
    pipe, found = measured(name)
    model = tiny.denoisers(pipe)[0]
    depths = depths_of(find_family(model).block_stacks(model))
    assert dict(zip(found.blocks, found.depths, strict=True)) == depths
    angles = Sampling.of(pipe.scheduler).angles
    assert found.levels == (angles[0], angles[2])
    assert all(0 < value <= 1 for row in found.values for value in row)
    text = str(found).splitlines()
    assert len(text) == 1 + len(depths) and text[0].split()[-1] == "mean"
    for line, block, mean in zip(text[1:], found.blocks, found.means, strict=True):
        assert line.split()[0] == block and line.split()[-1] == f"{mean:.3f}"


def test_grids_too_small_to_lose_a_token_are_left_out():
    pipe, found = measured("unet", tiny.tiny_sd(), height=16, width=16, ratio=0.25)
    stacks = find_family(pipe.unet).block_stacks(pipe.unet)
    finest = [name for stack in stacks if stack.resolution == 0 for name, _ in stack.blocks]
    assert list(found.blocks) == finest and len(stacks) > len(finest)
    with pytest.raises(ValueError, match=r"ratio 0\.1 moves no token of UNet2DConditionModel"):
        measured("unet", pipe, height=16, width=16, ratio=0.1)


def test_measuring_leaves_no_trace():
    pipe = tiny.tiny_sd3()
    before, state = tiny.generate(pipe), torch.get_rng_state()
    hooks = [len(each._forward_pre_hooks) for each in pipe.transformer.modules()]
    _, first = measured("sd3", pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(each._forward_pre_hooks) for each in pipe.transformer.modules()] == hooks
    assert torch.equal(tiny.generate(pipe), before)
    assert measured("sd3", pipe)[1] == first


def test_what_cannot_be_measured_is_refused():
    pipe = tiny.tiny_sd()
    with pytest.raises(ValueError, match="no prompts to measure linearity on"):
        measure_linearity(pipe, [])
    with pytest.raises(ValueError, match="calls is 0; give 1 or more"):
        measure_linearity(pipe, "a cat", calls=0)
    for ratio in (0, 0.8, math.nan):
        with pytest.raises(ValueError, match=r"ratio is .*; give one above 0, and at most 0.75"):
            measure_linearity(pipe, "a cat", ratio=ratio)
    with (
        apply_tofu(pipe, ratio=0.5),
        pytest.raises(ValueError, match=r"call remove_tofu\(pipe\) before"),
    ):
        measure_linearity(pipe, "a cat")
    with pytest.raises(ValueError, match="has 2 denoisers"):
        measure_linearity(tiny.tiny_wan(two=True), "a cat")
    with pytest.raises(TypeError, match="takes a diffusers pipeline, not UNet2DCond"):
        measure_linearity(pipe.unet, "a cat")
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled calls cannot be watched"):
        measure_linearity(pipe, "a cat")


# ---- what is merged by it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "switch"),
    [
        (0.0, [0.0]),
        (0.2, [0.0]),
        (0.3, [0.0, 5 / 6]),
        (0.7, [0.0, 1 / 6, 0.5, 5 / 6]),
        (0.85, [0.5, 5 / 6]),
        (0.95, []),
    ],
)
def test_blocks_at_or_above_the_threshold_merge(threshold, switch):
    options = FOUR.merges(threshold)
    assert options == {"switch": pytest.approx(switch)}
    config = TokenReduction(method="tofu", method_options=options)
    assert TokenReduction.from_json(config.to_json()) == config
    for depth, mean in zip(FOUR.depths, FOUR.means, strict=True):
        merges = mean >= threshold
        assert config.merge_at(depth) == ("mlerp" if merges else "prune")
        assert config.unmerge_at(depth) == ("mlerp" if merges else "copy")


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"threshold is nan; give a linearity"):
        FOUR.merges(math.nan)


@pytest.mark.parametrize("scope", ["attention", "block"])
@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_the_sites_follow(name, scope):
    pipe, found = measured(name)
    model, inputs = tiny.denoisers(pipe)[0], tiny.model_inputs(tiny.denoisers(pipe)[0])
    outs = []
    for threshold in (2.0, *found.means):
        wanted = {
            block: "mlerp" if mean >= threshold else "prune"
            for block, mean in zip(found.blocks, found.means, strict=True)
        }
        handle = apply_tofu(
            model, method="tofu", scope=scope, method_options=found.merges(threshold)
        )
        sites = generation_of(handle).runtime.setup.sites
        of_blocks = {site.name.removesuffix(".attn1").removesuffix(".attn"): site for site in sites}
        for block, merge in wanted.items():
            assert of_blocks[block].merge == merge
            assert of_blocks[block].unmerge == ("mlerp" if merge == "mlerp" else "copy")
        with torch.no_grad():
            outs.append(model(**inputs)[0])
        remove_tofu(model)
    # Each block that merges more shows.
    assert not any(torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
