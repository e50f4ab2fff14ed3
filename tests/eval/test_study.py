"""eval.studies and report.tables: every valid combination, rows that add up, and documents that show them."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.__main__ import main
from eval.bench.pipeline import UNREDUCED, Bench
from eval.generate.run import Loaded
from eval.generate.settings import Setting, config_of
from eval.jsonl import read
from eval.report import (
    tables,
    tables_distances,
    tables_front,
    tables_profiles,
    tables_rivals,
    tables_rules,
)
from eval.report.tables_rows import FAMILY, by_name, circumstances, described, size
from eval.statistics import difference, of_mean
from eval.studies import stages, study
from eval.studies.stages import STAGES, Trial
from eval.studies.study import Study
from pipelines.emoji import weights_hash
from tests import tiny
from tofu_diffusers import (
    FAMILIES,
    KEYS_VALUES,
    MERGES,
    METHODS,
    SCOPES,
    UNMERGES,
    StepSkipping,
    TokenReduction,
    profile,
)
from tofu_diffusers.steps.rules import computed_steps

ROOT = Path(__file__).parents[2]
CALL = {"guidance_scale": 4.0, "height": 64, "width": 64}


def tiny_study(prompts=3):
    pipe = tiny.tiny_sd(channels=(32,), sample_size=8)
    pipe.set_progress_bar_config(disable=True)
    loaded = Loaded(pipe, "tiny", "0" * 16, "float32", torch.device("cpu"))
    return Study(loaded, ["a cat", "a dog", "a hat"][:prompts], 0, 2, CALL)


def test_the_grid_is_every_valid_combination_and_no_other():
    trials = list(stages.grid(12))
    settings = [trial.setting for trial in trials]
    assert len({setting.name for setting in settings}) == len(settings)
    given = {json.dumps(setting.options, sort_keys=True) for setting in settings}
    assert len(given) == len(settings)
    valid = 0
    names = ("method", "merge", "unmerge", "corrector", "scope", "keys_values")
    others = set(METHODS) - {"tofu"}
    choices = (others, MERGES, UNMERGES, (False, True), SCOPES, KEYS_VALUES)
    for values in itertools.product(*choices):
        options = dict(zip(names, values, strict=True))
        if options["corrector"] and options["unmerge"] != "taylor":
            continue
        try:
            TokenReduction(**options, ratio=stages.RATIO)
        except ValueError:
            continue
        valid += 1
    own = [setting for setting in settings if setting.options["merge"] is None]
    assert {setting.options["method"] for setting in own} == {"tofu"}
    assert len(settings) - len(own) == valid


def test_what_the_grid_leaves_out_is_tome_by_another_name():
    made = tiny_study(prompts=1)
    whole, _ = made.pictures(Trial(UNREDUCED, 4))
    pairs = [("mean", "copy"), ("mlerp", "mlerp"), *(("prune", how) for how in UNMERGES)]
    combinations = [{"merge": merge, "unmerge": how} for merge, how in pairs]
    combinations.append({"merge": "prune", "unmerge": "taylor", "corrector": True})
    for options in combinations:
        tofu, tome = (
            stages.tofu(name, method=name, ratio=0.5, **options, **stages.GRID)
            for name in ("tofu", "tome")
        )
        pictures, _ = made.pictures(Trial(tofu, 4))
        assert torch.equal(pictures, made.pictures(Trial(tome, 4))[0])
        assert not torch.equal(pictures, whole)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_settings_of_every_stage_can_be_made(stage):
    trials = list(STAGES[stage](25))
    names = [(trial.steps, trial.setting.name) for trial in trials]
    assert len(set(names)) == len(names)
    for trial in trials:
        for part in trial.setting.parts():
            if part.kind == "tofu":
                config_of(part.options)


def test_a_row_says_what_was_saved_and_lost():
    made = tiny_study()
    cache = {"total": 12, "computed": 8, "first": 2, "order": 1}
    settings = [
        Setting("steps", "fewer_steps", {"steps": 8}),
        Setting("line", "step_cache", cache),
        stages.tofu("step", speedup=1.5, warmup_steps=2, rule="late"),
        stages.tofu("tome", method="tome", ratio=0.5),
        stages.tofu("tokens", **stages.TOKENS, ratio=0.5, warmup_steps=2),
        Setting("pab", "pab", {"skip": 2}),
    ]
    both = {"of": [settings[4].to_dict(), settings[1].to_dict()]}
    call = {**CALL, "num_inference_steps": 12}
    bench = Bench(made.loaded.pipe, made.prompts[:1], 0, call)
    whole = bench.flops(UNREDUCED)
    for setting in [*settings, Setting("both", "stack", both)]:
        row = made.row(Trial(setting, 12))
        # Counted by running it, not worked out.
        assert row["flops_ratio"] == pytest.approx(whole / bench.flops(setting), rel=0.01)
        assert len(row["psnr_db"]) == row["n"] == 3
        assert row["metrics"]["psnr_db"]["value"] == pytest.approx(
            sum(row["psnr_db"]) / 3, abs=0.01
        )
        assert max(row["psnr_db"]) < 120
    assert made.row(Trial(UNREDUCED, 12))["psnr_db"] == [120.0] * 3


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `eval study` on a tiny pipeline, with two settings."""
    out = tmp_path / "rows.jsonl"
    loaded = tiny_study().loaded
    monkeypatch.setattr(
        study.run,
        "load",
        lambda source, dtype, scheduler: replace(loaded, scheduler=scheduler),
    )
    trials = [
        Trial(Setting(f"steps-{count}", "fewer_steps", {"steps": count}), 3) for count in (1, 2)
    ]
    monkeypatch.setitem(STAGES, "grid", lambda steps: trials)

    def run(*more):
        words = ["study", "--stage", "grid", "-n", "2", "--height", "64", "--width", "64", *more]
        main([*words, "--out", str(out)])
        return read(out)

    return run, out


def test_goes_on_where_it_was_killed(command):
    run, out = command
    rows = run()
    assert [row["setting"]["name"] for row in rows] == ["steps-1", "steps-2"]
    whole = out.read_bytes()
    first, second = whole.splitlines(keepends=True)
    out.write_bytes(first + second[:40])
    assert len(read(out)) == 1
    again = run()
    assert [row["psnr_db"] for row in again] == [row["psnr_db"] for row in rows]
    out.write_bytes(whole)
    run()
    assert out.read_bytes() == whole


def test_only_rows_that_match_are_made(command, capsys):
    run, out = command
    assert [row["setting"]["name"] for row in run("--match", "3steps.*-2$")] == ["steps-2"]
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        run("--match", "4steps")
    assert "no row of stage grid matches '4steps'" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_no_setting_hangs_on_a_profile():
    """Profiles change: a row must say all that it was measured with.

    But for what people type, of which is asked what the profiles of the row's commit do.
    """
    trials = [*stages.grid(25), *stages.merging(25), *stages.tokens(25), *stages.early(25)]
    assert len(trials) > 250
    for trial in trials:
        options = trial.setting.options
        assert "method" in options and config_of(options).is_resolved, options


def test_typed_settings_are_what_people_type():
    typed = [trial.setting for trial in stages.typed(25)]
    given = [list(each.options) for each in typed if each.kind == "tofu"]
    assert given.count(["ratio"]) == given.count(["speedup"]) == 3 and len(given) == 6
    # Fewer steps have no more FLOPs than each speed-up.
    counts = [each.options["steps"] for each in typed if each.kind == "fewer_steps"]
    speedups = [each.options["speedup"] for each in typed if "speedup" in each.options]
    assert all(25 / n >= s for n, s in zip(counts, speedups, strict=True))


def test_beside_each_rival_stands_the_default_at_as_many_flops():
    rivals = [
        Setting("steps-12", "fewer_steps", {"steps": 12}),
        Setting("own", "tofu", {"speedup": 3.0}),
        Setting("nothing-skipped", "seacache", {"threshold": 1e-9}),
    ]
    rows = [
        {"setting": each.to_dict(), "flops_ratio": ratio}
        for each, ratio in zip(rivals, (2.0833, 3.0, 1.0), strict=True)
    ]
    (trial,) = stages.beside(rows, 25)
    assert trial.setting.name == "speedup-as-steps-12"
    assert computed_steps(25, trial.setting.options["speedup"], range(1, 25)) == 12


def test_the_flops_of_what_decides_on_the_way_are_those_of_all_prompts(monkeypatch):
    tiny_one = tiny_study()
    counted = []
    monkeypatch.setattr(
        study.Bench,
        "flops",
        lambda bench, setting: counted.append(bench.prompts) or len(bench.prompts),
    )
    assert tiny_one.counted(Trial(UNREDUCED, 3), {}) == 1.0
    assert [each for batch in counted[:-1] for each in batch] == tiny_one.prompts


def test_rows_made_otherwise_are_not_mixed(command, capsys):
    run, out = command
    run()
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        run("--seed", "5")
    told = capsys.readouterr().err.splitlines()[-1]
    assert "seed: 0 here, 5 asked for" in told and told.startswith("eval study: error: ")
    assert out.read_bytes() == before


# ---- the documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_committed_rows(path):
    text = path.read_text(encoding="utf-8")
    assert tables.MARKED.search(text)
    assert tables.filled(text) == text


def test_every_table_stands_in_a_document():
    texts = [path.read_text(encoding="utf-8") for path in tables.DOCUMENTS]
    assert {name for text in texts for _, name, _ in tables.MARKED.findall(text)} == {
        *tables.TABLES
    }


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="no table 'nonsense'"):
        tables.filled("<!-- table: nonsense -->\n<!-- /table -->")


def test_rows_of_another_scheduler_are_others(command):
    run, _ = command
    rows = [*run(), *run("--scheduler", "HeunDiscreteScheduler")[2:]]
    assert [row["id"].split("/")[0] for row in rows] == [
        *["tiny-64px-3steps-n2"] * 2,
        *["tiny-64px-3steps-n2-HeunDiscreteScheduler"] * 2,
    ]
    assert [row.get("scheduler") for row in rows] == [None] * 2 + ["HeunDiscreteScheduler"] * 2


def test_every_rule_computes_as_many_steps_as_fewer_steps_do():
    found: dict[tuple[int, str], set[int]] = {}
    for trial in stages.rules(25):
        speedup = trial.setting.name.split("-")[1]
        steps = found.setdefault((trial.steps, speedup), set())
        if trial.setting.kind == "fewer_steps":
            steps.add(trial.setting.options["steps"])
            continue
        config = config_of(trial.setting.options)
        free = range(config.steps_needed, trial.steps)
        steps.add(computed_steps(trial.steps, config.speedup, free))
    assert len(found) == 18
    assert {len(steps) for steps in found.values()} == {1}


def test_settings_of_the_study_are_told_apart_in_words():
    words = [
        described({"setting": each.setting.to_dict(), "steps": 25, "flops_ratio": 2.0})
        for each in stages.front(25)
    ]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("path", tables_front.FRONT.values(), ids=lambda path: path.name)
def test_the_committed_front_is_whole(path):
    rows = read(path)
    names = {row["setting"]["name"] for row in rows}
    packages = {
        "unet": {"tomesd-0.5", "deepcache-2", "deepcache-3"},
        "mmdit": {"taylorseer-2", "taylorseer-3"},
    }
    rivals = {"pab-2", "both-0.25-2", "both-0.5-2", *packages[rows[0]["pipeline"]]}
    beside = {f"speedup-as-{name}" for name in rivals}
    assert names == {trial.setting.name for trial in stages.front(25)} | rivals | beside
    assert {(row["steps"], row["n"], len(row["psnr_db"])) for row in rows} == {(25, 32, 32)}
    assert {(row["seed"], size(row)) for row in rows} == {(0, "128 x 128 px")}


@pytest.mark.parametrize("path", tables_rivals.RIVALS.values(), ids=lambda path: path.name)
def test_beside_every_committed_rival_is_the_default(path):
    rows = by_name(read(path))
    assert {(row["n"], row["seed"], size(row)) for row in rows.values()} == {(32, 0, "64 x 64 px")}
    rivals = {name for name in rows if not name.startswith("speedup-as-")}
    kinds = {"seacache"} | (
        {"magcache", "dbcache", "taylorseer"} if "mmdit" in path.name else {"deepcache"}
    )
    assert {rows[name]["setting"]["kind"] for name in rivals} >= kinds
    for name in rivals:
        if rows[name]["flops_ratio"] > 1:
            assert rows[f"speedup-as-{name}"]["flops_ratio"] >= rows[name]["flops_ratio"] - 0.001


def test_fewer_steps_beside_a_row_are_the_best_there():
    def steps(count, saved, db, **more):
        return {
            "setting": {"kind": "fewer_steps", "options": {"steps": count, **more}},
            "flops_ratio": saved,
            "metrics": {"psnr_db": {"value": db}},
        }

    rows = [
        steps(18, 1.39, 51),
        steps(16, 1.56, 49),
        steps(15, 1.67, 50),
        steps(12, 2.08, 45),
        steps(14, 1.79, 99, scheduler="multistep"),
    ]
    assert tables_front.like({"flops_ratio": 1.80}, rows) is rows[2]
    assert tables_front.like({"flops_ratio": 1.40}, rows) is rows[0]
    assert tables_front.like({"flops_ratio": 1.56}, rows) is rows[2]
    assert tables_front.like({"flops_ratio": 1.2}, rows) is None


def test_two_rows_of_one_name_are_refused():
    def row(size):
        return {"id": f"unet-{size}px-n32/a", "setting": {"name": "a"}}

    with pytest.raises(ValueError, match="unet-64px-n32/a and unet-128px-n32/a lie in one file"):
        by_name([row(64), row(128)])
    assert [*by_name([row(64)])] == ["a"]


def test_what_differs_between_rows_is_told_once():
    about = {
        "pipeline": "unet",
        "weights": "abc",
        "device": "CPU",
        "versions": {"torch": "2"},
        "steps": 25,
    }
    rows = [
        {**about, "n": n, "seed": 0, "call": {"guidance_scale": guidance, **sides}}
        for n, guidance, sides in (
            (8, 3.0, {}),
            (32, 5.0, {"height": 64, "width": 96}),
            (8, 3.0, {}),
        )
    ]
    told = circumstances(rows, "What.")
    assert (
        "128 x 128 px or 96 x 64 px, 25 steps, guidance 3 or 5, n = 8 or 32, seed 0 on; CPU;"
        in told
    )
    assert told.endswith(". What.")


def test_of_each_rival_the_closest_is_shown():
    def pair(name, theirs, own):
        rows = ({"setting": {"name": name}}, {"setting": {"name": f"speedup-as-{name}"}})
        values = ({"metrics": {"psnr_db": {"value": value}}} for value in (theirs, own))
        return tuple(each | value for each, value in zip(rows, values, strict=True))

    far, near, other = pair("cache-0.1", 30, 50), pair("cache-0.2", 30, 45), pair("skip-2", 1, 99)
    assert [*tables_rivals.closest([far, near, other])] == [near, other]


def test_a_change_the_other_way_round():
    change = {"value": 0.25, "low": 0.0, "high": 1.0}
    assert tables_distances.less(change) == "-20.0% (-50.0% to +0.0%)"


def test_how_much_worse_at_most():
    more, fewer = {"lower": 0.01, "upper": 0.02}, {"lower": -0.03, "upper": 0.01}
    metrics = {f"{tables_distances.FD}-change": more, f"{tables_distances.ALIGNMENT}-change": fewer}
    assert tables_distances.worst(metrics, tables_distances.FD) == "2.0%"
    assert tables_distances.worst(metrics, tables_distances.ALIGNMENT) == "3.0%"
    metrics[f"{tables_distances.ALIGNMENT}-change"] = more
    assert tables_distances.worst(metrics, tables_distances.ALIGNMENT) == "0.0%"


@pytest.mark.parametrize("path", tables_rules.RULES.values(), ids=lambda path: path.name)
def test_the_committed_rules_are_whole(path):
    groups: dict[tuple[int, str], list[str]] = {}
    for row in read(path):
        assert (row["n"], row["seed"], size(row)) == (8, 0, "64 x 64 px")
        sampler = row.get("scheduler", "")
        groups.setdefault((row["steps"], sampler), []).append(row["setting"]["name"])
    assert len(groups) == (6 if "unet" in path.name else 9)
    for (steps, _), names in groups.items():
        known = (trial.setting.name for trial in stages.rules(25) if trial.steps == steps)
        assert sorted(names) == sorted(known)


@pytest.mark.parametrize("path", tables_front.HIRES.values(), ids=lambda path: path.name)
def test_the_committed_hires_passes_are_of_the_same_settings(path):
    rows = read(path)
    upscaled, drawn = (
        sorted(row["setting"]["name"] for row in rows if row["sides"] == [side, 128])
        for side in (64, 128)
    )
    assert upscaled == drawn
    assert {*drawn} >= {"ratio-0.5", "tofu-0.5", "tofu-attention-0.5", "tome-0.5", "random-0.5"}


@pytest.mark.parametrize(("px", "n"), {64: 256, 128: 128}.items())
@pytest.mark.parametrize("model", tables_distances.DISTANCES)
def test_the_committed_distances_are_whole_and_see_damage(model, px, n):
    rows = tables_distances.sweep_rows(tables_distances.SIZES[f"{px} px"][model])
    names = {trial.setting.name for trial in stages.distances(25)}
    if px == 128:
        around = {f"{name}-attention-0.5" for name in ("tofu", "tome", "prune")}
        names = {*tables_distances.SHARP, *around}
    assert {*rows} == names | {"unreduced"}
    for row in rows.values():
        assert (row["n"], row["seed"], size(row)) == (n, 0, f"{px} x {px} px")
    damage = rows["damaged"]["metrics"]
    assert damage[f"{tables_distances.FD}-change"]["lower"] > 0.1
    assert damage[f"{tables_distances.ALIGNMENT}-change"]["upper"] < -0.1


@pytest.mark.parametrize("model", tables_profiles.PROFILES)
def test_every_option_of_the_token_profile_was_tried(model):
    rows = {row["id"] for row in read(tables_profiles.PROFILES[model])}
    for steps, count in {12: 8, 25: 32, 50: 8}.items():
        names = {trial.setting.name for trial in stages.profiles(steps)}
        if steps != 25:
            names = {name for name in names if name.startswith("first3-")}
        assert rows >= {f"{model}-64px-{steps}steps-n{count}/{name}" for name in names}


@pytest.mark.parametrize("workflow", ["tokens", "speedup"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_measured_profile_is_that_of_its_row(family, workflow):
    chosen = profile(family)[workflow]
    if chosen["result"] is None:
        pytest.skip("provisional: these very options were not measured")
    file, row_id = chosen["result"].split("#")
    (row,) = [each for each in read(ROOT / file) if each["id"] == row_id]
    assert row["weights"] == profile(family)["weights"]
    config = config_of(row["setting"]["options"])
    kind = {"TokenReduction": TokenReduction, "StepSkipping": StepSkipping}
    assert type(config) is kind[chosen.get("type", "TokenReduction")]
    amount = {n: getattr(config, n) for n in ("ratio", "speedup") if hasattr(config, n)}
    # A row of rule "trajectory" is of the profile's trajectory, and does not repeat it.
    options = {name: each for name, each in chosen["options"].items() if name != "trajectory"}
    assert config == type(config)(**amount, **options)
    # Nothing that was measured on the same pictures saves as much and surely drifts less; of tokens: nothing
    # that removes some at every step.
    place = row_id.rpartition("/")[0]
    rivals = [each for each in read(ROOT / file) if each["id"].startswith(place + "/")]
    if workflow == "tokens":
        rivals = [
            each
            for each in rivals
            if each["setting"]["kind"] in ("tofu", "tomesd")
            and "speedup" not in each["setting"]["options"]
        ]
    mine = of_mean(row["psnr_db"])
    better = [
        each["id"]
        for each in rivals
        if each["flops_ratio"] >= row["flops_ratio"]
        and difference(of_mean(each["psnr_db"]), mine).low > 0
    ]
    assert len(rivals) > 10 and better == []


def weights_in(path):
    """Pairs of pipeline and weights of a file's rows, as far as they are of one."""
    if path.suffix == ".jsonl":
        rows = read(path)
    else:
        data = json.loads(path.read_text(encoding="utf-8"))
        about = data.get("about", {}).get("pipeline", {})
        rows = data["rows"] + [{"pipeline": about.get("name"), "weights": about.get("weights")}]
    return {(row.get("pipeline"), row.get("weights")) for row in rows}


RESULTS = sorted((ROOT / "eval" / "results").glob("*.json*"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_no_committed_row_is_of_earlier_weights(path):
    now = {model: weights_hash(model) for model in FAMILY}
    earlier = {pair for pair in weights_in(path) if pair[0] in now} - {*now.items()}
    assert not earlier


def test_profiles_were_measured_on_the_weights_at_hand():
    for model, family in FAMILY.items():
        assert profile(family)["weights"] == weights_hash(model)
