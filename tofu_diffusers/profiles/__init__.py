"""Measured defaults, one JSON file a family: what `apply_tofu(pipe, ratio=...)` does when told no more.

A profile's `status` is "measured" when `result` names the committed result it was chosen from, else
"provisional". A family without a trained model at hand names the one whose profile it borrows (`like`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from ..config import STEP_RESTORES, TofuConfig

# Options that a profile's `config` goes with where no scope is named; with any other `tokens` does.
STEP_OPTIONS = frozenset(
    {"ratio", "restore", "first_steps", "last_steps", "memory_limit", "family"}
)


@cache
def profile(family: str) -> Mapping[str, Any]:
    """A family's profile: `status`, `result`, `weights`, and fields of TofuConfig as `config` and `tokens`.

    `config` is the default. `tokens` is the best that removes some tokens at every step; it is `config`
    where that does. With `like`, all of them are that family's.
    """
    text = (files(__package__) / f"{family}.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    if "like" in data:
        return {**profile(data["like"]), **data}
    return data


def default_config(family: str, options: Mapping[str, Any]) -> TofuConfig:
    """The configuration for these options: the family's profile, or a named method's own defaults."""
    if "method" in options:
        return TofuConfig(**options)
    chosen = profile(family)
    of_steps = (
        STEP_OPTIONS.issuperset(options) and options.get("restore", "taylor") in STEP_RESTORES
    )
    if "scope" in options:
        of_steps = options["scope"] == "step"
    base = chosen["config"] if of_steps else chosen["tokens"]
    return TofuConfig(**(dict(base) | dict(options)))
