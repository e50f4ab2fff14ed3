"""What removed tokens lacked, given back when they are computed again (`corrector=True`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.reference import upcast
from .trajectory import CORRECTED_SHARE


@dataclass
class CorrectorState:
    """What the latents got in one branch of guidance while tokens were not computed; changed in place only.

    By tokens, as maps over the latents: what a token stands for is corrected where it stands.

    Attributes:
        computed: [B, C, F, H, W], the prediction of the step at which a token was last computed.
        integrated: [B, C, F, H, W], sum over the steps since of their step sizes times their prediction.
        step_size_sum: [B, 1, F, H, W], sum of their step sizes.
        step_size_moment: [B, 1, F, H, W], sum of their step sizes times their number of steps since.
        last: [B, 1, F, H, W], when it was last computed.
    """

    computed: Tensor
    integrated: Tensor
    step_size_sum: Tensor
    step_size_moment: Tensor
    last: Tensor

    @classmethod
    def of(cls, prediction: Tensor, step: Tensor) -> CorrectorState:
        """None yet: as if all had been computed at this step."""
        none = torch.zeros_like(prediction[:, :1])
        # Every one a tensor of its own: they are written.
        return cls(
            prediction.clone(), torch.zeros_like(prediction), none, none.clone(), none + step
        )

    def keep_tokens(self, start: int, tokens: int) -> None:
        """Of maps that are rows of tokens: only so many from this one on are the image's."""
        for name, maps in vars(self).items():
            setattr(self, name, maps[..., start : start + tokens].clone())

    @staticmethod
    def nbytes_for(prediction: Tensor) -> int:
        """Bytes that `of` would take."""
        return 4 * (2 * prediction.numel() + 3 * prediction[:, :1].numel())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


@dataclass
class Corrector:
    """Brings back the latents of tokens that were not computed, at the step that computes them again.

    At the steps between, the prediction of such a token was made from extrapolated updates. Once it is
    computed again, it can be interpolated, as `Forecaster` does with that of all tokens: with p_i, p_k of
    the steps i and k that computed the token and u_j used between, its latents lack the sum over j of

        move_j (p_i + (j - i) / (k - i) (p_k - p_i) - u_j)

    Step k adds half of it, with a prediction that is larger by that over move_k; the last step adds nothing,
    for the reasons given at `forecast.corrector_weights`. What tofu itself remembers stays as it was
    computed.

    Args:
        step_sizes: Of this generation; None: nothing is corrected.
    """

    step_sizes: list[float] | None = None
    states: dict[str, CorrectorState] = field(default_factory=dict)
    factors: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(state.nbytes for state in self.states.values())

    def begin(self, step_sizes: list[float] | None) -> None:
        """Take note of how far the steps of a generation go, as `sampler.step_sizes` has it."""
        self.step_sizes = step_sizes
        self.factors = None
        if step_sizes is not None:
            back = [CORRECTED_SHARE / move for move in step_sizes[:-1]] + [0.0]
            self.factors = torch.tensor([step_sizes, back])

    def to(self, device: torch.device) -> None:
        """Where the denoiser is."""
        if self.factors is not None and self.factors.device != device:
            self.factors = self.factors.to(device)

    def apply(
        self, cfg_branch: str, prediction: Tensor, computed: Tensor | None, step: Tensor
    ) -> Tensor:
        """The prediction with what tokens lack that this step computed.

        Args:
            prediction: [B, C, F, H, W], as maps.
            computed: [B, 1, F, H, W] bool, where a token that this step computed stands; None: everywhere.
            step: 0-d float32 tensor.

        Returns:
            [B, C, F, H, W] of the same dtype.
        """
        assert self.factors is not None
        p = upcast(prediction.detach())
        state = self.states.get(cfg_branch)
        if state is None:
            state = self.states[cfg_branch] = CorrectorState.of(p, step)
        move, back = self.factors.index_select(1, step.long().view(1)).to(p.dtype)
        age = step - state.last
        slope = state.step_size_moment / age.clamp(min=1.0)
        missing = (
            state.step_size_sum * state.computed + slope * (p - state.computed) - state.integrated
        )
        corrected = (p + back * missing).to(prediction.dtype)
        recomputed = torch.ones_like(state.last, dtype=torch.bool) if computed is None else computed
        state.integrated.copy_((state.integrated + move * p).masked_fill(recomputed, 0.0))
        state.step_size_sum.copy_((state.step_size_sum + move).masked_fill(recomputed, 0.0))
        state.step_size_moment.copy_(
            (state.step_size_moment + move * age).masked_fill(recomputed, 0.0)
        )
        state.computed.copy_(torch.where(recomputed, p, state.computed))
        state.last.copy_(torch.where(recomputed, step, state.last))
        return torch.where(recomputed, corrected, prediction)
