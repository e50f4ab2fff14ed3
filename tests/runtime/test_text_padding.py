"""Text padding that a mask hides leaves the sequence, and nothing else changes.

A family that says where its texts and masks stand is tested by that alone.
"""

import copy
import warnings
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests import tiny
from tests.denoisers import DENOISERS
from tests.families.test_classes import output_of
from tofu_diffusers import FAMILIES, StepSkipping, TokenReduction, apply_tofu
from tofu_diffusers.families import known_family
from tofu_diffusers.runtime.text_padding import Places, TextPadding

CLASSES = sorted(name for family in FAMILIES.values() if family.texts for name in family.classes)
VIDEO15 = "HunyuanVideo15Transformer3DModel"
PAD = 3
STAYS = "drop_text_padding leaves padding"


def put(x, dim, place, new):
    """Rows with others at a place."""
    before, behind = x.tensor_split([place], dim)
    return torch.cat([before, new, behind], dim)


def with_padding(family, inputs, at=None, amount=PAD):
    """The arguments with noise under the mask of every text, behind it or at a position."""
    inputs, noise = dict(inputs), torch.Generator().manual_seed(7)

    for text in family.texts:
        states = inputs.get(text.states)
        if states is None or text.mask is None:
            continue
        place = states.shape[1] if at is None else at
        new = torch.randn(len(states), amount, *states.shape[2:], generator=noise)
        inputs[text.states] = put(states, 1, place, new)
        mask = inputs[text.mask]
        # As Chroma's denoiser takes it: of numbers, it would hide nothing.
        mask = mask.bool() if mask.is_floating_point() else mask
        inputs[text.mask] = put(mask, 1, place, mask.new_zeros(len(mask), amount))
        if text.ids is not None:
            ids = inputs[text.ids]
            inputs[text.ids] = put(ids, 0, place, ids.new_zeros(amount, ids.shape[-1]))
    return inputs


def built(name):
    described = DENOISERS[name]
    model = tiny.randomise(described.build())
    return model, known_family(model), described.arguments()


class Unknown(torch.nn.Module):
    def forward(self, hidden_states, timestep):
        return hidden_states


def text_of(handle):
    return handle._all[0].runtime.text


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_what_goes_changes_nothing(name):
    """In a batch of texts of different length, wherever their padding stands."""
    model, family, bare = built(name)
    for at in (None, 0, 1):
        inputs = with_padding(family, bare, at)
        expected = output_of(model, inputs)
        with (
            warnings.catch_warnings(record=True) as said,
            apply_tofu(model, drop_text_padding=True) as handle,
        ):
            warnings.simplefilter("always")
            found = output_of(model, inputs)
            ((tokens, dropped),) = text_of(handle).counts.values()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(output_of(model, inputs), expected)
        goes = any(each.gaps for each in family.texts) or at is None
        padded = PAD * sum(each.mask is not None for each in family.texts)
        assert padded * goes <= dropped < tokens
        assert any(STAYS in str(each.message) for each in said) == (not goes)


@torch.no_grad()
def test_counted_are_the_flops_of_the_text_that_is_left():
    model, family, bare = built("ChromaTransformer2DModel")
    bare = with_padding(family, bare, amount=0)
    # One token of its text is hidden in both rows.
    bare["attention_mask"] = bare["attention_mask"].index_fill(1, torch.tensor([6]), True)
    counts = []
    for inputs, options in (
        (with_padding(family, bare), {"drop_text_padding": True}),
        (with_padding(family, bare), {}),
        (bare, {}),
    ):
        with apply_tofu(model, ratio=0, **options) as handle:
            output_of(model, inputs)
            summary = handle.summary()
            counts.append((summary.flops_unreduced, summary.flops_run))
            said = f"dropped {PAD} of 10 text tokens" in str(summary)
            assert said == bool(options)
    (whole, run), padded, left = counts
    assert padded == (whole, whole) and left == (run, run) and run < whole


TOKENS = TokenReduction(0.5, "random", warmup_steps=1)
STEPS = StepSkipping(1.3, rule="even")


@pytest.mark.filterwarnings("ignore:4 steps")
@pytest.mark.parametrize(
    ("name", "configs"),
    [
        ("HunyuanVideoTransformer3DModel", [TOKENS, STEPS]),
        ("Krea2Transformer2DModel", [TOKENS]),
        ("PRXTransformer2DModel", [STEPS]),
    ],
)
@torch.no_grad()
def test_with_fewer_tokens_and_steps_and_two_calls_of_guidance(name, configs, monkeypatch):
    """Each call has its own text, whose mask is read once in a generation."""
    model, family, bare = built(name)
    calls = [with_padding(family, bare), with_padding(family, bare, amount=2 * PAD)]
    reads, read = [], TextPadding._read

    def counted(self, *args):
        reads.append(args)
        return read(self, *args)

    monkeypatch.setattr(TextPadding, "_read", counted)

    def generate(**options):
        found = []
        with apply_tofu(model, *configs, **options) as handle:
            for _ in range(2):
                for step in range(4):
                    handle.step(step, 4)
                    found += [output_of(model, inputs) for inputs in calls]
            return found, [*text_of(handle).counts.values()]

    expected, texts = generate()
    assert not reads and not texts
    found, texts = generate(drop_text_padding=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(reads) == 2 * len(calls)
    assert [dropped for _, dropped in texts] == [PAD, 2 * PAD]


@torch.no_grad()
def test_a_picture_that_is_not_there_goes_as_well():
    model, _, inputs = built(VIDEO15)
    inputs["image_embeds"] = torch.zeros(2, 9, 12)
    expected = output_of(model, inputs)
    with apply_tofu(model, drop_text_padding=True) as handle:
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-4, atol=1e-4)
        assert [*text_of(handle).counts.values()] == [(5 + 4 + 9, 8)]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("PRXTransformer2DModel", lambda mask: None, "attention_mask is None"),
        ("PRXTransformer2DModel", lambda mask: mask * 0.5, "other numbers than 0 and 1"),
        ("ChromaTransformer2DModel", lambda mask: mask.float(), "is float32"),
        (
            "Krea2Transformer2DModel",
            lambda mask: mask.float(),
            "give the pipeline a prompt_embeds_mask of bool",
        ),
    ],
)
@torch.no_grad()
def test_padding_that_may_be_seen_stays_and_is_spoken_of(name, changes, why):
    model, family, bare = built(name)
    inputs = with_padding(family, bare)
    (text,) = family.texts
    inputs[text.mask] = changes(inputs[text.mask])
    expected = output_of(model, inputs)
    with apply_tofu(model, drop_text_padding=True) as handle:
        with pytest.warns(UserWarning, match=why):
            assert torch.equal(output_of(model, inputs), expected)
        summary = handle.summary()
    assert summary.texts[0].dropped == 0 and why in str(summary)
    assert summary.flops_run == summary.flops_unreduced


def test_it_is_refused_where_no_mask_hides_a_text():
    model = DENOISERS["FluxTransformer2DModel"].build()
    for options in ({}, {"ratio": 0.5}, {"speedup": 2}):
        with pytest.raises(
            ValueError, match=r"max_sequence_length=, .*HunyuanImageTransformer2DModel"
        ):
            apply_tofu(model, **options, drop_text_padding=True)
    assert "_tofu" not in vars(model)
    with pytest.raises(ValueError, match=r"Unknown is of no known class.* name the family"):
        apply_tofu(Unknown(), drop_text_padding=True)
    with pytest.raises(TypeError, match="True or False, not 1"):
        apply_tofu(DENOISERS["PRXTransformer2DModel"].build(), drop_text_padding=1)


@pytest.mark.filterwarnings("ignore:6 steps")
@torch.no_grad()
def test_compiled_it_goes_from_the_second_step_on():
    """And a text that changes on the way is not cut by what was known of another."""
    torch._dynamo.reset()
    model, family, bare = built("PRXTransformer2DModel")
    inputs = with_padding(family, bare)
    expected, counter = output_of(model, inputs), CompileCounter()
    with apply_tofu(model, speedup=1, drop_text_padding=True) as handle:
        model.compile(fullgraph=True, backend=counter)
        for step in range(3):
            handle.step(step, 6)
            torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-4, atol=1e-4)
            assert [*text_of(handle).counts.values()] == [(10, PAD if step else 0)]
        assert counter.frame_count == 2
        longer = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        handle.step(3, 6)
        output_of(model, longer)
        with pytest.raises(RuntimeError, match=f"of 10 tokens that are no padding {PAD} were"):
            handle.step(4, 6)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:6 steps")
@torch.no_grad()
def test_compiled_padding_that_stays_is_spoken_of_behind_the_first_step():
    torch._dynamo.reset()
    model, family, bare = built("PRXTransformer2DModel")
    inputs = with_padding(family, bare)
    inputs["attention_mask"] = inputs["attention_mask"] * 0.5
    with apply_tofu(model, speedup=1, drop_text_padding=True) as handle:
        model.compile(fullgraph=True, backend="eager")
        handle.step(0, 6)
        output_of(model, inputs)
        with pytest.warns(UserWarning, match=f"{STAYS}.* other numbers than 0 and 1"):
            handle.step(1, 6)
    torch._dynamo.reset()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@torch.no_grad()
def test_a_mask_that_is_written_to_is_read_again(steps, mode):
    """In one call alone and in a loop; there not in inference mode, where nobody can know it."""
    model, family, bare = built("PRXTransformer2DModel")
    inputs = with_padding(family, bare)
    with mode(), apply_tofu(model, drop_text_padding=True) as handle:
        mask = inputs["attention_mask"] = inputs["attention_mask"].clone()
        dropped = []
        for step in range(2):
            if steps:
                handle.step(step, steps)
            found = output_of(model, inputs)
            dropped += [count for _, count in text_of(handle).counts.values()]
            if step == 0:
                mask.fill_(1)
    known = not steps or mode is torch.no_grad
    assert dropped == [PAD, 0 if known else PAD]
    if known:
        assert torch.equal(found, output_of(model, inputs))


@torch.no_grad()
def test_why_padding_stayed_is_of_the_last_call_where_it_is_alone():
    model, family, bare = built("PRXTransformer2DModel")
    inputs = with_padding(family, bare)
    with apply_tofu(model, drop_text_padding=True) as handle:
        with pytest.warns(UserWarning, match="attention_mask is None"):
            output_of(model, {**inputs, "attention_mask": None})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output_of(model, inputs)
        assert f"dropped {PAD} of" in str(handle.summary())
        assert "is None" not in str(handle.summary())


def test_what_was_read_is_not_kept():
    """A picture with a gradient could not be copied, and would hold what it was made from."""
    model, family, bare = built(VIDEO15)
    inputs = with_padding(family, bare)
    inputs["image_embeds"] = torch.randn(2, 9, 12, requires_grad=True) * 1
    expected, read = output_of(model, inputs), weakref.ref(inputs["image_embeds"])
    with apply_tofu(model, drop_text_padding=True) as handle:
        handle.step(0, 4)
        found = output_of(model, inputs)
        torch.testing.assert_close(output_of(copy.deepcopy(model), inputs), found, rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        del inputs, found, expected
        assert read() is None


def test_places_are_cut_in_runs():
    x = torch.arange(10)[None, :, None]
    places = Places.of([4, 0, 1, 6], tokens=7)
    assert places.runs == ((0, 2), (4, 5), (6, 7)) and places.dropped == 3
    assert places.cut(x, 1).flatten().tolist() == [0, 1, 4, 6, 7, 8, 9]
    # What goes behind the end is not copied.
    assert Places.of(range(4), tokens=10).cut(x, 1).data_ptr() == x.data_ptr()
