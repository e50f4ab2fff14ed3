"""What to generate: a built-in set of prompts, or a file: text with one prompt a line, CSV or JSON lines.

>>> from eval.generate.prompts import load_prompts
>>> load_prompts("emoji")[:3]
['a red apple', 'a smiling face', 'a blue car']
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
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
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # blank, although letters and symbols by category
COLUMN = "prompt"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
SHOWN = 5  # problems of a file named in one error


def load_prompts(source: str | Path, column: str | None = None) -> list[str]:
    """The prompts of a built-in set, or of a UTF-8 file; blank lines are passed over.

    Of a .csv, .tsv, .jsonl or .ndjson file, one column is read. Of any other, every line is a prompt, also
    one that begins with "#".

    Args:
        column: Its name, in whatever case; `prompt` unless given.

    Raises:
        ValueError: if there is no such set, file or column, or if a line cannot be meant as a prompt of its
            own.
    """
    path = BUILT_IN.get(str(source), Path(source))
    if not path.is_file():
        raise ValueError(
            f"no prompts at {source}: it is neither a file nor a built-in set "
            f"({', '.join(sorted(BUILT_IN))}); give a text file with one prompt a line"
        )
    first_lines: dict[str, int] = {}
    problems: list[str] = []
    for number, text in _texts(path, _lines(path), column, problems):
        prompt = text.strip(" ")
        if problem := _problem(prompt):
            problems.append(f"line {number} {problem}")
        elif prompt in first_lines:
            problems.append(f"line {number} repeats line {first_lines[prompt]}; keep one of them")
        else:
            first_lines[prompt] = number
    _refuse(path, problems)
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


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError("\n  ".join([f"{path} has odd lines:", *problems[:SHOWN]]) + more)


def _lines(path: Path) -> list[str]:
    """Decoded; line i has the number i + 1."""
    found: list[str] = []
    problems: list[str] = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            found.append(raw.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            problems.append(f"line {number} is not UTF-8 (byte 0x{byte:02X}); save it as UTF-8")
    _refuse(path, problems)
    return found


def _texts(
    path: Path, lines: list[str], column: str | None, problems: list[str]
) -> Iterator[tuple[int, str]]:
    """What may be prompts, with the number of the line that each begins in."""
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        yield from _cells(path, lines, SEPARATORS[suffix], column or COLUMN, problems)
    elif suffix in JSON_LINES:
        yield from _fields(lines, column or COLUMN, problems)
    elif suffix == ".json" or column is not None:
        raise ValueError(
            f"{path} has no columns; give a file that ends in {', '.join([*SEPARATORS, *JSON_LINES])} "
            "and has one, or a text file with one prompt a line"
        )
    else:
        texts = [(number, line) for number, line in enumerate(lines, 1) if line.strip(" ")]
        if texts and (form := _form(texts[0][1])):
            raise ValueError(
                f"{path} holds {form}, as its line {texts[0][0]} says; let its name end so, or write one "
                "prompt a line"
            )
        yield from texts


def _cells(
    path: Path, lines: list[str], separator: str, column: str, problems: list[str]
) -> Iterator[tuple[int, str]]:
    """Of one column of CSV, whose first line that is not blank names the columns."""
    reader = csv.reader((line + "\n" for line in lines), delimiter=separator, strict=True)
    header: list[str] = []
    place: int | None = None
    number = 1
    try:
        for row in reader:
            if not "".join(row).strip(" "):
                pass
            elif place is None:
                header = [name.strip(" ") for name in row]
                place = _place(header, column)
                if place is None:
                    raise ValueError(
                        f"{path} has {', '.join(map(repr, header))} in line {number}, and not one column "
                        f"{column!r}; name one by --prompt-column, or let the name of a file with one prompt "
                        "a line end in .txt"
                    )
            elif len(row) != len(header):
                problems.append(
                    f"line {number} has {len(row)} cells, the header {len(header)}; put texts with "
                    f"{separator!r} in quotes"
                )
            else:
                yield number, row[place]
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path} cannot be read from line {number} on: {error}; mend its quotes"
        ) from error


def _fields(lines: list[str], column: str, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Of one field of JSON lines."""
    for number, line in enumerate(lines, 1):
        if not line.strip(" "):
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number} is no JSON ({error}); mend or remove it")
            continue
        if not isinstance(row, dict):
            problems.append(f"line {number} is no JSON object; write {{{json.dumps(column)}: ...}}")
        elif (place := _place([*row], column)) is None:
            names = ", ".join(map(repr, row)) or "nothing"
            problems.append(
                f"line {number} has {names}, and not one {column!r}; name one by --prompt-column"
            )
        elif not isinstance(text := [*row.values()][place], str):
            problems.append(f"line {number} has {text!r} as {column!r}, which is no text")
        else:
            yield number, text


def _place(names: list[str], column: str) -> int | None:
    """Of the column with this name, or else of the only one with it in another case."""
    for same in (str, str.casefold):
        found = [place for place, name in enumerate(names) if same(name) == same(column)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _form(line: str) -> str | None:
    """What a file is instead of text with a prompt a line, by its first line."""
    try:
        if isinstance(json.loads(line), dict):
            return "JSON lines (.jsonl)"
    except ValueError:
        pass
    names = [name.strip(' "').casefold() for name in re.split("[,;\t]", line)]
    return "CSV (.csv, .tsv)" if len(names) > 1 and COLUMN in names else None


def _problem(prompt: str) -> str | None:
    """Why a line is no prompt, and what to do about it."""
    if not prompt:
        return "has an empty prompt; write one, or remove the line"
    if len(prompt) > MOST_CHARACTERS:
        return (
            f"has {len(prompt)} characters, more than {MOST_CHARACTERS}; shorten it, or put each "
            "prompt on a line of its own"
        )
    for character in prompt:
        # Control characters and the two separators of Unicode; joiners inside emoji are of category Cf.
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            return f"holds the control character U+{ord(character):04X}; replace it by a space"
    if not any(map(_seen, prompt)):
        codes = ", ".join(f"U+{ord(character):04X}" for character in dict.fromkeys(prompt))
        return f"holds nothing to be seen ({codes}); write a prompt, or remove the line"
    return None


def _seen(character: str) -> bool:
    """Not spaces, joiners and other marks; an unassigned one may be an emoji that Python does not know."""
    category = unicodedata.category(character)
    return category[0] not in "ZM" and category != "Cf" and character not in FILLERS
