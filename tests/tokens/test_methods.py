"""What each method promises by itself: its candidates, its limits, its options and its errors."""

import json
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tofu_diffusers.tokens.grid import TokenGrid
from tofu_diffusers.tokens.merge import MERGES, merge_tokens
from tofu_diffusers.tokens.methods import METHODS, Evidence, Method, make_method, matching, register
from tofu_diffusers.tokens.methods.tome import Tome
from tofu_diffusers.tokens.plan import Plan
from tofu_diffusers.tokens.sources import SOURCES
from tofu_diffusers.tokens.unmerges import UNMERGES

LAW = settings(max_examples=30, deadline=None, derandomize=True)
every_name = pytest.mark.parametrize("name", sorted(METHODS))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def evidence(grid: TokenGrid, remove: int, seed: int = 0, **more: object) -> Evidence:
    ages = torch.ones(2, grid.tokens)
    scores = normal(seed + 1, 2, grid.tokens).abs()
    by_source = dict.fromkeys(sorted(SOURCES), scores)
    given = {"step": torch.tensor(0.0), "age": ages, "importance": by_source, "seed": seed}
    return Evidence(normal(seed, 2, grid.tokens, 5), grid, remove, **{**given, **more})


def home(plan: Plan) -> Tensor:
    """For every token the position of the kept token of its group.  -> [B, N]"""
    return plan.kept.gather(1, plan.assign)


# --- the registry


def test_the_methods_of_the_design_are_registered() -> None:
    assert {"tome", "pitome", "importance", "random", "tofu"} <= set(METHODS)


@every_name
def test_options_are_frozen_and_survive_json(name: str) -> None:
    method = make_method(name)
    again = make_method(name, **json.loads(json.dumps(asdict(method))))
    assert again == method
    for field in fields(method):
        with pytest.raises(AttributeError):
            setattr(method, field.name, None)
    windowed = make_method(name, window=[1, 8, 8])
    assert make_method(name, **json.loads(json.dumps(asdict(windowed)))) == windowed


@every_name
def test_defaults_name_known_merges_and_unmerges(name: str) -> None:
    method = make_method(name)
    for depth in (0.0, 0.5, 1.0):
        assert method.merge(depth) in MERGES and method.unmerge(depth) in UNMERGES
    assert 0 < method.max_ratio <= 1


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("toem", {}, "unknown method 'toem' .did you mean 'tome'.*choose one of importance, pit"),
        ("tome", {"strid": 2}, "no option 'strid' .did you mean 'stride'.*it has stride, frame_s"),
        ("random", {"stride": 2}, "no option 'stride'; it has window"),
        ("tome", {"stride": 0}, "stride is 0"),
        ("tome", {"stride": (2, 2, 2)}, "give an int >= 1 or 2 of them"),
        ("tome", {"stride": 1}, "every token a destination"),
        ("tome", {"frame_stride": 1.5}, "frame_stride is 1.5"),
        ("tome", {"random": 1}, "random is 1; give True or False"),
        ("tome", {"stride": 4, "window": 3}, "smaller than the cell"),
        ("tome", {"window": "8"}, "window is '8'"),
        ("random", {"window": (0, 2, 2)}, "window is"),
        ("pitome", {"margin": 1.5}, "margin is 1.5; give a number, 0 to 1"),
        ("pitome", {"margin": float("nan")}, "margin is nan"),
        ("pitome", {"alpha": -1}, "alpha is -1"),
        ("pitome", {"protect": 3}, "protect is 3"),
        ("importance", {"source": "grad"}, "unknown source 'grad'; choose one of attention, cfg"),
        (
            "importance",
            {"source": {"change": 1, "key": 1}},
            "unknown source 'key'; choose one of attention",
        ),
        ("importance", {"source": {}}, "source is {}; name one, or several with their exponents"),
        ("importance", {"source": ["cfg"]}, "source is .'cfg'.; name one, or several with"),
        (
            "importance",
            {"source": {"cfg": 0}},
            "source 'cfg' has exponent 0; give a number above 0",
        ),
        (
            "importance",
            {"source": "gradient"},
            "'gradient' needs the file that calibrate_gradient wrote",
        ),
        (
            "importance",
            {"probe": "a file"},
            "'gradient' needs the file .* and the others need none",
        ),
        ("importance", {"age_exponent": -1}, "age_exponent is -1"),
        ("importance", {"age_exponent": "2"}, "age_exponent is '2'"),
        ("importance", {"max_age": 1}, "max_age is 1; give an int of 2 or more"),
        ("importance", {"max_age": 2.5}, "max_age is 2.5"),
        ("tofu", {"switch": 1.2}, "switch is 1.2; give a depth from 0 to 1"),
        ("tofu", {"switch": True}, "switch is True; give a depth from 0 to 1"),
        ("tofu", {"switch": "0.5"}, "switch is '0.5'; give a depth from 0 to 1"),
        (
            "tofu",
            {"switch": [0.2, None]},
            "switch is .0.2, None.; give a depth from 0 to 1, or several",
        ),
        ("tofu", {"switch": (0.2, float("nan"))}, "switch is .0.2, nan.; give a depth from 0 to 1"),
        (
            "tofu",
            {"switch": [0.5, 0.2]},
            "switch is .0.5, 0.2.; give depths that ascend, each once",
        ),
        ("tofu", {"switch": [0.5, 0.5]}, "give depths that ascend, each once"),
    ],
)
def test_bad_options_are_refused_with_a_way_out(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_method(name, **options)


def test_a_name_is_registered_once() -> None:
    class Other(Method):
        name = "tome"

    with pytest.raises(ValueError, match="'tome' is taken by Tome"):
        register(Other)


@every_name
def test_evidence_that_does_not_fit_is_refused(name: str) -> None:
    method = make_method(name)
    e = evidence(TokenGrid(4, 5), 3)
    with pytest.raises(ValueError, match=r"metric is \(2, 20, 5\) but the grid has 21"):
        method.plan(Evidence(e.metric, TokenGrid(3, 7), 3))
    for remove in (0, -1, 20, 21):
        with pytest.raises(ValueError, match=f"cannot remove {remove} of 20 tokens: 1 to"):
            method.plan(evidence(TokenGrid(4, 5), remove))
    with pytest.raises(ValueError, match="none can go"):
        method.plan(evidence(TokenGrid(1, 1), 1))


# --- candidates


def tile_of(grid: TokenGrid, window: tuple[int, int, int], position: int) -> set[int]:
    """The positions in a token's tile, from its definition, with Python's own arithmetic."""
    row, column = divmod(position % (grid.height * grid.width), grid.width)
    spans = []
    for place, side, tile in zip(
        (position // (grid.height * grid.width), row, column), grid.sides, window, strict=True
    ):
        tile = min(tile, side)
        first = min(place // tile * tile, side - tile)
        spans.append(range(first, first + tile))
    return {
        (f * grid.height + r) * grid.width + c
        for f in spans[0] for r in spans[1] for c in spans[2]
    }  # fmt: skip


windows = st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(2, 4))
grids = st.builds(TokenGrid, st.integers(2, 7), st.integers(2, 7), st.integers(1, 3))


@every_name
@LAW
@given(grids, windows, st.floats(0.1, 0.9), st.integers(0, 99))
def test_windowed_matches_lie_in_the_window(
    name: str, grid: TokenGrid, window: tuple[int, int, int], ratio: float, seed: int
) -> None:
    method = make_method(name, window=window)
    remove = int(grid.tokens * ratio * method.max_ratio)
    assume(0 < remove <= method.max_remove(grid))
    plan = method.plan(evidence(grid, remove, seed))
    matches = home(plan)
    for b in range(2):
        kept = set(plan.kept[b].tolist())
        for i in plan.removed()[b].tolist():
            tile = tile_of(grid, window, i)
            if name in ("importance", "random"):
                assert int(matches[b, i]) in tile or not tile & kept
            elif name in ("tome", "tofu"):
                # The method prefers pairs inside tiles, so one outside means there was none.
                cells = {
                    p for p in range(grid.tokens)
                    if p // grid.width % grid.height % 2 == 0 and p % grid.width % 2 == 0
                    and p // grid.width % grid.height < grid.height // 2 * 2
                    and p % grid.width < grid.width // 2 * 2
                }  # fmt: skip
                assert int(matches[b, i]) in (tile & cells or cells)


@pytest.mark.parametrize("name", ["importance", "random"])
@LAW
@given(grids, st.one_of(st.none(), windows), st.integers(1, 40), st.integers(0, 99))
def test_a_removed_token_goes_to_its_most_similar_kept_one(
    name: str, grid: TokenGrid, window: tuple[int, int, int] | None, count: int, seed: int
) -> None:
    assume(count < grid.tokens)  # with few kept, most tiles hold none of them
    e = evidence(grid, grid.tokens - count, seed)
    plan = make_method(name, window=window).plan(e)
    unit = torch.nn.functional.normalize(e.metric.double(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    matches = home(plan)
    for b in range(2):
        kept = set(plan.kept[b].tolist())
        for i in plan.removed()[b].tolist():
            near = kept & tile_of(grid, window, i) if window else kept
            if near:
                assert cosine[b, i, matches[b, i]] >= cosine[b, i, sorted(near)].max() - 1e-6
            else:  # the nearest kept token before it, or the first
                assert int(matches[b, i]) == max([k for k in kept if k < i], default=min(kept))


@every_name
def test_a_window_over_the_whole_grid_is_no_window(name: str) -> None:
    e = evidence(TokenGrid(5, 6, 2), 12)
    wide, none = make_method(name, window=(2, 9, 6)).plan(e), make_method(name).plan(e)
    assert torch.equal(wide.kept, none.kept) and torch.equal(wide.assign, none.assign)


@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_tiles_give_what_the_whole_grid_gives_inside_each(name: str) -> None:
    """Two frames that are told apart by the window merge as two images do."""
    e = evidence(TokenGrid(4, 6, 2), 2)
    tiles = make_method(name, window=(1, 4, 6))
    joint = home(tiles.plan(Evidence(e.metric, e.grid, 24 if name == "pitome" else 36)))
    for frame in range(2):
        part = e.metric[:, 24 * frame : 24 * (frame + 1)]
        if name == "tome":
            alone = home(make_method(name).plan(Evidence(part, TokenGrid(4, 6), 18)))
            assert torch.equal(joint[:, 24 * frame : 24 * (frame + 1)], alone + 24 * frame)
        else:
            assert (joint[:, 24 * frame : 24 * (frame + 1)] // 24 == frame).all()


# --- tome, tofu


@pytest.mark.parametrize("name", ["tome", "tofu"])
@LAW
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 3),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.booleans(),
)  # fmt: skip
def test_one_destination_in_every_whole_cell(
    name: str, h: int, w: int, frames: int, sy: int, sx: int, sf: int, drawn: bool
) -> None:
    assume(sy * sx * sf > 1)
    grid = TokenGrid(h, w, frames)
    method = make_method(name, stride=(sy, sx), frame_stride=sf, random=drawn)
    where = method.destinations(evidence(grid, 1)).tolist()
    cf, ch, cw = min(sf, frames), min(sy, h), min(sx, w)
    cells = [
        (p // (h * w) // cf, p // w % h // ch, p % w // cw) for p in where
    ]  # fmt: skip
    want = [(f, i, j) for f in range(frames // cf) for i in range(h // ch) for j in range(w // cw)]
    assert sorted(cells) == want and where == sorted(where)
    assert method.max_remove(grid) == grid.tokens - len(want)
    if not drawn:
        assert all(p // (h * w) % cf == p // w % h % ch == p % w % cw == 0 for p in where)


@pytest.mark.parametrize("options", [{}, {"window": 4}])
def test_what_the_grid_decides_is_made_once(monkeypatch, options: dict) -> None:
    method, constants, made = make_method("tome", **options), {}, []
    grids = [TokenGrid(9, 6), TokenGrid(6, 9), TokenGrid(9, 6)]
    for seed, grid in enumerate(grids):
        expected = method.plan(evidence(grid, 20, seed))
        with monkeypatch.context() as patch:
            patch.setattr(Tome, "destinations", seen(made, grid, Tome.destinations))
            patch.setattr(matching, "tiles_of", seen(made, grid, matching.tiles_of))
            plan = method.plan(evidence(grid, 20, seed, constants=constants))
        assert torch.equal(plan.kept, expected.kept) and torch.equal(plan.assign, expected.assign)
    each = 1 + bool(options)
    assert made == grids[:1] * each + grids[1:2] * each


def seen(made: list, grid: TokenGrid, function):
    def noted(*given):
        made.append(grid)
        return function(*given)

    return noted


def test_drawn_destinations_change_with_seed_and_step_only() -> None:
    method, grid = make_method("tome", random=True), TokenGrid(16, 16)
    first = method.destinations(evidence(grid, 9))
    assert torch.equal(first, method.destinations(evidence(grid, 50)))
    places = first // 16 % 2 * 2 + first % 2
    assert torch.bincount(places).tolist() == pytest.approx([16] * 4, abs=12)
    assert not torch.equal(first, method.destinations(evidence(grid, 9, seed=1)))
    assert not torch.equal(first, method.destinations(evidence(grid, 9, step=torch.tensor(1.0))))


def test_max_ratio_is_what_the_stride_allows() -> None:
    assert make_method("tome").max_ratio == 0.75
    assert make_method("tome", stride=(1, 3)).max_ratio == pytest.approx(2 / 3)
    assert make_method("tofu", stride=4, frame_stride=2).max_ratio == pytest.approx(31 / 32)


def test_tofu_prunes_before_the_switch_and_merges_from_it() -> None:
    method = make_method("tofu", switch=0.3)
    assert [method.merge(d) for d in (0.0, 0.29, 0.3, 1.0)] == ["prune", "prune", "mlerp", "mlerp"]
    assert [method.unmerge(d) for d in (0.0, 0.29, 0.3, 1.0)] == ["copy", "copy", "mlerp", "mlerp"]
    e = evidence(TokenGrid(5, 6), 11)
    tofu, tome = method.plan(e), make_method("tome").plan(e)
    assert torch.equal(tofu.kept, tome.kept) and torch.equal(tofu.assign, tome.assign)


@pytest.mark.parametrize(
    ("switch", "merges"),
    [
        ([], "pppp"),
        ([0.0], "mmmm"),
        ([0.3], "ppmm"),
        ([0.3, 0.5], "ppmp"),
        ((0.0, 0.2, 0.6), "mppm"),
        ([0.0, 1.0], "mmmp"),
    ],
)
def test_tofu_changes_its_merge_at_every_switch(switch: list, merges: str) -> None:
    method = make_method("tofu", switch=switch)
    assert "".join(method.merge(d)[0] for d in (0.0, 0.29, 0.3, 1.0)) == merges
    assert [method.unmerge(d) for d in (0.0, 1.0)] == [
        "mlerp" if merge == "m" else "copy" for merge in (merges[0], merges[-1])
    ]
    assert make_method("tofu", **json.loads(json.dumps(asdict(method)))) == method


# --- pitome


def test_pitome_keeps_isolated_tokens_and_merges_look_alikes() -> None:
    e = evidence(TokenGrid(4, 4), 4)
    x = e.metric.clone()
    alike = torch.tensor([0, 3, 5, 6, 9, 10, 12, 15])
    x[:, alike] = x[:, :1] + 0.01 * normal(3, 2, 8, 5)
    plan = make_method("pitome").plan(Evidence(x, e.grid, 4))
    for b in range(2):
        assert set(plan.removed()[b].tolist()) <= set(alike.tolist())
        assert set(home(plan)[b][plan.removed()[b]].tolist()) <= set(alike.tolist())


def test_pitome_margin_falls_with_depth() -> None:
    """With the margin at 0, dissimilar tokens count too, and the ranking is another one."""
    e = evidence(TokenGrid(6, 6), 9)
    deep = Evidence(e.metric, e.grid, 9, depth=1.0)
    first, last = make_method("pitome").plan(e), make_method("pitome").plan(deep)
    assert not torch.equal(first.kept, last.kept)
    flat = make_method("pitome", margin=0.0).plan(e)
    assert torch.equal(flat.kept, last.kept)


# --- random


def test_random_keeps_one_set_for_the_batch_new_at_every_step() -> None:
    method, grid = make_method("random"), TokenGrid(8, 8)
    plan = method.plan(evidence(grid, 32))
    assert torch.equal(plan.kept[0], plan.kept[1])
    kept = torch.zeros(64)
    for step in range(200):
        kept += method.plan(evidence(grid, 32, step=torch.tensor(float(step)))).is_kept()[0]
    assert kept.min() > 60 and kept.max() < 140  # 100 expected, deviation 7
    assert not torch.equal(plan.kept, method.plan(evidence(grid, 32, seed=1)).kept)


# --- importance


def kept_by(method: Method, scores: list[float], ages: list[float], count: int) -> list[int]:
    grid = TokenGrid(1, len(scores))
    e = Evidence(
        normal(0, 1, len(scores), 3), grid, len(scores) - count,
        age=torch.tensor([ages]), importance=dict.fromkeys(sorted(SOURCES), torch.tensor([scores])),
    )  # fmt: skip
    return method.plan(e).kept[0].tolist()


def test_importance_keeps_the_highest_score_times_age() -> None:
    scores, ages = [5.0, 1.0, 3.0, 2.0], [1.0, 3.0, 1.0, 2.0]
    assert kept_by(make_method("importance", age_exponent=0), scores, ages, 2) == [0, 2]
    assert kept_by(make_method("importance", age_exponent=1), scores, ages, 2) == [0, 3]
    assert kept_by(make_method("importance"), scores, ages, 2) == [1, 3]  # 5, 9, 3, 8
    assert kept_by(make_method("importance", source="cfg"), scores, ages, 2) == [0, 2]


def test_several_sources_multiply() -> None:
    change, cfg = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[9.0, 4.0, 1.0, 0.0]])
    grid = TokenGrid(1, 4)
    e = Evidence(
        normal(0, 1, 4, 3), grid, 3, age=torch.ones(1, 4), importance={"change": change, "cfg": cfg}
    )
    for powers, kept in (
        ({"change": 1, "cfg": 1}, 0),  # 9, 8, 3, 0
        ({"change": 1, "cfg": 0.5}, 1),  # 3, 4, 3, 0
        ({"change": 3, "cfg": 0.5}, 2),  # 3, 16, 27, 0
        ({"change": 1}, 3),
    ):
        assert make_method("importance", source=powers).plan(e).kept.tolist() == [[kept]]
    # Scores too small for their product to be a number.
    tiny = {source: score * 1e-30 for source, score in e.importance.items()}
    small = Evidence(e.metric, grid, 3, age=e.age, importance=tiny)
    assert make_method("importance", source={"change": 1, "cfg": 1}).plan(small).kept.tolist() == [
        [0]
    ]


def test_importance_breaks_ties_by_position() -> None:
    assert kept_by(make_method("importance"), [1.0] * 40, [1.0] * 40, 7) == list(range(7))


def test_warmup_follows_the_source() -> None:
    sources = ("change", "cfg", "attention", "key_norm", {"cfg": 1, "attention": 2})
    assert [make_method("importance", source=s).warmup for s in sources] == [2, 1, 0, 0, 1]
    assert make_method("importance", source="gradient", probe="a file").warmup == 0
    assert all(
        make_method(n).sources == () and make_method(n).warmup == 0
        for n in ("tome", "pitome", "random", "tofu")
    )


def test_importance_without_its_evidence_is_refused() -> None:
    e = evidence(TokenGrid(4, 4), 4)
    with pytest.raises(
        ValueError, match=r"needs Evidence.importance of 'change'.*2 unreduced steps"
    ):
        make_method("importance").plan(Evidence(e.metric, e.grid, 4, age=e.age))
    with pytest.raises(ValueError, match=r"needs Evidence.age"):
        make_method("importance").plan(Evidence(e.metric, e.grid, 4, importance=e.importance))
    plain = make_method("importance", age_exponent=0)
    plain.plan(Evidence(e.metric, e.grid, 4, importance=e.importance)).check()


@pytest.mark.parametrize("enemy", ["newest", "one end", "noise", "flat"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(2, 6), st.integers(2, 29), st.integers(0, 3), st.integers(0, 99))
def test_no_token_waits_longer_than_max_age(
    enemy: str, max_age: int, tokens: int, spare: int, seed: int
) -> None:
    """Forty steps against scores that always favour the tokens that need it least."""
    method, grid = make_method("importance", max_age=max_age), TokenGrid(1, tokens)
    most = method.max_remove(grid)
    assert tokens - most == -(-tokens // max_age)  # no fewer could serve everyone in time
    remove = max(1, most - spare)
    assume(most > 0)
    age = torch.ones(1, tokens)
    for step in range(40):
        score = {
            "newest": 1e6 ** (1 - age / max_age),
            "one end": torch.arange(tokens)[None] ** 4.0,
            "noise": normal(seed + step, 1, tokens).abs() ** 8,
            "flat": torch.ones(1, tokens),
        }[enemy]
        plan = method.plan(
            Evidence(normal(0, 1, tokens, 2), grid, remove, age=age, importance={"change": score})
        )
        assert age.max() <= max_age
        age = torch.where(plan.is_kept(), 1.0, age + 1)


def test_no_more_tokens_are_forced_than_must_be() -> None:
    """After a whole step, with a slot to spare, the plan is the scores' own."""
    method = make_method("importance", max_age=4, age_exponent=0)
    scores = [float(i) for i in range(16)]
    assert kept_by(method, scores, [1.0] * 16, 5) == [11, 12, 13, 14, 15]
    # With none to spare the oldest go, whatever the younger ones score; among them the score.
    assert kept_by(method, scores, [2.0] * 12 + [1.0] * 4, 4) == [8, 9, 10, 11]
    # With one to spare, fewer must.
    assert kept_by(method, scores, [2.0] * 12 + [1.0] * 4, 5) == [10, 11, 13, 14, 15]


def test_overdue_tokens_come_first() -> None:
    method = make_method("importance", max_age=3)
    ages = [1.0, 9.0, 1.0, 5.0, 1.0, 9.0]
    assert kept_by(method, [9.0, 0.0, 9.0, 0.0, 9.0, 0.0], ages, 2) == [1, 5]


def test_max_age_limits_the_ratio() -> None:
    method = make_method("importance", max_age=4)
    assert method.max_ratio == 0.75 and method.max_remove(TokenGrid(5, 5)) == 18
    assert make_method("importance").max_ratio == 1.0


def test_merges_name_their_mistakes() -> None:
    e = evidence(TokenGrid(4, 4), 4)
    plan = make_method("tome").plan(e)
    with pytest.raises(ValueError, match="unknown merge 'avg'; choose one of prune, mean, mlerp"):
        merge_tokens(e.metric, plan, "avg")
    with pytest.raises(ValueError, match=r"x is \(1, 16, 5\) but the plan is for \(2, 16\)"):
        merge_tokens(e.metric[:1], plan)
