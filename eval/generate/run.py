"""Makes the images of one setting in a run folder; stopped anywhere, the same command goes on.

    python -m eval generate --pipeline unet --prompts emoji --n 32 --out runs/unreduced
    accelerate launch --num_processes 4 -m eval generate --pipeline path/to/model --out runs/model

An image depends on its prompt, its seed (the run's plus its index) and the others of its batch, which
the list of prompts fixes. So it is the same bit for bit in an unbroken run, in one that was stopped and
continued, and with any number of processes, as long as each computes on the same device with the same
number of threads. `torchrun --nproc-per-node 2 -m eval generate ...` does the same, on CPUs too, where
`accelerate launch --cpu` starts one process only.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from tqdm import tqdm

from eval.baselines.fewer_steps import add_scheduler_argument, scheduler_like
from eval.files import write_whole
from eval.generate.failed import by_prompt, failed, failure, png, told
from eval.generate.manifest import NAME, Manifest, differences, image_name, image_path
from eval.generate.prompts import BUILT_IN, COLUMN, as_prompts, first, load_prompts
from eval.generate.settings import Setting
from eval.provenance import provenance
from pipelines.emoji import GUIDANCE, MODELS, load_pipeline, weights_hash
from pipelines.loading import in_dtype

DTYPES = ("float32", "float16", "bfloat16")
OWN = ("prompt", "generator", "output_type", "num_images_per_prompt", "return_dict")
# For processes that are done: the slowest may still have a batch of large pictures before it.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Loaded:
    """A pipeline, ready to generate, and what tells it from others; `load` makes it.

    Args:
        pipe: The pipeline.
        name: Of the embedded pipeline, on the hub, or of its folder.
        weights: 16 hex digits.
        dtype: Of its weights, such as "float32".
        device: Where it is.
        scheduler: What was asked for instead of the pipeline's own, see `scheduler_like`; None: its own.
    """

    pipe: Any
    name: str
    weights: str
    dtype: str
    device: torch.device
    scheduler: str | None = None

    def identity(self) -> dict[str, Any]:
        """As a manifest has it; with its samplers: other ones draw otherwise with the same weights."""
        samplers = {}
        for name, part in self.pipe.components.items():
            if isinstance(part, SchedulerMixin):
                config = json.loads(part.to_json_string())
                options = {key: value for key, value in config.items() if key[0] != "_"}
                samplers[name] = {"class": type(part).__name__, **options}
        kind = type(self.pipe).__name__
        return {"name": self.name, "class": kind, "weights": self.weights, **samplers}


def load(
    source: str,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    scheduler: str | None = None,
) -> Loaded:
    """An embedded pipeline by its name, one in a local folder, or one on the hub.

    Args:
        source: The name or folder; a folder that is called like an embedded pipeline is "./name".
        dtype: One of DTYPES; float32 on a CPU and float16 elsewhere unless given.
        device: This process's own unless given.
        scheduler: A class of diffusers, instead of the pipeline's own, see `scheduler_like`.

    Raises:
        ValueError: if there is none, or the scheduler does not fit it.
    """
    device = processes(device).device if device is None else torch.device(device)
    dtype = dtype or ("float32" if device.type == "cpu" else "float16")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    pipe: Any
    if source in MODELS:
        pipe, name = load_pipeline(source, getattr(torch, dtype)), source
        weights = weights_hash(source)
    else:
        folder, weights = _folder(source)
        name = folder.resolve().name if Path(source).is_dir() else source
        pipe = DiffusionPipeline.from_pretrained(folder, **in_dtype(getattr(torch, dtype)))
    if scheduler is not None:
        pipe.scheduler = scheduler_like(pipe.scheduler, scheduler)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return Loaded(pipe, name, weights, dtype, device, scheduler)


def processes(device: str | torch.device | None = None) -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them."""
    accelerated = (
        torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    )
    # Not told that they compute on CPUs, several processes would each take itself for the only one.
    cpu = not accelerated or parse_flag_from_env("ACCELERATE_USE_CPU")
    cpu = cpu or (device is not None and torch.device(device).type == "cpu")
    return PartialState(cpu=cpu, timeout=PATIENCE)


def generate(
    source: str | Loaded,
    setting: Setting,
    prompts: str | Sequence[str],
    out: str | Path,
    *,
    seed: int = 0,
    batch_size: int = 8,
    call: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> Manifest:
    """Make what is missing of a run; when it returns, in whichever process, every image is there.

    Images of NaN or of one colour are warned of, and named in the manifest.

    Args:
        source: As of `load`, or what it gave; then dtype and device are its own.
        setting: How to generate.
        prompts: One an image; one string is one prompt.
        out: The run folder: a new one, an empty one, or one of this very run, which may have had fewer of
            the prompts.
        seed: Of image 0; image i has seed + i.
        batch_size: Images generated together.
        call: Arguments for every call of the pipeline; JSON values.
        dtype, device: As of `load`.

    Raises:
        ValueError: if the folder holds another run, or the pipeline cannot do what is asked.
        OSError: if an image cannot be written; those before it are kept.
    """
    state = processes(device)
    prompts = as_prompts(prompts)
    loaded = source if isinstance(source, Loaded) else load(source, dtype, device)
    manifest = Manifest(
        pipeline=loaded.identity(),
        setting=setting.to_dict(),
        call=call or {},
        prompts=tuple(prompts),
        seeds=tuple(range(seed, seed + len(prompts))),
        batch_size=batch_size,
        dtype=loaded.dtype,
        **provenance(loaded.device),
    )
    out = Path(out)
    with setting.applied(
        loaded.pipe
    ) as applied:  # what cannot be is refused before there is a folder
        _check(loaded.pipe, {**manifest.call, **applied.call})
    # One process looks, for all of them: while others write, each would see something else.
    plan: list[Any] = list(_open(out, manifest)) if state.is_main_process else [None, None]
    stored: Manifest
    todo: list[range]
    stored, todo = broadcast_object_list(plan)
    with tqdm(
        total=len(stored),
        initial=len(stored) - sum(map(len, todo)),  # not counted in the rate
        desc=setting.name,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        unit=" images",
        disable=not state.is_main_process,
    ) as bar:
        for batch in todo[state.process_index :: state.num_processes]:
            for index, data in zip(batch, _images(loaded, setting, stored, batch), strict=True):
                write_whole(image_path(out, index), data)
            if state.is_main_process:  # those of the other processes are counted along
                left = sum(map(len, unfinished(out, stored)))
                bar.update(len(stored) - left - bar.n)
        state.wait_for_everyone()
        bar.update(len(stored) - bar.n)
    judged: list[Any] = [_judged(out, stored)] if state.is_main_process else [None]
    (stored,) = broadcast_object_list(judged)
    return stored


def _judged(out: Path, stored: Manifest) -> Manifest:
    """The manifest with the images that are none, whoever made them."""
    found = failed(out, len(stored))
    if found != stored.failed:
        stored = replace(stored, failed=found)
        stored.save(out)
    if found:
        warnings.warn(told(out, by_prompt(stored, found), len(stored)), stacklevel=3)
    return stored


def unfinished(out: str | Path, manifest: Manifest) -> list[range]:
    """The batches, as ranges of indices, that lack an image."""
    present = {entry.name for entry in os.scandir(Path(out) / "images")}
    count, size = len(manifest), manifest.batch_size
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return [batch for batch in batches if any(image_name(index) not in present for index in batch)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m eval generate`."""
    add_run_arguments(parser)
    parser.add_argument(
        "--setting",
        default='{"name": "unreduced"}',
        help="name, kind and options as JSON, or a file with it (%(default)s)",
    )


def add_run_arguments(
    parser: argparse.ArgumentParser,
    out: str = "folder; goes on where it was",
    n: str = "only the first n prompts",
    batches: bool = True,
) -> None:
    """Those that say what to generate, whatever the setting.

    Args:
        out: What --out is.
        n: What -n is.
        batches: Whether images are generated together.
    """
    embedded, sets = ", ".join(sorted(MODELS)), ", ".join(sorted(BUILT_IN))
    parser.add_argument(
        "--pipeline",
        default="unet",
        help=f"embedded ({embedded}), local folder or hub name (%(default)s)",
    )
    parser.add_argument(
        "--prompts", default="emoji", help=f"file, one a line, or a set: {sets} (%(default)s)"
    )
    parser.add_argument("--prompt-column", help=f"of a CSV or JSON-lines file ({COLUMN})")
    # torchrun takes --n for its own, shortened; -n goes through.
    parser.add_argument("-n", "--n", type=int, help=n)
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--steps", type=int, default=25, help="(%(default)s)")
    parser.add_argument(
        "--guidance", type=float, help=f"embedded: {GUIDANCE:g}; else the pipeline's own default"
    )
    add_scheduler_argument(parser)
    for name in ("height", "width"):
        parser.add_argument(f"--{name}", type=int, help="in pixels; default: the model's own")
    if batches:
        parser.add_argument(
            "--batch-size", type=int, default=8, help="images generated together (%(default)s)"
        )
    parser.add_argument("--seed", type=int, default=0, help="of the first image (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, float16 elsewhere")


def call_of(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """The arguments of every call of the pipeline that `add_run_arguments` asked for."""
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} is below 1")
    guidance = args.guidance
    if guidance is None:
        own = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
        default = None if own is None else own.default
        guidance = GUIDANCE if args.pipeline in MODELS else default
    given = {"guidance_scale": guidance, "height": args.height, "width": args.width}
    given = {name: value for name, value in given.items() if value is not None}
    return {"num_inference_steps": args.steps, **given}


def main(args: argparse.Namespace) -> int:
    """`python -m eval generate`. A mistake in the arguments is a ValueError."""
    loaded = load(args.pipeline, args.dtype, scheduler=args.scheduler)
    manifest = generate(
        loaded,
        setting_of(args.setting),
        first(load_prompts(args.prompts, args.prompt_column), args.n),
        args.out,
        seed=args.seed,
        batch_size=args.batch_size,
        call=call_of(args, loaded.pipe),
    )
    state = processes()
    if state.is_main_process:
        name, way = manifest.pipeline["name"], manifest.setting["name"]
        lost = f", {len(manifest.failed)} of them failed" if manifest.failed else ""
        print(f"{args.out}: {len(manifest)} images of {name}, {way}{lost}")
    state.destroy_process_group()
    return 0


def setting_of(text: str) -> Setting:
    """From JSON, or from a file with it."""
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        return Setting.from_dict(json.loads(text))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"--setting cannot be read: {error}; give JSON with name, kind and options, such as "
            '\'{"name": "half", "kind": "tofu", "options": {"ratio": 0.5}}\', or a file with it'
        ) from error


def _folder(source: str) -> tuple[Path, str]:
    """Where a pipeline's files are, and the hash of its weights: on the hub, the snapshot's own."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{folder} holds no model_index.json; give a folder that `pipe.save_pretrained` wrote"
            )
        digest = hashlib.sha256()
        files = [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]
        for path in sorted(files):
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        return folder, digest.hexdigest()[:16]
    try:
        snapshot = Path(DiffusionPipeline.download(source))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no pipeline {source!r}: it is not embedded ({', '.join(sorted(MODELS))}), no folder, and "
            f"the hub did not give it ({error}); correct the name, or give a local folder"
        ) from error
    # The snapshot's files may grow in number (other precisions); its commit stays.
    return snapshot, snapshot.name[:16]


def _check(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what the pipeline would refuse, or pass over, once it has been called."""
    name, accepted = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    if lacking := [key for key in ("prompt", "generator", "output_type") if key not in accepted]:
        raise ValueError(
            f"{name} takes no {', '.join(lacking)}; choose a pipeline that makes images from texts"
        )
    if wrong := [key for key in arguments if key in OWN]:
        raise ValueError(f"{', '.join(wrong)} cannot be given: a run sets it for every image")
    if unknown := [key for key in arguments if key not in accepted]:
        choices = ", ".join(key for key in accepted if key not in (*OWN, "self"))
        raise ValueError(f"{name} takes no {', '.join(unknown)}; it takes {choices}")


def _open(out: Path, manifest: Manifest) -> tuple[Manifest, list[range]]:
    """Begin or continue a run: its manifest as stored, and the batches still to make."""
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if {*held} == {NAME, "images"} and not any(image_path(out, 0).parent.iterdir()):
        # Refused by the pipeline before its first image: nothing is there to be mixed.
        held = []
    if NAME in held:
        held_run = Manifest.load(out)
        stored = held_run.extended(manifest)
        if lines := stored.differences(manifest):
            raise ValueError(
                "\n  ".join([f"{out} holds another run:", *lines])
                + "\nask for the same, choose another folder, or remove this one"
            )
        if stored != held_run:
            stored.save(out)
    elif set(held) - {f".{NAME}.tmp"}:
        raise ValueError(
            f"{out} holds {len(held)} entries such as {held[0]}, but no {NAME}; choose a new folder"
        )
    else:
        stored = manifest
        out.mkdir(parents=True, exist_ok=True)
        stored.save(out)
    images = image_path(out, 0).parent
    images.mkdir(exist_ok=True)
    for leftover in (out / f".{NAME}.tmp", *images.glob(".*.png.tmp")):
        leftover.unlink(missing_ok=True)
    _remove_unreadable(out, stored)
    todo = unfinished(out, stored)
    if todo and (lines := differences(stored.provenance, manifest.provenance)):
        warnings.warn(
            "\n  ".join([f"{out} goes on where other images were made otherwise:", *lines])
            + "\nimages may differ by rounding; the manifest notes it as continued_with",
            stacklevel=3,
        )
        if manifest.provenance not in stored.continued_with:
            stored = replace(stored, continued_with=(*stored.continued_with, manifest.provenance))
            stored.save(out)
    return stored, todo


def _remove_unreadable(out: Path, manifest: Manifest) -> None:
    """Nothing is lost with them: they are made again, as they were."""
    for index in range(len(manifest)):
        path = image_path(out, index)
        try:
            with Image.open(path) as image:
                image.verify()  # the checksums of the whole file
        except FileNotFoundError:
            pass
        except PermissionError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            warnings.warn(f"{path} cannot be read ({error}); it is made again", stacklevel=4)
            path.unlink()


def _images(loaded: Loaded, setting: Setting, manifest: Manifest, batch: range) -> list[bytes]:
    """Files of one batch, each from a generator of its own; on the CPU, as devices draw differently.

    The setting starts anew, and so does what it draws from the global generator, as tomesd does: nothing
    is left of the batches before. The caller's global generator stays as it was.
    """
    with torch.random.fork_rng([loaded.device] if loaded.device.type == "cuda" else []):
        torch.manual_seed(manifest.seeds[batch.start])
        with setting.applied(loaded.pipe) as applied:
            output = loaded.pipe(
                prompt=[manifest.prompts[index] for index in batch],
                generator=[torch.Generator().manual_seed(manifest.seeds[index]) for index in batch],
                output_type="np",  # of which diffusers makes the others; NaN still shows
                **{**manifest.call, **applied.call},
            )
    if not hasattr(output, "images"):
        name = type(loaded.pipe).__name__
        raise ValueError(
            f"{name} gives {', '.join(output)}, no images; choose one that gives images"
        )
    pixels = np.asarray(output.images)
    images = loaded.pipe.numpy_to_pil(np.nan_to_num(pixels, nan=0.0))
    return [png(image, failure(each)) for image, each in zip(images, pixels, strict=True)]
