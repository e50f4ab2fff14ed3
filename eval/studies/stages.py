"""What a study compares: each stage is a list of settings."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from eval.baselines.cache_dit import FORECASTS
from eval.generate.settings import Setting
from tofu_diffusers import KEYS_VALUES, MERGES, METHODS, SCOPES, UNMERGES, TokenReduction

RATIO = 0.5
"""Of the grid."""
# As in every row of the grid: what the choice by change needs, and the bound of extrapolation.
GRID = {"warmup_steps": 2, "max_age": 8}
CORRECTED = "corrected"
"""In names: unmerge "taylor" with the corrector."""


@dataclass(frozen=True)
class Trial:
    """A setting in a generation of this many steps."""

    setting: Setting
    steps: int


def tofu(name: str, **options: Any) -> Setting:
    """A setting of apply_tofu."""
    return Setting(name, "tofu", options)


def grid(steps: int) -> Iterator[Trial]:
    """Every valid combination; a method's own merge (by depth for ToFu) is called "own".

    ToFu is there with its own merge only: with a merge and an unmerge given, it is ToMe with them. The
    corrector is there with unmerge "taylor" only; that pair is called "corrected".
    """
    for method, merge, how, scope, keys_values in itertools.product(
        sorted(METHODS), [*MERGES, "own"], [*UNMERGES, CORRECTED], SCOPES, KEYS_VALUES
    ):
        own = merge == "own"
        # Apart from ToFu's, a method's own merge is one of the others.
        if own != (method == "tofu"):
            continue
        options = {
            "method": method,
            "merge": None if own else merge,
            "unmerge": "taylor" if how == CORRECTED else how,
            "corrector": how == CORRECTED,
            "scope": scope,
            "keys_values": keys_values,
            "ratio": RATIO,
            **GRID,
        }
        try:
            TokenReduction(**options)
        except ValueError:
            continue
        seen = "none" if keys_values == "dropped" else keys_values
        yield Trial(tofu(f"{method}-{merge}-{how}-{scope}-{seen}-{RATIO:g}", **options), steps)


SPEEDS = (1.5, 2, 3)


def typed(steps: int) -> Iterator[Trial]:
    """The values that people type, and fewer steps for as many FLOPs as each speed-up."""
    for ratio in (0.25, 0.5, 0.75):
        yield Trial(tofu(f"ratio-{ratio:g}", ratio=ratio), steps)
    for speedup in SPEEDS:
        yield from sped_up(steps, speedup)


def sped_up(steps: int, speedup: float) -> Iterator[Trial]:
    """Steps skipped, and as many left out."""
    yield Trial(tofu(f"speedup-{speedup:g}", speedup=speedup), steps)
    count = int(steps / speedup)
    yield Trial(Setting(f"steps-{count}", "fewer_steps", {"steps": count}), steps)


def multistep(steps: int, count: int) -> Trial:
    """Fewer steps of a second-order solver."""
    options = {"steps": count, "scheduler": "multistep"}
    return Trial(Setting(f"multistep-{count}", "fewer_steps", options), steps)


# Steps at the start that a rule computes: one is enough for those that look at all steps.
WARMUPS = {"trajectory": (1,), "even": (1,), "late": (2, 4)}


def rules(steps: int) -> Iterator[Trial]:
    """Every skip rule from little to much skipped, in short and long generations, with fewer steps."""
    for total, speedup in itertools.product((10, 25, 50), (1.3, 1.5, 2, 3, 4, 5)):
        count = int(total / speedup)
        for rule, warmups in WARMUPS.items():
            for warmup in warmups:
                # Behind the warm-up one step more is computed, so that a longer one would be slower.
                if warmup < count:
                    options = {"speedup": speedup, "rule": rule, "warmup_steps": warmup}
                    yield Trial(tofu(f"{rule}-{speedup:g}-first{warmup}", **options), total)
        yield Trial(Setting(f"steps-{speedup:g}", "fewer_steps", {"steps": count}), total)


# The best known of those that remove some tokens at every step, and what it is made of.
TOKENS = {
    "method": "importance",
    "merge": "prune",
    "unmerge": "taylor",
    "corrector": False,
    "keys_values": "fresh",
    "share": "resolution",
    "max_age": 8,
}


# The token that has waited longest is due first; of those that have waited as long, what changes most.
DUE = {"source": "change", "age_exponent": 16}
WHOLE = {"warmup_steps": 3, "cooldown_steps": 4}
"""Steps of the token profile that compute all tokens."""


def tokens(steps: int) -> Iterator[Trial]:
    """`TOKENS` with fresh and with cached keys and values, at two ratios.

    Again with the corrector ("corrected"), and with the corrector and the oldest tokens first ("due"), also
    with two warm-up steps in the place of a quarter of all, and with three and the last four steps whole.
    """
    for ratio in (0.5, 0.75):
        for keys_values in ("fresh", "cached"):
            name = f"tokens-{keys_values}-{ratio:g}"
            options = {
                **TOKENS,
                "keys_values": keys_values,
                "ratio": ratio,
                "warmup_steps": steps // 4,
            }
            yield Trial(tofu(name, **options), steps)
            corrected = {**options, "corrector": True}
            yield Trial(tofu(f"{name}-corrected", **corrected), steps)
            if keys_values == "fresh":
                due = {**corrected, "method_options": DUE}
                yield Trial(tofu(f"{name}-due", **due), steps)
                yield Trial(tofu(f"{name}-due-first2", **{**due, "warmup_steps": 2}), steps)
                yield Trial(tofu(f"{name}-due-last4", **{**due, **WHOLE}), steps)


WHOLE_FIRST, WHOLE_LAST = (2, 3, 6), (0, 1, 2, 3, 4, 6, 8)
PROFILE = {**TOKENS, "corrector": True, "method_options": DUE, "ratio": 0.5}
"""The token profile, but for its whole steps."""
OTHERWISE: dict[str, dict[str, Any]] = {
    "cached": {"keys_values": "cached"},
    "uncorrected": {"corrector": False},
    "temporal": {"unmerge": "temporal"},
    "blend": {"unmerge": "blend"},
    "age4": {"method_options": {**DUE, "age_exponent": 4}},
    "age64": {"method_options": {**DUE, "age_exponent": 64}},
    "max-age2": {"max_age": 2},
    "share-stack": {"share": "stack"},
    "share-block": {"share": "block"},
    "reuse2": {"reuse": 2},
    "first-block": {"first_blocks": 1},
    "last-block": {"last_blocks": 1},
}
"""Options of the token profile, each changed alone."""


def profiles(steps: int) -> Iterator[Trial]:
    """The token profile with more or fewer whole steps, and with each of `OTHERWISE`."""
    for first, last in itertools.product(WHOLE_FIRST, WHOLE_LAST):
        if first + last < steps:
            whole = {"warmup_steps": first, "cooldown_steps": last}
            yield Trial(tofu(f"first{first}-last{last}", **PROFILE, **whole), steps)
    for name, changed in OTHERWISE.items():
        options = {**PROFILE, **WHOLE, **changed}
        yield Trial(tofu(f"profile-{name}", **options), steps)


MERGING: dict[str, dict[str, Any]] = {
    "tofu": {"method": "tofu"},
    "tome": {"method": "tome"},
    "pitome": {"method": "pitome"},
    "mlerp": {"method": "tome", "merge": "mlerp", "unmerge": "mlerp"},
    "prune": {"method": "tome", "merge": "prune"},
    "random": {"method": "random"},
}
"""ToMe merges by the mean; "mlerp" and "prune" choose as it does: the two halves of ToFu, each everywhere."""


def merging(steps: int) -> Iterator[Trial]:
    """What merges or prunes at every step and remembers nothing, at each ratio that it can reach.

    In blocks, and at half of the tokens around attention alone, as in the papers.
    """
    for name, options in MERGING.items():
        for ratio in (0.25, 0.5, 0.75):
            if ratio <= METHODS[options["method"]]().max_ratio:
                yield Trial(tofu(f"{name}-{ratio:g}", **options, ratio=ratio), steps)
        yield around(name, steps)


def around(name: str, steps: int) -> Trial:
    """One of `MERGING` at half of the tokens, around attention alone."""
    options = {**MERGING[name], "ratio": 0.5, "scope": "attention"}
    return Trial(tofu(f"{name}-attention-0.5", **options), steps)


def distances(steps: int) -> Iterator[Trial]:
    """Few enough that sets of thousands of pictures can be made of each, for distances between sets.

    "damaged" leaves a quarter of the tokens, drawn at random at every step: what a distance must see.
    """
    for speedup in (2, 3):
        yield from sped_up(steps, speedup)
    yield Trial(tofu("ratio-0.5", ratio=0.5), steps)
    for name, options in MERGING.items():
        yield Trial(tofu(f"{name}-0.5", **options, ratio=0.5), steps)
    yield Trial(tofu("damaged", method="random", ratio=0.75), steps)
    yield from (around(name, steps) for name in MERGING if name != "random")
    yield from early(steps)


def front(steps: int) -> Iterator[Trial]:
    """All ways to save, each at what it saves: tokens, steps, both, and fewer steps by two solvers."""
    yield from typed(steps)
    yield from sped_up(steps, 4)
    # More of a curve, for what saves less or between.
    for count in range(steps - 2, steps // 2 - 3, -1):
        if count not in {int(steps / speedup) for speedup in (*SPEEDS, 4)}:
            yield Trial(Setting(f"steps-{count}", "fewer_steps", {"steps": count}), steps)
    for speedup in (*SPEEDS, 4):
        yield multistep(steps, int(steps / speedup))
    for ratio in (0.25, 0.5):
        both = {"tokens": {"ratio": ratio}, "steps": {"speedup": 2.0}}
        yield Trial(Setting(f"both-{ratio:g}-2", "both", both), steps)
    yield from early(steps)
    yield from merging(steps)
    yield from tokens(steps)


def rivals(steps: int) -> Iterator[Trial]:
    """Others that halve the FLOPs: a second-order solver, predictions that are repeated, few tokens early.

    As a stage, with the caches of other packages, and beside each the default at as many FLOPs or fewer.
    """
    count = round(steps / 2)
    cache = {"total": steps, "computed": count, "first": 2, "order": 0}
    yield multistep(steps, count)
    yield Trial(Setting(f"repeat-{count}", "step_cache", cache), steps)
    yield from early(steps)


def early(steps: int) -> Iterator[Trial]:
    """All blocks compute 35 % of the tokens, later 67 %, in the end all: JiT's shares (arXiv 2603.10744).

    A token that is not computed gets its match's update, in the place of what lies around it on the grid.
    """
    points = [(0.4, 1.0), (0.401, 0.5), (0.65, 0.5), (0.651, 0.0)]
    schedule = {"kind": "explicit", "points": points}
    options = {"ratio": 0.65, "merge": "prune", "schedule": schedule, "warmup_steps": 0}
    for method in ("random", "tome"):
        yield Trial(tofu(f"early-{method}", method=method, **options), steps)


def caches(pipe: Any, steps: int) -> list[Setting]:
    """What decides on the way when to compute, each from little to much skipped."""
    settings = [
        Setting(f"seacache-{threshold:g}", "seacache", {"threshold": threshold, "most": most})
        for threshold, most in ((0.08, 2), (0.12, 2), (0.2, 4))
    ]
    if getattr(pipe, "transformer", None) is None:
        return settings
    settings += [
        Setting(
            f"magcache-{threshold:g}",
            "magcache",
            {"threshold": threshold, "most": most, "steps": steps},
        )
        for threshold, most in ((0.01, 3), (0.02, 3), (0.5, 5))
    ]
    if importlib.util.find_spec("cache_dit") is None:
        warnings.warn("cache-dit is not installed: its rows are left out", stacklevel=2)
        return settings
    return settings + [
        Setting(
            f"dbcache-{forecast}-{threshold:g}",
            "dbcache",
            {"threshold": threshold, "forecast": forecast, "steps": steps},
        )
        for threshold in (0.1, 0.2, 0.4)
        for forecast in FORECASTS
    ]


def beside(rows: Iterable[dict[str, Any]], steps: int) -> Iterator[Trial]:
    """The default at the FLOPs of each of these rows, or fewer."""
    for row in rows:
        if "speedup" not in row["setting"]["options"] and row["flops_ratio"] > 1:
            name = f"speedup-as-{row['setting']['name']}"
            # Rows are rounded, and half of 25 steps is 12.
            yield Trial(tofu(name, speedup=row["flops_ratio"] - 1e-4), steps)


STAGES = {
    "typed": typed,
    "front": front,
    "rules": rules,
    "rivals": rivals,
    "grid": grid,
    "distances": distances,
    "profiles": profiles,
}
