"""TokenReduction and Schedule: frozen, validated, JSON both ways, saved beside a pipeline."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import tiny
from tofu_diffusers import FAMILIES, Schedule, TokenReduction, apply_tofu, profile

CONFIGS = [
    TokenReduction(),
    TokenReduction(ratio=0.3, method="pitome", method_options={"margin": 0.75}, merge="mlerp"),
    TokenReduction(method="tome", method_options={"stride": (2, 4), "window": (1, 8, 8)}),
    TokenReduction(
        method="importance", max_age=6, keys_values="cached", resolutions=(0, 1), memory_limit=2.5
    ),
    TokenReduction(schedule="cosine", depth_schedule=[(0.0, 0.0), (0.5, 1.0)], first_blocks=1),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_both_ways(config, tmp_path):
    assert TokenReduction.from_json(config.to_json()) == config
    config.save(tmp_path)
    assert TokenReduction.load(tmp_path) == config


def test_saved_beside_a_pipeline(tmp_path):
    pipe = tiny.tiny_sd()
    pipe.save_pretrained(tmp_path)
    TokenReduction(ratio=0.25, method="tome").save(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, safety_checker=None)
    with apply_tofu(loaded, TokenReduction.load(tmp_path)) as handle:
        tiny.generate(loaded)
        assert handle.configs[0].ratio == 0.25


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TokenReduction().ratio = 0.1


def test_unreadable_configs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"write one with TokenReduction.save"):
        TokenReduction.load(tmp_path)
    with pytest.raises(ValueError, match="JSON object, not a list"):
        TokenReduction.from_json("[]")
    with pytest.raises(ValueError, match="reads TokenReduction format 1"):
        TokenReduction.from_json(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match=r"unknown option 'ratoi' \(did you mean 'ratio'"):
        TokenReduction.from_json(json.dumps({"ratoi": 0.5}))


def test_max_age_binds_the_choice_as_well_as_the_unmerge():
    assert TokenReduction(ratio=0.5, method="importance", max_age=4).make_method().max_age == 4
    with pytest.raises(ValueError, match=r"ratio 0.9 exceeds 0.75"):
        TokenReduction(ratio=0.9, method="importance", max_age=4)


def test_tofu_prunes_early_and_merges_late():
    config = TokenReduction(method="tofu")
    assert (config.merge_at(0.0), config.merge_at(1.0)) == ("prune", "mlerp")
    assert (config.unmerge_at(0.0), config.unmerge_at(1.0)) == ("copy", "mlerp")
    assert TokenReduction(method="tofu", merge="mean").merge_at(0.0) == "mean"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_valid_profile_that_says_where_it_is_from(family):
    data = profile(family)
    assert TokenReduction(**data["config"]).scope == "step"
    assert TokenReduction(**data["tokens"]).scope == "block"
    assert (data["status"] == "provisional") == (data["result"] is None)
    # A borrowed profile is that of a family which has one of its own.
    assert "like" not in data or profile(data["like"])["config"] == data["config"]


# ---- schedules ----------------------------------------------------------------------------------

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
    assert type(config.warmup_steps) is int and {type(level) for level in config.levels} == {int}


def test_a_seed_of_more_than_64_bits_is_refused_at_once():
    TokenReduction(method="random", seed=2**63 - 1)
    with pytest.raises(ValueError, match="seed 9223372036854775808 is above 9223372036854775807"):
        TokenReduction(method="random", seed=2**63)
