"""Where the tokens of one sample stand: the grid of image tokens and what stands around it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class TokenGrid:
    """Image tokens in (frame, row, column) order, with other tokens before or after them.

    Rows come first everywhere. An image has one frame. The others (text, or the reference pictures of an
    edit) are never reduced.

    Raises:
        ValueError: a side is below 1, a text length below 0, or either is not an int.
    """

    height: int
    width: int
    frames: int = 1
    text_before: int = 0
    text_after: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if "text" in field.name else 1
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(
                    f"TokenGrid.{field.name} is {value!r}, not an int; give the number of tokens"
                )
            if value < least:
                raise ValueError(
                    f"TokenGrid.{field.name} is {value}, below {least}; "
                    f"give the number of tokens ({least} or more)"
                )

    @property
    def tokens(self) -> int:
        """Image tokens: frames * height * width."""
        return self.frames * self.height * self.width

    @property
    def total(self) -> int:
        """All tokens of the sequence, those around the image included."""
        return self.text_before + self.tokens + self.text_after

    @property
    def row(self) -> TokenGrid:
        """The same tokens in one row, where only their number is known or counts."""
        return replace(self, height=1, width=self.tokens, frames=1)

    @property
    def size(self) -> str:
        """For messages: its sides in words, such as 6x10, or 3x6x10 of three frames."""
        sides = (self.height, self.width) if self.frames == 1 else self.sides
        return "x".join(map(str, sides))

    @property
    def sides(self) -> tuple[int, int, int]:
        """(frames, height, width), the order in which tokens are numbered."""
        return self.frames, self.height, self.width
