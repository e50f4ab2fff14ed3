"""What a picture is called: colour words from its pixels, captions from its names, the split."""

import hashlib
import random
import re

import numpy as np

STYLES = ("flat", "3d")  # Noto is drawn flat, Fluent 3D is rendered
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey",
)  # fmt: skip
_PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "child", "and"}
SYNONYMS = {"gray": "grey", "violet": "purple"}
_COLOUR_WORDS = {*COLOURS, *SYNONYMS}


def colour_shares(pixels: np.ndarray) -> np.ndarray:
    """Share of the pixels that each word of COLOURS names.  float [P, 3] in [0, 1] -> [11]"""
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
    # A pale red is what people call pink.
    names = np.where((names == 0) & (saturation < 0.45) & (high > 0.75), 6, names)
    return np.bincount(names, minlength=len(COLOURS)) / max(len(names), 1)


def dominant_colour(pixels: np.ndarray, least: float = 0.4) -> str | None:
    """The colour word of at least that share of the pixels, if there is one."""
    if len(pixels) == 0:
        return None
    shares = colour_shares(pixels)
    best = int(shares.argmax())
    return COLOURS[best] if shares[best] >= least else None


def subject(name: str) -> str:
    """What a name shows, whoever does it: "man running" and "woman running" are one subject."""
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in _PEOPLE]
    return " ".join(words)


def held_out(name: str, percent: int = 5) -> bool:
    """Whether a concept is kept from training: a fixed hash of its subject."""
    digest = hashlib.sha256(subject(name).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def without_colours(text: str) -> str:
    """The words of a name that are not colours ("red apple" -> "apple")."""
    return " ".join(word for word in text.split() if word not in _COLOUR_WORDS)


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"


def caption(
    name: str,
    keywords: list[str],
    style: str,
    colour: str | None,
    rng: random.Random,
    recoloured: bool = False,
) -> str:
    """One caption, drawn from the ways a person might ask for the picture.

    A recoloured picture is always called by its new colour, and never by the old one.
    """
    if recoloured:
        name = without_colours(name) or name
        keywords = [k for k in keywords if k not in _COLOUR_WORDS]
    words = [k for k in keywords if k not in _COLOUR_WORDS]
    noun = name if not words or rng.random() < 0.8 else rng.choice(words)
    named = any(word in _COLOUR_WORDS for word in noun.split())
    if colour and not named and (recoloured or rng.random() < 0.4):
        noun = f"{colour} {noun}"
    if rng.random() < 0.5:
        noun = with_article(noun)
    if words and rng.random() < 0.35:
        noun = ", ".join([noun, *rng.sample(words, min(len(words), rng.randint(1, 3)))])
    if rng.random() < 0.25:
        noun = f"{noun}, {style}"
    return noun
