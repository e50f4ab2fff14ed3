"""FLOPs of full-size models: those of the real forward, at the case's own size, by one command."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from eval import jsonl
from eval.bench import full_size, text_padding
from eval.bench.ceilings import run_on_first
from eval.bench.full_size import SETTINGS, measure
from eval.bench.models import SUITES, USUAL
from eval.report.tables import CLASSES, PADDING
from eval.report.tables_speed import full_size_table
from tofu_diffusers import FAMILIES

TINY = SUITES["tiny"]
META = torch.device("meta")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("flops") / "full_size.jsonl"
    measure(path, TINY)
    return path


@torch.no_grad()
def test_a_step_is_the_real_one_of_that_size(out):
    larger = replace(TINY[0], size="other", latents=(6, 8))
    measure(out, [larger], SETTINGS[:1])
    rows = {(row["model"], row["size"]): row for row in jsonl.read(out)}
    for case in (*TINY, larger):
        with META:
            model = case.cls.from_config(dict(case.config))
        # On a CPU torch does not count its own kernel of attention.
        with FlopCounterMode(display=False) as counter:
            model(**case.inputs(META, torch.float32))
        row = rows[case.model, case.size]
        assert row["step_flops"] == counter.get_total_flops() // case.batch
    assert rows["FLUX-tiny", "other"]["tokens"] == 48


def test_more_is_saved_the_more_is_asked_for(out):
    rows = [row for row in jsonl.read(out) if row["size"] != "other"]
    for case in TINY:
        saved = {
            row["setting"]["name"]: row["flops_ratio"] for row in rows if row["model"] == case.model
        }
        assert [*saved] == [setting.name for setting in SETTINGS]
        assert 1 < saved["ratio-0.25"] < saved["ratio-0.5"] < saved["ratio-0.75"]
        for amount in (1.5, 2, 3):
            assert saved[f"speedup-{amount:g}"] == round(25 / (25 // amount), 4)


def test_it_goes_on_where_it_was_and_leaves_the_families_as_they_were(out, monkeypatch):
    before = out.read_bytes()
    monkeypatch.setattr(full_size, "counted", None)
    measure(out, TINY)
    assert out.read_bytes() == before
    assert all("example" not in vars(case.family) for case in TINY)


SMALL_FLUX = {
    "num_layers": 3,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def test_layers_are_counted_by_one_and_two_of_each_kind(monkeypatch):
    monkeypatch.setattr(full_size, "RATIOS", (0.5,))
    counts = Counter()

    def counted(**changes):
        with META:
            model = FluxTransformer2DModel(**{**SMALL_FLUX, **changes})
        return full_size.steps_of(model, FAMILIES["flux"])

    for depths, weight in full_size.depths_of("FluxTransformer2DModel", SMALL_FLUX):
        for key, flops in counted(**depths).items():
            counts[key] += weight * flops
    assert counts == counted()


@torch.no_grad()
def test_dropped_keys_and_values_are_the_ceiling(monkeypatch):
    """The same FLOPs as a model whose blocks are given its first tokens alone."""
    monkeypatch.setattr(full_size, "RATIOS", (0.5,))
    family = FAMILIES["flux"]
    with META:
        model = FluxTransformer2DModel(**SMALL_FLUX)
    dropped = full_size.steps_of(model, family)["dropped", 0.5]
    inputs = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in family.example(model).items()
    }
    run_on_first(model, family, 0.5)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert dropped == counter.get_total_flops()


def test_every_class_has_its_row():
    assert sorted(row["id"] for row in jsonl.read(CLASSES)) == full_size.classes()


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "SanaTransformer2DModel"])
def test_a_class_counted_anew_is_its_row(name):
    (row,) = (row for row in jsonl.read(CLASSES) if row["id"] == name)
    anew = full_size.counted_class(name)
    assert anew == {key: row[key] for key in anew}


def test_every_class_whose_text_padding_can_go_has_its_row():
    assert sorted(row["id"] for row in jsonl.read(PADDING)) == text_padding.classes()


def test_text_padding_counted_anew_is_its_row():
    (row,) = (row for row in jsonl.read(PADDING) if row["id"] == "Krea2Transformer2DModel")
    anew = text_padding.counted_text(row["id"])
    assert anew == {key: row[key] for key in anew}


def test_the_usual_models_take_their_arguments():
    for case in USUAL:
        with META:
            model = case.cls.from_config(dict(case.shallow().config))
        inputs = case.inputs(META, torch.float32)
        with torch.no_grad():
            got = model(**inputs)[0]
        assert (got.shape[0], got.shape[2:]) == (
            case.batch,
            inputs[case.family.sample_name].shape[2:],
        )


def test_qwen_image_has_the_published_number_of_parameters():
    (case,) = (case for case in USUAL if case.model == "Qwen-Image")
    with META:
        model = case.cls.from_config(dict(case.config))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(20.4, rel=0.01)


def test_a_line_of_the_table_cites_a_row_a_cell(out):
    _, _, _, _, *lines = full_size_table(out).splitlines()
    for line, case in zip(lines, TINY, strict=False):
        assert line.startswith(f"| {case.model}, {case.size} |")
        assert line.count("<!-- row: full_size.jsonl#") == len(SETTINGS)
