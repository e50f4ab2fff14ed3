"""Generated parts of documents: tables, and where they stand."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(marks: tuple[str, str], made: str, text: str) -> str:
    """The text with something else between two marks of it."""
    before, rest = text.split(marks[0])
    return f"{before}{marks[0]}{made}{marks[1]}{rest.split(marks[1])[1]}"
