"""Skip rule "trajectory": the steps that matter most for this denoiser, by how its predictions change."""

from __future__ import annotations

import numpy as np

from ..trajectory import best_steps
from .base import Steps, register_rule


@register_rule("trajectory")
def trajectory(steps: Steps) -> set[int]:
    """Skip what the denoiser's trajectory shows to be forecast best.

    Where it is not known how far the steps move the latents (samplers that draw noise, or call several times
    a step), each is taken to move them as far as any other.

    Raises:
        ValueError: if the configuration has no trajectory.
    """
    if steps.trajectory is None:
        raise ValueError(
            "rule 'trajectory' needs a trajectory of the denoiser, and neither the options nor the family's "
            "profile has one; give trajectory=..., or another rule such as 'even'"
        )
    total = len(steps.levels)
    sizes = np.array(steps.sizes or (1.0,) * total)
    products = steps.trajectory.at(steps.levels)
    chosen = best_steps(products, sizes, steps.computed, steps.free, steps.order, steps.corrects)
    return {*range(total)} - chosen
