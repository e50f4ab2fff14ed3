"""What the trained pipelines are asked for when they are judged, in four sets."""

import random
from collections.abc import Sequence

from pipelines.emoji.captions import caption, with_article
from pipelines.emoji.data import Emoji

SETS = ("held_out", "compositions", "training", "captions")
TRAINING, CAPTIONS = 200, 2560


def prompt_sets(emoji: Emoji) -> dict[str, list[str]]:
    """What to ask for.  A data set with fewer than the usual numbers gives what it has.

    held_out: names that training has never seen; compositions: colours and objects, each known from
    training, but not together; training: names of training; captions: of pictures of training, no two the
    same.
    """
    rng = random.Random(0)
    held, pairs, trained = emoji.held_out, emoji.held_pair, emoji.trained

    def some(values: Sequence[str], count: int) -> list[str]:
        return rng.sample(values, min(count, len(values)))

    rows = list(zip(emoji.names, emoji.colours, emoji.recoloured, strict=True))
    known = sorted({names[0] for (names, *_), use in zip(rows, trained, strict=True) if use})
    unseen = sorted({names[0] for (names, *_), use in zip(rows, held, strict=True) if use})
    compositions = sorted({words for words, use in zip(emoji.described, pairs, strict=True) if use})
    # Several of each: with and without an article or its colour, under another name.
    captions = dict.fromkeys(
        caption(names, colour, bool(recoloured), rng)
        for _ in range(8)
        for (names, colour, recoloured), use in zip(rows, trained, strict=True)
        if use
    )
    asked = [with_article(each) for each in compositions]
    chosen = (unseen, asked, some(known, TRAINING), some(list(captions), CAPTIONS))
    return dict(zip(SETS, chosen, strict=True))
