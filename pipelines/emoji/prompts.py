"""What the trained pipelines are asked for when they are judged, in four sets."""

import random
import re

from pipelines.emoji.captions import COLOURS, SYNONYMS, caption
from pipelines.emoji.data import Emoji
from pipelines.emoji.vae import shown

# Colour and object, each known from training, but not together: `taught` has none of these pairs.
COMPOSITIONS = (
    "a red frog", "a purple frog", "a green rocket", "a purple rocket", "a red castle",
    "a purple castle", "a green guitar", "a purple guitar", "a blue hamburger", "a pink hamburger",
    "a blue balloon", "a yellow balloon", "an orange bicycle", "a purple bicycle", "a green elephant",
    "a purple elephant", "a blue rabbit", "a green rabbit", "a green owl", "a purple owl",
    "a green octopus", "a yellow octopus", "a red butterfly", "a yellow butterfly", "a blue lemon",
    "a purple lemon", "a blue pear", "a purple pear", "red grapes", "yellow grapes",
    "a blue carrot", "a purple carrot", "a green ghost", "a pink ghost", "an orange robot",
    "a purple robot", "a blue snail", "a red snail", "a green penguin", "a pink penguin",
    "a blue duck", "a pink duck", "a blue fox", "a yellow fox", "a green koala",
    "a pink koala", "a blue sunflower", "a purple sunflower", "a green trumpet", "a pink trumpet",
)  # fmt: skip
HELD_OUT, TRAINING, CAPTIONS = 64, 200, 2560


def taught(emoji: Emoji) -> set[tuple[str, str]]:
    """Every colour with every word that captions of one training picture can say, recoloured ones too.

    Generous: a colour is a picture's own or any in its name and keywords, a word any of them, though a
    caption says only some.
    """
    pairs: set[tuple[str, str]] = set()
    pictures, held = shown(emoji), emoji.held_out
    for i, colour in zip(pictures.source.tolist(), pictures.colours, strict=True):
        if not held[i]:
            words = set(re.findall(r"[a-z0-9]+", " ".join([emoji.names[i], *emoji.keywords[i]])))
            named = {SYNONYMS.get(word, word) for word in words} & {*COLOURS}
            colours = named | ({colour} if colour else set())
            pairs |= {(colour, word) for colour in colours for word in words}
    return pairs


def prompt_sets(emoji: Emoji) -> dict[str, list[str]]:
    """held_out and training: names; compositions; captions: one of each of so many training pictures,
    no two the same.

    A data set with fewer gives what it has.
    """
    rng = random.Random(0)
    held = emoji.held_out

    def some(values: list[str], count: int) -> list[str]:
        return rng.sample(values, min(count, len(values)))

    names = {
        side: sorted({n for n, h in zip(emoji.names, held, strict=True) if h == side})
        for side in (True, False)
    }
    rows = [i for i, h in enumerate(held) if not h]
    captions = [
        caption(emoji.names[i], emoji.keywords[i], emoji.styles[i], emoji.colours[i], rng).strip()
        for i in rows
    ]
    return {
        "held_out": some(names[True], HELD_OUT),
        "compositions": list(COMPOSITIONS),
        "training": some(names[False], TRAINING),
        "captions": some(list(dict.fromkeys(captions)), CAPTIONS),
    }
