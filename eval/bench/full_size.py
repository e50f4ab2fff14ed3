"""How many FLOPs full-size denoisers save, counted without weights and without a GPU.

    python -m eval flops --out eval/results/full_size.jsonl
    python -m eval flops --classes --out eval/results/full_size_classes.jsonl

Every row of the first is what `apply_tofu(pipe, ...).summary()` says before the first picture: of a typical
generation, at a size that people use. Nothing is computed: shapes alone run through the model, and torch
counts the products that they would take. A row of the second is a class of denoisers whose tokens are
reduced, and says what one step saves whose plan costs nothing, for each choice of keys and values.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from eval import jsonl
from eval.bench.ceilings import First, first_method
from eval.bench.models import USUAL, Case
from eval.files import mend
from eval.generate.settings import Setting
from eval.provenance import provenance
from tofu_diffusers import FAMILIES, KEYS_VALUES, apply_tofu

# What people type.
RATIOS = (0.25, 0.5, 0.75)
SETTINGS = tuple(
    Setting(f"{name}-{amount:g}", "tofu", {name: amount})
    for name, amounts in (("ratio", RATIOS), ("speedup", (1.5, 2, 3)))
    for amount in amounts
)

PLAIN = {"method": First.name, "merge": "prune", "unmerge": "copy", "corrector": False}
BATCH = 2  # of `Family.example`
UNREDUCED = ("unreduced", 0.0)
LAYERS = (
    "n_layers",
    "n_refiner_layers",
    "num_decoder_layers",
    "num_layers",
    "num_mmdit_layers",
    "num_refiner_layers",
    "num_single_dit_layers",
    "num_single_layers",
    "num_visual_blocks",
)
# Whose layers of one kind are unlike each other.
UNLIKE = ("HiDreamImageTransformer2DModel", "HunyuanDiT2DModel", "WanVACETransformer3DModel")
# Of classes whose defaults are no whole model: published ones.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "HiDreamImageTransformer2DModel": (
        "HiDream-I1",
        {
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 16,
            "num_single_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 20,
            "caption_channels": [4096, 4096],
            "text_emb_dim": 2048,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (64, 32, 32),
            "max_resolution": (128, 128),
            "llama_layers": [*range(32), *[31] * 16],
        },
    ),
    "HunyuanDiT2DModel": (
        "HunyuanDiT-v1.2",
        {
            "patch_size": 2,
            "in_channels": 4,
            "sample_size": 128,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "pooled_projection_dim": 1024,
            "text_len": 77,
            "text_len_t5": 256,
            "use_style_cond_and_image_meta_size": False,
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        "FramePack",
        {
            "guidance_embeds": True,
            "has_image_proj": True,
            "image_proj_dim": 1152,
            "has_clean_x_embedder": True,
        },
    ),
    "LatteTransformer3DModel": (
        "Latte-1",
        {
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "patch_size": 2,
            "sample_size": 64,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 16,
        },
    ),
}


@contextmanager
def example_of(family: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Inside it FLOPs of a family are counted with these arguments."""
    family.example = lambda model: inputs
    try:
        yield
    finally:
        del family.example


def measure(out: Path, cases: Sequence[Case], settings: Sequence[Setting] = SETTINGS) -> None:
    """Append the rows that a file lacks."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mend(out)
    done = {row["id"] for row in jsonl.read(out)}
    # Of the code that this process runs, whatever becomes of the checkout meanwhile.
    about = provenance()
    for case in cases:
        ids = {setting.name: f"{case.model}-{case.size}/{setting.name}" for setting in settings}
        lacking = [setting for setting in settings if ids[setting.name] not in done]
        if not lacking:
            continue
        with torch.device("meta"):
            model = case.cls.from_config(dict(case.config))
        for setting in lacking:
            row = {"id": ids[setting.name], "model": case.model, "size": case.size}
            row |= {"setting": setting.to_dict(), **counted(case, model, setting), **about}
            jsonl.append(out, row)
            print(f"{row['id']}: {row['flops_ratio']:.2f}x", flush=True)


def counted(case: Case, model: Any, setting: Setting) -> dict[str, Any]:
    """What a row says that was counted.

    Args:
        model: Of the case, on the meta device.
    """
    family, inputs = case.family, case.inputs(torch.device("cpu"), torch.float32)
    with example_of(family, inputs), apply_tofu(model, **setting.options) as handle:
        summary = handle.summary()
        (config,) = handle.configs
        grids = family.grids(model, inputs)
    steps = summary.steps[0].steps if summary.steps else summary.rows[0].calls
    return {
        "config": json.loads(config.to_json()),
        "steps": steps,
        "tokens": max(grids[stack.resolution].tokens for stack in family.block_stacks(model)),
        "text": case.text,
        # One image, one branch of guidance, one step.
        "step_flops": summary.flops_unreduced // (steps * case.batch),
        "flops_ratio": round(summary.flops_unreduced / summary.flops_run, 4),
    }


def classes() -> list[str]:
    """The denoisers whose tokens are reduced."""
    return sorted(name for family in FAMILIES.values() for name in family.classes)


def measure_classes(
    out: Path, names: Sequence[str], count: Callable[[str], dict[str, Any]]
) -> None:
    """Append the rows of classes that a file lacks: what `count` says of each."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mend(out)
    done = {row["id"] for row in jsonl.read(out)}
    about = provenance()
    for name in names:
        if name in done:
            continue
        row = {"id": name, "model": name, **count(name), **about}
        jsonl.append(out, row)
        print(f"{name}: {row['flops_ratio']}", flush=True)


class Published:
    """A denoiser class as it was published, or with its defaults, without weights.

    Attributes:
        config: Whose.
        inputs: Arguments of a usual call.
        grid: The finest of its blocks.
    """

    def __init__(self, name: str) -> None:
        self.name, self.cls = name, getattr(diffusers, name)
        self.config, self.options = PUBLISHED.get(name, ("class default", {}))
        self.model = self._of(self.options)
        self.family: Any = next(each for each in FAMILIES.values() if name in each.classes)
        self.inputs: dict[str, Any] = self.family.example(self.model)
        found = self.family.grids(self.model, self.inputs)
        grids = (found[stack.resolution] for stack in self.family.block_stacks(self.model))
        self.grid = max(grids, key=lambda each: each.tokens)

    def parts(self) -> Iterator[tuple[Any, int]]:
        """Models of few layers, and the weight of each in the whole."""
        for depths, weight in depths_of(self.name, self.model.config):
            yield self._of({**self.options, **depths}) if depths else self.model, weight

    def _of(self, options: dict[str, Any]) -> Any:
        with torch.device("meta"):
            return self.cls(**options)


def counted_class(name: str) -> dict[str, Any]:
    """What the row of a class says: of one reduced step, by keys and values and ratio."""
    published = Published(name)
    grid = published.grid
    flops = Counter[tuple[str, float]]()
    for part, weight in published.parts():
        for key, value in steps_of(part, published.family).items():
            flops[key] += weight * value
    saved = {
        keys_values: [round(flops[UNREDUCED] / flops[keys_values, ratio], 4) for ratio in RATIOS]
        for keys_values in dict.fromkeys(keys_values for keys_values, _ in [*flops][1:])
    }
    return {
        "config": published.config,
        "parameters": sum(each.numel() for each in published.model.parameters()),
        "sides": [side for side in grid.sides if side > 1],
        "tokens": grid.tokens,
        "ratios": list(RATIOS),
        # One row of the batch.
        "step_flops": round(flops[UNREDUCED] / BATCH),
        "flops_ratio": saved,
    }


def depths_of(name: str, config: Mapping[str, Any]) -> list[tuple[dict[str, int], int]]:
    """Depths to count a class at, and the weight of each in the whole: layers of a kind are alike.

    Nothing instead of a depth: as it is.
    """
    layers = {key: config[key] for key in LAYERS if config.get(key) and name not in UNLIKE}
    if not layers:
        return [({}, 1)]
    ones = dict.fromkeys(layers, 1)
    more = [({**ones, key: 2}, count - 1) for key, count in layers.items()]
    return [(ones, 1 - sum(weight for _, weight in more)), *more]


def steps_of(model: Any, family: Any) -> dict[tuple[str, float], int]:
    """FLOPs of an unreduced step, the first, and of reduced ones by keys and values and ratio."""
    scope = next(each for each in ("block", "attention") if each not in family.scopes_refused)
    found = dict[tuple[str, float], int]()
    for keys_values in KEYS_VALUES:
        if keys_values in family.keys_values_refused:
            continue
        whole = int(keys_values == "cached")  # steps that fill what others read
        options = {**PLAIN, "scope": scope, "keys_values": keys_values, "warmup_steps": whole}
        for ratio in RATIOS:
            with first_method(), apply_tofu(model, ratio=ratio, **options) as handle:
                summary = handle.summary()
            steps = summary.rows[0].calls
            step = found[UNREDUCED] = summary.flops_unreduced // steps
            found[keys_values, ratio] = (summary.flops_run - whole * step) // (steps - whole)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What and where to."""
    parser.add_argument(
        "--classes", action="store_true", help="a row a class of denoisers, instead of usual models"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON-lines file; goes on where it was"
    )


def main(args: argparse.Namespace) -> None:
    """`python -m eval flops`."""
    if args.classes:
        measure_classes(args.out, classes(), counted_class)
    else:
        measure(args.out, USUAL)
