"""What the recipes share: load a pipeline, apply tofu, generate, save, print the summary.

A recipe declares what is its model's own and runs:

    RECIPE = Recipe(description=__doc__, pipelines=(FluxPipeline,), family="flux", ...)

    if __name__ == "__main__":
        sys.exit(run(RECIPE))
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.export_utils import export_to_video
from huggingface_hub import hf_hub_download
from PIL import Image

from pipelines.loading import in_dtype
from tofu_diffusers import StepSkipping, TokenReduction, apply_tofu, resolve

RATIO = 0.5
"""Of the tokens, where neither a ratio nor a speed-up is asked for."""
CHOICES = ("method", "merge", "unmerge", "scope", "keys_values")
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_TYPES = (".gif", ".webp", ".mp4")


@dataclass(frozen=True)
class Video:
    """What a model of videos is made for.

    Args:
        frames: The length unless told otherwise.
        step: Frames in one latent frame: a video has 1 + n * step of them.
        fps: Frames shown in a second.
    """

    frames: int
    step: int
    fps: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is one kind of model's own.

    Args:
        description: What --help says first: the recipe's docstring.
        pipelines: The classes that a model's pipeline may be of.
        family: Of the denoiser: its profile says what no option does.
        model: Hub name of the default model.
        steps: Its usual number of denoising steps.
        gpu_dtype: Of the weights on a GPU, or one for each component; a CPU computes in float32.
        multiple: Of what height and width must be multiples: pixels along a token's edge.
        video: For models that make videos.
        call: Further arguments of every call of the pipeline.
    """

    description: str
    pipelines: tuple[type[Any], ...]
    family: str
    model: str
    steps: int
    gpu_dtype: torch.dtype | Mapping[str, torch.dtype]
    multiple: int
    video: Video | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


def run(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """The whole recipe; a mistake in the arguments ends it with exit code 2.

    What can be known to fail does so before the model is loaded, the rest before it generates.
    """
    parser = _parser(recipe)
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    try:
        _check_out(args.out, VIDEO_TYPES if recipe.video else IMAGE_TYPES)
        check_options(args, recipe.family)
        if args.offload and not on_gpu:
            raise ValueError("--offload empties a GPU, and torch sees none here; leave it out")
    except ValueError as error:
        parser.error(str(error))
    try:
        pipe = _load(recipe, args.model, on_gpu, args.offload)
    except torch.cuda.OutOfMemoryError:
        parser.error(f"{args.model} does not fit this GPU as a whole; add --offload")
    except (OSError, ValueError) as error:
        missing = "" if Path(args.model).exists() else "no such folder, and of the hub: "
        parser.error(f"cannot load {args.model}: {missing}{error}")
    try:
        handle = apply_tofu(pipe, **chosen(args))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    sizes = ("height", "width", "num_frames")
    output = pipe(
        prompt=args.prompt,  # not the first argument of all
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pil",
        # Not every pipeline takes None for its own size.
        **{name: value for name in sizes if (value := getattr(args, name, None)) is not None},
        **recipe.call,
    )
    seconds = time.perf_counter() - start
    frames = output.frames[0] if recipe.video else output.images
    _save(frames, args.out, recipe.video)
    print(handle.summary())
    length = f"{len(frames)} frames of " if recipe.video else ""
    width, height = frames[0].size
    print(f"{args.out}: {length}{width} x {height} pixels in {seconds:.1f} s")
    return 0


def add_choices(parser: argparse.ArgumentParser, default: str = f"--ratio {RATIO:g}") -> None:
    """Options for `apply_tofu` that a command line offers; `chosen` reads them.

    Args:
        default: What it does without any of them, in words.
    """
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--ratio", type=float, help=f"fraction of the tokens removed (default: {default})"
    )
    amount.add_argument(
        "--speedup",
        type=float,
        help="how many times fewer FLOPs of the denoiser, instead of a ratio: skips steps",
    )
    for name in CHOICES:
        parser.add_argument(
            f"--{name.replace('_', '-')}", help="of the tokens; default: the family's profile"
        )


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The options for `apply_tofu`; what they leave open is up to the family's profile."""
    options = given(args)
    return options if "speedup" in options else {"ratio": RATIO} | options


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options of `add_choices` that were given."""
    options = {name: getattr(args, name) for name in ("ratio", "speedup", *CHOICES)}
    return {name: value for name, value in options.items() if value is not None}


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{Path(sys.argv[0]).stem}",
        description=recipe.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", default=recipe.model, help="hub name or local folder (%(default)s)"
    )
    apple = "a photograph of a red apple on a wooden table"
    parser.add_argument("--prompt", default=apple, help="(%(default)s)")
    add_choices(parser)
    pixels = whole(recipe.multiple, recipe.multiple)
    for name in ("height", "width"):
        parser.add_argument(f"--{name}", type=pixels, help="in pixels; default: the model's own")
    if recipe.video:
        parser.add_argument(
            "--frames",
            dest="num_frames",
            metavar="FRAMES",
            type=whole(1, recipe.video.step),
            default=recipe.video.frames,
            help="length of the video (%(default)s)",
        )
    parser.add_argument("--steps", type=whole(1), default=recipe.steps, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep only the model at work on the GPU: slower, but needs less of its memory",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tofu.gif" if recipe.video else "tofu.png"),
        help=f"ends in {', '.join(VIDEO_TYPES if recipe.video else IMAGE_TYPES)} (%(default)s)",
    )
    return parser


def whole(start: int, step: int = 1) -> Callable[[str], int]:
    """A reader of the whole numbers start, start + step, start + 2 step and so on."""

    def number(text: str) -> int:  # argparse says "invalid number value" where it is none
        value = int(text)
        if value < start:
            raise argparse.ArgumentTypeError(f"{value} is below {start}")
        below = value - (value - start) % step
        if value != below:
            raise argparse.ArgumentTypeError(
                f"{value} is not one of {start}, {start + step}, {start + 2 * step} and so on; "
                f"choose {below} or {below + step}"
            )
        return value

    return number


def _check_out(out: Path, types: Sequence[str]) -> None:
    """Refuse a file that could not be written once it has been generated."""
    kind = out.suffix.lower()
    if kind not in types:
        raise ValueError(f"--out {out} ends in {kind or 'no type'}; choose {', '.join(types)}")
    if kind == ".mp4" and (
        lacking := [name for name in ("imageio", "imageio_ffmpeg") if not find_spec(name)]
    ):
        packages = " ".join(lacking).replace("_", "-")
        raise ValueError(
            f"--out {out} needs packages that are not here; `pip install {packages}`, "
            "or end it in .gif or .webp"
        )
    above = next(path for path in out.absolute().parents if path.exists())
    if out.is_dir() or not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written; choose a file in a folder of your own")


def check_options(args: argparse.Namespace, family: str) -> None:
    """Refuse what `apply_tofu` would refuse of these options, but before the model is loaded.

    Raises:
        ValueError: if they do not go together.
    """
    options = chosen(args)
    kind = StepSkipping if "speedup" in options else TokenReduction
    for name in options:
        if name not in kind.field_names():
            option, speedup = f"--{name.replace('_', '-')}", options["speedup"]
            raise ValueError(
                f"{option} is of token reduction, and --speedup {speedup:g} skips steps; leave it out, or "
                "give --ratio instead"
            )
    resolve(kind(**options), family)


def _load(recipe: Recipe, model: str, on_gpu: bool, offload: bool) -> Any:
    kind = _pipeline_class(model, recipe.pipelines)
    dtype = recipe.gpu_dtype if on_gpu else torch.float32
    pipe = kind.from_pretrained(model, **in_dtype(dtype))
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda" if on_gpu else "cpu")
    return pipe


def _pipeline_class(model: str, pipelines: Sequence[type[Any]]) -> type[Any]:
    """The one of the classes that a model's index names; the index alone is read, or downloaded."""
    index = Path(model) / "model_index.json"
    if Path(model).exists() and not index.is_file():
        raise ValueError(
            "it holds no model_index.json; pass a folder that `pipe.save_pretrained` wrote"
        )
    if not index.is_file():
        index = Path(hf_hub_download(model, index.name))
    found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    known = {pipeline.__name__: pipeline for pipeline in pipelines}
    if found not in known:
        raise ValueError(f"it holds a {found}, and this recipe is for {' or '.join(known)}")
    return known[found]


def _save(frames: Sequence[Image.Image], out: Path, video: Video | None) -> None:
    """Write one picture, or all of them as a video."""
    if video is None:
        frames[0].save(out)
    elif out.suffix.lower() == ".mp4":
        export_to_video(list(frames), str(out), fps=video.fps)
    else:
        milliseconds = round(1000 / video.fps)
        frames[0].save(out, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
