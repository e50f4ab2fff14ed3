"""What the recipes share: load a pipeline, apply tofu, generate one image, print the summary."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from tofu_diffusers import apply_tofu

CHOICES = ("method", "fold", "restore", "scope", "context")


def run(
    argv: Sequence[str] | None,
    pipeline: type[DiffusionPipeline],
    *,
    description: str,
    model: str,
    steps: int,
    gpu_dtype: torch.dtype,
) -> int:
    """The whole recipe; a mistake in the arguments ends it with exit code 2."""
    parser = _parser(description, model, steps)
    args = parser.parse_args(argv)
    options = {name: value for name in CHOICES if (value := getattr(args, name)) is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        _check_folder(args.model, pipeline)
        pipe = pipeline.from_pretrained(
            args.model, dtype=gpu_dtype if device == "cuda" else torch.float32
        ).to(device)
    except (OSError, ValueError) as error:
        parser.error(f"cannot load {args.model}: {error}")
    try:
        handle = apply_tofu(pipe, ratio=args.ratio, **options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))

    start = time.perf_counter()
    image = pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    seconds = time.perf_counter() - start
    args.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(args.out)
    print(handle.summary())
    print(f"{args.out}: {image.width} x {image.height} pixels in {seconds:.1f} s")
    return 0


def _parser(description: str, model: str, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=model, help="hub name or local folder (%(default)s)")
    parser.add_argument("--prompt", default="a photograph of a red apple on a wooden table")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of tokens removed")
    for name in CHOICES:
        parser.add_argument(f"--{name}", help="default: the family's profile")
    parser.add_argument("--height", type=int, help="in pixels; default: the model's own")
    parser.add_argument("--width", type=int, help="in pixels; default: the model's own")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tofu.png"), help="(%(default)s)")
    return parser


def _check_folder(model: str, pipeline: type[DiffusionPipeline]) -> None:
    """Refuse a local folder of no pipeline or another one; a hub name is left to the hub."""
    folder = Path(model)
    if not folder.exists():
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            "it holds no model_index.json; pass a folder that `pipe.save_pretrained` wrote"
        )
    found = json.loads(index.read_text())["_class_name"]
    if found != pipeline.__name__:
        raise ValueError(f"it holds a {found}, and this recipe is for {pipeline.__name__}")
