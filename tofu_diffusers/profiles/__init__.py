"""Measured defaults, one JSON file a family: what `ratio=` and `speedup=` do when told no more.

    tokens    options of TokenReduction: the best measured that reduces tokens at all steps but the first
              and the last ones
    speedup   the type and options of what was measured best at two times fewer FLOPs, whatever it is

Each names the committed result it was chosen from; without one it is provisional. A family without a trained
model at hand has no file and borrows the profile of `BORROWED`; or its file names whose it borrows (`like`),
and under `tokens` the options that are other ones. What is borrowed is provisional, whatever was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from ..config import CONFIGS, DenoiserConfig, TokenReduction

BORROWED = "sd3"
"""Whose profile families without one take: a transformer's, trained by flow matching, as most are."""
MEMORYLESS: Mapping[str, Any] = {"method": "tofu"}
"""Options of TokenReduction where there is no past to use: one call alone, or few steps."""


@cache
def profile(family: str) -> Mapping[str, Any]:
    """Read a family's profile: `weights`, `tokens` and `speedup`; with `like`, those of that family."""
    path = files(__package__) / f"{family}.json"
    data: dict[str, Any] = {"like": BORROWED}
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
    if "like" not in data:
        return data
    own = profile(data["like"])
    borrowed = {**own, "like": data["like"]}
    if "tokens" in data:
        borrowed["tokens"] = {"result": None, "options": own["tokens"]["options"] | data["tokens"]}
    return borrowed


def resolve(config: DenoiserConfig, family: str) -> DenoiserConfig:
    """Fill in from the family's profile what a configuration leaves open.

    Raises:
        ValueError: if its options do not go with the profile's.
    """
    data = profile(family)
    key = "tokens" if isinstance(config, TokenReduction) else "speedup"
    return config.resolved(data[key]["options"])


def fastest(family: str) -> type[DenoiserConfig]:
    """The type of what was measured best for a given speed-up."""
    name = profile(family)["speedup"]["type"]
    return next(each for each in CONFIGS if each.__name__ == name)


def origin(family: str, config: DenoiserConfig) -> str:
    """Say whether a configuration in force is the family's profile, for a summary."""
    key = "tokens" if isinstance(config, TokenReduction) else "speedup"
    amount = {name: getattr(config, name) for name in ("ratio", "speedup") if hasattr(config, name)}
    if config != resolve(type(config)(**amount), family):
        return ""
    data = profile(family)
    borrowed = "like" in data
    status = "measured" if data[key]["result"] and not borrowed else "provisional"
    whose = f"that of {data['like']}, " if borrowed else ""
    return f" (default profile, {whose}{status})"
