"""Whether options from JSON are of the types that a function is annotated with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, get_args, get_type_hints

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def check_types(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Of these options, those that are annotated with one of `WORDS`, or with one and None.

    Raises:
        TypeError: naming the first that is of another type.
    """
    hints = get_type_hints(inspect.unwrap(function))
    for name, value in options.items():
        hint = hints.get(name)
        allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = [kind for kind in allowed if kind in WORDS]
        # JSON's true is no number, and a whole number is a number, too.
        fits = type(value) in (*allowed, *([int] if float in kinds else []))
        if kinds and not fits:
            raise TypeError(f"{name} must be {' or '.join(WORDS[k] for k in kinds)}, not {value!r}")
