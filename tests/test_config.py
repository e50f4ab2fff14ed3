"""TokenReduction, StepSkipping and Schedule: frozen, validated, JSON both ways, saved beside a pipeline."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import tiny
from tofu_diffusers import (
    Config,
    Schedule,
    StepSkipping,
    TokenReduction,
    apply_tofu,
)
from tofu_diffusers.config import CONFIGS as TYPES
from tofu_diffusers.profiles import resolve

CONFIGS = [
    TokenReduction(),
    TokenReduction(ratio=0.3, method="pitome", method_options={"margin": 0.75}, merge="mlerp"),
    TokenReduction(method="tome", method_options={"stride": (2, 4), "window": (1, 8, 8)}),
    TokenReduction(
        method="importance", max_age=6, keys_values="cached", resolutions=(0, 1), memory_limit=2.5
    ),
    TokenReduction(schedule="cosine", depth_schedule=[(0.0, 0.0), (0.5, 1.0)], first_blocks=1),
    TokenReduction(ratio=0.4, keys_values="cached", max_age=0, corrector=False),
    StepSkipping(),
    StepSkipping(speedup=1),
    StepSkipping(speedup=3, warmup_steps=0, cooldown_steps=2, rule="even", order=0),
    StepSkipping(corrector=False, memory_limit=1.5, family="unet"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_both_ways(config, tmp_path):
    kind = type(config)
    assert kind.from_json(config.to_json()) == config
    state = json.loads(config.to_json())
    assert {*state} == {"type", "version", "data"}
    assert (state["type"], state["version"]) == (kind.__name__, 1)
    assert {*state["data"]} == {item.name for item in dataclasses.fields(kind)}
    # An open option stays open.
    assert all(
        (state["data"][name] is None) == (getattr(config, name) is None) for name in state["data"]
    )
    config.save(tmp_path)
    assert kind.load(tmp_path) == config


def test_both_types_are_saved_in_one_folder(tmp_path):
    tokens, steps = TokenReduction(ratio=0.3), StepSkipping(speedup=3.0)
    assert tokens.save(tmp_path / "pipe") == tmp_path / "pipe" / "token_reduction.json"
    assert steps.save(tmp_path / "pipe") == tmp_path / "pipe" / "step_skipping.json"
    assert TokenReduction.load(tmp_path / "pipe") == tokens
    assert StepSkipping.load(str(tmp_path / "pipe")) == steps


def test_saved_beside_a_pipeline(tmp_path):
    pipe = tiny.tiny_sd()
    pipe.save_pretrained(tmp_path)
    TokenReduction(ratio=0.25, method="tome").save(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, safety_checker=None)
    with apply_tofu(loaded, TokenReduction.load(tmp_path)) as handle:
        tiny.generate(loaded)
        assert handle.configs == (TokenReduction(ratio=0.25, method="tome"),)
    StepSkipping(speedup=1.5).save(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, safety_checker=None)
    configs = [kind.load(tmp_path) for kind in TYPES]
    with apply_tofu(loaded, *configs) as handle:
        assert handle.configs == tuple(resolve(each, "unet") for each in configs)


@pytest.mark.parametrize(
    ("config", "name"), [(TokenReduction(), "ratio"), (StepSkipping(), "speedup")]
)
def test_frozen(config, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 0.1)
    assert isinstance(config, Config)


def test_a_copy_with_changes_is_validated_again():
    assert TokenReduction(method="tome").replace(ratio=0.3) == TokenReduction(0.3, "tome")
    assert StepSkipping().replace(speedup=3) == StepSkipping(3)
    with pytest.raises(ValueError, match=r"ratio 0.8 exceeds 0.75"):
        TokenReduction(method="tome").replace(ratio=0.8)
    with pytest.raises(ValueError, match=r"speedup 0\.5 is below 1"):
        StepSkipping().replace(speedup=0.5)
    with pytest.raises(
        ValueError, match=r"unknown option of StepSkipping 'speedpu' \(did you mean"
    ):
        StepSkipping().replace(speedpu=2.0)
    with pytest.raises(ValueError, match="unknown option of TokenReduction 'rule'"):
        TokenReduction().replace(rule="late")


@pytest.mark.parametrize("kind", TYPES)
def test_none_is_a_value_only_where_it_is_the_default(kind):
    defaults = {each.name: each.default for each in dataclasses.fields(kind)}
    for name in kind.whole_numbers:
        if defaults[name] is None:
            kind(**{name: None})
            continue
        with pytest.raises(TypeError, match=f"{name} must be a whole number, not None"):
            kind(**{name: None})
    for name in kind.whole_numbers:
        with pytest.raises(ValueError, match=name):
            kind(**{name: 10**30})


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (TokenReduction, {"memory_limit": math.nan}, "memory_limit nan GiB must be above 0"),
        (StepSkipping, {"memory_limit": math.nan}, "memory_limit nan GiB must be above 0"),
        (TokenReduction, {"method_options": 3}, "method_options are options by name"),
        (TokenReduction, {"method_options": ["age"]}, "method_options are options by name"),
        (TokenReduction, {"method_options": None}, "method_options are options by name"),
        (
            TokenReduction,
            {"resolutions": 0},
            r"resolutions are whole numbers, such as \(0, 1\), not 0",
        ),
        (TokenReduction, {"resolutions": b"x"}, "resolutions are whole numbers"),
        (TokenReduction, {"schedule": [[0, 1], [0.5]]}, "schedule: points must be pairs"),
        (TokenReduction, {"depth_schedule": "a"}, "depth_schedule: unknown schedule kind 'a'"),
        (
            TokenReduction,
            {"schedule": {"kind": "linear", "start": "x"}},
            "schedule: points must be",
        ),
        (
            TokenReduction,
            {"schedule": {"kind": "linear", "stop": 1}},
            "a schedule has no 'stop'; it has",
        ),
        (TokenReduction, {"family": []}, r"family must be a name or None, not \[\]"),
        (StepSkipping, {"family": True}, "family must be a name or None, not True"),
        (TokenReduction, {"corrector": 1.0}, "corrector must be True or False, not 1.0"),
        (TokenReduction, {"share_plan": None}, "share_plan must be True or False, not None"),
        (StepSkipping, {"speedup": 10**400}, "speedup inf is below 1 or no number"),
    ],
)
def test_values_of_the_wrong_kind_are_named(kind, options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        kind(**options)


def test_numbers_of_other_libraries_are_saved():
    config = TokenReduction(
        ratio=np.float32(0.5), warmup_steps=np.int64(3), memory_limit=Fraction(1, 2), method="tome"
    )
    assert TokenReduction.from_json(config.to_json()) == config
    with pytest.raises(TypeError, match="abstract"):
        Config()


@pytest.mark.parametrize("version", [True, 1.0, "1", 0, 2])
def test_only_the_version_that_is_read_is_read(version):
    text = json.dumps({"type": "TokenReduction", "version": version, "data": {}})
    with pytest.raises(ValueError, match="reads version 1; ") as caught:
        TokenReduction.from_json(text)
    assert ("update" in str(caught.value)) == (version == 2)


def test_a_damaged_file_is_named(tmp_path):
    path = TokenReduction(ratio=0.5).save(tmp_path)
    for content in (
        b"\xff\xfe",
        b"{",
        b'{"type": "TokenReduction", "version": 1, "data": {}, "ratio": 1}',
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"token_reduction\.json: "):
            TokenReduction.load(tmp_path)


def test_unreadable_configs(tmp_path):
    for kind in TYPES:
        with pytest.raises(
            FileNotFoundError, match=rf"no {kind.file_name} .* write one with {kind.__name__}.save"
        ):
            kind.load(tmp_path)
        with pytest.raises(ValueError, match=f"a {kind.__name__} is a JSON object, not a list"):
            kind.from_json("[]")
        with pytest.raises(ValueError, match="the text is no JSON, where Expecting value"):
            kind.from_json("")
        with pytest.raises(ValueError, match=r'has no options of .* under "data"'):
            kind.from_json(json.dumps({"type": kind.__name__, "version": 1}))
        state = json.loads(kind().to_json())
        with pytest.raises(
            ValueError, match=f"has version 2 of {kind.__name__}, .* reads version 1"
        ):
            kind.from_json(json.dumps(state | {"version": 2}))
        (other,) = {*TYPES} - {kind}
        with pytest.raises(
            ValueError, match=f"holds a {other.__name__}, not a {kind.__name__}; read it with"
        ):
            kind.from_json(other().to_json())
    state = json.loads(TokenReduction().to_json()) | {"data": {"ratoi": 0.5}}
    with pytest.raises(
        ValueError, match=r"unknown option of TokenReduction 'ratoi' \(did you mean 'ratio'"
    ):
        TokenReduction.from_json(json.dumps(state))


def test_max_age_binds_the_choice_as_well_as_the_unmerge():
    assert TokenReduction(ratio=0.5, method="importance", max_age=4).make_method().max_age == 4
    with pytest.raises(ValueError, match=r"ratio 0.9 exceeds 0.75"):
        TokenReduction(ratio=0.9, method="importance", max_age=4)


def test_tofu_prunes_early_and_merges_late():
    config = TokenReduction(method="tofu")
    assert (config.merge_at(0.0), config.merge_at(1.0)) == ("prune", "mlerp")
    assert (config.unmerge_at(0.0), config.unmerge_at(1.0)) == ("copy", "mlerp")
    assert TokenReduction(method="tofu", merge="mean").merge_at(0.0) == "mean"


positions = st.floats(0, 1)


@given(positions)
def test_kinds(position):
    assert Schedule().factor(position) == 1.0
    linear = Schedule("linear", 0.2, 0.8).factor(position)
    assert linear == pytest.approx(0.2 + 0.6 * position)
    cosine = Schedule("cosine", 1.0, 0.0)
    assert cosine.factor(position) + cosine.factor(1 - position) == pytest.approx(1.0)


@example([(0.0, 0.0), (5e-324, 0.5)])
@given(st.lists(st.tuples(positions, positions), min_size=1, max_size=5, unique_by=lambda p: p[0]))
def test_explicit_goes_through_its_points(points):
    points = sorted(points)
    schedule = Schedule.of(points)
    for position, factor in points:
        assert schedule.factor(position) == pytest.approx(factor)
    factors = [factor for _, factor in points]
    for position in (0.0, 0.3, 1.0):
        assert min(factors) - 1e-9 <= schedule.factor(position) <= max(factors) + 1e-9


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sine", "unknown schedule kind 'sine'"),
        ({"kind": "linear", "start": 2.0}, r"2.0 is outside \[0, 1\]"),
        ({"kind": "linear", "points": [(0, 1)]}, "'linear' with 1 points"),
        ([], "'explicit' with 0 points"),
        ([(0.5, 1.0), (0.1, 0.0)], "must ascend"),
    ],
)
def test_bad_schedules(value, message):
    with pytest.raises(ValueError, match=message):
        Schedule.of(value)


def test_a_depth_schedule_changes_the_tokens_of_deep_blocks():
    pipe = tiny.tiny_sd3()
    with apply_tofu(
        pipe, ratio=0.5, method="tome", depth_schedule=[(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]
    ) as handle:
        tiny.generate(pipe, steps=2)
        kept = [row["tokens_kept"] / row["tokens_in"] for row in handle.stats()]
    assert kept[0] == 1.0 and kept == sorted(kept, reverse=True) and kept[-1] == 0.5


def test_numbers_and_paths_of_any_kind_become_what_json_has(tmp_path):
    config = TokenReduction(
        method="importance",
        method_options={"source": "gradient", "probe": tmp_path / "probes.safetensors"},
        warmup_steps=np.int64(2),
        resolutions=np.array([0, 1]),
        ratio=np.float32(0.5),
    )
    assert TokenReduction.from_json(config.to_json()) == config
    assert type(config.warmup_steps) is int and {type(level) for level in config.resolutions} == {
        int
    }


def test_a_seed_of_more_than_64_bits_is_refused_at_once():
    TokenReduction(method="random", seed=2**63 - 1)
    with pytest.raises(ValueError, match="seed 9223372036854775808 is above 9223372036854775807"):
        TokenReduction(method="random", seed=2**63)


def test_a_merge_in_the_middle_of_the_depth_alone_counts_too():
    middle = {"method": "tofu", "method_options": {"switch": [0.3, 0.6]}}
    config = TokenReduction(**middle)
    assert [config.merge_at(depth) for depth in (0.0, 0.5, 1.0)] == ["prune", "mlerp", "prune"]
    assert config.merges == {"prune", "mlerp"} and config.unmerges == {"copy", "mlerp"}
    for more in ({"keys_values": "fresh"}, {"unmerge": "temporal"}, {"corrector": True}):
        with pytest.raises(ValueError, match="needs merge 'prune' at every site"):
            TokenReduction(**middle, **more)
    never = TokenReduction(method="tofu", method_options={"switch": []}, keys_values="fresh")
    assert never.merges == {"prune"}


@pytest.mark.parametrize("more", [{"warmup_steps": 2}, {"cooldown_steps": 1}])
def test_steps_that_are_fitted_to_be_skipped_cannot_be_asked_for(more):
    fitted = {"levels": (0.9, 0.6, 0.3, 0.1), "computed": (0, 2), "sampler": "DDIMScheduler"}
    fitted["weights"] = ((0.0,), (0.1,), (0.1, 0.2), (0.1, 0.2))
    kept = StepSkipping(rule="even", fitted=fitted, **{"warmup_steps": 1})
    assert kept.fitted.computed == (0, 2)
    with pytest.raises(
        ValueError, match=r"ask for steps .* \(of 4 they compute 0, 2\); leave them out"
    ):
        StepSkipping(rule="even", **{"warmup_steps": 1, "fitted": fitted, **more})
