"""Where to spend a ratio: a policy over noise levels and depths, learned from what it does to latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..api import apply_tofu, only_denoiser, remove_tofu
from ..config import EncoderReduction, TokenReduction
from ..hooks.patch import state_of
from ..runtime.generation import Generation
from ..steps.schedule import Schedule
from ..tokens.grid import TokenGrid
from .calibrate import as_prompts, latents
from .encoder_calls import MeasuredEncoder

# Of the policy: factors at these many noise levels and depths, evenly spread.
NOISE_POINTS, DEPTHS = 4, 3
# Of an encoder's tokens where they are not known: so many that rounding is small.
NOMINAL = 10_000
SPREAD = 1.0
RATE = 0.5


@dataclass(frozen=True)
class LearnedSchedule:
    """Result of `learn_schedule`.

    Attributes:
        config: The given one with the ratio and the schedules of the best policy met.
        error: Its mean squared error of latents, or of an encoder's first output, on the prompts that it was
            learned from.
        constant_error: That of the given configuration.
    """

    config: TokenReduction | EncoderReduction
    error: float
    constant_error: float


@dataclass(frozen=True)
class ReductionBudget:
    """What there is to shrink in a generation: noise levels of the steps, depth and weight of the sites."""

    positions: tuple[float, ...]
    depths: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, generation: Generation) -> ReductionBudget:
        """Of the generation just seen; its warm-up and cool-down steps are left out.

        Raises:
            ValueError: if it had no others.
        """
        setup, call, noise = (
            generation.runtime.setup,
            generation.runtime.call,
            generation.sampling.noise,
        )
        assert setup.reduction is not None
        first, last = setup.warmup_steps, len(noise) - setup.cooldown_steps
        if first >= last:
            raise ValueError(
                f"all {len(noise)} steps compute all tokens, so there is nothing to learn; ask for more than "
                f"{len(noise) - last + first} steps"
            )
        sites = [site for site in setup.sites if call.in_use(site)]
        return cls(
            tuple(1.0 - level for level in noise[first:last]),
            tuple(site.depth for site in sites),
            # Linear layers have the larger part of a block's FLOPs.
            tuple(float(call.grids[site.resolution].tokens * site.width**2) for site in sites),
        )

    def removed(self, config: TokenReduction) -> float:
        """The share of the work that a configuration leaves out."""
        total = 0.0
        for position in self.positions:
            for depth, weight in zip(self.depths, self.weights, strict=True):
                total += weight * config.ratio_at(position, depth)
        return total / (len(self.positions) * sum(self.weights))


def learn_schedule(
    pipe: Any,
    prompts: str | Sequence[Any],
    config: TokenReduction | EncoderReduction,
    *,
    most: float | None = None,
    rounds: int = 6,
    candidates: int = 6,
    seed: int = 0,
    **options: Any,
) -> LearnedSchedule:
    """Spread a configuration's ratio over noise levels and depths such that latents drift less.

    A Gaussian policy draws factors for the two schedules, all scaled such that no less is left out than by
    the given configuration; what each does to the latents of the prompts is measured against the unreduced
    pipeline, and the policy moves towards what did better than the others (policy gradient: REINFORCE,
    Williams 1992, with normalised rewards). Takes (rounds * candidates + 2) generations of every prompt.

    Of an encoder, with an EncoderReduction, the policy draws what share of the tokens leaves at each block;
    no more pass through all its blocks together than by the given configuration. Takes as many calls.

    Example:
        >>> config = TokenReduction(method="tome", ratio=0.4)
        >>> learned = learn_schedule(pipe, ["a cat", "a red apple"], config, num_inference_steps=20)
        >>> apply_tofu(pipe, learned.config)

    Args:
        pipe: A pipeline with one denoiser, without tofu; or a model that is or holds one encoder.
        prompts: Each what the pipeline takes as its first argument; one string is one prompt. Of an
            encoder the model's arguments by name, without padding.
        config: What to spread; with a method and constant schedules, of an encoder with one of the two names.
        most: The largest ratio anywhere, of an encoder the largest share that leaves at one block; None:
            halfway between the ratio, or an even share, and what the method can reach.
        rounds: Updates of the policy.
        candidates: Drawn in each round, two or more.
        seed: Of the draws, and of the images; the n-th prompt has seed + n.
        options: Further arguments of the pipeline, or of the model.

    Raises:
        TypeError: if `pipe` is no pipeline and holds no encoder, the configuration is not of its kind, or an
            encoder's input is not by name.
        ValueError: if there is no prompt, the configuration or so few steps leave nothing to spread, a number
            is too small, the pipeline has tofu or several denoisers, or an encoder's input has padding.
    """
    prompts = as_prompts(prompts)
    encoder = MeasuredEncoder.of(pipe)
    wanted_type = TokenReduction if encoder is None else EncoderReduction
    if not isinstance(config, wanted_type):
        raise TypeError(
            f"config is {type(config).__name__}; for {type(pipe).__name__} give {wanted_type.__name__}"
        )
    _check_counts(prompts, rounds, candidates)
    if encoder is not None:
        assert isinstance(config, EncoderReduction)
        return _learn_encoder(encoder, prompts, config, most, rounds, candidates, seed, options)
    assert isinstance(config, TokenReduction)
    highest = config.make_method().max_ratio if config.is_resolved else 1.0
    most = (config.ratio + min(highest, 1.0)) / 2 if most is None else most
    _check(config, most, highest)

    def generated() -> list[Tensor]:
        found = [latents(pipe, prompt, seed + n, options) for n, prompt in enumerate(prompts)]
        return [torch.as_tensor(each).float() for each in found]

    model = only_denoiser(pipe, config.family)
    wanted = generated()

    def error(tried: TokenReduction) -> tuple[float, ReductionBudget]:
        apply_tofu(pipe, tried)
        try:
            pairs = zip(generated(), wanted, strict=True)
            squares = [float((mine - other).square().mean()) for mine, other in pairs]
            return sum(squares) / len(squares), ReductionBudget.of(state_of(model).generation)
        finally:
            remove_tofu(pipe)

    # The same, but its blocks are not joined to spans: with a schedule over depth none are.
    constant, work = error(config.replace(depth_schedule=_evenly([1.0, 1.0])))
    tried_all = [(constant, config)]

    def reward(logits: Tensor) -> float:
        tried = spread(config, most, logits, work)
        tried_all.append((error(tried)[0], tried))
        return -tried_all[-1][0]

    follow_rewards(reward, NOISE_POINTS + DEPTHS, rounds, candidates, seed)
    least, best = min(tried_all, key=lambda each: each[0])
    return LearnedSchedule(best, least, constant)


def follow_rewards(
    reward: Callable[[Tensor], float], size: int, rounds: int, candidates: int, seed: int
) -> Tensor:
    """Policy gradient on the mean of a Gaussian policy, from 0 on.  -> [size], where it ended."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.zeros(size)
    for _ in range(rounds):
        step_sizes = torch.randn(candidates, size, generator=draw) * SPREAD
        rewards = torch.tensor([reward(mean + move) for move in step_sizes])
        advantage = (rewards - rewards.mean()) / rewards.std().clamp(min=1e-12)
        mean = mean + RATE * (advantage[:, None] * step_sizes).mean(dim=0) / SPREAD
    return mean


def spread(
    config: TokenReduction, most: float, logits: Tensor, work: ReductionBudget
) -> TokenReduction:
    """The configuration with these schedules, leaving out no less than before: by the least such shift."""

    def at(shift: float) -> TokenReduction:
        factors = torch.sigmoid(logits + shift).tolist()
        noise, depth = factors[:NOISE_POINTS], factors[NOISE_POINTS:]
        return config.replace(ratio=most, schedule=_evenly(noise), depth_schedule=_evenly(depth))

    wanted = work.removed(config)
    # At the upper end all factors are 1, and more than the ratio is left out.
    return at(_least(lambda shift: work.removed(at(shift)) >= wanted))


def _least(enough: Callable[[float], bool]) -> float:
    """The least shift of logits from which on it is enough, as it is where they all are 1."""
    low, high = -20.0, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _learn_encoder(
    encoder: MeasuredEncoder,
    prompts: Sequence[Any],
    config: EncoderReduction,
    most: float | None,
    rounds: int,
    candidates: int,
    seed: int,
    options: dict[str, Any],
) -> LearnedSchedule:
    """`learn_schedule` of an encoder."""
    blocks = len(encoder.blocks)
    even = 1.0 - (1.0 - config.ratio) ** (1.0 / blocks)
    highest = config.make_method().max_remove(TokenGrid(1, NOMINAL)) / NOMINAL
    most = (even + highest) / 2 if most is None else most
    if not isinstance(config.schedule, str) or config.first_block:
        raise ValueError(
            f"schedule {config.schedule!r} with first_block {config.first_block} says already where tokens "
            "leave; give one of its names, and first_block 0"
        )
    if config.ratio == 0 or not even < most <= highest or most >= 1:
        raise ValueError(
            f"ratio {config.ratio:g}, at {blocks} blocks a share of {even:.3g} at each, cannot be spread "
            f"up to {most:.3g}: give a ratio above 0, and above that share a `most` that method "
            f"{config.method!r} can reach ({highest:g})"
        )

    @torch.no_grad()
    def outputs() -> list[Tensor]:
        return [encoder(given, options).float() for given in prompts]

    wanted = outputs()

    def error(tried: EncoderReduction) -> float:
        with apply_tofu(encoder.model, tried):
            pairs = zip(outputs(), wanted, strict=True)
            squares = [float((mine - other).square().mean()) for mine, other in pairs]
        return sum(squares) / len(squares)

    tried_all = [(error(config), config)]

    def reward(logits: Tensor) -> float:
        tried = spread_over_blocks(config, most, logits)
        tried_all.append((error(tried), tried))
        return -tried_all[-1][0]

    follow_rewards(reward, blocks, rounds, candidates, seed)
    least, best = min(tried_all, key=lambda each: each[0])
    return LearnedSchedule(best, least, tried_all[0][0])


def spread_over_blocks(config: EncoderReduction, most: float, logits: Tensor) -> EncoderReduction:
    """The configuration with weights by these logits, one a block, computing no more tokens than before."""
    blocks = len(logits)

    def at(shift: float) -> EncoderReduction:
        shares = (most * torch.sigmoid(logits.double() + shift)).clamp(min=1e-9)
        # Of those that are left, so that what stays is their product.
        weights = -torch.log1p(-shares)
        ratio = 1.0 - float(torch.exp(-weights.sum()))
        return config.replace(ratio=ratio, schedule=tuple(weights.tolist()))

    wanted = missing(config, blocks)
    return at(_least(lambda shift: missing(at(shift), blocks) >= wanted))


def missing(config: EncoderReduction, blocks: int) -> int:
    """How many of `NOMINAL` tokens are missing in the feed-forwards of all blocks, together."""
    return sum(accumulate(config.removed(NOMINAL, blocks)))


def _check_counts(prompts: Sequence[Any], rounds: int, candidates: int) -> None:
    if not prompts:
        raise ValueError("no prompts to learn from; give at least one")
    if rounds < 1 or candidates < 2:
        raise ValueError(f"{rounds} rounds of {candidates} candidates; give 1 or more of 2 or more")


def _evenly(factors: Sequence[float]) -> Schedule:
    places = torch.linspace(0, 1, len(factors)).tolist()
    return Schedule("explicit", points=tuple(zip(places, factors, strict=True)))


def _check(config: TokenReduction, most: float, highest: float) -> None:
    if not config.is_resolved:
        raise ValueError("the configuration names no method; name one, such as method='tome'")
    if not (config.schedule.is_constant and config.depth_schedule.is_constant):
        raise ValueError("the configuration has schedules already; give one with constant ones")
    if not 0 < config.ratio < most <= highest or most >= 1:
        raise ValueError(
            f"ratio {config.ratio:g} cannot be spread up to {most:g}: give a ratio above 0, and below it a "
            f"`most` that method {config.method!r} can reach ({highest:g})"
        )
