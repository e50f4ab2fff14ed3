"""What to generate: a built-in set of prompts, or a text file with one prompt a line.

>>> from eval.generate.prompts import load_prompts
>>> load_prompts("emoji")[:3]
['a red apple', 'a smiling face', 'a blue car']
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

# `emoji`: 336 prompts in words that the embedded pipelines were trained on, of all kinds from the start, and
# about two of sixteen of a colour and an object. So the first n are as fair a sample as all of them.
# `emoji-captions`: 2,560 in random order, as many as distances of sets need, each of a picture that the
# embedded pipelines were trained on (`pipelines.emoji.prompts`).
BUILT_IN = {
    "emoji": Path(__file__).with_name("prompts_emoji.txt"),
    "emoji-captions": Path(__file__).with_name("prompts_emoji_captions.txt"),
}
MOST_CHARACTERS = (
    2000  # about what the longest text encoders read; more is likelier a lost line break
)
SHOWN = 5  # problems of a file named in one error


def load_prompts(source: str | Path) -> list[str]:
    """The prompts of a built-in set, or of a UTF-8 text file; blank lines are passed over.

    Every other line is a prompt, also one that begins with "#".

    Raises:
        ValueError: if there is no such set or file, or if a line cannot be meant as a prompt of its own.
    """
    path = BUILT_IN.get(str(source), Path(source))
    if not path.is_file():
        raise ValueError(
            f"no prompts at {source}: it is neither a file nor a built-in set "
            f"({', '.join(sorted(BUILT_IN))}); give a text file with one prompt a line"
        )
    first_lines: dict[str, int] = {}
    problems: list[str] = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            prompt = raw.decode("utf-8").removesuffix("\r").strip(" ")
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            problems.append(f"line {number} is not UTF-8 (byte 0x{byte:02X}); save it as UTF-8")
            continue
        if not prompt:
            continue
        if problem := _problem(prompt):
            problems.append(f"line {number} {problem}")
        elif prompt in first_lines:
            problems.append(f"line {number} repeats line {first_lines[prompt]}; keep one of them")
        else:
            first_lines[prompt] = number
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError("\n  ".join([f"{path} has odd lines:", *problems[:SHOWN]]) + more)
    if not first_lines:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return list(first_lines)


def as_prompts(given: str | Sequence[str]) -> list[str]:
    """One string is one prompt; as a sequence it would be its letters."""
    return [given] if isinstance(given, str) else list(given)


def first(prompts: list[str], n: int | None, least: int = 1) -> list[str]:
    """The first n of them; all without a number.

    Args:
        least: How many there must be; an interval needs 2.

    Raises:
        ValueError: if there are not as many, or n is less.
    """
    wanted = len(prompts) if n is None else n
    if not least <= wanted <= len(prompts):
        raise ValueError(
            f"{wanted} prompts asked for of {len(prompts)}; choose {least} to {len(prompts)}"
        )
    return prompts[:wanted]


def _problem(prompt: str) -> str | None:
    """Why a line is no prompt, and what to do about it."""
    if len(prompt) > MOST_CHARACTERS:
        return (
            f"has {len(prompt)} characters, more than {MOST_CHARACTERS}; shorten it, or put each "
            "prompt on a line of its own"
        )
    for character in prompt:
        # Control characters and the two separators of Unicode; joiners inside emoji are of category Cf.
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            return f"holds the control character U+{ord(character):04X}; replace it by a space"
    return None
