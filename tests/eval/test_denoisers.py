"""bench.denoisers: the models are the published ones, ceilings are what they say, rows are kept and go on."""

import csv
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from eval.__main__ import main
from eval.bench import ceilings, denoisers, parity
from eval.bench.denoisers import Bench, Cell
from eval.bench.models import SUITES, WAN_1B, Case, _wan, twin
from eval.bench.rows import FIELDS, append_row, read_rows
from eval.report.tables_speed import suite_table
from tofu_diffusers import METHODS

CPU = torch.device("cpu")
FLUX, UNET = SUITES["tiny"]
SHORT = list(denoisers.FIRST_CELLS[:2])
# In billions, as published.
PARAMETERS = {
    "SD1.5": 0.860,
    "SDXL": 2.57,
    "SD3.5-medium": 2.24,
    "SD3.5-large": 8.06,
    "FLUX.1": 11.9,
    "PixArt-Sigma": 0.61,
    "Wan-1.3B": 1.42,
    "Wan-14B": 14.3,
}


def work(cells=SHORT, case=FLUX):
    return [(case, "eager", cell) for cell in cells]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "suite.csv"


@pytest.fixture(scope="module")
def bench():
    return Bench(FLUX, CPU, torch.float32)


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_models_have_the_published_number_of_parameters(name):
    case = next(case for case in SUITES["full"] if case.model == name)
    with torch.device("meta"):
        model = case.cls.from_config(dict(case.config))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.05)


def test_every_full_size_model_takes_its_arguments():
    meta = torch.device("meta")
    assert {case.model for case in SUITES["full"]} == set(PARAMETERS)
    for case in SUITES["full"]:
        with meta:
            model = case.cls.from_config(dict(case.shallow().config))
        inputs = case.inputs(meta, torch.float32)
        latents = inputs[case.family.sample_name]
        with torch.no_grad():
            got = model(**inputs)[0]
        assert (got.shape[0], got.shape[2:]) == (case.batch, latents.shape[2:])
        assert case.batch % case.cfg_branches == 0


def test_weights_are_the_same_every_time_and_shared_by_twins():
    state = torch.get_rng_state()
    one, other = (UNET.build(CPU, torch.float32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == torch.float32
    copied = twin(one)
    for a, b, c in zip(one.parameters(), other.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b) and c is a
    assert all(x is not y for x, y in zip(one.modules(), copied.modules(), strict=True))


@torch.no_grad()
def test_the_free_ceiling_is_the_blocks_on_the_first_tokens(bench):
    """By hand, from what the first block of the unreduced model is given."""
    model, kept, seen = twin(bench.models[0][0]), 18, {}

    def note(name):
        return lambda _, args, kwargs: seen.setdefault(name, (args, kwargs))

    hook = model.transformer_blocks[0].register_forward_pre_hook(note("in"), with_kwargs=True)
    model(**bench.inputs[0])
    hook.remove()
    given = seen.pop("in")[1]
    x, text, (cos, sin) = (
        given[n] for n in ("hidden_states", "encoder_hidden_states", "image_rotary_emb")
    )
    rows = text.shape[1] + kept
    rest = {"temb": given["temb"], "image_rotary_emb": (cos[:rows], sin[:rows])}
    y = x[:, :kept]
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        text, y = block(hidden_states=y, encoder_hidden_states=text, **rest)
    expected = torch.cat([y, x[:, kept:]], dim=1)

    cell = Cell("ceiling", 0.5, "block", "dropped")
    with bench.applied(cell, *bench.models[0]) as lane:
        lane.model.norm_out.register_forward_pre_hook(note("out"), with_kwargs=True)
        for _ in range(2):  # the second is not helped by the first
            seen.clear()
            lane.model(**bench.inputs[0])
            torch.testing.assert_close(seen["out"][0][0], expected)


def test_a_ceiling_has_the_flops_of_what_it_bounds(bench):
    for tofu in denoisers.FIRST_CELLS[1:]:
        cells = (*tofu.bounds, tofu)
        least, ours = (bench.row(cell, False, 1)["flops_ratio"] for cell in cells)
        assert ours > 1.2
        # What the plan's matching adds, on a grid this small.
        assert 0.97 * least < ours < 1.001 * least


def test_the_first_tokens_make_a_plan_and_leave_no_method_behind():
    before = dict(METHODS)
    with ceilings.first_method():
        assert METHODS["first"] is ceilings.First
    assert before == METHODS
    plan = ceilings.first_plan(2, 9, 4, CPU)
    plan.check()
    assert torch.equal(plan.kept[1], torch.arange(4))


def test_a_model_of_two_layers_is_scaled_to_all_of_them():
    small = WAN_1B | {"num_layers": 5, "num_attention_heads": 1, "ffn_dim": 64, "text_dim": 16}
    whole = _wan("Wan", small, 1, 8, 12, 4)
    scaled = replace(whole, layers=5)
    assert scaled.depths == {1: -3.0, 2: 4.0}
    counts = [Bench(case, CPU, torch.float32)._unreduced_flops() for case in (whole, scaled)]
    assert counts[0] == counts[1]
    row = Bench(scaled, CPU, torch.float32).row(Cell("unreduced"), False, 1)
    assert "of 5 layers" in row["note"]


def test_tomesd_is_timed_where_it_merges_and_not_available_elsewhere():
    pytest.importorskip("tomesd")
    cell = denoisers.MORE_CELLS[-1]
    assert cell.kind == "tomesd"
    assert Bench(UNET, CPU, torch.float32).row(cell, False, 1)["flops_ratio"] > 1
    # As in SDXL, the finest level has no attention.
    stages = {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    }
    plain = Case("x", "", UNet2DConditionModel, {**UNET.config, **stages}, (4, 8, 8), 4, 2, 2)
    assert "n/a" in Bench(plain, CPU, torch.float32).row(cell, False, 1)["note"]


def test_rows_are_written_and_a_second_call_measures_nothing(out, monkeypatch):
    assert denoisers.run(work(), out, 1, commit="abc")
    first = out.read_text()
    rows = list(csv.DictReader(first.splitlines()))
    assert [row["kind"] for row in rows] == ["unreduced", "tofu"]
    assert list(rows[0]) == list(FIELDS)
    for row in rows:
        assert float(row["step_ms_p20"]) <= float(row["step_ms"]) <= float(row["step_ms_p80"])
        assert (row["tokens"], row["mode"], row["commit"]) == ("36", "eager", "abc")
        assert row["note"] == "" and float(row["speed"]) > 0
    assert rows[0]["share"] == rows[0]["ceiling_speed"] == ""
    # In a single round the share is the quotient of the two speeds.
    share = float(rows[1]["speed"]) / float(rows[1]["ceiling_speed"])
    assert float(rows[1]["share"]) == pytest.approx(share, rel=1e-4)
    monkeypatch.setattr(denoisers, "Bench", None)
    assert denoisers.run(work(), out, 1) and out.read_text() == first


def test_what_was_written_before_a_kill_stays(out):
    denoisers.run(work(SHORT[:1]), out, 1)
    whole = out.read_text()
    with out.open("a") as file:
        file.write("FLUX-tiny,96x96,1,")
    denoisers.run(work(), out, 1)
    assert out.read_text().startswith(whole)
    assert len(read_rows(out)) == 2


def test_a_row_that_fails_says_so_and_the_others_go_on(out, capsys):
    broken = [SHORT[0], Cell("tofu", 0.5, "block", "dropped", "nothing"), SHORT[1]]
    assert denoisers.run(work(broken), out, 1)
    rows = read_rows(out)
    assert rows[1]["note"].startswith("failed: ValueError: unknown method")
    assert rows[1]["step_ms"] == "" and rows[2]["step_ms"]
    assert "unknown method" in capsys.readouterr().out


def test_no_row_is_begun_when_the_time_is_up(out):
    assert not denoisers.run(work(), out, 1, until=0.0)
    assert not out.exists()


def test_rows_of_another_device_are_not_mixed_in(out):
    denoisers.run(work(SHORT[:1]), out, 1)
    out.write_text(out.read_text().replace("float32", "bfloat16"))
    with pytest.raises(ValueError, match="measured with dtype bfloat16"):
        denoisers.run(work(), out, 1)
    out.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of this suite"):
        denoisers.run(work(), out, 1)
    with pytest.raises(ValueError, match="rounds 0"):
        denoisers.run(work(), out, 0)


def test_the_most_important_rows_come_first():
    cases = SUITES["full"]
    items = list(denoisers.jobs(cases, denoisers.modes_of("full")))
    assert len(set(items_key(items))) == len(items)
    head = len(cases) * len(denoisers.FIRST_CELLS)
    assert [case for case, *_ in items[:head:4]] == list(cases)
    modes = [mode for _, mode, _ in items]
    assert modes == sorted(modes)  # compiled, then eager
    served = {case.family.name for case, _, cell in items if cell.kind == "tomesd"}
    assert served == {"unet"}
    for _, _, cell in items:
        assert [bound.kind for bound in cell.bounds] == ["ceiling"] * (cell.kind == "tofu")


def items_key(items):
    return [(case.model, case.size, mode, cell) for case, mode, cell in items]


def test_a_prediction_unlike_the_references_stops_everything(tmp_path):
    path = str(tmp_path / "a.pt")
    parity.save_predictions("tiny", 1, path)
    mine = torch.load(path)
    assert {name.split()[-1] for name in mine} == {"dropped", "fresh", "cached"}
    assert set(parity.compare(mine, mine).values()) == {0.0}
    for wrong in (1.1, float("nan")):
        other = {name: wrong * x for name, x in mine.items()}
        with pytest.raises(ValueError, match="nothing is timed"):
            parity.compare(other, mine)


@pytest.mark.parametrize(
    "wrong",
    [[], ["--suite", "huge"], ["--suite", "cpu", "--setting", "{}"], ["--suite", "cpu", "--rounds", "0"]],
)  # fmt: skip
def test_wrong_arguments_end_with_code_2(wrong, out, capsys):
    with pytest.raises(SystemExit) as end:
        main(["speed", "--out", str(out), *wrong])
    assert end.value.code == 2 and not out.exists()
    assert "suite" in capsys.readouterr().err or wrong[-1] == "0"


def test_the_command_runs_a_suite(out, monkeypatch):
    monkeypatch.setitem(SUITES, "cpu", (FLUX,))
    monkeypatch.setattr(denoisers, "FIRST_CELLS", tuple(SHORT))
    monkeypatch.setattr(denoisers, "MORE_CELLS", ())
    assert main(["speed", "--suite", "cpu", "--rounds", "1", "--out", str(out)]) == 0
    assert len(read_rows(out)) == 2


# ---- the table -------------------------------------------------------------------------------------

ABOUT = {
    "batch": 2, "cfg_branches": 2, "tokens": 4096, "rounds": 5, "dtype": "float32", "device": "CPU (x86_64)",
    "threads": 7, "torch": "2.x", "diffusers": "0.x", "transformers": "5.x", "tofu_diffusers": "0.y",
    "commit": "0123456789abcdef", "size": "8x8", "mode": "eager",
}  # fmt: skip
TIMES = {"step_ms": 10.0, "speed": 1.5, "speed_p20": 1.4, "speed_p80": 1.6, "flops_ratio": 1.9}


def told(out, *rows):
    """The table's lines below its head, of rows each made of a model, a cell and what was found."""
    for model, cell, found in rows:
        append_row(out, ABOUT | {"model": model, **vars(cell)} | found)
    return suite_table(out).splitlines()[4:]


def test_the_table_puts_a_row_beside_its_ceiling(out):
    shares = {"share": 0.75, "share_p20": 0.7, "share_p80": 0.8}
    bounded = TIMES | shares | {"ceiling_speed": 2.0, "peak_mib": 1234.5}
    lines = told(
        out,
        ("A", Cell("unreduced"), TIMES),
        ("A", Cell("tofu", 0.5, "block", "dropped", "importance"), bounded),
        ("A", Cell("tofu", 0.5, "block", "dropped", "tome"), TIMES),
    )
    assert lines == [
        "| A 8x8, eager | 4,096 | block, dropped, importance | 0.5 | 1.90x | 2.00x | 1.50x (1.40 to 1.60) | "
        "75% (70% to 80%) | 1,234 |",
        "| A 8x8, eager | 4,096 | block, dropped, tome | 0.5 | 1.90x |  | 1.50x (1.40 to 1.60) |  |  |",
    ]


def test_the_table_says_where_it_was_measured(out):
    told(out, ("A", Cell("tofu", 0.5, "block", "dropped", "tome"), TIMES))
    append_row(
        out, ABOUT | TIMES | {"model": "B", "ratio": 0.5, "kind": "tofu", "commit": "fedcba"}
    )
    about = suite_table(out).splitlines()[0]
    for part in (
        "CPU (x86_64), 7 threads, float32",
        "torch 2.x, diffusers 0.x, transformers 5.x, tofu_diffusers 0.y",
        "commit 0123456789ab, fedcba.",
        "median of 5 (",
    ):
        assert part in about


def test_the_table_keeps_cases_together_and_ratios_in_order(out):
    cells = [Cell("tofu", ratio, "block", "dropped", "importance") for ratio in (0.5, 0.25, 0.75)]
    lines = told(out, *((model, cell, TIMES) for cell in cells for model in ("B", "A")))
    assert [(line[2], line.split(" | ")[3]) for line in lines] == [
        (model, ratio) for model in ("B", "A") for ratio in ("0.25", "0.5", "0.75")
    ]


def test_the_table_says_why_something_was_not_measured(out):
    lines = told(
        out,
        (
            "A",
            Cell("tomesd", 0.5, "attention", "dropped", "tomesd"),
            {"note": "n/a: merges nothing"},
        ),
        ("A", Cell("tofu", 0.5, "block", "dropped", "x"), {"note": "failed: a|b", "tokens": None}),
        (
            "B",
            Cell("tofu", 0.5, "block", "dropped", "tome"),
            TIMES | {"note": "1 and 2 of 9 layers"},
        ),
    )
    assert lines[:2] == [
        "| A 8x8, eager | 4,096 | tomesd, attention, dropped | 0.5 | n/a: merges nothing | | | | |",
        "| A 8x8, eager |  | block, dropped, x | 0.5 | failed: a\\|b | | | | |",
    ]
    assert lines[2].startswith(
        "| B 8x8, eager (1 and 2 of 9 layers) | 4,096 | block, dropped, tome |"
    )


def test_the_table_reads_what_a_suite_writes(out):
    denoisers.run(work(), out, 1)
    (line,) = suite_table(out).splitlines()[4:]
    row = read_rows(out)[-1]
    share = f"{float(row['share']):.0%}"
    assert line.startswith(
        f"| {row['model']} {row['size']}, eager | 36 | block, dropped, importance | 0.5 |"
    )
    assert f"| {share} (" in line
    assert {text.count("|") for text in suite_table(out).splitlines()[2:]} == {10}
