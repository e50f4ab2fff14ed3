"""What cached unmerges give back: exact where their assumption holds, a copy where they know
nothing; and what the cache holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.plans import plan_keeping
from tofu_diffusers.tokens.plan import Plan
from tofu_diffusers.tokens.unmerge import unmerge_tokens
from tofu_diffusers.tokens.unmerges import UNMERGES
from tofu_diffusers.tokens.update_cache import CacheKind, UpdateCache

LAW = settings(max_examples=30, deadline=None, derandomize=True)
B, N, C = 2, 13, 3
CACHED = [name for name, each in UNMERGES.items() if each.cached]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan_at(seed: int, slots: int = 5) -> Plan:
    """A plan that changes from step to step."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(N, generator=g) for _ in range(B)])[:, :slots]
    kept = kept.sort(dim=1).values
    return plan_keeping(kept, kept.gather(1, torch.randint(slots, (B, N), generator=g)))


def empty(how: str, dtype: torch.dtype = torch.float64) -> UpdateCache:
    return UpdateCache.empty(UNMERGES[how].cache, B, N, C, dtype, "cpu")


def at(step: float) -> Tensor:
    return torch.tensor(float(step))


def parts(cache: UpdateCache) -> list[Tensor]:
    return [t for t in (cache.value, cache.slope, cache.last) if t is not None]


@LAW
@given(st.integers(0, 999), st.integers(1, N))
def test_temporal_is_exact_on_constant_updates(seed: int, slots: int) -> None:
    update, cache = normal(seed, B, N, C), empty("temporal")
    cache.record(update, at(0))
    for step in range(1, 8):
        plan = plan_at(seed + step, slots)
        full = unmerge_tokens(plan.rows(update), plan, "temporal", cache=cache, step=at(step))
        assert torch.equal(full, update)


@LAW
@given(st.integers(0, 999), st.integers(1, N))
def test_taylor_is_exact_on_updates_linear_in_the_step(seed: int, slots: int) -> None:
    start, slope, cache = normal(seed, B, N, C), normal(seed + 1, B, N, C), empty("taylor")
    cache.record(start, at(0))
    cache.record(start + slope, at(1))
    for step in (2, 3, 5, 6, 9, 10):  # skipped steps too
        update = start + step * slope
        plan = plan_at(seed + step, slots)
        full = unmerge_tokens(plan.rows(update), plan, "taylor", cache=cache, step=at(step))
        torch.testing.assert_close(full, update, rtol=1e-9, atol=1e-9)


@LAW
@given(st.integers(0, 999), st.integers(1, N))
def test_blend_is_exact_where_a_token_changes_as_its_match_does(seed: int, slots: int) -> None:
    own, cache = normal(seed, B, N, C), empty("blend")
    cache.record(own, at(0))
    for step in range(1, 8):
        update = own + normal(seed + step, B, 1, C)  # all change alike, however much
        plan = plan_at(seed + step, slots)
        full = unmerge_tokens(plan.rows(update), plan, "blend", cache=cache, step=at(step))
        torch.testing.assert_close(full, update, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cache.value, full, rtol=0, atol=0)


def test_blend_is_its_formula_over_two_steps() -> None:
    u, plan, cache = normal(0, 3, B, N, C), plan_at(1), empty("blend")
    cache.record(u[0], at(0))
    first = unmerge_tokens(plan.rows(u[1]), plan, "blend", cache=cache, step=at(1))
    second = unmerge_tokens(plan.rows(u[2]), plan, "blend", cache=cache, step=at(2))
    for b in range(B):
        for i in plan.removed()[b].tolist():
            m = plan.kept[b, plan.assign[b, i]]
            torch.testing.assert_close(first[b, i], u[0, b, i] + u[1, b, m] - u[0, b, m])
            torch.testing.assert_close(second[b, i], first[b, i] + u[2, b, m] - u[1, b, m])


@pytest.mark.parametrize("how", CACHED)
def test_a_copy_until_there_is_a_value(how: str) -> None:
    cache = empty(how)
    known = torch.zeros(B, N, dtype=torch.bool)
    for step in range(4):
        plan, update = plan_at(step, 3), normal(step, B, 3, C)
        full = unmerge_tokens(update, plan, how, cache=cache, step=at(step))
        copied = unmerge_tokens(update, plan, "copy")
        assert torch.equal(full[~known], copied[~known])
        known |= plan.is_kept()
        assert torch.equal(cache.last >= 0, known)


def test_blend_is_a_copy_where_the_past_of_the_match_is_unknown() -> None:
    cache, plan = empty("blend"), plan_keeping(torch.tensor([[0]] * B), torch.zeros(B, N).long())
    cache.record(normal(0, B, N - 1, C), at(0), torch.arange(1, N).expand(B, -1))
    update = normal(1, B, 1, C)
    full = unmerge_tokens(update, plan, "blend", cache=cache, step=at(1))
    assert torch.equal(full, update.expand(B, N, C))


def test_taylor_of_one_value_is_temporal() -> None:
    taylor, temporal, plan = empty("taylor"), empty("temporal"), plan_at(0)
    for cache in (taylor, temporal):
        cache.record(normal(1, B, N, C), at(0))
    first = unmerge_tokens(normal(2, B, 5, C), plan, "taylor", cache=taylor, step=at(3))
    other = unmerge_tokens(normal(2, B, 5, C), plan, "temporal", cache=temporal, step=at(3))
    assert torch.equal(first, other)
    gone = ~plan.is_kept()
    assert (taylor.slope[gone] == 0).all() and (taylor.slope[~gone] != 0).all()


@pytest.mark.parametrize("how", CACHED)
def test_too_old_a_value_is_not_used(how: str) -> None:
    plan, update = plan_at(0), normal(1, B, 5, C)
    copied = unmerge_tokens(update, plan, "copy")
    for step, used in ((2, True), (3, False)):
        cache = empty(how)
        cache.record(normal(2, B, N, C), at(0))
        full = unmerge_tokens(update, plan, how, cache=cache, step=at(step), max_age=2)
        assert torch.equal(full, copied) != used


def test_a_second_call_in_one_step_keeps_the_slope() -> None:
    cache, plan, u = empty("taylor"), plan_at(0), normal(0, 4, B, N, C)
    cache.record(u[0], at(0))
    cache.record(u[1], at(2))
    slope = cache.slope.clone()
    torch.testing.assert_close(slope, (u[1] - u[0]) / 2)
    cache.record(u[2], at(2))
    assert torch.equal(cache.slope, slope) and torch.equal(cache.value, u[2])
    unmerge_tokens(plan.rows(u[3]), plan, "taylor", cache=cache, step=at(2))
    assert torch.equal(cache.slope, slope) and torch.equal(plan.rows(cache.value), plan.rows(u[3]))


@pytest.mark.parametrize("how", CACHED)
def test_recording_a_whole_step_is_recording_every_token_as_kept(how: str) -> None:
    whole, rows = empty(how), empty(how)
    every = torch.arange(N).expand(B, -1)
    for step in (0, 1, 3):
        update = normal(step, B, N, C)
        whole.record(update, at(step))
        rows.record(update, at(step), every)
    for a, b in zip(parts(whole), parts(rows), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", CACHED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_memory_is_what_was_foretold(how: str, dtype: torch.dtype) -> None:
    cache = UpdateCache.empty(UNMERGES[how].cache, B, N, C, dtype, "cpu")
    held = sum(t.untyped_storage().nbytes() for t in parts(cache))
    assert UpdateCache.nbytes_for(UNMERGES[how].cache, B, N, C, dtype) == cache.nbytes == held
    before = [t.data_ptr() for t in parts(cache)]
    cache.record(torch.ones(B, N, C, dtype=dtype), at(0))
    unmerge_tokens(torch.ones(B, 5, C, dtype=dtype), plan_at(0), how, cache=cache, step=at(1))
    assert [t.data_ptr() for t in parts(cache)] == before, "the cache changes in place"


def test_unmerges_without_a_cache_need_no_memory() -> None:
    for name in set(UNMERGES) - {*CACHED}:
        assert UpdateCache.nbytes_for(UNMERGES[name].cache, B, N, C, torch.float16) == 0
    with pytest.raises(ValueError, match="no cache of kind NONE"):
        UpdateCache.empty(CacheKind.NONE, B, N, C, torch.float32, "cpu")


def test_a_step_given_as_float32_serves_a_cache_of_any_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        cache = empty("taylor", dtype)
        cache.record(torch.zeros(B, N, C, dtype=dtype), at(998))
        cache.record(torch.ones(B, N, C, dtype=dtype), at(999))  # 999 is no bfloat16 number
        assert (cache.slope == 1).all() and cache.slope.dtype == dtype
        full = unmerge_tokens(
            torch.zeros(B, 5, C, dtype=dtype), plan_at(0), "taylor", cache=cache, step=at(1001)
        )
        assert (full[~plan_at(0).is_kept()] == 3).all()


@pytest.mark.parametrize("how", UNMERGES)
def test_compiled_unmerges_equal_eager_ones(how: str) -> None:
    torch._dynamo.reset()
    x = normal(9, B, N, C).float()

    def run(update: Tensor, plan: Plan, cache: UpdateCache | None, step: Tensor) -> Tensor:
        return unmerge_tokens(
            update, plan, how, x=x, merged=plan.rows(x), cache=cache, step=step, max_age=2
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager = empty(how, torch.float32) if UNMERGES[how].cached else None
    traced = empty(how, torch.float32) if UNMERGES[how].cached else None
    for step in range(5):
        update, plan = normal(step, B, 5, C).float(), plan_at(step)
        want = run(update, plan, eager, at(step))
        torch.testing.assert_close(compiled(update, plan, traced, at(step)), want)
    if eager is not None and traced is not None:
        for a, b in zip(parts(eager), parts(traced), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", UNMERGES)
def test_unmerges_run_on_meta_tensors(how: str) -> None:
    plan = Plan(*(t.to("meta") for t in plan_at(0)))
    x = torch.empty(B, N, C, device="meta", dtype=torch.float16)
    cache = None
    if UNMERGES[how].cached:
        cache = UpdateCache.empty(UNMERGES[how].cache, B, N, C, torch.float16, "meta")
    full = unmerge_tokens(
        plan.rows(x),
        plan,
        how,
        x=x,
        merged=plan.rows(x),
        cache=cache,
        step=torch.zeros((), device="meta"),
    )
    assert full.shape == x.shape and full.dtype == x.dtype and full.device.type == "meta"


def test_mistakes_are_named() -> None:
    plan, update, x = plan_at(0), normal(0, B, 5, C), normal(1, B, N, C)
    cache = empty("temporal")
    for arguments, said in [
        ({"kind": "cpoy"}, "unknown unmerge 'cpoy'; choose one of blend, copy, mlerp"),
        ({"kind": "mlerp", "x": x}, "'mlerp' needs merged"),
        ({"kind": "mlerp", "merged": update}, "'mlerp' needs x"),
        ({"kind": "temporal", "step": at(0)}, "'temporal' needs cache"),
        ({"kind": "blend", "cache": cache}, "'blend' needs step"),
        ({"kind": "taylor", "cache": cache, "step": at(0)}, "needs a cache with slopes"),
    ]:
        with pytest.raises(ValueError, match=said):
            unmerge_tokens(update, plan, **arguments)
    with pytest.raises(ValueError, match=r"update is \(2, 13, 3\) but the plan keeps \(2, 5\)"):
        unmerge_tokens(x, plan)
    small = UpdateCache.empty(CacheKind.VALUE, 1, N, C, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"cache is \(1, 13, 3\)"):
        unmerge_tokens(update, plan, "temporal", cache=small, step=at(0))
    with pytest.raises(ValueError, match="an update of all tokens is"):
        cache.record(update, at(0))
