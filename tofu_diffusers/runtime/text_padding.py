"""Drops text tokens that a mask hides from all others, at places that are read once a generation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families.base import Family, MaskedText
from ..steps.reference import Reference
from .call import Call


@dataclass(frozen=True)
class Places:
    """Which tokens of a text stay.

    Attributes:
        runs: [start, end) of what follows each other, ascending. As numbers of the host, so that cutting is
            a view, or one copy.
        tokens: How many the text has.
    """

    runs: tuple[tuple[int, int], ...]
    tokens: int

    @classmethod
    def of(cls, kept: Iterable[int], tokens: int) -> Places:
        """Those of these positions."""
        runs: list[tuple[int, int]] = []
        for place in sorted(kept):
            if runs and runs[-1][1] == place:
                runs[-1] = (runs[-1][0], place + 1)
            else:
                runs.append((place, place + 1))
        return cls(tuple(runs), tokens)

    @property
    def kept(self) -> frozenset[int]:
        """Their positions."""
        return frozenset(place for start, end in self.runs for place in range(start, end))

    @property
    def dropped(self) -> int:
        """How many tokens go."""
        return self.tokens - sum(end - start for start, end in self.runs)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """The rows that stay, along an axis on which the text stands first, and all that follows it."""
        runs = [*self.runs, (self.tokens, x.shape[dim])]
        parts = [x.narrow(dim, start, end - start) for start, end in runs if end > start]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def version_of(x: Tensor) -> int:
    """How often a tensor was written to; always 0 in inference mode, where nobody counts."""
    return 0 if x.is_inference() else x._version


class TextPadding:
    """The padding of one denoiser's texts.

    Whether a token is padding is a number on the device. It is read when a mask is first seen; where a call
    is traced that cannot be, and its masks are read when the step is over. Until then nothing is dropped.

    Args:
        drops: Whether it is asked for; else nothing is done.

    Attributes:
        why_not: Why padding stayed, of which it is not certain that nothing sees it; empty if none did.
        counts: Of every branch of guidance, the text tokens of its last call, and those dropped of them.
        reads: How many masks were read in this generation.
    """

    def __init__(self, family: Family, drops: bool) -> None:
        self.family = family
        self.drops = drops
        self.why_not = ""
        self.counts: dict[str, tuple[int, int]] = {}
        self.reads = 0
        # By branch and number of the text: what was read, how often it had been written to, what it says.
        self._known: dict[str, tuple[Reference, int, Places]] = {}
        self._traced: dict[str, Places] = {}
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def start(self) -> None:
        """Forget the texts of the last generation."""
        self.why_not, self.reads = "", 0
        for each in (self._known, self._traced, self._seen):
            each.clear()

    def cut(self, model: Any, named: dict[str, Any], call: Call) -> dict[str, Any]:
        """The denoiser's arguments without padding; the same ones where none is dropped.

        Raises:
            RuntimeError: if the masks cannot be read now and there is no step to wait for.
        """
        if not self.drops:
            return named
        if call.cfg_branch == "0":
            self.counts.clear()
        tokens = dropped = 0
        changed: dict[str, Any] = {}
        seen = self.family.sees_padding(model, named)
        for number, text in enumerate(self.family.texts):
            states = named.get(text.states)
            if states is None:
                continue
            tokens += states.shape[1]
            source = states if text.mask is None else named.get(text.mask)
            if seen is not None or source is None:
                self.why_not = (
                    seen or f"{text.mask} is None, so that no token is known to be padding"
                )
                continue
            places = self._places(text, f"{call.cfg_branch}/{number}", source, states, call)
            if places is None or not places.dropped:
                continue
            dropped += places.dropped
            changed[text.states] = places.cut(states, 1)
            if text.mask is not None:
                changed[text.mask] = places.cut(source, 1)
            if text.ids is not None and named.get(text.ids) is not None:
                changed[text.ids] = places.cut(named[text.ids], -2)
        self.counts[call.cfg_branch] = (tokens, dropped)
        return {**named, **changed} if changed else named

    def resolve(self) -> None:
        """Read the masks of traced calls, now that their step is over.

        Raises:
            RuntimeError: if a text is longer than what was left of it, because it changed on the way.
        """
        for key, (source, states) in self._seen.items():
            if self._is_known(key, source):
                continue
            text, used = self.family.texts[int(key.split("/")[1])], self._traced.get(key)
            places = self._read(text, source, states.shape[1])
            if used is not None and not places.kept <= used.kept:
                raise RuntimeError(
                    f"the text changed on the way: of {len(places.kept)} tokens that are no padding "
                    f"{len(places.kept - used.kept)} were dropped in this step of a compiled denoiser; leave "
                    "drop_text_padding out, or do not compile"
                )
            self._remember(key, source, places)
        self._seen.clear()

    def _places(
        self, text: MaskedText, key: str, source: Tensor, states: Tensor, call: Call
    ) -> Places | None:
        """What stays of a text in this call; None: all, as it is not known yet."""
        if torch.compiler.is_compiling():
            if not call.step_known:
                raise RuntimeError(
                    f"a compiled {self.family.name} denoiser must be told its steps, or it cannot be known "
                    "which text tokens are padding: call handle.step(i, n) before each step of a bare model, "
                    "or apply tofu to the whole pipeline"
                )
            self._seen[key] = (source, states)
            return self._traced.get(key)
        if not self._is_known(key, source):
            self._remember(key, source, self._read(text, source, states.shape[1]))
        return self._known[key][2]

    def _is_known(self, key: str, source: Tensor) -> bool:
        """Whether it was read, and is as it was then."""
        if key not in self._known:
            return False
        read, version, _ = self._known[key]
        return read() is source and version == version_of(source)

    def _remember(self, key: str, source: Tensor, places: Places) -> None:
        self._known[key] = (Reference(source), version_of(source), places)
        # Traced, all branches of guidance drop what is padding in each of them: they share one graph, and
        # may change places where guidance begins or ends on the way.
        number = key.split("/")[1]
        alike = [
            other
            for other, (_, _, its) in self._known.items()
            if other.split("/")[1] == number and its.tokens == places.tokens
        ]
        kept = frozenset[int]().union(*(self._known[other][2].kept for other in alike))
        for other in alike:
            self._traced[other] = Places.of(kept, places.tokens)

    def _read(self, text: MaskedText, source: Tensor, tokens: int) -> Places:
        """Wait for the device, and see which tokens stay: all, where padding is not certainly padding."""
        self.reads += 1
        everything = range(tokens)
        if text.mask is None:
            return Places.of(everything if bool(source.any()) else [0], tokens)
        if source.ndim != 2 or source.shape[1] < tokens:
            shape = tuple(source.shape)
            self.why_not = f"{text.mask} of shape {shape} is no row of {tokens} tokens a prompt"
            return Places.of(everything, tokens)
        mask = source[:, :tokens].detach().cpu()
        if not ((mask == 0) | (mask == 1)).all():
            self.why_not = f"{text.mask} has other numbers than 0 and 1, which hide nothing wholly"
            return Places.of(everything, tokens)
        shown = mask.bool().any(0).nonzero().flatten().tolist()
        # One at least: an attention over no token has no value.
        if text.gaps:
            return Places.of(shown or [0], tokens)
        end = max(shown, default=0) + 1
        if len(shown) < min(end, tokens) and shown:
            self.why_not = (
                f"{end - len(shown)} of {tokens} tokens that {text.mask} hides stand before shown ones, and "
                "without them others would move"
            )
        return Places.of(range(end), tokens)
