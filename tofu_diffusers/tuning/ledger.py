"""What `tune` has measured, kept in a folder, so that it goes on when it was stopped anywhere."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..steps.fitted import FittedForecasts


@dataclass(frozen=True)
class Score:
    """One generation of a setting, compared with the unreduced one.

    Attributes:
        latents_db: See `references.latents_db`.
        flops: Of the unreduced denoiser over those with the setting.
        plan: A sign a step: "#" was computed, "." skipped.
        pixels_db: PSNR of the pictures; None: not decoded.
    """

    latents_db: float
    flops: float
    plan: str
    pixels_db: float | None = None


def damaged(path: Path, error: Exception) -> str:
    """In words, that a file of a search cannot be read."""
    return f"{path} is damaged ({error}); delete it, or choose another folder"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file, which is then put in its place: it is there as a whole or not at all.

    Each process has its own: two may write one file.
    """
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Ledger:
    """Scores by key, and unreduced generations by number.

    Several processes may add to one folder: each line is written at once.

    Args:
        folder: Where to keep them; None: in a temporary one, until `close`.
        about: What tells this search from others; JSON values.

    Raises:
        ValueError: if the folder holds another search.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any]) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="tofu-tune-")
            folder = self._temporary.name
        self.folder = Path(folder)
        self.scores: dict[str, Score] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "search.json"
        about = json.loads(json.dumps(about))
        if known.is_file():
            try:
                stored = json.loads(known.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(damaged(known, error)) from error
            for name in about:
                if stored.get(name) != about[name]:
                    raise ValueError(
                        f"{self.folder} holds another search: its {name} is {stored.get(name)!r}, not "
                        f"{about[name]!r}; ask for the same, or choose another folder"
                    )
        else:
            with written_whole(known) as part:
                part.write_text(json.dumps(about), encoding="utf-8")
        path = self.folder / "scores.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # A line that a killed process left unfinished is cut off: others are added behind it.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(path, len(whole.encode()))
        for line in whole.splitlines():
            try:
                data = json.loads(line)
                key = data.pop("key")
                self.scores[key] = Score(**data)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(damaged(path, error)) from error

    def close(self) -> None:
        """Remove a temporary folder."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def add(self, key: str, score: Score) -> None:
        """Keep a score."""
        self.scores[key] = score
        line = json.dumps({"key": key, **asdict(score)}) + "\n"
        with (self.folder / "scores.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode())

    def reference_file(self, number: int) -> Path:
        """Where an unreduced generation is kept."""
        return self.folder / f"reference-{number}.safetensors"

    def fitted(self, plan: str) -> FittedForecasts | None:
        """The fitted forecasts of a choice of steps, if they were kept."""
        path = self._fitted_file(plan)
        if not path.is_file():
            return None
        try:
            return FittedForecasts.of(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(damaged(path, error)) from error

    def keep_fitted(self, plan: str, fitted: FittedForecasts) -> None:
        """Keep fitted forecasts."""
        with written_whole(self._fitted_file(plan)) as part:
            part.write_text(json.dumps(asdict(fitted)), encoding="utf-8")

    def _fitted_file(self, plan: str) -> Path:
        signs = plan.replace("#", "1").replace(".", "0")
        return self.folder / f"fitted-{signs}.json"
