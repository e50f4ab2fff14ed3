"""The tables of the study and of sweeps: drift, and what else it cost, from committed rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eval.jsonl import read
from eval.provenance import ROOT
from eval.report.cells import interval, versions
from eval.statistics import difference, of_mean
from pipelines.emoji import weights_hash

FAMILY = {"unet": "unet", "mmdit": "sd3"}
RESULTS = {name: ROOT / "eval" / "results" / f"study_{name}.jsonl" for name in FAMILY}
QUALITY = {name: ROOT / "eval" / "results" / f"sweep_{name}.json" for name in FAMILY}
DISTANCES = {name: ROOT / "eval" / "results" / f"sweep_{name}_64px.json" for name in FAMILY}

CHOSEN_WARMUP = {"unet": 2, "mmdit": 4}
"""Of rule "late", which the study was made with."""
RULES = {name: ROOT / "eval" / "results" / f"rules_{name}.jsonl" for name in FAMILY}
SEARCHED = ROOT / "eval" / "results" / "searched.jsonl"
TYPED = {name: ROOT / "eval" / "results" / f"typed_{name}.jsonl" for name in FAMILY}

Row = Mapping[str, Any]


def rows_of(model: str, stage: str) -> list[Row]:
    """A pipeline's committed rows of one stage, such as "25steps-n32"."""
    start = f"{model}-{stage}/"
    return [row for row in read(RESULTS[model]) if row["id"].startswith(start)]


def described(row: Row) -> str:
    """A setting in words."""
    setting, steps = row["setting"], row["steps"]
    options, kind = setting["options"], setting["kind"]
    if kind == "fewer_steps":
        solver = ", DPM-Solver++" if "scheduler" in options else ""
        return f"{options['steps']} steps{solver}"
    if kind == "step_cache":
        how = "extrapolated" if options["order"] else "repeated"
        return (
            f"whole-step caching, {options['computed']} of {steps} steps, the first {options['first']} among "
            f"them, {how}"
        )
    if kind == "stack":
        inner = " with ".join(
            described({"setting": each, "steps": steps}) for each in options["of"]
        )
        return f"both: {inner}"
    if kind == "both":
        return f"both: `ratio={options['tokens']['ratio']:g}` and `speedup={options['steps']['speedup']:g}`"
    if kind != "tofu":
        numbers = ", ".join(f"{name} {value}" for name, value in options.items())
        return f"{kind}, {numbers}"
    corrector = ", corrector" if options.get("corrector") else ""
    if len(options) == 1:  # as people type it
        ((name, amount),) = options.items()
        return f"`{name}={amount:g}`"
    if "speedup" in options:
        computed = round(steps / row["flops_ratio"])
        return (
            f"step skipping{corrector}, speedup {options['speedup']:.2f}, {options['warmup_steps']} warm-up "
            f"steps: {computed} of {steps} steps computed"
        )
    if "keys_values" in options:
        how_chosen = options.get("method_options", {})
        source = how_chosen.get("source", "change")
        chosen = {"random": "at random", "importance": f"by {source.replace('_', ' ')}"}
        how = chosen.get(options["method"], f"as {options['method']} chooses")
        if how_chosen.get("age_exponent", 0) > 2:
            how = f"oldest first, then {how}"
        return (
            f"tokens {how}, {options['unmerge']}{corrector}, keys_values {options['keys_values']}, "
            f"ratio {options['ratio']:g}, {options['warmup_steps']} warm-up steps"
        )
    if "schedule" in options:
        return f"few tokens early (JiT's shares), {options['method']}"
    merge = f", {options['merge']}" if "merge" in options else ""
    where = ", around attention" if "scope" in options else ""
    return f"{options['method']}{merge}{where}, ratio {options['ratio']:g}"


def cite(model: str, row: Row, files: Mapping[str, Path] = RESULTS) -> str:
    """The comment that names a row."""
    return f"<!-- row: {files[model].name}#{row['id']} -->"


def line(model: str, row: Row) -> str:
    """A row of a table: what, FLOPs, PSNR with its interval, the worst picture's."""
    psnr = row["metrics"]["psnr_db"]
    return (
        f"| {described(row)} {cite(model, row)} | {row['flops_ratio']:.2f}x | "
        f"{interval(psnr, 1)} | {min(row['psnr_db']):.1f} |"
    )


def circumstances(rows: Sequence[Row]) -> str:
    """Of rows that share them, whatever their pipelines."""
    row = rows[0]
    weights = {each["pipeline"]: each["weights"] for each in rows}
    pipelines = ", ".join(
        f"`{name}` (weights {those}{'' if those == weights_hash(name) else ', replaced since'})"
        for name, those in weights.items()
    )
    call = row.get("call", {})
    calls = [each["call"] for each in rows if "width" in each.get("call", {})]
    sizes = dict.fromkeys(f"{each['width']} x {each['height']} px" for each in calls)
    size = f"{' or '.join(sizes)}, " if sizes else ""
    count = " or ".join(dict.fromkeys(str(each["n"]) for each in rows))
    guidance = f"guidance {call['guidance_scale']:g}, " if call else ""
    steps = " or ".join(dict.fromkeys(str(each["steps"]) for each in rows))
    return (
        f"Embedded pipeline {pipelines}, {size}{steps} steps, {guidance}n = {count}, "
        f"seed {row['seed']} on; {row['device']}; {versions(row)}. PSNR to the unreduced picture of "
        "the same seed in dB, mean with its 95 % bootstrap interval. FLOPs of the denoiser, counted, "
        "unreduced over reduced."
    )


def sampler(row: Row) -> str:
    """The sampler's class and options in words, behind a comma; nothing for the pipeline's own."""
    return f", {row['scheduler'].replace(',', ' with ')}" if "scheduler" in row else ""


def ahead(mine: Row, other: Row) -> str:
    """By how many dB, image by image, with its interval."""
    gain = difference(of_mean(mine["psnr_db"]), of_mean(other["psnr_db"]))
    return f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"


def drift_table(model: str, stage: str) -> str:
    """All rows of a stage, the least drift first."""
    rows = rows_of(model, stage)
    ordered = sorted(rows, key=lambda row: -row["metrics"]["psnr_db"]["value"])
    head = ["| | FLOPs | PSNR, dB | lowest |", "|---|---|---|---|"]
    return "\n".join([circumstances(rows), "", *head, *(line(model, row) for row in ordered)])


LENGTHS = (10, 20, 50)
# In the order of the plots: the profile's step skipping at two savings, what removes tokens, what must be
# beaten.
SHORT = (
    "step-17-corrected", "step-17-first4-corrected", "step-12-corrected", "step-12-first4-corrected",
    "tokens-fresh-0.5-due", "tokens-fresh-0.5-corrected", "tokens-fresh-0.5", "tokens-cached-0.5-corrected",
    "tofu-0.5", "tome-0.5", "pitome-0.5", "random-0.5", "tomesd-0.5", "deepcache-2", "taylorseer-2",
    "steps-17", "steps-12", "multistep-12", "line-12", "late-12",
)  # fmt: skip
# Beside these, drawn: the most that each can save.
FURTHEST = (
    "step-8-corrected", "step-8-first4-corrected", "tokens-fresh-0.75-due", "steps-8", "line-8", "late-8",
)  # fmt: skip


def chosen(model: str, stage: str, names: Iterable[str]) -> dict[str, Row]:
    """Rows by name, in this order, as far as there are; of step skipping only the profile's."""
    rows = named(model, stage)
    return {
        name: rows[name]
        for name in names
        if name in rows and (not name.startswith("step-") or is_chosen(model, rows[name]))
    }


def drawn_rows(model: str, stage: str) -> list[Row]:
    """Those of the plot."""
    return list(chosen(model, stage, (*SHORT, *FURTHEST)).values())


def typed_order(row: Row) -> tuple[bool, float, str]:
    """Ratios first; then each speed-up before the fewer steps that save as much."""
    kind = row["setting"]["name"].split("-")[0]
    return kind != "ratio", round(row["flops_ratio"], 1), kind


def typed_table() -> str:
    """The values that people type, both models side by side; of the weights at hand."""
    shown: dict[str, dict[str, Row]] = {}
    for model, path in TYPED.items():
        for row in sorted(read(path), key=typed_order):
            kind, amount = row["setting"]["name"].split("-")
            label = f"{amount} steps" if kind == "steps" else f"`{kind}={amount}`"
            shown.setdefault(label, {})[model] = row
    return side_by_side(shown, TYPED)


def rules_table() -> str:
    """The default rule at every speed-up, and how far it is ahead of the best other one."""
    groups: dict[tuple[str, int, str], dict[float, list[Row]]] = {}
    every = []
    for model, path in RULES.items():
        for row in read(path):
            every.append(row)
            group = groups.setdefault((model, row["steps"], sampler(row)), {})
            group.setdefault(float(row["setting"]["name"].split("-")[1]), []).append(row)
    speedups = sorted({speedup for group in groups.values() for speedup in group})
    head = ["", *(f"{speedup:g}x" for speedup in speedups)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (model, steps, also), group in groups.items():
        cells = [default_ahead(model, group[speedup]) for speedup in speedups]
        lines.append(f"| `{model}`, {steps} steps{also} | {' | '.join(cells)} |")
    return "\n".join([circumstances(every), "", *lines])


def default_ahead(model: str, rows: Iterable[Row]) -> str:
    """The PSNR of rule "trajectory", how much more than the best of the other rules, and than fewer steps."""
    drift = {
        row["setting"]["options"].get("rule", "fewer steps"): row
        for row in sorted(rows, key=lambda row: row["metrics"]["psnr_db"]["value"])
    }
    own, fewer = drift.pop("trajectory"), drift.pop("fewer steps")
    other = max(drift.values(), key=lambda row: row["metrics"]["psnr_db"]["value"])
    value = own["metrics"]["psnr_db"]["value"]
    ahead = (
        f"{value - row['metrics']['psnr_db']['value']:+.1f} {cite(model, row, RULES)}"
        for row in (other, fewer)
    )
    return f"{value:.1f} {cite(model, own, RULES)} ({', '.join(ahead)})"


def searched_table() -> str:
    """What a search over whole schedules finds, beside the default rule's own choice."""
    lines = [
        "| | rule `trajectory`, dB | found, dB | ahead, dB | on the prompts of the search | schedules |",
        "|---|---|---|---|---|---|",
    ]
    rows = read(SEARCHED)
    for row in rows:
        ahead = row["ahead_db"]
        drawn = (
            "".join("#" if step in computed else "." for step in range(row["steps"]))
            for computed in row["schedules"].values()
        )
        cells = [
            f"`{row['pipeline']}`, {row['call']['width']} px, {row['steps']} steps{sampler(row)}, "
            f"{row['speedup']:g}x <!-- row: {SEARCHED.name}#{row['id']} -->",
            interval(row["planned"], 1),
            interval(row["found"], 1),
            f"{ahead['held_out']:+.1f} ({ahead['low']:+.1f} to {ahead['high']:+.1f})",
            f"{ahead['searched']:+.1f}",
            "<br>".join(f"`{each}`" for each in drawn),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([circumstances(rows), "", *lines])


def plans_table(stage: str) -> str:
    """Plans that are shared by more blocks and steps, both models side by side."""
    shown: dict[str, dict[str, Row]] = {}
    for model in RESULTS:
        for row in rows_of(model, stage):
            options = row["setting"]["options"]
            what = "tokens by change" if options["method"] == "importance" else options["method"]
            steps = f", kept for {options['reuse']} steps" if "reuse" in options else ""
            shown.setdefault(f"{what}: one plan a {options['share']}{steps}", {})[model] = row
    return side_by_side(shown)


def named(model: str, stage: str) -> dict[str, Row]:
    """A stage's rows by the name of their setting."""
    return by_name(rows_of(model, stage))


def by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows of one stage by the name of their setting."""
    return {row["setting"]["name"]: row for row in rows}


def side_by_side(
    shown: Mapping[str, Mapping[str, Row]], files: Mapping[str, Path] = RESULTS
) -> str:
    """A line a label, with a row of each model from its file."""
    lines = [
        "| | `unet`, FLOPs | PSNR, dB | `mmdit`, FLOPs | PSNR, dB |",
        "|---|---|---|---|---|",
    ]
    for label, by_model in shown.items():
        cells = []
        for model in RESULTS:
            row = by_model.get(model)
            cells += (
                ["", ""]
                if row is None
                else [
                    f"{row['flops_ratio']:.2f}x {cite(model, row, files)}",
                    interval(row["metrics"]["psnr_db"], 1),
                ]
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    every = [row for by_model in shown.values() for row in by_model.values()]
    return "\n".join([circumstances(every), "", *lines])


def lengths_table(stage: str) -> str:
    """Step skipping in short, usual and long generations, and what has the same FLOPs."""
    return beside_rivals(
        (model, "", rows_of(model, stage.format(steps))) for model in RESULTS for steps in LENGTHS
    )


def samplers_table(stage: str) -> str:
    """Step skipping with other samplers, and what has the same FLOPs."""
    found: dict[tuple[str, str], list[Row]] = {}
    for model, path in RESULTS.items():
        for row in read(path):
            if row["id"].startswith(f"{model}-{stage}-"):
                found.setdefault((model, row["scheduler"]), []).append(row)
    return beside_rivals((model, f" {name},", rows) for (model, name), rows in found.items())


def beside_rivals(groups: Iterable[tuple[str, str, Sequence[Row]]]) -> str:
    """A line for every row of step skipping that is a profile's, beside what has the same FLOPs.

    Args:
        groups: A model, what else to say of it, and rows that belong together.
    """
    lines = [
        "| | FLOPs | step skipping | first quarter computed, then evenly | evenly | fewer steps |",
        "|---|---|---|---|---|---|",
    ]
    every = []
    for model, also, rows in groups:
        every += rows
        names = by_name(rows)
        for name, row in sorted(names.items(), key=lambda item: item[1]["flops_ratio"]):
            if not is_chosen(model, row):
                continue
            count = name.split("-")[1]
            beside = [row, *(names[f"{rival}-{count}"] for rival in ("late", "line", "steps"))]
            cells = []
            for each in beside:
                apart = abs(each["flops_ratio"] / row["flops_ratio"] - 1) > 0.02
                at = f" at {each['flops_ratio']:.2f}x" if apart else ""
                cells.append(f"{each['metrics']['psnr_db']['value']:.1f}{at} {cite(model, each)}")
            lines.append(
                f"| `{model}`,{also} {count} of {row['steps']} steps | {row['flops_ratio']:.2f}x | "
                f"{' | '.join(cells)} |"
            )
    return "\n".join([circumstances(every), "", *lines])


Metrics = Mapping[str, Mapping[str, float]]


def quality_table() -> str:
    """What settings kept of the pictures' quality, and what they lose of alignment at most."""

    def cells(metrics: Metrics) -> list[str]:
        alignment = interval(metrics["emoji_alignment"], 2)
        return [f"{metrics['ssim']['value']:.3f}", alignment, *alignment_lost(metrics)]

    return kept_table(QUALITY, ["SSIM", "alignment", "change", "loss at most"], cells)


def distances_table() -> str:
    """How far sets of pictures are from the pictures of training, and by how much farther at most."""

    def cells(metrics: Metrics) -> list[str]:
        found = alignment_lost(metrics)[1:]
        for name, scale in (("fd-effnetlite0-real", 1), ("kid-effnetlite0-real", 1000)):
            scaled = {key: metrics[name][key] * scale for key in ("value", "low", "high")}
            found += [interval(scaled, 1), *changed(metrics, name, "upper")]
        return found

    more = ("change", "increase at most")
    head = ["loss of alignment at most", "FD", *more, "KID x 1000", *more]
    return kept_table(DISTANCES, head, cells)


def alignment_lost(metrics: Metrics) -> list[str]:
    """Its change, and the one-sided 95 % bound of the loss."""
    return changed(metrics, "emoji_alignment", "lower")


def changed(metrics: Metrics, name: str, worst: str) -> list[str]:
    """A metric's change, and how much worse it is at most, by one bound; nothing of the unreduced row."""
    change = metrics.get(f"{name}-change")
    if change is None:
        return ["", ""]
    worse = change["upper"] if worst == "upper" else -change["lower"]
    return [f"{change['value']:+.1%}", f"{max(0.0, worse):.1%}"]


def kept_table(
    files: Mapping[str, Path], head: Sequence[str], cells: Callable[[Metrics], list[str]]
) -> str:
    """A line a row of sweeps: what it saves and how far it drifts, and `cells` of its metrics."""
    head = ["", "FLOPs", "PSNR, dB", *head]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    every = []
    for path in files.values():
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            every.append(row)
            what, saved, drift = "unreduced", "", ""
            if row["setting"]["kind"] != "unreduced":
                what, saved = described(row), f"{row['flops_ratio']:.2f}x"
                drift = interval(row["metrics"]["psnr_db"], 1)
            what = f"`{row['pipeline']}`, {what} <!-- row: {path.name}#{row['id']} -->"
            lines.append(f"| {' | '.join([what, saved, drift, *cells(row['metrics'])])} |")
    return "\n".join([circumstances(every), "", *lines])


def is_chosen(model: str, row: Row) -> bool:
    """Whether a row is the step skipping that the study found best of its own, whatever the speed-up."""
    options = row["setting"].get("options", {})
    chosen = {"warmup_steps": CHOSEN_WARMUP[model], "rule": "late", "order": 1, "corrector": True}
    return (
        row["setting"]["kind"] == "tofu"
        and {name: value for name, value in options.items() if name != "speedup"} == chosen
    )


# What has the same FLOPs, by the names of its settings: "line-12" beside "step-12", which has a twin without
# corrector.
RIVALS = {
    "steps": "fewer steps",
    "multistep": "fewer steps, DPM-Solver++",
    "line": "steps skipped evenly",
    "late": "evenly after the first quarter",
    "repeat": "evenly, repeated",
    "": "without corrector",
}


def ahead_table(stage: str) -> str:
    """By how much the profile's step skipping is ahead of what has the same FLOPs, image by image."""
    lines = []
    for model in RESULTS:
        rows = named(model, stage)
        for name, row in rows.items():
            if not is_chosen(model, row):
                continue
            count = name.split("-")[1]
            others = [
                rows.get(f"{rival}-{count}" if rival else name.removesuffix("-corrected"))
                for rival in RIVALS
            ]
            label = f"`{model}`, {count} of {row['steps']} steps computed"
            lines.append(ahead_line(label, model, row, others))
    return "\n".join([*ahead_head(RIVALS.values()), *lines])


def ahead_head(rivals: Iterable[str]) -> list[str]:
    """Of a table of `ahead_line`."""
    names = ["dB ahead of", "FLOPs", *rivals]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def ahead_line(label: str, model: str, row: Row, others: Iterable[Row | None]) -> str:
    """By how much a setting is ahead of each other one, image by image; its own FLOPs."""
    cells = [
        "" if other is None else f"{ahead(row, other)} {cite(model, other)}" for other in others
    ]
    return f"| {label} {cite(model, row)} | {row['flops_ratio']:.2f}x | {' | '.join(cells)} |"


# Tokens oldest first, and how many steps cost about as much.
OLDEST = (
    ("unet", "tokens-fresh-0.75", 17),
    ("mmdit", "tokens-fresh-0.5", 17),
    ("mmdit", "tokens-fresh-0.75", 12),
)
OLDEST_RIVALS = ("steps", "line", "late")


def oldest_table(stage: str) -> str:
    """By how much tokens oldest first are ahead of the choice by change, and of steps skipped."""
    lines = []
    for model, name, count in OLDEST:
        rows = named(model, stage)
        row = rows[f"{name}-due"]
        others = [rows[f"{name}-corrected"], *(rows[f"{rival}-{count}"] for rival in OLDEST_RIVALS)]
        label = f"`{model}`, ratio {row['setting']['options']['ratio']:g}"
        lines.append(ahead_line(label, model, row, others))
    rivals = ("tokens by change", *(RIVALS[rival] for rival in OLDEST_RIVALS))
    return "\n".join([*ahead_head(rivals), *lines])


def worth(
    rows: Sequence[Row], option: str, mine: str, other: str
) -> tuple[int, float, float, float]:
    """Over all combinations that differ in one option only: how many, mean, p20 and p80 of the dB gained."""

    def rest(row: Row) -> tuple[Any, ...]:
        options = dict(row["setting"]["options"])
        # ToFu's matching is ToMe's; in the grid only its merge is its own.
        if options.get("method") == "tofu":
            options["method"] = "tome"
        return tuple(sorted((k, str(v)) for k, v in options.items() if k != option))

    found: dict[str, dict[tuple[Any, ...], float]] = {mine: {}, other: {}}
    for row in rows:
        value = str(row["setting"]["options"].get(option))
        if value in found:
            found[value][rest(row)] = row["metrics"]["psnr_db"]["value"]
    gains = [found[mine][key] - found[other][key] for key in found[mine] if key in found[other]]
    if not gains:
        return 0, float("nan"), float("nan"), float("nan")
    low, high = np.percentile(gains, [20, 80])
    return len(gains), float(np.mean(gains)), float(low), float(high)


QUESTIONS = (
    ("merge", "mlerp", "mean"),
    ("merge", "None", "prune"),
    ("merge", "None", "mlerp"),
    ("merge", "mean", "prune"),
    ("unmerge", "temporal", "copy"),
    ("unmerge", "taylor", "temporal"),
    ("unmerge", "blend", "temporal"),
    ("corrector", "True", "False"),
    ("keys_values", "fresh", "dropped"),
    ("keys_values", "cached", "dropped"),
    ("keys_values", "fresh", "cached"),
    ("scope", "block", "attention"),
    ("method", "importance", "random"),
    ("method", "pitome", "tome"),
    ("method", "tome", "random"),
)


def worth_table(stage: str) -> str:
    """What each choice is worth, by pairs of combinations that differ in nothing else."""
    lines = [
        "| choice | instead of | "
        + " | ".join(f"`{model}`, dB | pairs" for model in RESULTS)
        + " |",
        "|---|---|" + "---|---|" * len(RESULTS),
    ]
    rows = {model: rows_of(model, stage) for model in RESULTS}
    for option, mine, other in QUESTIONS:
        cells = []
        for model in RESULTS:
            count, mean, low, high = worth(rows[model], option, mine, other)
            gained = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" if count else "n/a"
            cells += [gained, str(count)]
        named = (value if value != "None" else "ToFu's own, by depth" for value in (mine, other))
        lines.append(f"| {option} {' | '.join(named)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_table(stage: str) -> str:
    """Of the grid: at each saving, the combination with the least drift."""
    lines = [
        "| | at least | best combination | FLOPs | PSNR, dB |",
        "|---|---|---|---|---|",
    ]
    for model in RESULTS:
        rows = rows_of(model, stage)
        for floor, ceiling in pairwise((1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 99.0)):
            among = [row for row in rows if floor <= row["flops_ratio"] < ceiling]
            if not among:
                continue
            best = max(among, key=lambda row: row["metrics"]["psnr_db"]["value"])
            psnr = best["metrics"]["psnr_db"]["value"]
            lines.append(
                f"| `{model}` | {floor:g}x | {best['setting']['name']} {cite(model, best)} | "
                f"{best['flops_ratio']:.2f}x | {psnr:.1f} |"
            )
    return "\n".join(lines)
