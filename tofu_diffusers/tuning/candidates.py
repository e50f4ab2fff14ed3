"""The settings that `tune` tries at a speed-up, those first that were best on other models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import Config, StepSkipping, TokenReduction
from ..steps.fitted import FittedForecasts
from ..steps.trajectory import Trajectory

OWN = "own trajectory"
RATIOS = (0.25, 0.5)
"""Of token reduction inside the steps that run."""


@dataclass(frozen=True)
class Candidate:
    """A setting to try, and its name in words."""

    name: str
    configs: tuple[Config, ...]


def default(speedup: float) -> Candidate:
    """What `apply_tofu(pipe, speedup=...)` does."""
    return Candidate("profile", (StepSkipping(speedup=speedup),))


def candidates(speedup: float, trajectory: Trajectory | None, tokens: bool) -> list[Candidate]:
    """Everything but the default.

    Args:
        speedup: To reach.
        trajectory: Of the pipeline; None: its steps are too few to have one.
        tokens: Whether tokens can be reduced in the pipeline's denoisers.
    """
    own: dict[str, Any] = {"speedup": speedup, "trajectory": trajectory}
    found: list[Candidate] = []

    def skipping(name: str, **more: Any) -> None:
        found.append(Candidate(name, (StepSkipping(**own, **more),)))

    if trajectory is not None:
        planned: dict[str, Any] = {"rule": "trajectory", "warmup_steps": 1}
        skipping(OWN, **planned)
        skipping(f"{OWN}, last step computed", **planned, cooldown_steps=1)
        skipping(f"{OWN}, not corrected", **planned, corrector=False)
        skipping(f"{OWN}, repeated", **planned, order=0)
    skipping("even", rule="even", warmup_steps=1)
    for warmup in (2, 4):
        skipping(f"late after {warmup} steps", rule="late", warmup_steps=warmup)
    if tokens and trajectory is not None:
        for ratio in RATIOS:
            # Skipped as little as it could do; `raised` until it is enough.
            less = StepSkipping(**own, **planned).replace(speedup=max(1.0, (1 - ratio) * speedup))
            # Behind a long warm-up there would be no step left that reduces tokens.
            both = (TokenReduction(ratio=ratio, warmup_steps=2), less)
            found.append(Candidate(f"{OWN} and ratio {ratio:g}", both))
    return found


def fitted(speedup: float, forecasts: FittedForecasts, trajectory: Trajectory | None) -> Candidate:
    """Steps with forecasts that were fitted to them; generations of other steps go by the trajectory."""
    rule = "even" if trajectory is None else "trajectory"
    config = StepSkipping(
        speedup=speedup, rule=rule, warmup_steps=1, trajectory=trajectory, fitted=forecasts
    )
    signs = "".join(".#"[step in forecasts.computed] for step in range(len(forecasts.levels)))
    return Candidate(f"fitted {signs}", (config,))


def raised(candidate: Candidate, factor: float) -> Candidate:
    """The candidate with more steps skipped, by this factor."""
    configs = tuple(
        each.replace(speedup=each.speedup * factor) if isinstance(each, StepSkipping) else each
        for each in candidate.configs
    )
    return Candidate(candidate.name, configs)
