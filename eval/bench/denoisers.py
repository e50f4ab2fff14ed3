"""What full-size denoisers save of a step, against what the same model takes on as many tokens for free.

    python -m eval speed --suite full --out suite.csv

Every row is one way to run a step, in turns with the unreduced model and with its ceiling (`ceilings`),
after the unreduced steps that it needs; what a row says is in `rows`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from eval.bench.ceilings import First, first_method, run_on_first
from eval.bench.models import SUITES, Case, free_memory, here, twin
from eval.bench.rows import KEY, SAME, append_row, as_text, line, read_rows
from eval.files import mend
from eval.provenance import provenance
from eval.statistics import spread
from pipelines.timer import Timer
from tofu_diffusers import Handle, TokenReduction, apply_tofu

STEPS = 1000  # of the generation that is never finished
REDUCED = 2  # warm-up steps with fewer tokens, the first of which makes what later ones find
# A graph a resolution, kind of step and width; past the limit Dynamo would silently run on without compiling.
GRAPHS = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}

# Those that change most, with as few unreduced steps at the start as there can be: it costs what any choice
# by importance does.
TOKENS = {
    "method": "importance",
    "method_options": {"source": "change"},
    "merge": "prune",
    "unmerge": "taylor",
    "share": "resolution",
    "max_age": 8,
}

# For checks: which tokens stay must not turn on a rounding.
BY_SEED = {"method": "random", "merge": "prune", "unmerge": "taylor", "share": "resolution"}


@dataclass(frozen=True)
class Cell:
    """One way to run a step: kind "unreduced", "tofu" or "tomesd", or what bounds tofu, "ceiling"."""

    kind: str
    ratio: float = 0.0
    scope: str = ""
    keys_values: str = ""
    method: str = ""

    @property
    def bounds(self) -> list[Cell]:
        """What it is compared with beside the unreduced model: its ceiling, where it has one."""
        return [replace(self, kind="ceiling", method="")] if self.kind == "tofu" else []

    def options(self) -> dict[str, Any]:
        """Of `apply_tofu`."""
        shared = {"ratio": self.ratio, "scope": self.scope, "keys_values": self.keys_values}
        if self.kind == "ceiling":
            once = {"method": First.name, "merge": "prune", "unmerge": "copy", "reuse": STEPS}
            return shared | once | {"share": "resolution"}
        return shared | {"importance": TOKENS, "random": BY_SEED}.get(
            self.method, {"method": self.method}
        )


def _each_keys_values(ratio: float) -> list[Cell]:
    """Scope "block" at a ratio, with each `keys_values`."""
    return [
        Cell("tofu", ratio, "block", keys_values, "importance")
        for keys_values in ("dropped", "fresh", "cached")
    ]


FIRST_CELLS = (Cell("unreduced"), *_each_keys_values(0.5))
MORE_CELLS = (
    *_each_keys_values(0.25),
    *_each_keys_values(0.75),
    Cell("tofu", 0.5, "block", "dropped", "tome"),
    Cell("tofu", 0.5, "attention", "dropped", "tome"),
    Cell("tomesd", 0.5, "attention", "dropped", "tomesd"),
)


@dataclass
class Lane:
    """One denoiser, told its steps one after another.

    Args:
        weight: Of its times in those of the case (`Case.depths`).
        inputs: Arguments of its steps, by turns: what does not change at all is no evidence.
        handle: Of tofu, if that is on it.
    """

    model: Any
    weight: float
    inputs: Sequence[dict[str, Any]]
    cfg_branches: int = 1
    handle: Handle | None = None
    index: int = 0

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The next step's prediction."""
        if self.handle is not None:
            self.handle.step(self.index, STEPS, cfg_branches=self.cfg_branches)
        # By position, as pipelines give the latents: tomesd reads the size there.
        latents, *others = self.inputs[self.index % len(self.inputs)].items()
        self.index += 1
        out: Tensor = self.model(latents[1], **dict(others))[0]
        return out

    def step(self) -> tuple[Tensor, float]:
        """The next step's prediction, and the time of the denoiser's call in ms; waits for the device."""
        with Timer(self.model) as timer:
            out = self.forward()
        return out, timer.calls_ms()[0]

    def unreduced_steps(self) -> int:
        """How many steps at the start are not reduced."""
        if self.handle is None:
            return 0
        (config,) = self.handle.configs
        assert isinstance(config, TokenReduction)
        return config.steps_needed


@dataclass
class Bench:
    """A case on a device: its weights, shared by everything that is timed.

    Raises:
        RuntimeError: from `row`, if the output has another shape or is not finite, or nothing was removed.
    """

    case: Case
    device: torch.device
    dtype: torch.dtype
    flops: dict[str, float] = field(default_factory=dict)
    plain: dict[bool, list[Lane]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.compiler.reset()
        depths = self.case.depths.items()
        self.models = [(self.case.build(self.device, self.dtype, depth), w) for depth, w in depths]
        given = self.case.inputs(self.device, self.dtype)
        name = self.case.family.sample_name
        other = given[name] + 0.1 * given[name].roll(1, dims=-1)
        self.inputs = (given, {**given, name: other})

    @property
    def tokens(self) -> int:
        """Tokens of one image, at the finest resolution that has blocks."""
        family, model = self.case.family, self.models[0][0]
        grids = family.grids(model, self.inputs[0])
        return int(max(grids[stack.resolution].tokens for stack in family.block_stacks(model)))

    def row(self, cell: Cell, compiled: bool, rounds: int) -> dict[str, Any]:
        """Measured: times, speed, share of the ceiling, FLOPs, memory."""
        plain = self._plain(compiled)
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(**GRAPHS))
            stack.enter_context(first_method())
            before = self._allocated()
            bounds = []
            for bound in cell.bounds:
                bounds.append(self._applied(stack, bound))
                self._prepare(plain, bounds[-1], bound, compiled)
            # What the ceiling keeps for its keys_values is not tofu's.
            held = self._allocated() - before
            ours, unreduced, flops = self._applied(stack, cell), self._unreduced_flops(), 0.0
            if cell.kind == "tomesd":
                unreduced, flops = self._eager_flops(self._plain(False)), self._eager_flops(ours)
                if flops == unreduced:
                    return {"note": "n/a: tomesd merges nothing in this model"}
            self._prepare(plain, ours, cell, compiled)
            flops = flops or self._flops(cell, ours)
            if cell.kind != "unreduced" and not flops < unreduced:
                raise RuntimeError(f"{cell} removed nothing: {flops:.4g} FLOPs a step")
            (bases, *limits, steps), peak = self._in_turns([plain, *bounds, ours], rounds)
        row = {
            **_spread_of("step_ms", steps),
            "unreduced_ms": spread(bases)["value"],
            **_spread_of("speed", _ratios(bases, steps)),
            "flops_ratio": unreduced / flops,
            "peak_mib": None if peak is None else (peak - held) / 2**20,
            "note": self._note(),
        }
        for limit in limits:
            row["ceiling_speed"] = spread(_ratios(bases, limit))["value"]
            row |= _spread_of("share", _ratios(limit, steps))
        return row

    def _plain(self, compiled: bool) -> list[Lane]:
        """The unreduced model, one for all rows: to compile it for each would take most of the time."""
        if compiled not in self.plain:
            self.plain[compiled] = [self._lane(weight, model) for model, weight in self.models]
            for lane in self.plain[compiled] if compiled else ():
                compile_blocks(lane.model, self.case.family)
        return self.plain[compiled]

    def _note(self) -> str:
        layers = self.case.layers
        return "" if layers is None else f"1 and 2 of {layers} layers run, scaled to {layers}"

    def _lane(self, weight: float, model: Any, handle: Handle | None = None) -> Lane:
        own = model if handle is not None else twin(model)
        return Lane(own, weight, self.inputs, self.case.cfg_branches, handle)

    @contextmanager
    def applied(self, cell: Cell, model: Any, weight: float) -> Iterator[Lane]:
        """A lane of a copy of the model with the cell's speed-up on it, which is taken off again."""
        own = twin(model)
        if cell.kind == "tofu" or (cell.kind == "ceiling" and not is_free(cell)):
            with apply_tofu(own, **cell.options()) as handle:
                yield self._lane(weight, own, handle)
            return
        if cell.kind == "ceiling":
            run_on_first(own, self.case.family, cell.ratio)
        if cell.kind == "tomesd":
            import tomesd

            tomesd.apply_patch(own, ratio=cell.ratio)
        yield Lane(own, weight, self.inputs, self.case.cfg_branches)

    def _applied(self, stack: ExitStack, cell: Cell) -> list[Lane]:
        return [stack.enter_context(self.applied(cell, m, w)) for m, w in self.models]

    def _prepare(self, plain: list[Lane], ours: list[Lane], cell: Cell, compiled: bool) -> None:
        for base, own in zip(plain, ours, strict=True):
            if compiled:
                compile_blocks(own.model, self.case.family)
            self._warm_up(base, own, cell)

    def _warm_up(self, base: Lane, own: Lane, cell: Cell) -> None:
        for _ in range(REDUCED):
            expected, _ = base.step()
        for _ in range(own.unreduced_steps() + REDUCED):
            got, _ = own.step()
        if got.shape != expected.shape or not bool(got.isfinite().all()):
            raise RuntimeError(
                f"{cell} gives {tuple(got.shape)}, finite: {bool(got.isfinite().all())}; the unreduced "
                f"model gives {tuple(expected.shape)}"
            )

    def _in_turns(
        self, lanes: Sequence[Sequence[Lane]], rounds: int
    ) -> tuple[list[list[float]], int | None]:
        """Times of each, ms a round, and the most memory while the last ran, bytes."""
        times: list[list[float]] = [[] for _ in lanes]
        peak = 0
        for _ in range(rounds):
            for some, own in zip(lanes, times, strict=True):
                if self._cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                own.append(sum(lane.weight * lane.step()[1] for lane in some))
            if self._cuda:
                peak = max(peak, torch.cuda.max_memory_allocated(self.device))
        return times, peak if self._cuda else None

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _allocated(self) -> int:
        """Bytes on a GPU."""
        return torch.cuda.memory_allocated(self.device) if self._cuda else 0

    def _flops(self, cell: Cell, ours: list[Lane]) -> float:
        """Of one reduced step; those of tofu by its own count, after the warm-up's steps."""
        total = 0.0
        for lane in ours:
            if lane.handle is None:
                ratio = cell.ratio if cell.kind == "ceiling" else 0.0
                total += lane.weight * self._counted(lane, ratio)
                continue
            summary, unreduced = lane.handle.summary(), lane.unreduced_steps()
            an_unreduced_one = summary.flops_unreduced / (unreduced + REDUCED)
            total += lane.weight * (summary.flops_run - unreduced * an_unreduced_one) / REDUCED
        return total

    def _unreduced_flops(self) -> float:
        if "unreduced" not in self.flops:
            lanes = [Lane(model, weight, self.inputs) for model, weight in self.models]
            self.flops["unreduced"] = self._flops(Cell("unreduced"), lanes)
        return self.flops["unreduced"]

    def _counted(self, lane: Lane, ratio: float) -> float:
        """Of one step, counted on a copy without weights, on its first tokens where a ratio is given."""
        with torch.device("meta"):
            model = type(lane.model).from_config(dict(lane.model.config)).eval()
        if ratio:
            run_on_first(model, self.case.family, ratio)
        given = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, self.inputs[0])
        given = tree_map(_in_float32, given)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**given)
        return float(counter.get_total_flops())

    def _eager_flops(self, lanes: list[Lane]) -> float:
        """Of one step, counted as it runs."""
        # The counter does not see the CPU's fused attention.
        unfused: AbstractContextManager[object] = (
            nullcontext() if self._cuda else sdpa_kernel(SDPBackend.MATH)
        )
        total = 0.0
        for lane in lanes:
            with unfused, FlopCounterMode(display=False) as counter:
                lane.step()
            total += lane.weight * counter.get_total_flops()
        return total


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def _spread_of(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80, as a row has them."""
    found = spread(values)
    return {name: found["value"], f"{name}_p20": found["low"], f"{name}_p80": found["high"]}


def is_free(cell: Cell) -> bool:
    """Whether the cell's ceiling is the blocks on their first tokens, with nothing of tofu in it."""
    return cell.scope == "block" and cell.keys_values == "dropped"


def compile_blocks(model: Any, family: Any) -> None:
    """Compile every block by itself: blocks alike share a graph, and it takes seconds, not minutes."""
    for run in family.block_stacks(model):
        for _, block in run.blocks:
            block.compile(dynamic=False)


def _in_float32(leaf: Any) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.float() if floating else leaf


# ---- rows ------------------------------------------------------------------------------------------


def jobs(cases: Sequence[Case], modes: Sequence[str]) -> Iterator[tuple[Case, str, Cell]]:
    """The most important first: all cases' first cells, then the rest, mode by mode."""
    for case in cases:
        for cell in cells(case, FIRST_CELLS):
            yield case, modes[0], cell
    for mode in modes:
        for case in cases:
            rest = MORE_CELLS if mode == modes[0] else (*FIRST_CELLS, *MORE_CELLS)
            for cell in cells(case, rest):
                yield case, mode, cell


def cells(case: Case, some: Sequence[Cell]) -> list[Cell]:
    """Those that this kind of denoiser can have: tomesd serves UNets."""
    return [cell for cell in some if cell.kind != "tomesd" or case.family.name == "unet"]


def modes_of(suite: str) -> tuple[str, ...]:
    """On a CPU compiling would take longer than all that is measured."""
    return ("compiled", "eager") if suite == "full" else ("eager",)


def run(
    work: Sequence[tuple[Case, str, Cell]],
    out: Path,
    rounds: int,
    until: float | None = None,
    commit: str | None = None,
) -> bool:
    """Measure what is not yet in the file, a row at a time.

    A row that fails says so in its note, and the others go on; to try it again, take it out of the file.

    Args:
        until: When `time.monotonic` shall not be passed; no row is begun that would take as long as the one
            before and pass it.
        commit: For checkouts without their history.

    Returns:
        Whether all is there.

    Raises:
        ValueError: if rows of the file were measured with another device or other versions.
    """
    if rounds < 1:
        raise ValueError(f"rounds {rounds} is below 1")
    device, dtype = here()
    about = provenance(device)
    about |= {"dtype": str(dtype).removeprefix("torch."), **about.pop("versions")}
    about["commit"] = commit or about["commit"]
    mend(out)
    rows = read_rows(out)
    for name in SAME:
        if rows and rows[0][name] != as_text(about[name]):
            raise ValueError(
                f"{out} was measured with {name} {rows[0][name]}, here it is {about[name]}; "
                "choose another --out"
            )
    done = {tuple(row[name] for name in KEY) for row in rows}
    bench: Bench | None = None
    took = 0.0
    for case, mode, cell in work:
        row = {"model": case.model, "size": case.size, "mode": mode, **vars(cell)}
        if tuple(as_text(row[name]) for name in KEY) in done:
            continue
        start = time.monotonic()
        if until is not None and start + took > until:
            return False
        try:
            if bench is None or bench.case != case:
                bench = None
                free_memory()
                bench = Bench(case, device, dtype)
            row |= {"batch": case.batch, "cfg_branches": case.cfg_branches, "tokens": bench.tokens}
            row |= bench.row(cell, mode == "compiled", rounds) | {"rounds": rounds}
        except Exception as error:  # whatever it is, the other rows are still wanted
            row["note"] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        free_memory()
        rows.append(append_row(out, row | about))
        print(line(rows[-1]), flush=True)
        took = time.monotonic() - start
    return True


def main(suite: str, out: Path, rounds: int) -> None:
    """`python -m eval speed --suite`, behind its check of the kernels. Mistaken arguments: a ValueError."""
    run(list(jobs(SUITES[suite], modes_of(suite))), out, rounds)
