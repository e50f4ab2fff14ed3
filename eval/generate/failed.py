"""Which pictures are none: those of NaN, and those of one colour throughout.

Saved, NaN is black like what a safety checker leaves, and two black pictures are alike whatever made them.
So a picture of NaN says so in its file, whichever process wrote it and whenever that was stopped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval.generate.manifest import Manifest, image_name, image_path

NAN, ONE_COLOUR = "NaN", "one colour"
REASONS = {
    NAN: "the model's numbers overflowed: give --dtype float32 or bfloat16, or a setting that strays less",
    ONE_COLOUR: "as a safety checker leaves them: save the pipeline without it, or change the prompts",
}
SHOWN = 5  # pictures named in one message
_TEXT = "failed"  # of a PNG


class FailedPictures(ValueError):
    """More pictures failed than may."""


def failure(pixels: np.ndarray) -> str | None:
    """Of `REASONS`, for a picture [H, W, C] of bytes or in [0, 1]; None: it is one."""
    if np.isnan(pixels).any():
        return NAN
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round()  # as it is saved
    return ONE_COLOUR if (pixels == pixels[:1, :1]).all() else None


def png(image: Image.Image, reason: str | None) -> bytes:
    """A picture's file."""
    about = PngInfo()
    if reason == NAN:  # the other one shows
        about.add_text(_TEXT, NAN)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def failed(folder: str | Path, count: int) -> dict[str, str]:
    """Of a whole run of so many pictures, the names of those that are none, and why."""
    found = {}
    for index in range(count):
        with Image.open(image_path(folder, index)) as image:
            reason = image.info.get(_TEXT) or failure(np.array(image.convert("RGB")))
        if reason is not None:
            found[image_name(index)] = reason
    return found


def by_prompt(manifest: Manifest, failures: Mapping[str, str]) -> dict[str, str]:
    """These, each with its prompt beside its name."""
    prompts = {image_name(index): prompt for index, prompt in enumerate(manifest.prompts)}
    return {f"{name} {prompts[name]!r}": reason for name, reason in failures.items()}


def told(where: object, failures: Mapping[str, str], count: int) -> str:
    """How many of so many failed, which, why, and what to do about it."""
    lines = [f"{name}: {reason}" for name, reason in failures.items()]
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    ways = [f"{reason}: {REASONS[reason]}" for reason in dict.fromkeys(failures.values())]
    head = f"{where}: {len(lines)} of {count} pictures failed"
    return "\n  ".join([head, *lines[:SHOWN], *more]) + "\n" + "\n".join(ways)


def refuse(where: object, failures: Mapping[str, str], count: int, allowed: int = 0) -> None:
    """Raises FailedPictures if more failed than are allowed by --allow-failed."""
    if len(failures) > allowed:
        raise FailedPictures(
            f"{told(where, failures, count)}\n{allowed} may; to score them like others: --allow-failed "
            f"{len(failures)}"
        )
