"""The Triton kernels compute what the torch reference computes, on a GPU or under Triton's interpreter.

The interpreter must be chosen before anything imports Triton, so without a GPU this file runs itself again in
a process of its own. Every output starts as NaN: what a kernel leaves unwritten is seen.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tofu_diffusers import apply_tofu
from tofu_diffusers.kernels import reference
from tofu_diffusers.tokens import merge, unmerge
from tofu_diffusers.tokens.gather import gather_rows, scatter_rows_
from tofu_diffusers.tokens.grid import TokenGrid
from tofu_diffusers.tokens.methods.matching import tiles_of
from tofu_diffusers.tokens.plan import Plan
from tofu_diffusers.tokens.unmerges import UNMERGES
from tofu_diffusers.tokens.update_cache import UpdateCache

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
if HERE:
    from tofu_diffusers.kernels import dispatch
    from tofu_diffusers.kernels.triton import _tiles as triton_tiles
    from tofu_diffusers.kernels.triton import merge as triton_merge
    from tofu_diffusers.kernels.triton import unmerge as triton_unmerge

    dispatch.load("triton")
    OPS = torch.ops.tofu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COSINE = 4e-6
"""Most that a cosine may be off: float32 sums, or three tf32 products for one, of numbers near one."""
SIZES = [(1, 1, 1, 40), (2, 37, 21, 40), (1, 130, 70, 64), (1, 70, 131, 72), (2, 150, 300, 320)]


def test_under_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout and " skipped" not in child.stdout, child.stdout


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Deterministic mode fills what `empty` returns with NaN, or with the largest integer."""
    if HERE:
        # What kernels are compared with must not be the kernels.
        monkeypatch.setattr(dispatch, "LOADED", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def rounding(dtype: torch.dtype, times: int) -> float:
    """Relative error of so many roundings. The interpreter cuts bfloat16 off where a GPU rounds."""
    cut = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
    return times * cut * torch.finfo(dtype).eps / 2


def exact(dtype: torch.dtype) -> bool:
    """Whether a sum in float32 is rounded to this dtype as torch does it."""
    return not (INTERPRETED and dtype == torch.bfloat16)


def close(got: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    """Off by at most `error` of each row's largest entry (and finite)."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape and got.isfinite().all()
    largest = expected.abs().amax(dim=-1, keepdim=True)
    assert ((got - expected).abs() <= error * largest + 1e-30).all()


# ---- match -----------------------------------------------------------------------------------------


def check_match(queries: torch.Tensor, candidates: torch.Tensor) -> None:
    value, index = OPS.best_match(queries, candidates)
    assert value.dtype == torch.float32 and index.dtype == torch.int64
    unit_q, unit_c = (reference.normalise(x.double()) for x in (queries, candidates))
    cosine = unit_q @ unit_c.mT
    best = cosine.max(dim=-1).values
    assert ((value.double() - best).abs() <= COSINE).all()
    # Of several within rounding of the best any may win; of all others none.
    assert (cosine.gather(-1, index[..., None])[..., 0] >= best - 2 * COSINE).all()
    clear = (cosine >= best[..., None] - 2 * COSINE).sum(-1) == 1
    _, expected = reference.best_match(queries, candidates)
    assert torch.equal(index[clear], expected[clear])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_match_is_the_reference(size, dtype):
    batch, queries, candidates, channels = size
    check_match(
        normal(0, batch, queries, channels, dtype=dtype),
        normal(1, batch, candidates, channels, dtype=dtype),
    )


@settings(max_examples=15)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 80),
    st.integers(0, 99),
)
def test_match_of_any_size(batch, queries, candidates, channels, seed):
    check_match(
        normal(seed, batch, queries, channels), normal(seed + 1, batch, candidates, channels)
    )


@pytest.mark.parametrize("programs", [1, 2, 1024])
def test_candidates_may_be_split_among_programs_in_any_way(programs, monkeypatch):
    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    x, y = normal(0, 1, 20, 40), normal(1, 1, 300, 40)
    check_match(x, y)
    value, index = OPS.best_match(x, y)
    monkeypatch.setattr(triton_tiles, "PROGRAMS", 1024)
    other, same = OPS.best_match(x, y)
    assert torch.equal(value, other) and torch.equal(index, same)


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equals_the_first_is_the_match(dtype, programs, monkeypatch):
    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    some = normal(2, 1, 45, 40, dtype=dtype)
    value, index = OPS.best_match(some, some.repeat(1, 4, 1))
    assert torch.equal(index, torch.arange(45, device=DEVICE)[None])
    assert ((value - 1).abs() <= COSINE).all()
    alike = some[:, :1].expand(1, 200, 40)
    value, index = OPS.best_match(alike, alike)
    assert (index == 0).all() and ((value - 1).abs() <= COSINE).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_match_of_zero_huge_and_tiny_rows(dtype):
    x = normal(3, 1, 30, 64, dtype=dtype)
    value, index = OPS.best_match(torch.zeros_like(x), x)
    assert (value == 0).all() and (index == 0).all()
    value, index = OPS.best_match(x, torch.zeros_like(x))
    assert (value == 0).all() and (index == 0).all()
    limits = torch.finfo(dtype)
    unit = x / x.abs().amax(dim=-1, keepdim=True)
    # The interpreter misreads subnormal numbers of bfloat16: keep what counts out of them.
    small = limits.tiny * (64 if exact(dtype) else 2**14)
    for factor in (limits.max / 4, small):
        check_match(unit * factor, unit * factor)
        check_match(unit, unit * factor)


def test_match_sees_nan_as_torch_does():
    x, y = normal(4, 1, 6, 40), normal(5, 1, 9, 40)
    y[0, 3, 7] = torch.nan
    y[0, 5, 0] = torch.inf
    x[0, 2, 1] = -torch.inf
    for got, expected in zip(OPS.best_match(x, y), reference.best_match(x, y), strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_match_does_not_depend_on_strides_or_neighbours():
    x, y = normal(6, 2, 20, 72), normal(7, 2, 33, 72)
    value, index = OPS.best_match(x, y)
    strided = OPS.best_match(x.mT.contiguous().mT, y.repeat_interleave(2, dim=1)[:, ::2])
    alone = OPS.best_match(x[1:], y[1:])
    assert torch.equal(value, strided[0]) and torch.equal(index, strided[1])
    assert torch.equal(value[1:], alone[0]) and torch.equal(index[1:], alone[1])


TILINGS = [((1, 7, 9), (1, 3, 4)), ((3, 5, 6), (2, 2, 6)), ((2, 1, 40), (1, 1, 40))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sides", "window"), TILINGS)
def test_match_inside_tiles_is_the_reference(sides, window, dtype):
    grid = TokenGrid(frames=sides[0], height=sides[1], width=sides[2])
    tiles, _ = tiles_of(grid, window, torch.device(DEVICE))
    x = normal(8, 2, grid.tokens, 40, dtype=dtype)
    candidate = normal(9, 2, grid.tokens) > 0.5
    candidate[0, tiles[0]] = False
    value, position = OPS.best_match_tiles(x, candidate, tiles)
    expected, places = reference.best_match_tiles(x.double(), candidate, tiles)
    none = expected == -torch.inf
    assert none.any() and torch.equal(value == -torch.inf, none)
    assert ((value - expected)[~none].abs() <= COSINE).all()
    # Random rows of 40 channels leave no near tie that another order of sums could turn.
    assert torch.equal(position, places)


# ---- energy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("margin", "alpha"), [(0.9, 1.0), (0.2, 0.3)])
@pytest.mark.parametrize("size", [(1, 1, 40), (2, 37, 72), (1, 300, 64)])
def test_energy_is_the_reference(size, margin, alpha, dtype):
    x = normal(10, *size, dtype=dtype)
    x[:, -1:] = x[:, :1]
    unit = reference.normalise(x.double())
    # f_m jumps at the margin: a cosine within rounding of it may fall on either side.
    unsure = ((unit @ unit.mT - margin).abs() <= COSINE).double().mean(-1) * margin
    expected = reference.energy(x.double(), margin, alpha)
    got = OPS.energy(x, margin, alpha)
    assert got.dtype == torch.float32
    assert ((got - expected).abs() <= (1 + alpha) * COSINE + unsure).all()
    assert torch.equal(got, OPS.energy(x, margin, alpha))


@pytest.mark.parametrize("programs", [1, 1024])
def test_energy_of_equal_and_of_zero_rows(programs, monkeypatch):
    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    alike = normal(11, 1, 1, 40).expand(1, 170, 40)
    assert ((OPS.energy(alike, 0.9, 1.0) - 1).abs() <= COSINE).all()
    nothing = torch.zeros(1, 170, 40, device=DEVICE)
    expected = reference.energy(nothing, 0.9, 1.0)
    assert ((OPS.energy(nothing, 0.9, 1.0) - expected).abs() <= COSINE).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sides", "window"), TILINGS)
def test_energy_inside_tiles_is_the_reference(sides, window, dtype):
    grid = TokenGrid(frames=sides[0], height=sides[1], width=sides[2])
    tiles, _ = tiles_of(grid, window, torch.device(DEVICE))
    x = normal(12, 2, grid.tokens, 40, dtype=dtype)
    expected = reference.energy_tiles(x.double(), tiles, 0.9, 1.0)
    assert ((OPS.energy_tiles(x, tiles, 0.9, 1.0) - expected).abs() <= 2 * COSINE).all()


# ---- merge ------------------------------------------------------------------------------------------


def make_plan(seed: int, batch: int, tokens: int, slots: int) -> Plan:
    """A random partition; the last group is empty but for its kept token where there is room."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=draw)[:slots].sort().values for _ in range(batch)]
    kept = torch.stack(rows)
    assign = torch.randint(0, max(1, slots - 1), (batch, tokens), generator=draw)
    own = torch.arange(slots).expand(batch, -1)
    plan = Plan(kept.to(DEVICE), assign.scatter(1, kept, own).to(DEVICE))
    plan.check()
    return plan


def merged(x: torch.Tensor, plan: Plan, how: str) -> torch.Tensor:
    members = triton_merge.members(plan.assign, plan.kept.shape[1])
    if how == "mean":
        return OPS.merge_mean(x, *members)
    return OPS.merge_mlerp(x, *members, merge.EPS)


def check_merge(x: torch.Tensor, plan: Plan, how: str) -> torch.Tensor:
    got = merged(x, plan, how)
    assert got.dtype == x.dtype
    with torch.no_grad():
        expected = merge.MERGES[how](x.double(), plan)
    # In float32 the sums of up to N members; the direction of a mean loses what its tokens cancel.
    size, span = int(plan.sizes().max()), plan.broadcast(merge.mean(x.double(), plan)).norm(dim=-1)
    cancel = (
        float((x.double().norm(dim=-1) / span.clamp(min=1e-300)).max()) if how == "mlerp" else 8
    )
    error = rounding(x.dtype, 2) + (size + 8) * max(8.0, cancel) * torch.finfo(torch.float32).eps
    close(got, expected, error)
    assert torch.equal(got, merged(x, plan, how))
    return got


@pytest.mark.parametrize("how", ["mean", "mlerp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 40), (2, 30, 7, 40), (1, 33, 30, 72), (2, 50, 2, 64), (1, 21, 10, 320)]
)
def test_merge_is_the_reference_and_the_same_every_time(size, dtype, how):
    batch, tokens, _, channels = size
    x, plan = normal(13, batch, tokens, channels, dtype=dtype), make_plan(14, *size[:3])
    got = check_merge(x, plan, how)
    if how == "mean":
        alone = plan.sizes() == 1
        assert alone.any() and torch.equal(got[alone], plan.rows(x)[alone])


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 30), st.data())
def test_merge_of_any_partition(batch, tokens, data):
    slots, channels = data.draw(st.integers(1, tokens)), data.draw(st.integers(1, 50))
    seed = data.draw(st.integers(0, 99))
    plan = make_plan(seed, batch, tokens, slots)
    x = normal(seed, batch, tokens, channels) + 1.0
    for how in ("mean", "mlerp"):
        check_merge(x, plan, how)


@pytest.mark.parametrize("how", ["mean", "mlerp"])
def test_merge_takes_any_strides(how):
    plan = make_plan(15, 2, 30, 9)
    x = normal(16, 2, 40, 30)
    assert torch.equal(merged(x.mT, plan, how), merged(x.mT.contiguous(), plan, how))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_huge_tiny_zero_and_opposed_tokens(dtype):
    plan = make_plan(17, 1, 30, 6)
    limits = torch.finfo(dtype)
    x = normal(18, 1, 30, 40, dtype=dtype)
    unit = x / x.abs().amax(dim=-1, keepdim=True) + 1
    small = limits.tiny * (64 if exact(dtype) else 2**14)
    for factor in (limits.max / 3, small):
        check_merge(unit * factor, plan, "mean")
    # A whole vector longer than the dtype's largest number has no float32 norm of its own either.
    check_merge(unit * (limits.max / 128), plan, "mlerp")
    check_merge(unit * small, plan, "mlerp")
    for how in ("mean", "mlerp"):
        assert (merged(torch.zeros_like(x), plan, how) == 0).all()
    pair = Plan(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), plan.assign[:, :2] * 0)
    opposed = torch.cat([x[:, :1], -x[:, :1]], dim=1)
    got = merged(opposed, pair, "mlerp")
    assert got.isfinite().all()
    assert got.float().norm() <= opposed.float().norm(dim=-1).max() * 1.01


def test_a_mean_without_direction_is_not_stretched():
    pair = Plan(*(torch.zeros(1, n, dtype=torch.int64, device=DEVICE) for n in (1, 2)))
    x = torch.zeros(1, 2, 40, device=DEVICE)
    # The mean is 5e-9 long, less than the share EPS of the longest token.
    x[0, 0, 0], x[0, 1, 0], x[0, 1, 1] = 1.0, -1.0, 1e-8
    expected = merge.mlerp(x, pair)
    assert 0 < expected.abs().max() < 0.1
    torch.testing.assert_close(merged(x, pair, "mlerp"), expected, rtol=1e-5, atol=0)


def test_members_lists_every_group_in_order():
    plan = make_plan(19, 3, 25, 6)
    order, offsets = triton_merge.members(plan.assign, 6)
    assert torch.equal(offsets.diff(dim=1), plan.sizes())
    for b in range(3):
        for k in range(6):
            got = order[b, offsets[b, k] : offsets[b, k + 1]]
            assert torch.equal(got, (plan.assign[b] == k).nonzero()[:, 0])


# ---- unmerge ---------------------------------------------------------------------------------------


def filled(how, batch, tokens, channels, dtype):
    """Two equal caches with a past: tokens of ages 1 and 2, and some that were never computed."""
    caches = [
        UpdateCache.empty(UNMERGES[how].cache, batch, tokens, channels, dtype, DEVICE)
        for _ in range(2)
    ]
    for cache in caches:
        for step, count in ((0, tokens * 3 // 5), (1, tokens // 2), (2, tokens // 4)):
            rows = torch.arange(count, device=DEVICE).expand(batch, -1).contiguous()
            update = normal(20 + step, batch, count, channels, dtype=dtype)
            cache.record(update, torch.tensor(float(step), device=DEVICE), rows)
    return caches


def same(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Bit by bit, or where the interpreter cuts off by an error of its."""
    assert got.dtype == expected.dtype
    if exact(dtype):
        assert torch.equal(got, expected)
    else:
        close(got, expected, rounding(dtype, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 40), (2, 30, 7, 40), (1, 33, 20, 72), (2, 9, 4, 320)])
def test_unmerge_copy_is_gather_and_add(size, dtype):
    batch, tokens, slots, channels = size
    plan = make_plan(30, batch, tokens, slots)
    x = normal(31, batch, channels, tokens, dtype=dtype).mT
    update, computed = (normal(s, batch, slots, channels, dtype=dtype) for s in (32, 33))
    expected = unmerge.unmerge_tokens(update, plan, "copy") + x
    same(OPS.unmerge_copy(x, update, *plan, None), expected, dtype)
    got = OPS.unmerge_copy(x, update, *plan, computed)
    scatter_rows_(expected, plan.kept, computed)
    same(got, expected, dtype)
    assert torch.equal(plan.rows(got), computed)


@pytest.mark.parametrize("max_age", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["temporal", "taylor", "blend"])
def test_unmerge_cached_is_the_reference_and_records(how, dtype, max_age):
    batch, tokens, slots, channels = size = (2, 30, 9, 40)
    plan, (mine, theirs) = make_plan(34, *size[:3]), filled(how, batch, tokens, channels, dtype)
    x = normal(35, batch, tokens, channels, dtype=dtype)
    match_known = plan.broadcast(plan.rows(theirs.last[..., None]))[..., 0] >= 0
    assert ((theirs.last >= 0) & ~match_known & ~plan.is_kept()).any()
    # The third call is a second one within its step.
    for call, step in enumerate((3.0, 4.0, 4.0)):
        now = torch.tensor(step, device=DEVICE)
        update = normal(36 + call, batch, slots, channels, dtype=dtype)
        full = unmerge.unmerge_tokens(update, plan, how, cache=theirs, step=now, max_age=max_age)
        residual = x if call else None
        computed = plan.rows(x) if call == 1 else None
        expected = full if residual is None else x + full
        if computed is not None:
            scatter_rows_(expected, plan.kept, computed)
        got = OPS.unmerge_cached(
            update, *plan, mine.value, mine.slope, mine.last, now, how, max_age, residual, computed
        )
        assert torch.equal(mine.last, theirs.last)
        pairs = [(got, expected), (mine.value, theirs.value)]
        if how == "taylor":
            pairs.append((mine.slope, theirs.slope))
            # A compiler may fuse the extrapolation's product and sum.
            for one, other in pairs:
                close(one, other, rounding(dtype, 4))
        else:
            for one, other in pairs:
                same(one, other, dtype)


def test_unmerge_taylor_stays_in_the_range_of_its_dtype():
    plan, (mine, theirs) = make_plan(37, 1, 12, 4), filled("taylor", 1, 12, 40, torch.float16)
    for cache in (mine, theirs):
        cache.slope.fill_(6e4)
    now, update = torch.tensor(9.0, device=DEVICE), normal(38, 1, 4, 40, dtype=torch.float16)
    expected = unmerge.unmerge_tokens(update, plan, "taylor", cache=theirs, step=now)
    got = OPS.unmerge_cached(
        update, *plan, mine.value, mine.slope, mine.last, now, "taylor", None, None, None
    )
    assert expected.max() == torch.finfo(torch.float16).max
    assert torch.equal(got, expected) and torch.equal(mine.slope, theirs.slope)


# ---- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 40), (2, 30, 7, 40), (1, 33, 20, 72), (2, 9, 4, 320)])
def test_rows_are_taken_and_put_bit_by_bit(size, dtype):
    batch, tokens, slots, channels = size
    kept = make_plan(40, batch, tokens, slots).kept
    x = normal(41, batch, channels, tokens, dtype=dtype).mT
    assert torch.equal(OPS.take_rows(x, kept), gather_rows(x, kept))
    mine, theirs = x.contiguous(), x.contiguous().clone()
    rows = normal(42, batch, channels, slots, dtype=dtype).mT
    OPS.put_rows_(mine, kept, rows)
    scatter_rows_(theirs, kept, rows)
    assert torch.equal(mine, theirs)
    # Into part of a larger cache, and of another dtype.
    wide = torch.zeros(batch, tokens, channels + 3, device=DEVICE)
    OPS.put_rows_(wide[..., 2:-1], kept, rows)
    assert torch.equal(gather_rows(wide[..., 2:-1], kept), rows.float())
    assert (wide[..., :2] == 0).all() and (wide[..., -1] == 0).all()


# ---- as operations of torch ------------------------------------------------------------------------


def samples() -> dict[str, tuple]:
    """Arguments of every operation, by name."""
    x, plan = normal(50, 2, 12, 40), make_plan(51, 2, 12, 5)
    update, (cache, _) = normal(52, 2, 5, 40), filled("taylor", 2, 12, 40, torch.float32)
    tiles = torch.arange(12, device=DEVICE).view(3, 4)
    members = triton_merge.members(plan.assign, 5)
    last = (cache.last, torch.tensor(3.0, device=DEVICE))
    return {
        "best_match": (x[:, :7], x[:, 7:]),
        "best_match_tiles": (x, x[..., 0] > 0, tiles),
        "energy": (x, 0.9, 1.0),
        "energy_tiles": (x, tiles, 0.9, 1.0),
        "merge_mean": (x, *members),
        "merge_mlerp": (x, *members, 1e-6),
        "unmerge_copy": (x, update, *plan, update),
        "unmerge_cached": (update, *plan, cache.value, cache.slope, *last, "taylor", 2.0, x, None),
        "take_rows": (x, plan.kept),
        "put_rows_": (x.clone(), plan.kept, update),
    }


OPERATIONS = (
    "best_match",
    "best_match_tiles",
    "energy",
    "energy_tiles",
    "merge_mean",
    "merge_mlerp",
    "unmerge_copy",
    "unmerge_cached",
    "take_rows",
    "put_rows_",
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_well_formed(name):
    assert set(samples()) == set(OPERATIONS)
    torch.library.opcheck(getattr(OPS, name).default, samples()[name])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_have_shapes_without_data(name):
    def to_meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    arguments = samples()[name]
    real = getattr(OPS, name)(*arguments)
    shapes = getattr(OPS, name)(*map(to_meta, arguments))
    for one, other in zip(
        *(r if isinstance(r, tuple) else (r,) for r in (real, shapes)), strict=True
    ):
        if one is None:
            assert other is None
        else:
            assert one.shape == other.shape and one.dtype == other.dtype
            assert one.stride() == other.stride()


def test_one_graph_through_all_of_them():
    def step(x, update, kept, assign, value, slope, last, now):
        members = triton_merge.members(assign, kept.shape[1])
        y = OPS.merge_mlerp(x, *members, 1e-6) + OPS.merge_mean(x, *members)
        _, index = OPS.best_match(x, y)
        full = OPS.unmerge_cached(
            update, kept, assign, value, slope, last, now, "taylor", None, x, y
        )
        OPS.put_rows_(full, kept, OPS.take_rows(x, kept))
        return full, index, OPS.energy(full, 0.5, 1.0)

    x, plan, update = normal(53, 2, 12, 40), make_plan(54, 2, 12, 5), normal(55, 2, 5, 40)
    now = torch.tensor(3.0, device=DEVICE)
    runs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        cache, _ = filled("taylor", 2, 12, 40, torch.float32)
        out = function(x, update, *plan, cache.value, cache.slope, cache.last, now)
        runs.append((*out, cache.value, cache.slope, cache.last))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()


def test_dispatch_reaches_the_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "CHOICE", "triton")
    monkeypatch.setattr(dispatch, "LOADED", True)
    x, tiles = normal(56, 1, 12, 40), torch.arange(12, device=DEVICE).view(3, 4)
    allowed = x[..., 0] > 0
    for got, expected in (
        (dispatch.best_match(x, x[:, :5]), OPS.best_match(x, x[:, :5])),
        (dispatch.best_match_tiles(x, allowed, tiles), OPS.best_match_tiles(x, allowed, tiles)),
        ((dispatch.energy(x, 0.9),), (OPS.energy(x, 0.9, 1.0),)),
        ((dispatch.energy_tiles(x, tiles, 0.9),), (OPS.energy_tiles(x, tiles, 0.9, 1.0),)),
    ):
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
    # What kernels do not take goes to torch.
    assert dispatch.best_match(x.double(), x.double())[0].dtype == torch.float64
    assert dispatch.use_triton(x) and not dispatch.use_triton(x.requires_grad_())
    fused = {name for name, each in UNMERGES.items() if each.cached and each.fused}
    assert set(triton_unmerge.FORMS) == fused


MODELS = {
    "tome": {"method": "tome", "merge": "mlerp", "unmerge": "mlerp"},
    "mean": {"method": "pitome", "merge": "mean", "unmerge": "copy"},
    "prune": {"method": "tome", "merge": "prune", "unmerge": "copy"},
    "taylor": {"keys_values": "fresh", **tiny.SHORT},
    "blend": {"keys_values": "cached", "unmerge": "blend", **tiny.SHORT},
}


@torch.no_grad()
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_denoiser_runs_the_same(options, monkeypatch):
    model = tiny.denoisers(tiny.tiny_sd3(sample_size=8, num_layers=2))[0].to(DEVICE)
    inputs = {
        name: value.to(DEVICE) if torch.is_tensor(value) else value
        for name, value in tiny.model_inputs(model).items()
    }
    monkeypatch.setattr(dispatch, "CHOICE", "triton")
    outs, calls = [], []
    take_rows = torch.ops.tofu.take_rows
    monkeypatch.setattr(OPS, "take_rows", lambda *args: calls.append(1) or take_rows(*args))
    for loaded in (False, True):
        monkeypatch.setattr(dispatch, "LOADED", loaded)
        with apply_tofu(model, ratio=0.5, **options) as handle:
            for step in range(4):
                handle.step(step, 4)
                out = model(**inputs)[0]
        outs.append(out)
        assert bool(calls) == loaded
    close(outs[1], outs[0], 1e-4)


# Without a GPU the child process collects these, and this one what starts it.
for name, thing in list(globals().items()):
    if name.startswith("test_") and (name == "test_under_the_interpreter") == HERE:
        thing.__test__ = False
