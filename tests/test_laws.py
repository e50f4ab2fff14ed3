"""What holds for every method, merge and unmerge: the registries are the list of cases.

A method that is registered is tested here without being named. Grids are odd, non-square, one row
high or three-dimensional; dtypes are the four float ones.
"""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plans import plan_keeping
from tofu_diffusers.tokens.grid import TokenGrid
from tofu_diffusers.tokens.merge import EPS, MERGES, merge_tokens
from tofu_diffusers.tokens.methods import METHODS, Evidence, Method, make_method
from tofu_diffusers.tokens.plan import Plan
from tofu_diffusers.tokens.sources import SOURCES
from tofu_diffusers.tokens.unmerge import unmerge_tokens
from tofu_diffusers.tokens.unmerges import UNMERGES
from tofu_diffusers.tokens.update_cache import UpdateCache

LAW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
# Options other than the defaults, for methods that have the field.
OPTIONS = (
    {},
    {"window": (1, 3, 2)},
    {"random": True, "frame_stride": 2},
    {"stride": (3, 2), "window": 3},
    {"max_age": 4},
    {"protect": False},
    {"source": "cfg"},
    {"source": {"change": 1, "key_norm": 0.5}},
)


def accepted(name: str, options: dict) -> bool:
    return set(options) <= {field.name for field in fields(METHODS[name])}


CASES = [(name, o) for name in sorted(METHODS) for o in OPTIONS if accepted(name, o)]
every_method = pytest.mark.parametrize(
    "method", [make_method(n, **o) for n, o in CASES], ids=[f"{n}-{o or ''}" for n, o in CASES]
)

grids = st.one_of(
    st.builds(TokenGrid, st.integers(1, 7), st.integers(1, 7)),
    st.builds(TokenGrid, st.integers(1, 4), st.integers(1, 5), st.integers(2, 3)),
).filter(lambda grid: grid.tokens > 1)
seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def evidence(grid: TokenGrid, remove: int, metric: Tensor, seed: int = 0) -> Evidence:
    """Evidence that satisfies every method: ages up to 3, some importance."""
    g = torch.Generator().manual_seed(seed)
    rows = metric.shape[:2]
    return Evidence(
        metric,
        grid,
        remove,
        depth=0.5,
        step=torch.tensor(3.0),
        age=torch.randint(1, 4, rows, generator=g).float(),
        importance={source: torch.rand(rows, generator=g) for source in sorted(SOURCES)},
        seed=seed,
    )


def removable(method: Method, grid: TokenGrid, ratio: float) -> int:
    """int(N * ratio) for a share of what the method can reach, if this grid allows it."""
    remove = int(grid.tokens * ratio * method.max_ratio)
    assume(0 < remove <= method.max_remove(grid))
    return remove


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of any shape, groups of any size and no regard to similarity."""
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(2, 20))
    slots, g = draw(st.integers(1, tokens)), torch.Generator().manual_seed(draw(seeds))
    order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(batch)])
    kept = order[:, :slots].sort(dim=1).values
    return plan_keeping(kept, kept.gather(1, torch.randint(slots, (batch, tokens), generator=g)))


def assert_rows_close(got: Tensor, want: Tensor, tol: float) -> None:
    """Rows agree up to a share of their own length."""
    assert got.dtype == want.dtype and got.shape == want.shape
    off = (got.double() - want.double()).norm(dim=-1)
    assert (off <= tol * want.double().norm(dim=-1) + 1e-30).all(), off.max()


# --- plans


@every_method
@LAW
@given(grids, st.floats(0.05, 0.999), st.integers(1, 2), st.sampled_from(DTYPES), seeds)
def test_kept_and_removed_partition_the_tokens(
    method: Method, grid: TokenGrid, ratio: float, batch: int, dtype: torch.dtype, seed: int
) -> None:
    remove = removable(method, grid, ratio)
    x = normal(seed, batch, grid.tokens, 3, dtype=dtype)
    plan = method.plan(evidence(grid, remove, x, seed))
    plan.check()
    assert plan.kept.shape == (batch, grid.tokens - remove)
    together = torch.cat([plan.kept, plan.removed()], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(grid.tokens).expand(batch, -1))
    assert (plan.sizes().sum(dim=1) == grid.tokens).all() and (plan.sizes() >= 1).all()


@every_method
@LAW
@given(grids, st.data())
def test_max_remove_is_reachable_and_the_next_is_refused(
    method: Method, grid: TokenGrid, data: st.DataObject
) -> None:
    most = method.max_remove(grid)
    x = normal(0, 1, grid.tokens, 3)
    if most > 0:
        method.plan(evidence(grid, most, x)).check()
    with pytest.raises(ValueError, match=rf"cannot remove {most + 1} of {grid.tokens}"):
        method.plan(evidence(grid, most + 1, x))


@every_method
@LAW
@given(grids, st.floats(0.05, 0.999), seeds)
def test_same_evidence_same_plan_and_no_global_randomness(
    method: Method, grid: TokenGrid, ratio: float, seed: int
) -> None:
    remove = removable(method, grid, ratio)
    x = normal(seed, 2, grid.tokens, 3)
    state = torch.get_rng_state()
    first = method.plan(evidence(grid, remove, x, seed))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = method.plan(evidence(grid, remove, x.clone(), seed))
    assert torch.equal(first.kept, again.kept) and torch.equal(first.assign, again.assign)


@every_method
@LAW
@given(grids, st.floats(0.05, 0.999), st.integers(2, 4), seeds)
def test_a_plan_does_not_depend_on_its_row_or_neighbours(
    method: Method, grid: TokenGrid, ratio: float, batch: int, seed: int
) -> None:
    remove = removable(method, grid, ratio)
    # Few distinct values, so that there are ties for a neighbour to tip.
    x = normal(seed, batch, grid.tokens, 2).round()
    e = evidence(grid, remove, x, seed)
    together = method.plan(e)
    for b in range(batch):
        alone = method.plan(
            Evidence(
                x[b : b + 1],
                grid,
                remove,
                e.depth,
                e.step,
                e.age[b : b + 1],
                {source: score[b : b + 1] for source, score in e.importance.items()},
                e.seed,
            )
        )
        assert torch.equal(alone.kept[0], together.kept[b])
        assert torch.equal(alone.assign[0], together.assign[b])


@every_method
@LAW
@given(grids, st.floats(0.05, 0.999), seeds)
def test_a_plan_depends_on_directions_not_on_lengths(
    method: Method, grid: TokenGrid, ratio: float, seed: int
) -> None:
    """Lengths whose squares are no float32 numbers included; powers of two change no rounding."""
    remove = removable(method, grid, ratio)
    x = normal(seed, 1, grid.tokens, 3)
    powers = torch.arange(grid.tokens)[None, :, None] * 37 % 180 - 90.0
    plan = method.plan(evidence(grid, remove, x, seed))
    scaled = method.plan(evidence(grid, remove, x * torch.exp2(powers), seed))
    assert torch.equal(plan.kept, scaled.kept) and torch.equal(plan.assign, scaled.assign)


@every_method
def test_equal_tokens_are_told_apart_by_position(method: Method) -> None:
    grid = TokenGrid(5, 6)
    remove = min(9, method.max_remove(grid))
    e = evidence(grid, remove, torch.ones(1, 30, 4))
    even = dict.fromkeys(e.importance, torch.ones(1, 30))
    e = Evidence(e.metric, grid, remove, 0.5, e.step, torch.ones(1, 30), even)
    plan = method.plan(e)
    same = method.plan(Evidence(e.metric * 2, grid, remove, 0.5, e.step, e.age, e.importance))
    assert torch.equal(plan.kept, same.kept) and torch.equal(plan.assign, same.assign)


@every_method
def test_meta_tensors_give_the_same_shapes(method: Method) -> None:
    for grid in (TokenGrid(5, 6), TokenGrid(3, 4, 2), TokenGrid(64, 48)):
        remove = min(grid.tokens // 3, method.max_remove(grid))
        e = evidence(grid, remove, torch.zeros(2, grid.tokens, 4))
        metric, step, age = (t.to("meta") for t in (e.metric, e.step, e.age))
        importance = {source: score.to("meta") for source, score in e.importance.items()}
        plan = method.plan(Evidence(metric, grid, remove, 0.5, step, age, importance))
        assert plan.kept.shape == (2, grid.tokens - remove) and plan.kept.dtype == torch.int64
        assert plan.assign.shape == (2, grid.tokens) and plan.assign.device.type == "meta"
        assert plan.removed().shape == (2, remove)


@every_method
def test_compiled_without_a_graph_break_gives_the_same_plan(method: Method) -> None:
    torch._dynamo.reset()
    grid = TokenGrid(5, 6)
    remove = min(10, method.max_remove(grid))

    def run(x: Tensor, step: Tensor, age: Tensor, importance: dict[str, Tensor], seed: int) -> Plan:
        return method.plan(Evidence(x, grid, remove, 0.5, step, age, importance, seed))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in (0, 7, 2**40):
        e = evidence(grid, remove, normal(seed % 99, 2, 30, 4), seed % 99)
        arguments = (e.metric, e.step, e.age, e.importance, seed)
        got, want = compiled(*arguments), run(*arguments)
        assert isinstance(got, Plan)
        assert torch.equal(got.kept, want.kept) and torch.equal(got.assign, want.assign)


class OperationNames(TorchDispatchMode):
    """Collects what actually runs, so that a host sync cannot hide behind the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "cumsum" and args[0].is_floating_point():
            name = "cumsum of floats"
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            name = "index by a mask"
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


# Data-dependent shapes, host syncs, and what torch documents to raise on CUDA under
# use_deterministic_algorithms(True), or once did.
FORBIDDEN = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2",
    "index by a mask", "cumsum of floats", "scatter_add", "scatter_add_", "put_", "kthvalue",
    "median", "bincount", "histc", "index_reduce", "index_reduce_", "rand", "randn", "randint",
    "randperm", "uniform_", "normal_", "bernoulli_", "multinomial",
}  # fmt: skip


@every_method
def test_nothing_data_dependent_or_nondeterministic_runs(method: Method) -> None:
    grid = TokenGrid(5, 6)
    remove = min(10, method.max_remove(grid))
    e = evidence(grid, remove, normal(0, 2, 30, 4))
    torch.use_deterministic_algorithms(True)
    try:
        with OperationNames() as ops:
            plan = method.plan(e)
            for merge in MERGES:
                y = merge_tokens(e.metric, plan, merge)
                for how in UNMERGES:
                    cache = None
                    if UNMERGES[how].cached:
                        cache = UpdateCache.empty(
                            UNMERGES[how].cache, 2, 30, 4, torch.float32, "cpu"
                        )
                        cache.record(e.metric, torch.tensor(0.0))
                    unmerge_tokens(
                        y, plan, how, x=e.metric, merged=y, cache=cache, step=e.step, max_age=9
                    )
            plan.removed(), plan.sizes(), plan.repeat(2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "max" in ops.seen and not ops.seen & FORBIDDEN


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_method
def test_the_same_plan_on_the_gpu_with_deterministic_algorithms(method: Method) -> None:
    grid = TokenGrid(9, 8)
    remove = min(24, method.max_remove(grid))
    # Double precision: a near tie may fall otherwise on a device that rounds otherwise.
    e = evidence(grid, remove, normal(0, 2, 72, 4, dtype=torch.float64))
    tensors = [t.cuda() for t in (e.metric, e.step, e.age, e.importance)]
    torch.use_deterministic_algorithms(True)
    try:
        there = method.plan(Evidence(tensors[0], grid, remove, 0.5, *tensors[1:], e.seed))
        here = method.plan(e)
        assert torch.equal(there.kept.cpu(), here.kept)
        assert torch.equal(there.assign.cpu(), here.assign)
        for merge in MERGES:
            got, want = merge_tokens(tensors[0], there, merge), merge_tokens(e.metric, here, merge)
            torch.testing.assert_close(got.cpu(), want)
    finally:
        torch.use_deterministic_algorithms(False)


# --- merges and unmerges


@pytest.mark.parametrize("merge", sorted(MERGES))
@LAW
@given(plans(), st.sampled_from(DTYPES), seeds)
def test_reducing_a_copy_gives_the_update_back(
    merge: str, plan: Plan, dtype: torch.dtype, seed: int
) -> None:
    y = normal(seed, *plan.kept.shape, 5, dtype=dtype)
    back = merge_tokens(unmerge_tokens(y, plan, "copy"), plan, merge)
    if merge == "prune":
        assert torch.equal(back, y)
    assert_rows_close(back, y, TOLERANCE[dtype])


@pytest.mark.parametrize("how", UNMERGES)
@LAW
@given(plans(), st.sampled_from(DTYPES), seeds)
def test_pruning_any_unmerged_update_gives_it_back(
    how: str, plan: Plan, dtype: torch.dtype, seed: int
) -> None:
    y = normal(seed, *plan.kept.shape, 4, dtype=dtype)
    x = normal(seed + 1, *plan.assign.shape, 4, dtype=dtype)
    cache = None
    if UNMERGES[how].cached:
        cache = UpdateCache.empty(UNMERGES[how].cache, *plan.assign.shape, 4, dtype, "cpu")
        cache.record(normal(seed + 2, *x.shape, dtype=dtype), torch.tensor(0.0))
        cache.record(normal(seed + 3, *x.shape, dtype=dtype), torch.tensor(1.0))
    full = unmerge_tokens(
        y,
        plan,
        how,
        x=x,
        merged=merge_tokens(x, plan, "prune"),
        cache=cache,
        step=torch.tensor(3.0),
    )
    assert full.dtype == dtype
    if how == "mlerp":
        assert_rows_close(merge_tokens(full, plan, "prune"), y, TOLERANCE[dtype])
    else:
        assert torch.equal(merge_tokens(full, plan, "prune"), y)


@LAW
@given(plans(), st.sampled_from(DTYPES), seeds)
def test_mlerp_of_an_mlerp_unmerged_update_gives_it_back(
    plan: Plan, dtype: torch.dtype, seed: int
) -> None:
    x = normal(seed, *plan.assign.shape, 4, dtype=dtype)
    y = normal(seed + 1, *plan.kept.shape, 4, dtype=dtype)
    full = unmerge_tokens(y, plan, "mlerp", x=x, merged=merge_tokens(x, plan, "mlerp"))
    assert_rows_close(merge_tokens(full, plan, "mlerp"), y, 3 * TOLERANCE[dtype])


@LAW
@given(plans(), st.sampled_from(DTYPES), st.sampled_from([1e-3, 1.0, 1e3]), seeds)
def test_mlerp_keeps_the_largest_norm_of_the_group(
    plan: Plan, dtype: torch.dtype, size: float, seed: int
) -> None:
    x = normal(seed, *plan.assign.shape, 5, dtype=dtype) * size
    norms = x.double().norm(dim=-1)
    means = merge_tokens(x.double(), plan, "mean").norm(dim=-1)
    got = merge_tokens(x, plan, "mlerp").double().norm(dim=-1)
    for b, slot in torch.cartesian_prod(*map(torch.arange, plan.kept.shape)).tolist():
        largest = norms[b, plan.assign[b] == slot].max()
        if means[b, slot] > 2 * EPS * largest:
            assert math.isclose(got[b, slot], largest, rel_tol=TOLERANCE[dtype])


@pytest.mark.parametrize("merge", sorted(set(MERGES) - {"prune"}))
@LAW
@given(plans(), st.sampled_from(DTYPES), seeds)
def test_the_order_inside_a_group_only_changes_rounding(
    merge: str, plan: Plan, dtype: torch.dtype, seed: int
) -> None:
    x = normal(seed, *plan.assign.shape, 4, dtype=dtype) + 2  # no cancelling groups
    # Sorting shuffled tokens stably by group lists each group in a random order; unsorted, a
    # stable sort lists it in token order. Together: a permutation inside every group.
    g = torch.Generator().manual_seed(seed)
    shuffle = torch.stack([torch.randperm(x.shape[1], generator=g) for _ in range(x.shape[0])])
    there = shuffle.gather(1, plan.assign.gather(1, shuffle).argsort(dim=1, stable=True))
    here = plan.assign.argsort(dim=1, stable=True)
    source = torch.zeros_like(here).scatter(1, here, there)
    assert torch.equal(plan.assign.gather(1, source), plan.assign)
    mixed = x.gather(1, source[..., None].expand_as(x))
    assert_rows_close(
        merge_tokens(mixed, plan, merge), merge_tokens(x, plan, merge), TOLERANCE[dtype]
    )


@LAW
@given(plans(), st.sampled_from((torch.float32, torch.float64, torch.bfloat16)), seeds)
def test_mlerp_unmerge_inverts_the_merge_on_parallel_groups(
    plan: Plan, dtype: torch.dtype, seed: int
) -> None:
    """For non-negative multiples of one direction and a token-wise bias-free linear f."""
    direction = plan.broadcast(normal(seed, *plan.kept.shape, 4, dtype=torch.float64))
    multiple = normal(seed + 1, *plan.assign.shape, 1, dtype=torch.float64).clamp(min=0)
    weight = normal(seed + 2, 4, 4, dtype=torch.float64)
    x = (direction * multiple).to(dtype)
    y = merge_tokens(x, plan, "mlerp")
    update = (y.double() @ weight).to(dtype)
    want = (x.double() @ weight).to(dtype)
    full = unmerge_tokens(update, plan, "mlerp", x=x, merged=y)
    # In proportion to the largest of f in the group, not to what may cancel inside f.
    reach = plan.broadcast(y).double().norm(dim=-1) * weight.norm()
    assert ((full - want).double().norm(dim=-1) <= 2 * TOLERANCE[dtype] * reach + 1e-30).all()


def test_a_copy_does_not_invert_the_mlerp_merge() -> None:
    plan = plan_keeping(torch.tensor([[0]]), torch.tensor([[0, 0]]))
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    y = merge_tokens(x, plan, "mlerp")
    torch.testing.assert_close(unmerge_tokens(y, plan, "mlerp", x=x, merged=y), x)
    assert not torch.allclose(unmerge_tokens(y, plan, "copy"), x, rtol=0.5)


# --- hard numbers


def hard_tokens(kind: str, batch: int, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Finite tokens [B, N, 3] whose norms are representable and whose squares often are not."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, tokens, 3, generator=g, dtype=torch.float64) - 0.5
    info = torch.finfo(dtype)
    if kind == "opposed":
        return torch.ones_like(x).mul(torch.randint(0, 2, (batch, tokens, 1), generator=g) * 2 - 1)
    if kind == "mixed":
        share = torch.rand(batch, tokens, 1, generator=g, dtype=torch.float64)
        low, high = math.log2(info.tiny), math.log2(info.max)
        return x * torch.exp2(low + (high - low) * share)
    # 1.1 / 2 * sqrt(3) < 1: the largest norm is just representable.
    return 1.1 * x * {"zero": 0.0, "huge": info.max, "tiny": info.tiny}[kind]


KINDS = ("zero", "opposed", "huge", "tiny", "mixed")


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_hard_tokens_are_plans(method: Method, kind: str) -> None:
    for dtype in DTYPES:
        for grid in (TokenGrid(5, 6), TokenGrid(1, 9), TokenGrid(3, 3, 3)):
            x = hard_tokens(kind, 2, grid.tokens, dtype, 1).to(dtype)
            assert x.isfinite().all()
            remove = min(grid.tokens // 3, method.max_remove(grid))
            plan = method.plan(evidence(grid, remove, x))
            plan.check()


@pytest.mark.parametrize("kind", KINDS)
@LAW
@given(plans(), st.sampled_from(DTYPES), st.integers(0, 99))
def test_finite_in_finite_out(kind: str, plan: Plan, dtype: torch.dtype, seed: int) -> None:
    x = hard_tokens(kind, *plan.assign.shape, dtype, seed).to(dtype)
    longest = x.double().norm(dim=-1).amax()
    for merge in MERGES:
        y = merge_tokens(x, plan, merge)
        assert y.isfinite().all(), merge
        assert y.double().norm(dim=-1).amax() <= longest * (1 + TOLERANCE[dtype])
        for how in UNMERGES:
            cache = None
            if UNMERGES[
                how
            ].cached:  # a sign that flips takes slopes and sums out of the dtype's range
                cache = UpdateCache.empty(UNMERGES[how].cache, *plan.assign.shape, 3, dtype, "cpu")
                cache.record(x, torch.tensor(0.0))
                cache.record(-x, torch.tensor(1.0))
            # Rescaling is finite where the rescaled norm is: at most sizes() times the update's.
            update = y / plan.sizes().amax() if how == "mlerp" else y
            for step in (3.0, 4.0):
                full = unmerge_tokens(
                    update, plan, how, x=x, merged=y, cache=cache, step=torch.tensor(step)
                )
                assert full.isfinite().all(), (merge, how, step)
                assert cache is None or cache.value.isfinite().all()
                assert cache is None or cache.slope is None or cache.slope.isfinite().all()
