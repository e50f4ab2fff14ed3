"""Do the gains of tofu and of another speed-up multiply? Each alone and both together, in turns.

    python -m eval stacking --suite cpu --out stacking.jsonl

Timed is a generation of 12 steps of one denoiser with random weights: the sum of its calls. Partners are
torch.compile, weights in int8 (torchao), and what reuses most of a denoiser at every second step: First Block
Cache in transformers, DeepCache in UNets. At every second step the latents are those of the step before, and
the threshold of First Block Cache is one with which it reuses there and nowhere else. Merging
(ToMe) stands for tofu: it remembers nothing, so a step is the same whatever was reused before it.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor

from eval.baselines.deepcache import deep_cached
from eval.baselines.diffusers_caches import first_block_cached
from eval.bench.denoisers import GRAPHS, Cell, compile_blocks
from eval.bench.models import SUITES, Case, free_memory, here, twin
from eval.files import mend
from eval.jsonl import append, read
from eval.provenance import provenance
from eval.statistics import spread
from pipelines.timer import Timer
from tofu_diffusers import Handle, apply_tofu

STEPS = 12
CASES = 2  # of a suite: its first transformer and its first UNet
TOFU = Cell("tofu", 0.5, "block", "dropped", "tome")
PACKAGES = {"deepcache": "DeepCache", "int8": "torchao"}
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def partners(case: Case, device: torch.device) -> list[str]:
    """Those that this denoiser can have here; on a CPU compiling takes longer than all that is measured.

    What needs a package that is not installed is left out, and said.
    """
    cache = "deepcache" if case.family.name == "unet" else "first_block_cache"
    compiled = ["compile"] if device.type == "cuda" else []
    found = []
    for name in (cache, *compiled, "int8"):
        package = PACKAGES.get(name)
        if package is None or importlib.util.find_spec(package):
            found.append(name)
        else:
            print(f"{case.model}-{case.size}: no {name}, as {package} is not installed", flush=True)
    return found


@dataclass
class Lane:
    """A denoiser that generates over and over.

    Args:
        latents: Of its steps, by turns of two.
        others: Its other arguments.
        times: Its timesteps, falling.
    """

    model: Any
    latents: Sequence[Tensor]
    others: dict[str, Any]
    times: Tensor
    cfg_branches: int
    handle: Handle | None

    @torch.no_grad()
    def generate(self) -> tuple[Tensor, float]:
        """The last step's prediction, and the time of all calls of the denoiser in ms."""
        with Timer(self.model) as timer:
            for i, now in enumerate(self.times):
                if self.handle is not None:
                    self.handle.step(i, STEPS, cfg_branches=self.cfg_branches)
                latents = self.latents[i // 2 % 2]
                if "timestep" in self.others:
                    named = self.others | {"timestep": now.expand(len(latents))}
                    out = self.model(latents, **named)
                else:
                    out = self.model(latents, now, **self.others)
        prediction: Tensor = out[0]
        return prediction, sum(timer.calls_ms())


@contextmanager
def lane(
    case: Case,
    model: Any,
    inputs: dict[str, Any],
    *,
    tofu: bool = False,
    partner: str | None = None,
    threshold: float = 0.0,
) -> Iterator[Lane]:
    """The model with either, both or none of them; its weights are shared."""
    own = twin(model)
    first, *others = inputs.items()
    given = dict(others)
    like = given["timestep"]
    # Near each other, so that two steps differ by their latents only.
    falling = 1 - torch.arange(STEPS, device=like.device) / 100
    times = (falling * like.flatten()[0]).to(like.dtype)
    if case.family.name == "unet":  # DeepCache looks for it by place
        del given["timestep"]
    with ExitStack() as stack:
        if partner == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(own, Int8WeightOnlyConfig())
        handle = stack.enter_context(apply_tofu(own, **TOFU.options())) if tofu else None
        if partner == "compile":
            compile_blocks(own, case.family)
        elif partner == "first_block_cache":
            stack.enter_context(first_block_cached(own, threshold=threshold))
        elif partner == "deepcache":
            pipe = SimpleNamespace(unet=own, scheduler=SimpleNamespace(timesteps=times))
            stack.enter_context(deep_cached(pipe, interval=2))
        latents = (first[1], first[1].flip(-1))
        yield Lane(own, latents, given, times, case.cfg_branches, handle)


def computed_steps(case: Case, own: Lane) -> int:
    """At how many steps of a generation the innermost block runs, of a transformer the last."""
    *_, run = sorted(case.family.block_stacks(own.model), key=lambda run: run.resolution)
    ran: list[object] = []
    # A part of it: a cache takes the block's own place.
    part = next(run.blocks[-1][1].children())
    hook = part.register_forward_hook(lambda *call: ran.append(call[0]))
    try:
        own.generate()
    finally:
        hook.remove()
    return len(ran)


def fitting_threshold(case: Case, model: Any, inputs: dict[str, Any]) -> float:
    """With which First Block Cache reuses at every second step.

    Raises:
        RuntimeError: if none of `THRESHOLDS` does.
    """
    for threshold in THRESHOLDS:
        with lane(case, model, inputs, partner="first_block_cache", threshold=threshold) as cached:
            if computed_steps(case, cached) == STEPS // 2:
                return threshold
    raise RuntimeError(f"no threshold of {THRESHOLDS} reuses at every second step of {case.model}")


def stacked(
    case: Case, model: Any, inputs: dict[str, Any], partner: str, rounds: int
) -> dict[str, Any]:
    """Speeds over unreduced, alone and together, and what share of the product of the two the last is.

    Raises:
        RuntimeError: if a prediction is not finite, or tofu changes nothing.
    """
    threshold = 0.0
    if partner == "first_block_cache":
        threshold = fitting_threshold(case, model, inputs)
    kinds: dict[str, tuple[bool, str | None]] = {
        "plain": (False, None),
        "tofu": (True, None),
        "partner": (False, partner),
        "both": (True, partner),
    }
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(**GRAPHS))
        lanes = {
            name: stack.enter_context(
                lane(case, model, inputs, tofu=tofu, partner=other, threshold=threshold)
            )
            for name, (tofu, other) in kinds.items()
        }
        made = {name: each.generate()[0] for name, each in lanes.items()}
        for name, without in (("tofu", "plain"), ("both", "partner")):
            finite = bool(made[name].isfinite().all())
            if not finite or torch.equal(made[name], made[without]):
                raise RuntimeError(
                    f"{name} with {partner}: finite: {finite}, or it does not differ from {without}"
                )
        # Compiled blocks run no hooks that come later; nothing in them reuses a step either.
        counted = () if partner == "compile" else ("partner", "both")
        ran = {name: computed_steps(case, lanes[name]) for name in counted}
        turns = [{name: each.generate()[1] for name, each in lanes.items()} for _ in range(rounds)]
    speeds = {
        name: spread([turn["plain"] / turn[name] for turn in turns])
        for name in ("tofu", "partner", "both")
    }
    shares = [turn["tofu"] * turn["partner"] / (turn["plain"] * turn["both"]) for turn in turns]
    return {
        "plain_ms": spread([turn["plain"] for turn in turns])["value"],
        "speed": speeds,
        "share_of_product": spread(shares),
        "computed_steps": ran,
    }


def measure(
    suite: str, out: Path, rounds: int, until: float | None = None, commit: str | None = None
) -> str | None:
    """Every partner of a suite's first denoisers that is not yet in the file, a row at a time.

    Args:
        until: When `time.monotonic` shall not be passed; None: no matter.
        commit: For checkouts without their history.

    Returns:
        What was found; None if the time was up before.
    """
    device, dtype = here()
    about = provenance(device)
    about |= {"dtype": str(dtype).removeprefix("torch."), "commit": commit or about["commit"]}
    mend(out)
    done = {row["id"] for row in read(out)}
    for case in SUITES[suite][:CASES]:
        todo = {f"{case.model}-{case.size}/{name}": name for name in partners(case, device)}
        todo = {row: name for row, name in todo.items() if row not in done}
        if not todo:
            continue
        if until is not None and time.monotonic() > until:
            return None
        free_memory()
        model, inputs = case.build(device, dtype), case.inputs(device, dtype)
        for row, name in todo.items():
            if until is not None and time.monotonic() > until:
                return None
            found = stacked(case, model, inputs, name, rounds)
            settings = {"partner": name, "tofu": TOFU.options(), "steps": STEPS, "rounds": rounds}
            measured = {"id": row, "model": case.model, "size": case.size, **settings, **found}
            append(out, measured | about)
            print(line(measured), flush=True)
        del model, inputs
    return f"{len(read(out))} rows"


def line(row: dict[str, Any]) -> str:
    """A row to read while it runs."""
    speeds = ", ".join(f"{name} {each['value']:.2f}x" for name, each in row["speed"].items())
    return f"{row['id']}: {speeds}, {row['share_of_product']['value']:.0%} of the product"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m eval stacking`."""
    parser.add_argument("--suite", choices=sorted(SUITES), default="full", help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file; goes on where it was")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns (%(default)s)")


def main(args: argparse.Namespace) -> None:
    """`python -m eval stacking`. A mistake in the arguments is a ValueError."""
    if args.rounds < 1:
        raise ValueError(f"rounds {args.rounds} is below 1")
    measure(args.suite, args.out, args.rounds)
