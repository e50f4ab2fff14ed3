"""What a picture is called: colour words from its pixels, captions from its names, the split."""

import hashlib
import random

import numpy as np
from PIL import Image

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey",
)  # fmt: skip
TURNED = COLOURS[:7]
"""The colours that a turn of hues can give."""
_COLOUR_WORDS = {*COLOURS, "gray", "violet"}


def colour_shares(pixels: np.ndarray) -> np.ndarray:
    """Share of the pixels that each word of COLOURS names.  float [P, 3] in [0, 1] -> [11]."""
    high, low = pixels.max(1), pixels.min(1)
    span = high - low
    safe = np.maximum(span, 1e-6)
    red, green, blue = pixels.T
    hue = np.where(
        high == red,
        (green - blue) / safe % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue, saturation = hue * 60, span / np.maximum(high, 1e-6)
    names = np.select(
        [
            high < 0.22,
            (saturation < 0.15) & (high > 0.85),
            saturation < 0.18,
            (hue < 50) & (hue >= 10) & (high < 0.68),
            (hue < 16) | (hue >= 345),
            hue < 34,
            hue < 68,
            hue < 170,
            hue < 255,
            hue < 300,
        ],
        [8, 9, 10, 7, 0, 1, 2, 3, 4, 5],
        default=6,
    )
    # A pale red is what people call pink, and a strong crimson red.
    names = np.where((names == 0) & (saturation < 0.45) & (high > 0.75), 6, names)
    names = np.where((names == 6) & (hue >= 330) & (saturation > 0.65), 0, names)
    return np.bincount(names, minlength=len(COLOURS)) / max(len(names), 1)


def dominant_colour(pixels: np.ndarray, least: float = 0.33) -> str | None:
    """The colour word of at least that share of the pixels, if there is one.  float [P, 3] in [0, 1]."""
    if len(pixels) == 0:
        return None
    shares = colour_shares(pixels)
    best = int(shares.argmax())
    return COLOURS[best] if shares[best] >= least else None


def turn_hue(pixels: np.ndarray, degrees: int) -> np.ndarray:
    """The same picture with its hues turned.  uint8 [H, W, 3] -> uint8 [H, W, 3]."""
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    hue = hue.point(lambda h: (h + round(degrees / 360 * 256)) % 256)
    return np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))


def recolourings(foreground: np.ndarray, colour: str | None) -> dict[str, int]:
    """New colours of a picture, with the turn of hues that gives most of each.  uint8 [P, 3].

    Empty if its own colour is none or has no hue.
    """
    if colour not in (*TURNED, "brown") or len(foreground) == 0:
        return {}
    best: dict[str, tuple[float, int]] = {}
    for degrees in range(15, 360, 15):
        turned = turn_hue(foreground[None], degrees)[0] / 255
        shares = colour_shares(turned)
        new, share = COLOURS[int(shares.argmax())], float(shares.max())
        if new in TURNED and new != colour and share >= 0.33 and share > best.get(new, (0, 0))[0]:
            best[new] = (share, degrees)
    return {new: degrees for new, (_, degrees) in sorted(best.items())}


def held_out(name: str, percent: int = 5) -> bool:
    """Whether a concept, or a colour and concept, is kept from training: a fixed hash of its name.

    Its salt is the first that leaves the twelve pictures by which a card is judged in training.
    """
    digest = hashlib.sha256(f"split 1 {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def with_article(noun: str) -> str:
    """With an article before it, unless it looks like a plural."""
    if noun.endswith("s") and not noun.endswith(("ss", "us", "is", "os")):
        return noun
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"


def caption(names: list[str], colour: str | None, recoloured: bool, rng: random.Random) -> str:
    """One caption, drawn from the ways a person might ask for the picture.

    A recoloured picture is called by its new colour, unless the name has a colour word already.
    """
    noun = names[0] if len(names) == 1 or rng.random() < 0.75 else rng.choice(names[1:])
    named = any(word in _COLOUR_WORDS for word in noun.split())
    if colour and not named and (recoloured or rng.random() < 0.5):
        noun = f"{colour} {noun}"
    return with_article(noun) if rng.random() < 0.5 else noun
