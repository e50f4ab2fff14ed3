"""What a run folder holds: which pipeline, setting, prompts and seeds its images were made with.

>>> from eval.generate.manifest import Manifest, image_path
>>> manifest = Manifest.load(folder)
>>> path = image_path(folder, 3)  # the image of manifest.prompts[3] and manifest.seeds[3]
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from eval.files import write_whole
from eval.provenance import PROVENANCE

FORMAT = 1
NAME = "manifest.json"
_KEYS = {"pipeline": ("name", "class", "weights"), "setting": ("name", "kind", "options")}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One run. Image i belongs to prompts[i] and seeds[i].

    Args:
        pipeline: "name", "class" and "weights" (16 hex digits), and what else tells it from others.
        setting: "name", "kind" and "options", as of `Setting.to_dict`.
        call: Arguments of every call of the pipeline, before those that the setting replaces.
        prompts: One an image.
        seeds: One an image, of its own generator.
        batch_size: Images i to i + batch_size - 1 are generated together, i a multiple of it.
        dtype: Of the weights, such as "float32".
        device, threads, versions, commit: As `provenance` gives them.
        continued_with: Each other provenance that a part of the images was made with.
        failed: The names of images that are none, and why, as of `eval.generate.failed`.

    Raises:
        ValueError: on values that no run can have.
    """

    pipeline: Mapping[str, Any]
    setting: Mapping[str, Any]
    call: Mapping[str, Any]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    batch_size: int
    dtype: str
    device: str
    threads: int
    versions: Mapping[str, str]
    commit: str
    continued_with: tuple[Mapping[str, Any], ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("pipeline", "setting", "call", "versions", "failed"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        for name in ("prompts", "seeds", "continued_with"):
            if isinstance(getattr(self, name), str):  # a sequence, too: of its letters
                raise ValueError(f"{name} is the text {getattr(self, name)!r}; give a list")
            object.__setattr__(self, name, tuple(_plain(name, list(getattr(self, name)))))
        for name, keys in _KEYS.items():
            value = getattr(self, name)
            lacking = [key for key in keys if key not in value] if isinstance(value, dict) else keys
            if lacking:
                raise ValueError(f"{name} lacks {', '.join(lacking)}; it is {value!r}")
        if not re.fullmatch(r"[0-9a-f]{16}", str(self.pipeline["weights"])):
            raise ValueError(
                f"pipeline.weights is {self.pipeline['weights']!r}, not 16 lower-case hex digits"
            )
        if not (self.prompts and all(isinstance(p, str) and p for p in self.prompts)):
            raise ValueError("prompts must be one text or more, and none of them empty")
        if len(self.prompts) != len(self.seeds):
            raise ValueError(
                f"{len(self.prompts)} prompts but {len(self.seeds)} seeds; each image has one of both"
            )
        if wrong := [seed for seed in self.seeds if not _whole(seed, 0, 2**64 - 1)]:
            raise ValueError(f"seed {wrong[0]!r} is not a whole number from 0 to 2^64 - 1")
        if not _whole(self.batch_size, 1):
            raise ValueError(f"batch_size {self.batch_size!r} is not a whole number above 0")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def provenance(self) -> dict[str, Any]:
        """Of its first images."""
        return {name: getattr(self, name) for name in PROVENANCE}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"format": FORMAT, **plain}

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """What `to_dict` gave.

        Raises:
            ValueError: on another format, or on fields that are missing, unknown or impossible.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else data
            raise ValueError(f"format {found!r} is not {FORMAT}, which this checkout reads")
        known = {each.name for each in fields(cls)}
        given = data.keys() - {"format"}
        if lacking := sorted(known - {"continued_with", "failed"} - given):
            raise ValueError(f"it lacks {', '.join(lacking)}")
        if unknown := sorted(given - known):
            raise ValueError(f"it has {', '.join(unknown)}, which format {FORMAT} has not")
        return cls(**{name: data[name] for name in given})

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Of a run folder.

        Raises:
            ValueError: if it has none, or none that can be read.
        """
        path = Path(folder) / NAME
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"{folder} is no run folder: it holds no {NAME}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cannot read {path}: {error}; restore it, or generate into another folder"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Into a run folder, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_whole(Path(folder) / NAME, text.encode())

    def extended(self, other: Manifest) -> Manifest:
        """This run with the prompts and seeds of `other`, if that has more of them behind these."""
        count = len(self)
        if (other.prompts[:count], other.seeds[:count]) != (self.prompts, self.seeds):
            return self
        return replace(self, prompts=other.prompts, seeds=other.seeds)

    def differences(self, other: Manifest) -> list[str]:
        """What would make other images: a line a field, this one's value first."""
        mine, others = self.to_dict(), other.to_dict()
        for name in (*PROVENANCE, "continued_with", "failed"):
            del mine[name], others[name]
        return differences(mine, others)


def image_path(folder: str | Path, index: int) -> Path:
    """Of image i of a run."""
    return Path(folder) / "images" / image_name(index)


def image_name(index: int) -> str:
    """Of image i in its folder."""
    return f"{index:05d}.png"


def differences(mine: Any, other: Any) -> list[str]:
    """The fields in which two JSON values differ, a line each, what is there first."""
    return [f"{name}: {a} here, {b} asked for" for name, a, b in differing(mine, other)]


def differing(mine: Any, other: Any, name: str = "") -> list[tuple[str, str, str]]:
    """The innermost fields in which two JSON values differ, and both; of a list the first entry that does."""
    if isinstance(mine, dict) and isinstance(other, dict):
        keys = [*mine, *(key for key in other if key not in mine)]
        inner = {key: f"{name}.{key}" if name else key for key in keys}
        pairs = [(mine.get(key, _NOTHING), other.get(key, _NOTHING), inner[key]) for key in keys]
        return [found for pair in pairs for found in differing(*pair)]
    if mine == other:
        return []
    if not (isinstance(mine, list) and isinstance(other, list)):
        return [(name, repr(mine), repr(other))]
    if len(mine) != len(other):
        return [(name, str(len(mine)), str(len(other)))]
    wrong = [i for i, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return differing(mine[wrong[0]], other[wrong[0]], f"{name}[{wrong[0]}]{more}")


class _Nothing:
    """Stands for a field that is not there; None is a value like others."""

    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def _plain(name: str, value: Any) -> Any:
    """As JSON would give it back, so that a manifest equals the one read from its file."""
    try:
        if isinstance(value, Mapping):
            value = dict(value)
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be kept as JSON: {error}; it is {value!r}") from error


def _whole(value: Any, least: int, most: int | None = None) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return whole and (most is None or value <= most)
