"""A resumable training loop: budget in minutes or steps, EMA, atomic checkpoints, a JSONL log.

Everything random in a step comes from (seed, step, shard), so a run that is killed and started
again draws what the unbroken run would have drawn; the checkpoint needs no generator state.
"""

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Budget:
    """How long a stage trains, over all its runs: minutes of training, on a CPU of each core, or steps.

    until: of time.monotonic(); then this run stops, and the next one goes on.
    """

    minutes: float | None = None
    steps: int | None = None
    until: float = math.inf

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("a budget is either minutes or steps; give exactly one of them")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget used, in [0, 1]."""
        if self.steps is not None:
            return min(step / max(self.steps, 1), 1.0)
        assert self.minutes is not None
        return min(seconds / max(self.minutes * 60, 1e-9), 1.0)


def learning_rate(step: int, progress: float, warmup: int = 100) -> float:
    """Factor on the base rate: linear warm-up in steps, then half a cosine over the budget."""
    cosine = 0.5 * (1 + math.cos(progress * math.pi))
    return min((step + 1) / warmup, 1.0) * (0.02 + 0.98 * cosine)


def in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster: on GPUs, and on CPUs with AMX.

    AVX-512 BF16 alone has matrix products a quarter slower than float32, and convolutions half as fast.
    """
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 where it is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device))


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, as torch's scaled_dot_product_attention without dropout.

    [B, H, N, D], [B, H, M, D], [B, H, M, D] -> [B, H, N, D]
    """
    assert dropout_p == 0.0
    # Autocast would take the softmax in float32, with two copies of the largest tensor there is.
    with torch.autocast(query.device.type, enabled=False):
        scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1).to(value.dtype) @ value


class ExplicitAttention(TorchFunctionMode):
    """Attention by its formula instead of the fused kernel.

    In bfloat16 on a CPU the fused kernel's backward pass takes more than a third of a training step of 64
    tokens: the formula trains half as many pictures again a second there, and no fewer of 1,024 tokens.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            function = explicit_attention
        return function(*args, **kwargs or {})


def attention_for_training(device: torch.device) -> AbstractContextManager[Any]:
    """The faster attention to train with.  Modes are a thread's own: enter it in each.

    In float32 the fused kernel is it, at three times the formula's speed.
    """
    formula = device.type == "cpu" and in_bfloat16(device)
    return ExplicitAttention() if formula else nullcontext()


def compiled(module: nn.Module, device: torch.device, budget: Budget) -> nn.Module:
    """The module for training: fewer and larger kernels, unless TORCH_COMPILE_DISABLE=1 is set.

    On a CPU it takes minutes to compile, and a C++ compiler; a step is then a fifth to a third shorter. So it
    is done there in stages of half an hour and more alone.

    The weights stay the module's own. To evaluate, call the module itself: in another mode and batch size
    it would be compiled once more.
    """
    pays = budget.minutes is not None and budget.minutes >= 30 and shutil.which("g++") is not None
    if device.type != "cuda" and not pays:
        return module
    # For fixed sizes: those of the next stage would count as a change, and get slower kernels for any size.
    fast: nn.Module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    return fast


def save_atomic(state: object, path: Path) -> None:
    """Write beside the target, then rename: a kill leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def draws(
    seed: int, step: int, shard: int, device: torch.device
) -> tuple[torch.Generator, random.Random]:
    """The random numbers of one shard of a step: tensors' on the device, decisions' in Python."""
    mixed = ((seed * 1_000_003 + step) * 64 + shard) & 0x7FFFFFFFFFFF
    return torch.Generator(device).manual_seed(mixed), random.Random(mixed)


LossFn = Callable[[torch.Generator, random.Random], dict[str, Tensor]]


class Ema:
    """Exponential moving average of parameters, with a decay that ramps up: (1 + n) / (10 + n)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(module.named_parameters())
        self.values = {k: v.detach().clone() for k, v in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights, faster in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [self.parameters[k] for k in self.values]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)


def new_optimizers(
    rates: Mapping[nn.Module, float],
) -> tuple[torch.optim.AdamW, torch.optim.Muon | None]:
    """AdamW, and for the weights of linear layers Muon (Jordan et al. 2024), if there are any.

    Muon's updates have the size that AdamW's would have, so both take the same rates.
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for module, rate in rates.items():
        linear = {layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)}
        rest = [each for each in module.parameters() if each not in linear]
        weights = [each for each in module.parameters() if each in linear]
        others.append({"params": rest, "lr": rate, "base": rate})
        if weights:
            matrices.append({"params": weights, "lr": rate, "base": rate})
    adamw = torch.optim.AdamW(others, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    if not matrices:
        return adamw, None
    return adamw, torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


class Loop:
    """Trains a module by `loss_fn(generator, rng) -> {"loss": ..., ...}`, one call a shard.

    basis: hashes of what is learned from: data, autoencoder, text encoder. A checkpoint of another basis is
    not gone on from: training begins anew, with its averaged weights.

    No step waits for the device: a GPU is given the next one while it computes.

    On a CPU each shard runs in its own thread with single-threaded operators: small operators
    waste less time waiting for each other than when one operator is spread over the cores.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        work: Path,
        budget: Budget,
        lr: float | Mapping[str, float],
        device: torch.device,
        basis: str,
        seed: int = 0,
        shards: int = 1,
        decay: float = 0.999,
        save_seconds: float = 90,
        evaluate_seconds: float = 480,
    ) -> None:
        self.name, self.module, self.work, self.budget = name, module, work, budget
        self.basis = basis
        self.device, self.seed, self.shards = device, seed, shards
        self.save_seconds, self.evaluate_seconds = save_seconds, evaluate_seconds
        self.pool = ThreadPoolExecutor(shards, initializer=torch.set_num_threads, initargs=(1,))
        if device.type == "cpu":  # convolutions are half as fast again in this order there
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.to(device)
        rates = lr if isinstance(lr, Mapping) else {"": lr}  # one rate a submodule, by its name
        self.adamw, self.muon = new_optimizers(
            {module.get_submodule(k): v for k, v in rates.items()}
        )
        self.optimizers = [each for each in (self.adamw, self.muon) if each is not None]
        self.ema = Ema(module, decay)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            self._load()

    @property
    def checkpoint(self) -> Path:
        """The file that the loop goes on from."""
        return self.work / f"{self.name}.pt"

    @property
    def progress(self) -> float:
        """Share of the budget that is used up."""
        return self.budget.progress(self.step, self.seconds)

    def _clock(self) -> float:
        """Seconds of training.

        On a CPU those of its cores, so that a run in the background of other work, or one that is stopped
        for a while, is not charged for what it did not get.
        """
        if self.device.type == "cpu":
            return time.process_time() / self.shards
        return time.monotonic()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state.get("basis") != self.basis:
            self._begin_again(state)
            return
        if "module" not in state:
            raise SystemExit(
                f"{self.checkpoint} holds only the averaged weights of a finished stage, from which it "
                "cannot go on; move it away to train the stage anew"
            )
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.values = state["ema"]
        self.step, self.seconds = state["step"], state["seconds"]

    def _begin_again(self, state: Mapping[str, Any]) -> None:
        """From the first step, with what was learned from something else."""
        mine = self.ema.parameters
        # With other data the pieces of words have other ids.
        words = data_of(state.get("basis", "")) == data_of(self.basis)
        learned = {
            key: value
            for key, value in state["ema"].items()
            if mine[key].requires_grad and (words or not key.startswith("text."))
        }
        self.module.load_state_dict(learned, strict=False)
        self.ema = Ema(self.module, self.ema.decay)
        print(
            f"{self.name} begins anew, with the averaged weights of {self.checkpoint}: these were trained "
            "with other data, another autoencoder or text encoder than there are now",
            flush=True,
        )

    def save(self) -> None:
        """Write all that it takes to go on."""
        state = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.values,
            "basis": self.basis,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomic(state, self.checkpoint)

    def log(self, **values: object) -> None:
        """Append a row to log.jsonl, and print it."""
        row = {"stage": self.name, "step": self.step, "minutes": self.seconds / 60} | values
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)

    def _gradients(self, loss_fn: LossFn) -> dict[str, Tensor]:
        """Fill .grad with the mean over the shards of the gradients; the mean losses."""

        def one(shard: int) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
            with attention_for_training(self.device):
                losses = loss_fn(*draws(self.seed, self.step, shard, self.device))
            gradients = torch.autograd.grad(losses["loss"], self.parameters, allow_unused=True)
            return {k: v.detach() for k, v in losses.items()}, gradients

        if self.shards == 1:
            results = [one(0)]
        else:
            results = list(self.pool.map(one, range(self.shards)))
        for parameter, *parts in zip(self.parameters, *(g for _, g in results), strict=True):
            given = [part for part in parts if part is not None]
            if len(given) == 1:
                parameter.grad = given[0]
            else:
                parameter.grad = torch.stack(given).mean(0) if given else None
        return {k: torch.stack([r[k] for r, _ in results]).mean() for k in results[0][0]}

    def _update(self, norm: Tensor) -> None:
        """Move the weights, unless the norm of the gradients is not finite; a GPU decides that by itself."""
        finite = torch.isfinite(norm)
        # The fused AdamW reads this on the device and leaves the step out, as for a GradScaler.
        self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon is None:
            return
        # Muon knows no such thing: it is given zeros to remember, and what it did is taken back.
        groups = self.muon.param_groups
        weights = [p for group in groups for p in group["params"] if p.grad is not None]
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.where(finite, weight.grad, 0)  # type: ignore[arg-type]
        self.muon.step()
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(torch.where(finite, weight, old))

    def run(
        self,
        loss_fn: LossFn,
        evaluate: Callable[[], dict[str, float]],
        log_steps: int = 100,
        stop_after: int | None = None,
    ) -> None:
        """Train until the budget is used.  `evaluate` sees the averaged weights.

        `stop_after` ends this call after that many steps, as a kill would (for tests).
        """
        first, saved, evaluated = self.step, time.monotonic(), time.monotonic()
        sums: dict[str, Tensor] = {}
        summed = 0
        kind = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.log(split="start", device=kind, threads=torch.get_num_threads())
        while (progress := self.progress) < 1:
            if stop_after is not None and self.step - first >= stop_after:
                return
            start = self._clock()
            if time.monotonic() >= self.budget.until:
                break
            factor = learning_rate(self.step, progress)
            for group in (group for each in self.optimizers for group in each.param_groups):
                group["lr"] = group["base"] * factor
            losses = self._gradients(loss_fn)
            self._update(nn.utils.clip_grad_norm_(self.parameters, 1.0))
            self.ema.update(self.step)
            if self.step > first:  # in the first of a run, everything is compiled
                self.seconds += self._clock() - start
            self.step += 1
            for key, value in losses.items():
                sums[key] = sums[key] + value if key in sums else value
            summed += 1
            if summed == log_steps:
                self.log(split="train", **{k: (v / summed).item() for k, v in sums.items()})
                sums, summed = {}, 0
            if time.monotonic() - saved > self.save_seconds:
                self.save()
                saved = time.monotonic()
            if time.monotonic() - evaluated > self.evaluate_seconds:
                self._evaluate(evaluate)
                evaluated = time.monotonic()
        if summed:
            self.log(split="train", **{k: (v / summed).item() for k, v in sums.items()})
        self.save()
        if self.progress >= 1:
            self._evaluate(evaluate)

    def _evaluate(self, evaluate: Callable[[], dict[str, float]]) -> None:
        """Report the averaged weights on held-out concepts, then put the raw ones back."""
        with torch.no_grad():
            parameters = self.ema.parameters
            raw = {k: v.clone() for k, v in parameters.items()}
            for key, value in self.ema.values.items():
                parameters[key].copy_(value)
            self.module.eval()
            self.log(split="held_out", **evaluate())
            self.module.train()
            for key, value in raw.items():
                parameters[key].copy_(value)


def begin_with(
    module: ModelMixin | PreTrainedModel,
    folder: Path,
    checkpoints: Iterable[Path] = (),
    prefix: str = "",
) -> None:
    """Give a module what was trained before.

    That is the averaged weights of the first checkpoint that is there, of one submodule when a prefix is
    given, or else a saved model's.

    A saved model of another shape is left alone, and named. What the module has alone stays as it is (a
    table of positions for another size).
    """
    for path in checkpoints:
        if path.exists():
            module.load_state_dict(averaged(path, prefix), strict=False)
            print(f"{type(module).__name__} begins with the weights of {path}", flush=True)
            return
    if not folder.is_dir():
        return
    shapes = {k: v.shape for k, v in module.named_parameters()}
    saved = type(module).from_pretrained(folder, local_files_only=True)
    if {k: v.shape for k, v in saved.named_parameters()} == shapes:
        module.load_state_dict(dict(saved.named_parameters()), strict=False)
        print(f"{type(module).__name__} begins with the weights of {folder}", flush=True)
    else:
        print(f"begins anew: {folder} holds a model of another shape", flush=True)


def with_module(basis: str, module: nn.Module) -> str:
    """The basis of what is learned from this module too, on the CPU; its first part is of the data."""
    digest = hashlib.sha256()
    for value in module.parameters():
        digest.update(value.detach().float().numpy().tobytes())
    return f"{basis} {digest.hexdigest()[:16]}"


def data_of(basis: str) -> str:
    """The hash of the data in a basis."""
    return basis.partition(" ")[0]


def trained_on(path: Path) -> str:
    """The hash of the data that the checkpoint in a file was trained on."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return data_of(state.get("basis", ""))


def averaged(path: Path, prefix: str = "", basis: str | None = None) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint, of one submodule when a prefix is given.

    Raises:
        SystemExit: if there is none, or it was trained on another basis than the one that is given.
    """
    if not path.exists():
        stage = path.stem
        raise SystemExit(
            f"stage {stage} has no checkpoint at {path}; train it first: "
            f"python -m pipelines.emoji.train --stage {stage} --minutes 10"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    if basis is not None and state.get("basis") != basis:
        raise SystemExit(
            f"{path} was trained with other data, another autoencoder or text encoder than {path.parent} "
            "now gives; train it with these: "
            f"python -m pipelines.emoji.train --stage {path.stem} --minutes 10"
        )
    values = state["ema"]
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
