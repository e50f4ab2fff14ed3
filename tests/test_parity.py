"""Parity with outside sources: the tomesd package, and PiToMe and MLERP from their formulas."""

import math
import random

import numpy as np
import pytest
import torch
from tomesd.merge import bipartite_soft_matching_random2d

from tofu_diffusers.tokens.grid import TokenGrid
from tofu_diffusers.tokens.merge import merge_tokens
from tofu_diffusers.tokens.methods import Evidence, make_method
from tofu_diffusers.tokens.plan import Plan
from tofu_diffusers.tokens.unmerge import unmerge_tokens


def tomesd_case(seed: int) -> bool:
    """One random image, stride and ratio: the same kept set, groups, merged values and unmerge.

    False where the draw says nothing: every token is a destination.
    """
    rng = random.Random(seed)
    sy, sx = rng.choice([(2, 2), (2, 2), (1, 2), (2, 1), (3, 2), (4, 4)])
    h, w = rng.randint(sy, 11), rng.randint(sx, 11)  # leftover rows and columns included
    n, cells = h * w, (h // sy) * (w // sx)
    if n == cells:
        return False
    remove = rng.randint(1, n - cells)
    x = torch.randn(2, n, rng.randint(2, 9), dtype=torch.float64).add(rng.choice([0.0, 1.0]))
    merge, unmerge = bipartite_soft_matching_random2d(x, w, h, sx, sy, remove, no_rand=True)
    plan = make_method("tome", stride=(sy, sx)).plan(Evidence(x, TokenGrid(h, w), remove))
    plan.check()

    # tomesd orders its output as it likes; unmerging numbers tells where each token went.
    slots = torch.arange(n - remove, dtype=torch.float64).expand(2, -1)[..., None]
    went = unmerge(slots)[..., 0].long()
    theirs, ours = merge(x, mode="mean"), merge_tokens(x, plan, "mean")
    for b in range(2):
        destinations = {
            i * w + j for i in range(0, h // sy * sy, sy) for j in range(0, w // sx * sx, sx)
        }
        kept_of = {}
        for token, slot in enumerate(went[b].tolist()):
            alone = went[b].tolist().count(slot) == 1
            if alone or token in destinations:
                kept_of[slot] = token
        assert sorted(kept_of.values()) == plan.kept[b].tolist()
        home = [kept_of[slot] for slot in went[b].tolist()]
        assert home == plan.kept[b][plan.assign[b]].tolist()
        order = [slot for slot, _ in sorted(kept_of.items(), key=lambda item: item[1])]
        torch.testing.assert_close(ours[b], theirs[b][order], rtol=1e-12, atol=1e-12)
    back = unmerge_tokens(ours, plan, "copy")
    torch.testing.assert_close(back, unmerge(theirs), rtol=1e-12, atol=1e-12)
    return True


def test_tome_equals_tomesd() -> None:
    torch.manual_seed(0)
    assert sum(tomesd_case(seed) for seed in range(240)) >= 200


def pitome_by_hand(v: np.ndarray, k: int, margin: float, alpha: float) -> dict[int, int]:
    """One row of PiToMe, token by token from its formulas: {removed: match}."""
    n = len(v)
    unit = v / np.linalg.norm(v, axis=1, keepdims=True)
    cos = unit @ unit.T
    energy = []
    for i in range(n):
        pulls = [c if c >= margin else alpha * (math.exp(c - margin) - 1) for c in cos[i].tolist()]
        energy.append(sum(pulls) / n)
    order = sorted(range(n), key=lambda i: -energy[i])[: 2 * k]
    a, b = order[0::2], order[1::2]
    return {i: max(b, key=lambda j: cos[i, j]) for i in a}


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"margin": 0.5, "alpha": 0.3}])
def test_pitome_equals_its_formulas(depth: float, options: dict) -> None:
    rng = np.random.default_rng(int(10 * depth))
    for h, w in [(4, 4), (3, 7), (1, 9), (5, 6)]:
        n = h * w
        k = int(rng.integers(1, n // 2 + 1))
        # Clusters, so that similarities fall on both sides of the margin.
        v = rng.normal(size=(4, 6))[rng.integers(0, 4, size=(2, n))]
        v = v + 0.3 * rng.normal(size=v.shape)
        method = make_method("pitome", **options)
        plan = method.plan(Evidence(torch.tensor(v), TokenGrid(h, w), k, depth=depth))
        plan.check()
        margin = options.get("margin", 0.9) * (1 - depth)
        for b in range(2):
            match = pitome_by_hand(v[b], k, margin, options.get("alpha", 1.0))
            home = plan.kept[b][plan.assign[b]].tolist()
            assert plan.removed()[b].tolist() == sorted(match)
            assert home == [match.get(i, i) for i in range(n)]


def mlerp_by_hand(x: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    """Mean direction times the largest norm, group by group in float64."""
    out = []
    for group in groups:
        xbar = sum(x[i] for i in group) / len(group)
        longest = max(math.sqrt(float((x[i] ** 2).sum())) for i in group)
        out.append(xbar / math.sqrt(float((xbar**2).sum())) * longest)
    return np.stack(out)


@pytest.mark.parametrize(
    ("dtype", "tol"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 2e-6),
        (torch.float16, 2e-3),
        (torch.bfloat16, 1.6e-2),
    ],
)
def test_mlerp_and_mean_equal_their_formulas(dtype: torch.dtype, tol: float) -> None:
    g = torch.Generator().manual_seed(0)
    for n, k in [(7, 3), (12, 1), (15, 15), (20, 6)]:
        x = torch.randn(1, n, 5, generator=g).to(dtype)
        kept = torch.randperm(n, generator=g)[:k].sort().values[None]
        assign = torch.randint(k, (1, n), generator=g).scatter(1, kept, torch.arange(k)[None])
        plan = Plan(kept, assign)
        plan.check()
        groups = [[i for i in range(n) if assign[0, i] == slot] for slot in range(k)]
        exact = x[0].double().numpy()
        want = torch.tensor(mlerp_by_hand(exact, groups))
        got = merge_tokens(x, plan, "mlerp")
        assert got.dtype == dtype
        torch.testing.assert_close(got[0].double(), want, rtol=tol, atol=tol)
        means = torch.tensor(np.stack([exact[group].mean(axis=0) for group in groups]))
        torch.testing.assert_close(
            merge_tokens(x, plan, "mean")[0].double(), means, rtol=tol, atol=tol
        )


@pytest.mark.parametrize("merge", ["mean", "mlerp"])
def test_large_groups_are_averaged_in_float32(merge: str) -> None:
    """4,096 equal tokens of which one share is too small to be a float16 number."""
    plan = Plan(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 4096, dtype=torch.int64))
    x = torch.tensor([1e-4, -3e-4], dtype=torch.float16).expand(1, 4096, 2)
    torch.testing.assert_close(merge_tokens(x, plan, merge), x[:, :1], rtol=1e-3, atol=0)
