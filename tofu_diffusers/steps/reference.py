"""A weak reference that a deep copy follows."""

from __future__ import annotations

import weakref
from typing import Any


class Reference:
    """Refers to an object without keeping it alive, or copying it along with what refers to it.

    A deep copy refers to the object's copy where that was made before, in the same `copy.deepcopy`, and
    else to nothing.
    """

    def __init__(self, target: Any = None) -> None:
        self._get = _nothing if target is None else weakref.ref(target)

    def __call__(self) -> Any:
        """The object; None if there is none, or it is gone."""
        return self._get()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return Reference(memo.get(id(self())))

    def __reduce__(self) -> tuple[type[Reference], tuple[()]]:
        return Reference, ()


def _nothing() -> None:
    return None
