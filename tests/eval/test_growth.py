"""bench.growth: what is counted is what runs, what is left out is said, tables and plots show the file."""

import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.__main__ import main
from eval.bench import growth
from eval.bench.operations import drawn_plan, operations
from eval.report import plots_growth, tables
from eval.report.tables_speed import growth_rows, growth_table, short
from tofu_diffusers import Plan

NAMES = (
    "match", "energy", "match window 16", "energy window 16", "merge prune", "merge mean", "merge mlerp",
    "unmerge copy", "unmerge taylor",
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """No clock and no rates: a call takes 2 ms."""
    monkeypatch.setattr(growth, "clock", lambda call: [1.0, 2.0, 3.0])
    monkeypatch.setattr(growth, "rates", lambda: (1e6, 1e9))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "growth.csv"


def test_the_command_writes_a_whole_row_an_operation_and_size(out, capsys):
    assert main(["growth", "--out", str(out), "--tokens", "300", "64"]) == 0
    rows = growth_rows(out)
    assert [(int(row["tokens"]), row["operation"]) for row in rows] == [
        (tokens, name) for tokens in (64, 300) for name in NAMES
    ]
    assert "18 rows" in capsys.readouterr().out
    for row in rows:
        assert tuple(row) == growth.FIELDS
        # On a CPU there is nothing else to be compared with.
        assert [name for name in row if not row[name]] == ["difference"]
        assert row["implementation"] == "reference" and row["reference_ms"] == row["ms"]
        assert 0 < float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        share = float(row["bound_ms"]) / float(row["ms"])
        assert float(row["bound_share"]) == pytest.approx(share, rel=1e-4)
        assert row["threads"] == str(torch.get_num_threads())


# Tiles that fit, one that covers the grid, and grids of 25 x 40 and 21 x 33, where the last tiles overlap.
@pytest.mark.parametrize("tokens", [64, 1024, 1000, 693])
def test_flops_are_those_that_run(tokens):
    for name, each in operations(tokens).items():
        with FlopCounterMode(display=False) as counter:
            each.call()
        assert each.flops == counter.get_total_flops(), name


def test_inside_windows_cost_grows_in_proportion():
    few, many = operations(1024), operations(4096)
    assert tuple(few) == NAMES
    for name in NAMES[:4]:
        assert many[name].flops == (4 if "window" in name else 16) * few[name].flops


def test_too_much_for_a_cpu_is_left_out_and_said(out, quick, monkeypatch, capsys):
    monkeypatch.setattr(growth, "MOST_FLOPS", operations(1024)["match window 16"].flops)
    growth.measure(out, (64, 1024))
    found = {(row["tokens"], row["operation"]) for row in growth_rows(out)}
    assert {("64", name) for name in NAMES} < found
    gone = {name for name in NAMES if ("1024", name) not in found}
    # A match over 1,024 tokens takes as much as one inside windows of 256.
    assert gone == {"energy", "energy window 16"}
    said = capsys.readouterr().out
    assert all(f"{name} of 1024 tokens is left out" in said for name in gone)
    assert said.count("left out") == 2


def test_the_bound_is_the_slower_of_bytes_and_flops(out, quick):
    growth.measure(out, (64,))
    for row in growth_rows(out):
        each = operations(64)[row["operation"]]
        bounds = {"bytes": each.bytes / 1e6, "flops": each.flops / 1e9}
        assert row["bound_by"] == max(bounds, key=bounds.get)
        assert float(row["bound_ms"]) == pytest.approx(max(bounds.values()), rel=1e-4)


def test_the_drawn_plan_is_one_and_the_same():
    one, other = (drawn_plan(9, 5, torch.Generator().manual_seed(0)) for _ in range(2))
    one.check()
    assert one.kept.shape == (1, 5) and all(map(torch.equal, one, other))


@pytest.fixture
def process(monkeypatch):
    """The reference's process is played by this one; what it was started with."""
    started, elsewhere = [], subprocess.run

    def run(command, env=None, timeout=None, **options):
        if command[0] != sys.executable:
            return elsewhere(command, **options)
        started.append((env["TOFU_KERNELS"], timeout))
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        exec(command[2], {})

    monkeypatch.setattr(growth, "kernels_run", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_kernels_are_compared_with_a_process_of_the_reference(out, quick, process):
    growth.measure(out, (64,))
    assert process == [("reference", None)]
    rows = {row["operation"]: row for row in growth_rows(out)}
    assert {row["implementation"] for row in rows.values()} == {"triton"}
    for name in NAMES:
        assert rows[name]["difference"] == ("" if name.startswith("energy") else "0")
        assert rows[name]["reference_ms"] == "2"


def test_a_kernel_that_differs_is_not_timed(out, quick, process, monkeypatch):
    theirs = growth.reference

    def wrong(sizes, until):
        found = theirs(sizes, until)
        times, x = found[64]["merge mean"]
        found[64]["merge mean"] = times, 1.1 * x
        return found

    monkeypatch.setattr(growth, "reference", wrong)
    with pytest.raises(ValueError, match="differ by"):
        growth.measure(out, (64,))
    assert "merge mean" not in out.read_text()


def test_nothing_is_written_when_the_time_was_up(out, quick, process, monkeypatch):
    def late(command, timeout, **_):
        assert timeout == 1
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert growth.measure(out, (64,), until=0.0) is None
    assert not out.exists()


def test_kernels_must_agree_with_the_reference():
    match = torch.arange(8).clamp(max=3)[None]
    plan = (match[:, :4], match)
    assert growth.difference(plan, plan) == 0
    other = (plan[0], match.flip(1))
    with pytest.raises(ValueError, match="differ by"):
        growth.difference(Plan(*other), plan)
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    assert growth.difference(x, x) == 0
    for wrong in (1.1 * x, x * torch.nan):
        with pytest.raises(ValueError, match="differ by"):
            growth.difference(wrong, x)


@pytest.mark.parametrize("wrong", [[], ["--tokens", "1"], ["--tokens", "many"]])
def test_wrong_arguments_end_with_code_2(wrong, out):
    with pytest.raises(SystemExit) as end:
        main(["growth", *(["--out", str(out)] if wrong else []), *wrong])
    assert end.value.code == 2 and not out.exists()


# ---- what is shown ---------------------------------------------------------------------------------


def written(out, device="CPU (x86_64)"):
    """A file with round numbers: ms as many as tokens; energy was too much at the largest size."""
    about = {
        "implementation": "reference",
        "channels": 640,
        "dtype": "float32",
        "device": device,
        "threads": 7,
        "torch": "2.x",
        "commit": "0123456789abcdef",
    }
    rows = [
        {
            **about,
            "operation": name,
            "tokens": tokens,
            "ms": 1.5 * tokens,
            "ms_p20": 1.4 * tokens,
            "ms_p80": 1.6 * tokens,
            "bound_ms": 0.3 * tokens,
            "bound_by": "flops" if name == "energy" else "bytes",
            "bound_share": 100 / tokens,
        }
        for name in ("energy", "merge mean", "unmerge copy")
        for tokens in (1000, 2000)
        if (name, tokens) != ("energy", 2000)
    ]
    growth.write_rows(out, rows)
    return out


def test_the_table_shows_the_file(out):
    lines = growth_table([written(out)]).splitlines()
    for part in ("CPU (x86_64), 7 threads", "float32, 640 channels", "torch 2.x", "0123456789ab."):
        assert part in lines[0]
    assert lines[2:] == [
        "| | 1,000 | 2,000 | bound |",
        "|---|---|---|---|",
        "| energy | 1,500 |  | 10%, FLOPs |",
        "| merge mean | 1,500 | 3,000 | 5%, bytes |",
        "| unmerge copy | 1,500 | 3,000 | 5%, bytes |",
    ]


def test_a_device_more_is_a_table_more(out, tmp_path):
    other = written(tmp_path / "other.csv", "H200")
    text = growth_table([written(out), other])
    assert text.count("| energy |") == 2 and "\n\nH200, 7 threads" in text


@pytest.mark.parametrize(("ms", "text"), [(0.123, "0.12"), (45.67, "45.7"), (12345.6, "12,346")])
def test_times_have_as_many_digits_as_they_are_worth(ms, text):
    assert short(ms) == text


def test_the_plot_shows_the_file(out, tmp_path):
    rows = growth_rows(written(out))
    figure = plots_growth.growth([rows, rows])
    assert len(figure.axes) == 4
    plans, others = figure.axes[:2]
    assert plans.get_title("left") == "plans"
    drawn = {line.get_label(): line for line in others.get_lines()}
    assert list(drawn["merge mean"].get_xdata()) == [1000, 2000]
    assert list(drawn["merge mean"].get_ydata()) == [1500, 3000]
    (energy, bound, _) = plans.get_lines()
    assert energy.get_color() == bound.get_color() and not energy.is_dashed() and bound.is_dashed()
    assert list(bound.get_ydata()) == [300]
    assert "0123456789ab" in "".join(part.get_suptitle() for part in figure.subfigs)


def test_the_committed_file_has_every_size():
    for path in tables.GROWTH:
        rows = growth_rows(path)
        assert list(rows[0]) == list(growth.FIELDS)
        assert {int(row["tokens"]) for row in rows} == set(growth.SIZES)
        assert {row["operation"] for row in rows} == set(NAMES)
        assert len({(row["device"], row["commit"], row["threads"]) for row in rows}) == 1
        assert all(math.isfinite(float(row["ms"])) for row in rows)
