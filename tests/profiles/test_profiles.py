"""Profiles: every family has one, and it fills in what a configuration leaves open."""

import pytest

from tofu_diffusers import FAMILIES, StepSkipping, TokenReduction, profile
from tofu_diffusers.profiles import MEMORYLESS, fastest, origin, resolve


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_valid_profile_that_says_where_it_is_from(family):
    data = profile(family)
    tokens = TokenReduction(**data["tokens"]["options"])
    refused = FAMILIES[family].scopes_refused
    assert tokens.is_resolved and tokens.needs_steps
    assert tokens.scope == ("attention" if "block" in refused else "block")
    assert tokens.keys_values not in FAMILIES[family].keys_values_refused
    assert data["weights"]
    workflow = fastest(family)
    assert workflow.__name__ == data["speedup"]["type"]
    assert workflow(**data["speedup"]["options"]).is_resolved
    amounts = {TokenReduction: {"ratio": 0.3}, StepSkipping: {"speedup": 1.5}}
    for kind, key in ((TokenReduction, "tokens"), (workflow, "speedup")):
        # An amount is not the profile's to say, and what is open without one is all in it.
        assert not {"ratio", "speedup"} & {*data[key]["options"]}
        config = resolve(kind(**amounts[kind]), family)
        assert config == kind(**amounts[kind], **data[key]["options"])
        said = origin(family, config)
        if "like" in data:
            assert said == f" (default profile, that of {data['like']}, provisional)"
        else:
            status = "measured" if data[key]["result"] else "provisional"
            assert said == f" (default profile, {status})"
    # A borrowed profile is that of a family which has one of its own.
    if "like" in data:
        own = profile(data["like"])
        assert "like" not in own
        assert all(data[key] == own[key] for key in ("speedup", "weights"))


def test_a_family_without_a_file_borrows_a_profile_and_the_summary_says_so():
    assert profile("flux") == {**profile("sd3"), "like": "sd3"}
    config = resolve(TokenReduction(ratio=0.5), "flux")
    assert origin("flux", config) == " (default profile, that of sd3, provisional)"


OPTIONS = {
    "method": "importance",
    "method_options": {"source": "change"},
    "merge": "prune",
    "unmerge": "taylor",
    "corrector": True,
    "keys_values": "fresh",
    "warmup_steps": 4,
    "max_age": 8,
}
GIVEN = [
    {"keys_values": "cached"},
    {"corrector": False},
    {"warmup_steps": 0},
    {"max_age": 0},
    {"unmerge": "copy", "scope": "attention"},
    {"method_options": {"source": "key_norm"}},
    {"ratio": 0.7, "seed": 3, "reuse": 2},
    {"scope": "span", "keys_values": "dropped", "share": "stack"},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_what_is_given_stays_and_what_is_open_is_taken(given):
    config = TokenReduction(**given)
    assert not config.is_resolved
    found = config.resolved(OPTIONS)
    assert found == TokenReduction(**OPTIONS | given)
    assert all(getattr(found, name) == value for name, value in given.items())
    assert found.resolved({"method": "tome"}) is found
    # Nothing is open any more: what the profile does not have is as with a method named.
    assert all(getattr(found, name) is not None for name in TokenReduction.without_profile)


@pytest.mark.parametrize("method", ["tome", "importance"])
def test_with_a_method_named_nothing_is_taken(method):
    config = TokenReduction(method=method)
    assert config.is_resolved and config.resolved(OPTIONS) is config
    for name, value in TokenReduction.without_profile.items():
        assert getattr(config, name) == value
    assert (config.merge, config.unmerge, config.method_options) == (None, None, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"merge": "mean"}, "needs merge 'prune'"),
        ({"scope": "span"}, "scope 'span' cannot have keys_values 'fresh'"),
        ({"ratio": 0.95}, "ratio 0.95 exceeds"),
        ({"method_options": {"sauce": 1}}, "sauce"),
    ],
)
def test_an_error_that_comes_from_the_profile_says_so(given, said):
    with pytest.raises(ValueError, match=said) as found:
        TokenReduction(**given).resolved(OPTIONS)
    message = str(found.value)
    assert "taken from the family's profile" in message
    # Another method is no way out of a ratio that it cannot remove either.
    assert ("method='tofu'" in message) == ("ratio" not in given)
    # All that was taken, and nothing that was given.
    for name, value in OPTIONS.items():
        assert (f"{name} {value!r}" in message.split("Not given")[1]) == (name not in given)
    with pytest.raises(ValueError, match=said) as own:
        TokenReduction(**OPTIONS | given)
    assert "profile" not in str(own.value)


def test_there_are_options_that_need_no_past():
    assert TokenReduction(**MEMORYLESS).needs_steps == []
