"""Any denoiser: nothing is known of its blocks, so that steps can be skipped and no tokens reduced."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..steps.outputs import tensors_in
from ..tokens.grid import TokenGrid
from .base import FAMILIES, Family, Kwargs, known_classes, known_family


class AnyFamily(Family):
    """What step skipping needs of a denoiser: tensors among its arguments.

    Not registered: it is taken for classes that no family lists.
    """

    name = "any"
    classes = ()
    sample_name = ""
    stacks = ()
    attention_names = ()
    timestep_scale = None

    def latents(self, named: Kwargs) -> list[Tensor]:
        # Which argument holds them is not known. Whatever changes its shape may change the output's.
        # The number of timesteps may change from step to step, and changes nothing.
        return [each for each in tensors_in(list(named.values())) if each.ndim > 1]

    def grids(self, model: Any, named: Kwargs) -> dict[int, TokenGrid]:
        return {}

    def attention_inputs(self, block: nn.Module, x: Tensor, kwargs: Kwargs) -> dict[str, Tensor]:
        return {}


ANY = AnyFamily()


def takes_timestep(model: nn.Module) -> bool:
    """Whether a model is told how noisy its input is, as all denoisers are, and ControlNets beside them."""
    names = inspect.signature(type(model).forward).parameters
    return any("time" in name or name == "t" for name in names)


def find_family(model: nn.Module, name: str | None = None, skips: bool = False) -> Family:
    """The family of a denoiser, by name or else by its class (or a parent class).

    Args:
        skips: Whether steps are skipped, for which a denoiser need not be of a known class.

    Raises:
        ValueError: if the name is unknown, or no family lists the class.
    """
    cls = type(model).__name__
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(
                f"unknown family {name!r}; choose one of {', '.join(sorted(FAMILIES))}"
            )
        return FAMILIES[name]
    known = known_family(model)
    if known is not None:
        return known
    if not takes_timestep(model):
        raise ValueError(
            f"{cls} is no denoiser: its forward takes no timestep; give the pipeline, or its denoiser. Of an "
            "encoder of an unknown class name the family whose blocks are the same, such as family='bert'"
        )
    if not skips:
        raise ValueError(
            f"no family for denoiser class {cls}, so its tokens cannot be reduced; known are "
            f"{', '.join(sorted(known_classes()))}. Skip steps instead (speedup=2.0), which runs on any "
            "denoiser; name a family with family=... if its blocks are the same; or add one"
        )
    return ANY
