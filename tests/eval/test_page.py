"""eval.report: every row is there with its intervals; documents cite what exists."""

import argparse
import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.generate.manifest import Manifest
from eval.generate.settings import KINDS, Setting
from eval.report import page as report
from eval.report import plots
from eval.report.cells import cell, columns_of, markdown_table, mixed
from eval.report.citations import check_citations
from eval.report.plots import Point, front, metric_names, overlay_kept, pareto

ROOT = Path(__file__).parents[2]
WEIGHTS = "5c4c38d352d7c162"
VERSIONS = {"torch": "2.13.0", "diffusers": "0.42.1"}
PROMPTS, SEEDS = ("a red apple", "a <b>bold</b> | star", "a blue car"), (0, 1, 2)
VOID = ("meta", "img", "br", "link", "input", "hr")

# Setting, FLOPs ratio, speed, PSNR.
SETTINGS = (
    (Setting("unreduced"), 1.0, None, 120.0),
    (Setting("default-0.5", "tofu", {"ratio": 0.5}), 1.4, 1.3, 44.0),
    (Setting("tome-0.5", "tofu", {"ratio": 0.5, "method": "tome"}), 1.6, 1.7, 25.0),
    (Setting("random-0.5", "tofu", {"ratio": 0.5, "method": "random"}), 1.6, 1.6, 27.0),
    (Setting("steps-18", "fewer_steps", {"steps": 18}), 1.39, 1.38, 40.0),
    (Setting("line-12", "step_cache", {"total": 25, "computed": 12}), 2.1, None, 33.0),
)


def entry(value, **more):
    return {"value": value, "low": value * 0.95, "high": value * 1.06, "n": 64, **more}


def row(setting, flops, speed, psnr):
    return {
        "id": f"emoji/{setting.name}",
        "pipeline": "emoji",
        "weights": WEIGHTS,
        "setting": setting.to_dict(),
        "n": 64,
        "seed": 7,
        "steps": 25,
        "device": "CPU (x86_64)",
        "threads": 2,
        "versions": VERSIONS,
        "commit": "ca7f081",
        "flops_ratio": flops,
        "speed": speed and {"value": speed, "low": speed - 0.05, "high": speed + 0.07},
        "metrics": {
            "fd-effnetlite0": entry(120 - psnr, warning="64 images: biased upwards"),
            "psnr_db": entry(psnr),
            "novelty": entry(psnr / 2),
        },
    }


def rows():
    return [row(*line) for line in SETTINGS]


def picture(setting, index):
    """A picture of its own for every setting and prompt."""
    number = [line[0].name for line in SETTINGS].index(setting)
    return Image.fromarray(np.full((8, 12, 3), 20 * number + 5 * index, dtype=np.uint8))


def write_results(folder, found, **more):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"format": 1, "rows": found, **more}))


def manifest(setting):
    return Manifest(
        pipeline={"name": "emoji", "class": "StableDiffusionPipeline", "weights": WEIGHTS},
        setting=setting.to_dict(),
        call={"num_inference_steps": 25},
        prompts=PROMPTS,
        seeds=SEEDS,
        batch_size=1,
        dtype="float32",
        device="CPU (x86_64)",
        threads=2,
        versions=VERSIONS,
        commit="ca7f081",
    )


def make_sweep(folder):
    write_results(folder, rows())
    (folder / "scores").mkdir()
    for setting, _, _, psnr in SETTINGS:
        images = folder / setting.name / "images"
        images.mkdir(parents=True)
        manifest(setting).save(images.parent)
        for index in range(len(PROMPTS)):
            picture(setting.name, index).save(images / f"{index:05}.png")
        scores = {"per_image": {"psnr_db": [psnr - 1, psnr, psnr + 1]}}
        (folder / "scores" / f"{setting.name}.json").write_text(json.dumps(scores))
    return folder


def run(*words):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    report.main(parser.parse_args([str(word) for word in words]))


class Page(HTMLParser):
    """What a browser would see: text, attributes by tag, the cells of the table of all rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.cells = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if {"td", "th"} & {*self.open}:
            self.cells[-1][-1] += data


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = make_sweep(tmp_path_factory.mktemp("report") / "sweep")
    kept = folder / "default-0.5" / "kept"
    kept.mkdir()
    overlay_kept(picture("default-0.5", 0), np.eye(4, 6, dtype=bool)).save(kept / "00000.png")
    run("--sweep", folder, "--prompts", 2)
    return folder


@pytest.fixture(scope="module")
def html(sweep):
    return (sweep / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# --- The page


def test_metrics_stand_in_the_order_of_their_list():
    """Also where two of them are read alike: feature distance and KID."""
    names = [
        "kid-tiny",
        "clip_score-change",
        "clip_score",
        "fd-tiny",
        "feature_distance",
        "psnr_db",
    ]
    rows = [{"metrics": dict.fromkeys(["odd", *names])}]
    ordered = [
        "psnr_db",
        "feature_distance",
        "clip_score",
        "clip_score-change",
        "fd-tiny",
        "kid-tiny",
    ]
    assert metric_names(rows) == [*ordered, "odd"]


def test_the_page_needs_nothing_from_outside(html, page):
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import|\bfetch\(", html)


def test_every_row_has_all_its_cells(page):
    found = rows()
    by_id = {cells[1]: cells for cells in page.cells if len(cells) == len(columns_of(found)) + 1}
    for number, one in enumerate(found, 1):
        cells = next(
            cells for key, cells in by_id.items() if key.startswith(one["id"] + "pipeline")
        )
        assert cells[0] == str(number)
        for column, text in zip(columns_of(found)[1:], cells[2:], strict=True):
            assert text == cell(one, column)
        for said in (WEIGHTS, "CPU (x86_64)", "torch 2.13.0, diffusers 0.42.1", "ca7f081"):
            assert said in cells[1]
        assert re.search(r"n64seed7", cells[1])


def test_the_front_is_told_slowest_first(page):
    fronts = [cells[0] for cells in page.cells if len(cells) == 4]
    assert fronts[:5] == [
        "id",
        "emoji/default-0.5",
        "emoji/steps-18",
        "emoji/random-0.5",
        "emoji/tome-0.5",
    ]


def test_circumstances_that_differ_are_told(page):
    assert "not all measured" not in page.text
    found = rows()
    found[2]["commit"] = "0123456"
    assert mixed(found) == ["commit: ca7f081; 0123456"]


def test_plots_are_files_and_in_the_page(sweep, page):
    drawn = {path.name: path for path in (sweep / "report_plots").iterdir()}
    assert {*drawn} == {
        f"{metric}_{speed}.png"
        for metric in ("psnr_db", "fd-effnetlite0")
        for speed in plots.SPEEDS
    }
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    for path in drawn.values():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 800
        assert report.inline(path.read_bytes()) in sources
    assert "novelty is not drawn: whether more is better is unknown" in page.text
    assert "Not drawn, as a number is missing: 6." in page.text
    assert "64 images: biased upwards" in page.text


def test_out_may_lie_elsewhere(sweep, tmp_path):
    run("--sweep", sweep, "--out", tmp_path / "new" / "a.html", "--prompts", 1)
    assert (tmp_path / "new" / "a.html").is_file()
    assert (tmp_path / "new" / "a_plots" / "psnr_db_flops.png").is_file()
    with pytest.raises(ValueError, match="--prompts is 0"):
        run("--sweep", sweep, "--prompts", 0)


# --- The pictures


def pixels(uri):
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    )


def test_pictures_unreduced_first_with_their_psnr(sweep, page):
    found = rows()
    lines = report.grid(sweep, found[::-1], prompts=2)  # the reference is the last row here
    assert [(prompt, seed) for prompt, seed, _ in lines] == list(zip(PROMPTS, SEEDS, strict=True))[
        :2
    ]
    captions = [shown.caption for shown in lines[1][2]]
    assert captions == ["the reference", "33.0 dB", "40.0 dB", "27.0 dB", "25.0 dB", "44.0 dB"]
    assert (pixels(lines[1][2][2].picture) == picture("steps-18", 1)).all()
    assert [shown.kept is not None for shown in lines[0][2]] == [False] * 5 + [True]
    assert PROMPTS[1] in page.text  # and not as a tag
    assert ("b", {}) not in page.tags


def test_pictures_belong_to_prompts_not_to_places(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    turned = replace(manifest(SETTINGS[1][0]), prompts=PROMPTS[::-1], seeds=SEEDS[::-1])
    turned.save(sweep / "default-0.5")
    shown = report.grid(sweep, rows(), prompts=1)[0][2][1]
    assert (pixels(shown.picture) == picture("default-0.5", 2)).all()
    assert shown.caption == "45.0 dB"


def test_large_pictures_are_shown_small(tmp_path):
    Image.new("RGB", (1024, 512)).save(tmp_path / "large.png")
    assert pixels(report.inline_file(tmp_path / "large.png")).shape == (128, 256, 3)


def test_what_is_missing_has_its_reason_in_its_place(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    (sweep / "unreduced" / "images" / "00000.png").unlink()
    (sweep / "default-0.5" / "manifest.json").unlink()
    (sweep / "tome-0.5" / "images" / "00000.png").write_bytes(b"no picture")
    other = manifest(SETTINGS[3][0])
    replace(other, pipeline={**other.pipeline, "weights": "0" * 16}).save(sweep / "random-0.5")
    replace(manifest(SETTINGS[4][0]), seeds=(8, 9, 10)).save(sweep / "steps-18")
    (sweep / "line-12" / "manifest.json").write_text("{")
    run("--sweep", sweep, "--prompts", 1)
    text = Page((sweep / "report.html").read_text(encoding="utf-8")).text
    for reason in (
        "unreduced/images/00000.png is missing",
        "default-0.5/manifest.json is missing",
        "tome-0.5/images/00000.png is no picture",
        f"made with weights {'0' * 16}, the row is of {WEIGHTS}",
        "this run has no such prompt and seed",
        "line-12/manifest.json cannot be read",
    ):
        assert reason in text


def test_scores_and_run_folders_may_be_missing(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    (sweep / "scores" / "tome-0.5.json").unlink()
    assert report.grid(sweep, rows(), prompts=1)[0][2][2].caption == "not scored"
    assert report.grid(tmp_path, rows(), prompts=1) == []
    found = [{**one, "speed": None, "metrics": {}} for one in rows()]
    text = Page(report.page(tmp_path, found, tmp_path / "plots", 1)).text
    assert "No pictures" in text and "No setting has both" in text


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 5), (1, 7)])
def test_removed_tokens_are_dark_and_grey(height, width):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(60, 255, (3 * height, 3 * width, 3), dtype=np.uint8))
    kept = rng.random((height, width)) < 0.5
    before, after = np.asarray(image), np.asarray(overlay_kept(image, kept))
    whole = kept.repeat(3, axis=0).repeat(3, axis=1)
    assert (after[whole] == before[whole]).all()
    removed = after[~whole].astype(int)
    assert (removed == removed[:, :1]).all()
    assert (removed.mean(axis=1) < 0.5 * before[~whole].mean(axis=1) + 30).all()


def test_a_mask_of_another_form_is_refused():
    image = Image.new("RGB", (8, 8))
    for wrong in (
        np.full((4, 4), 1.5),
        np.ones((4, 4), int),
        np.ones(16, dtype=bool),
        np.ones((1, 4, 4), dtype=bool),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{wrong.dtype} of shape {wrong.shape}")):
            overlay_kept(image, wrong)


# --- The plots


def test_intervals_the_front_and_every_number_are_drawn():
    found = rows()
    figure = pareto(found, "psnr_db", "speed")
    axes = figure.axes[0]
    segments = {
        tuple(map(tuple, segment.round(6)))
        for collection in axes.collections
        for segment in collection.get_segments()
    }
    for one in found[1:5]:
        (x, y), speed = (one["speed"]["value"], one["metrics"]["psnr_db"]), one["speed"]
        vertical = ((x, round(y["low"], 6)), (x, round(y["high"], 6)))
        across = ((round(speed["low"], 6), y["value"]), (round(speed["high"], 6), y["value"]))
        assert {vertical, across} <= segments
    assert len(segments) == 8  # neither the reference, nor what was not timed
    steps = next(line for line in axes.lines if line.get_gid() == "front")
    assert steps.get_drawstyle() == "steps-pre"
    assert steps.get_xydata().tolist() == [[1.3, 44.0], [1.38, 40.0], [1.6, 27.0], [1.7, 25.0]]
    notes = [text for text in axes.texts if text.get_text()]
    assert [text.get_text().split()[0] for text in notes] == ["2", "5", "4", "3"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "5  steps-18" in legend and "fewer steps" in legend and "6  line-12" not in legend


def test_labels_do_not_overlap():
    # Close neighbours, and every third point right on another.
    places = [(1 + 0.1 * k + shift, 45 - k) for k in range(7) for shift in (0, 0.01, 0)]
    crowd = [row(Setting(f"tofu-{x:.2f}", "tofu"), x, None, y) for x, y in places]
    axes = pareto(crowd, "psnr_db", "flops").axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 21
    clashes = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert clashes == []
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_up_is_better_where_less_is_better():
    assert pareto(rows(), "fd-effnetlite0", "flops").axes[0].yaxis_inverted()
    assert not pareto(rows(), "psnr_db", "flops").axes[0].yaxis_inverted()


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_front_is_what_nothing_beats(higher_is_better):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 12, (60, 2)).astype(float)  # with ties
    crowd = [Point(i, "", "", (x,) * 3, (y,) * 3) for i, (x, y) in enumerate(values)]
    sign = 1 if higher_is_better else -1

    def beaten(p):
        return any(
            q.x[1] >= p.x[1] and sign * q.y[1] >= sign * p.y[1] and (q.x, q.y) != (p.x, p.y)
            for q in crowd
        )

    best = front(crowd, higher_is_better)
    assert {(p.x, p.y) for p in best} == {(p.x, p.y) for p in crowd if not beaten(p)}
    assert [p.x for p in best] == sorted({p.x for p in best})


def test_a_plot_without_points_is_refused():
    untimed = [{**one, "speed": None} for one in rows()]
    with pytest.raises(ValueError, match="both a measured speed and a finite psnr_db"):
        pareto(untimed, "psnr_db", "speed")
    with pytest.raises(ValueError, match="'novelty' is unknown"):
        pareto(rows(), "novelty", "flops")


def test_what_scores_write_is_known():
    higher = ("psnr_db", "ssim", "emoji_alignment", "clip_score")
    lower = ("lpips", "feature_distance", "fd-effnetlite0", "kid-effnetlite0-real", "fid", "kid")
    for name in (*higher, *lower):
        assert plots.metric_of(name).higher_is_better == (name in higher), name
    # Against the unreduced pictures the unreduced ones have no distance; against real ones they have.
    assert (
        plots.metric_of("fd-effnetlite0").paired
        and not plots.metric_of("fd-effnetlite0-real").paired
    )
    assert plots.metric_of("kid").paired and not plots.metric_of("kid-real").paired


def test_every_kind_of_setting_has_a_look_of_its_own():
    assert {*KINDS} == {*plots.STYLES}
    colours, shapes = zip(*plots.STYLES.values(), strict=True)
    assert len({*colours}) == len({*shapes}) == len(KINDS)


# --- Markdown and citations


def cells_of(markdown):
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines()]
    return [[text.strip().replace(r"\|", "|") for text in line] for line in lines]


def test_a_markdown_table_gives_its_cells_back(page):
    found = rows()
    found[1]["setting"]["options"]["note"] = "a | b\nc"
    columns = [*columns_of(found), "commit", "threads"]
    head, rule, *lines = cells_of(markdown_table(found, columns))
    assert head[:5] == ["id", "settings", "FLOPs", "speed", "PSNR, dB"]
    assert set(rule) == {"---"}
    assert lines == [[cell(one, column).replace("\n", " ") for column in columns] for one in found]
    assert lines[1][2:5] == ["1.40x", "1.30x (1.25 to 1.37)", "44.0 (41.8 to 46.6)"]
    assert lines[0][3] == "-"
    assert markdown_table(rows(), columns_of(rows())) in page.text


def test_an_unknown_column_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown column 'ssim'; choose among id, .*psnr_db"):
        markdown_table(rows(), ["id", "ssim"])


def test_settings_inside_of_settings_read_well():
    inner = [SETTINGS[1][0].to_dict(), SETTINGS[4][0].to_dict()]
    stacked = row(Setting("both", "stack", {"of": inner}), 1.9, None, 38.0)
    assert cell(stacked, "settings") == "stack of (tofu: ratio=0.5) and (fewer_steps: steps=18)"


@pytest.fixture
def results(tmp_path):
    files = []
    for name in ("a", "b"):
        write_results(tmp_path / name, rows())
        files.append(tmp_path / name / "results.json")
    return files


def test_citations_that_exist_pass(tmp_path, results):
    document = tmp_path / "doc.md"
    document.write_text(
        "44.0 dB <!-- row: a/results.json#emoji/default-0.5 -->\n\n"
        "25.0 <!--row:b/results.json#emoji/tome-0.5-->, cited by `<!-- row: FILE#ID -->`\n"
        "```\n<!-- row: nowhere -->\n```\n"
    )
    assert check_citations(document, results) == []


@pytest.mark.parametrize(
    ("citation", "problem"),
    [
        ("a/results.json#emoji/gone", "none of its 6 rows has this id"),
        ("a/results.json", "none of its 6 rows has this id"),
        ("c/results.json#emoji/tome-0.5", "0 of 2 results files"),
        ("results.json#emoji/tome-0.5", "2 of 2 results files"),
        ("", "0 of 2 results files"),
    ],
)
def test_citations_of_nothing_are_returned(tmp_path, results, citation, problem):
    document = tmp_path / "doc.md"
    document.write_text(f"```\ncode\n```\n`x` <!-- row: {citation} --> `y`\n")
    (wrong,) = check_citations(document, results)
    assert wrong.startswith(f"doc.md:4: {citation}") and problem in wrong


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_documents_cite_rows_that_exist(document):
    results = sorted((ROOT / "eval" / "results").rglob("*.json*"))
    assert check_citations(document, results) == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "eval" / "results").iterdir()), ids=lambda path: path.name
)
def test_results_are_of_commits(path):
    """A commit that ends in "+dirty" names code that nobody can check out."""
    assert "+dirty" not in path.read_text(encoding="utf-8")


# --- What is no sweep


def test_what_is_no_sweep_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results\.json in .*a sweep writes it"):
        run("--sweep", tmp_path)
    for content, problem in (
        ("{", "is no JSON"),
        ("[]", "has format None, this report reads 1"),
        ('{"format": 2, "rows": []}', "has format 2, this report reads 1"),
        ('{"format": 1, "rows": []}', "has no rows"),
        ('{"format": 1, "rows": [{"id": "a/b"}]}', r"row 1 of 1 \(a/b\) lacks pipeline, weights"),
    ):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=problem):
            run("--sweep", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
