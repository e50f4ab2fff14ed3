"""The library's random numbers: a pure function of seed, step and position, and uniform."""

import pytest
import torch

from tofu_diffusers.tokens.random_bits import uniform

PLACES = torch.arange(4096)


def draw(seed: int = 0, step: float | None = 0.0) -> torch.Tensor:
    return uniform(seed, None if step is None else torch.tensor(step), PLACES)


def by_hand(seed: int, step: int | None, position: int) -> float:
    """The same hash in Python's unbounded integers: nothing may overflow on the way."""

    def mix(word: int) -> int:
        for _ in range(2):
            word = (((word >> 16) ^ word) * 0x45D9F3B) % 2**32
        return (word >> 16) ^ word

    def absorb(state: int, word: int) -> int:
        return mix((state + 0x9E3779B9) % 2**32 ^ word % 2**32)

    state = absorb(mix(seed % 2**32), seed >> 32)
    if step is not None:
        state = absorb(state, step + 1)
    return (absorb(absorb(state, position), position >> 32) >> 8) / 2**24


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**40 + 7, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("step", [None, 0, 49])
def test_equals_unbounded_arithmetic(seed: int, step: int | None) -> None:
    places = [0, 1, 2, 4095, 65535, 2**33]
    got = uniform(seed, None if step is None else torch.tensor(float(step)), torch.tensor(places))
    assert got.tolist() == [by_hand(seed, step, p) for p in places]
    assert got.dtype == torch.float32


def test_range_moments_and_bins() -> None:
    n = PLACES.numel()
    for seed, step in [(0, 0.0), (1, 0.0), (0, 1.0), (12345, 20.0), (0, None)]:
        u = draw(seed, step)
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
        bins = torch.histc(u, 32, 0, 1)
        assert ((bins - n / 32) ** 2 / (n / 32)).sum() < 65  # chi-square, 31 degrees, p < 0.001


def test_seeds_steps_and_neighbours_are_unrelated() -> None:
    base = draw()
    for other in (draw(1), draw(2**32), draw(-1), draw(0, 1.0), draw(0, None), base.roll(1)):
        pair = torch.stack([base, other])
        assert abs(pair.corrcoef()[0, 1]) < 4 / PLACES.numel() ** 0.5


def test_a_position_draws_the_same_in_any_company() -> None:
    grid = PLACES.view(64, 64)
    assert torch.equal(uniform(3, torch.tensor(5.0), grid).flatten(), draw(3, 5.0))
    assert torch.equal(uniform(3, torch.tensor(5.0), PLACES[7:9]), draw(3, 5.0)[7:9])


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = draw(7)
    torch.manual_seed(123)
    assert torch.equal(draw(7), first)
    torch.set_rng_state(before)
    draw(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_meta_and_compiled() -> None:
    meta = uniform(1, torch.zeros((), device="meta"), torch.zeros(5, 3, dtype=int, device="meta"))
    assert meta.shape == (5, 3) and meta.dtype == torch.float32
    compiled = torch.compile(uniform, fullgraph=True, backend="aot_eager")
    for seed in (0, 1, 2, -5, 2**40):  # a changing seed must not break the graph
        assert torch.equal(compiled(seed, torch.tensor(2.0), PLACES), draw(seed, 2.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_draws_the_same() -> None:
    assert torch.equal(uniform(3, torch.tensor(5.0).cuda(), PLACES.cuda()).cpu(), draw(3, 5.0))
