"""The corrector of single tokens: what they lacked while they were not computed is given back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tofu_diffusers import TokenReduction, apply_tofu
from tofu_diffusers.steps.corrector import Corrector
from tofu_diffusers.steps.trajectory import CORRECTED_SHARE

STEPS = 6
TOKENS = {
    "ratio": 0.5,
    "scope": "block",
    "merge": "prune",
    "keys_values": "fresh",
    **tiny.SHORT,
    "share": "resolution",
}
BUILDS = {
    "unet": tiny.tiny_sd,
    "sdxl": tiny.tiny_sdxl,  # no attention on its finest level
    "sd3": tiny.tiny_sd3,
    "flux": tiny.tiny_flux,
    "wan": tiny.tiny_wan,
    "pixart": tiny.tiny_pixart,
}


@given(
    st.lists(st.floats(0.1, 3.0), min_size=4, max_size=12),
    st.integers(0, 2**31),
    st.sampled_from([1, 2]),
)
def test_what_a_token_lacked_lies_between_the_steps_that_computed_it(sizes, seed, calls):
    """Half of it: the sum of moves times predictions ends halfway to what it would be with every token's
    interpolated in between, but for what the last step computes."""
    count, tokens = len(sizes), 7
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(calls, count, 2, 3, 1, 1, tokens, generator=draw, dtype=torch.float64)
    computed = torch.rand(count, 2, 1, 1, 1, tokens, generator=draw) < 0.5
    computed[0] = True
    corrector = Corrector()
    corrector.begin(sizes)
    total, expected = (torch.zeros(made.shape[:1] + made.shape[2:]).double() for _ in range(2))
    for step, move in enumerate(sizes):
        mask = None if bool(computed[step].all()) else computed[step]
        for call in range(calls):
            at = torch.tensor(float(step))
            total[call] += move * corrector.apply(str(call), made[call, step], mask, at)
    for row in range(2):
        for token in range(tokens):
            runs = [step for step in range(count) if computed[step, row, ..., token]]
            for step, move in enumerate(sizes):
                before = max(run for run in runs if run <= step)
                after = min((run for run in runs if run >= step), default=count)
                wanted = made[:, step, row, ..., token]
                if step not in runs and after < count - 1:
                    ends = (made[:, run, row, ..., token] for run in (before, after))
                    between = torch.lerp(*ends, (step - before) / (after - before))
                    wanted = torch.lerp(wanted, between, CORRECTED_SHARE)
                expected[:, row, ..., token] += move * wanted
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)


KINDS = [("importance", "block"), ("random", "block"), ("random", "attention")]


@pytest.mark.parametrize(
    ("family", "method", "scope"),
    [(family, *kind) for family in BUILDS for kind in KINDS[: 1 if family == "sdxl" else None]],
)
def test_it_differs_from_taylor_where_a_token_is_computed_again(family, method, scope):
    pipe = BUILDS[family]()
    made = {}
    for name, corrector in (("taylor", False), ("corrected", True)):
        options = {**TOKENS, "method": method, "scope": scope}
        options |= {"unmerge": "taylor", "corrector": corrector}
        with apply_tofu(pipe, **options) as handle:
            made[name] = tiny.generate(pipe, ["a cat", "a dog"], steps=STEPS)
            again = tiny.generate(pipe, ["a cat", "a dog"], steps=STEPS)
            assert torch.equal(again, made[name])
            summary = handle.summary()
            made[f"{name} bytes"], text = summary.cache_bytes, str(summary)
            assert " taylor " in text and (", corrector" in text) == corrector
        # Only the last step is reduced: no token is computed after it.
        with apply_tofu(pipe, **options | {"warmup_steps": STEPS - 1}):
            made[f"{name} last"] = tiny.generate(pipe, steps=STEPS)
        with apply_tofu(pipe, **options | {"ratio": 0.0}):
            made[f"{name} none"] = tiny.generate(pipe, steps=STEPS)
    assert made["corrected"].isfinite().all()
    assert not torch.equal(made["taylor"], made["corrected"])
    assert made["taylor bytes"] < made["corrected bytes"]
    assert torch.equal(made["taylor last"], made["corrected last"])
    assert torch.equal(made["corrected none"], tiny.generate(pipe, steps=STEPS))


@pytest.mark.parametrize("family", BUILDS)
def test_a_token_is_corrected_where_it_stands(family, monkeypatch):
    """On a grid that is no square: what is said to be computed are the places of the kept tokens."""
    pipe, seen = BUILDS[family](), []
    inner = Corrector.apply

    def noted(self, condition, prediction, computed, step):
        (generation,) = {id(each): each for _, each in handle._generations}.values()
        level = generation.runtime._finest
        assert level == (1 if family == "sdxl" else 0)
        grid, plan_cache = (
            generation.runtime.call.grids[level],
            generation.runtime.setup.sites[0].plan_cache,
        )
        if computed is None:
            assert plan_cache.kept() == []
        else:
            (kept,) = plan_cache.kept()
            rows, columns = prediction.shape[3:]
            sides = (
                (1, 1, grid.tokens)
                if generation.runtime.setup.family.latents_are_tokens
                else grid.sides
            )
            assert rows % sides[1] == 0 and columns % sides[2] == 0
            # Of every token the first place of its patch.
            first = computed[..., :: rows // sides[1], :: columns // sides[2]]
            found = [row.flatten().nonzero().flatten().tolist() for row in first]
            assert found == kept.tolist() * (len(found) // len(kept))
            assert int(computed.sum()) * grid.tokens == kept.shape[1] * computed.numel()
        seen.append((condition, computed is None))
        return inner(self, condition, prediction, computed, step)

    monkeypatch.setattr(Corrector, "apply", noted)
    size = {} if family == "wan" else {"height": 96, "width": 160}
    with apply_tofu(pipe, **TOKENS, method="random", unmerge="taylor", corrector=True) as handle:
        tiny.generate(pipe, ["a cat", "a dog"], steps=5, **size)
    calls = 2 if family == "wan" else 1
    whole = max(2, sum(each for _, each in seen) // calls)
    assert seen == [(str(call), step < whole) for step in range(5) for call in range(calls)]
    assert whole <= 3


def test_without_known_step_sizes_it_is_taylor():
    pipe = tiny.tiny_ddpm()
    made = []
    options = {**TOKENS, "keys_values": "dropped", "method": "random", "unmerge": "taylor"}
    for corrector in (False, True):
        with apply_tofu(pipe, **options, corrector=corrector):
            made.append(tiny.generate(pipe, steps=STEPS))
    assert torch.equal(*made)


def test_what_it_keeps_counts_against_the_limit():
    pipe = tiny.small_sd()
    options = {**TOKENS, "method": "random", "unmerge": "taylor", "corrector": True}
    with apply_tofu(pipe, **options) as handle:
        tiny.generate(pipe, steps=4)
        needed = handle.summary().cache_bytes
    with (
        apply_tofu(pipe, **options, memory_limit=0.999 * needed / 2**30),
        pytest.raises(MemoryError, match="memory_limit"),
    ):
        tiny.generate(pipe, steps=4)
    with apply_tofu(pipe, **options, memory_limit=1.001 * needed / 2**30):
        tiny.generate(pipe, steps=4)


def test_half_precision_is_summed_in_single():
    pipe = tiny.small_sd().to(torch.bfloat16)
    with apply_tofu(pipe, **TOKENS, method="random", unmerge="taylor", corrector=True) as handle:
        found = []
        (generation,) = {id(each): each for _, each in handle._generations}.values()

        def note(*_):
            found.append(generation.runtime.caches.corrector.states["0"].integrated.dtype)

        pipe.unet.register_forward_hook(note)
        out = tiny.generate(pipe, steps=4)
    assert set(found) == {torch.float32} and out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scope": "block", "merge": "mlerp"}, "unmerge 'taylor' needs merge 'prune'"),
        ({"merge": "mean", "unmerge": "copy"}, "corrector True needs merge 'prune'"),
        ({"method": "tome", "unmerge": "copy"}, "the own one of method 'tome'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TokenReduction(**{"method": "random", "unmerge": "taylor", "corrector": True} | options)
