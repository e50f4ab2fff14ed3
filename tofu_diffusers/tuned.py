"""What `tune` found: configurations by speed-up, and what each was measured to cost."""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .config import CONFIGS, VERSION, Config, StepSkipping, checked_speedup

FILE_NAME = "tuned.json"
DEFAULT, TUNED, FEWER = "default", "tuned", "fewer steps"
KINDS = (DEFAULT, TUNED, FEWER)
"""What a table compares at each speed-up."""


@dataclass(frozen=True)
class Measured:
    """One setting at one speed-up.

    Attributes:
        kind: Of `KINDS`.
        name: The setting in words.
        speedup: That was asked for.
        flops: Counted FLOPs of the unreduced denoiser over those with the setting; where they cannot be
            counted, its calls.
        plan: Of the last generation, a sign a step: "#" was computed, "." skipped.
        searched_db: Of each prompt searched on, how far the final latents stand out of their error: 10 log10
            of the unreduced latents' mean square over the error's. Higher is better.
        held_out_db: The same of the prompts kept apart.
        pixels_db: PSNR of the pictures of the prompts kept apart, values in [0, 1]; empty where the pipeline
            gives none.
    """

    kind: str
    name: str
    speedup: float
    flops: float
    plan: str
    searched_db: tuple[float, ...] = ()
    held_out_db: tuple[float, ...] = ()
    pixels_db: tuple[float, ...] = ()

    @property
    def num_inference_steps(self) -> int | None:
        """What the pipeline was asked for instead of the call's own: of "fewer steps" alone.

        Samplers of two calls a step have more steps than that, image-to-image fewer.
        """
        return int(self.name.split()[0]) if self.kind == FEWER else None

    @classmethod
    def _of(cls, data: Any) -> Measured:
        several = ("searched_db", "held_out_db", "pixels_db")
        numbers = {name: float(data[name]) for name in ("speedup", "flops")}
        decibels = {name: tuple(map(float, data[name])) for name in several}
        row = cls(**{**data, **numbers, **decibels})
        if row.kind not in KINDS:
            raise ValueError(f"a row of kind {row.kind!r}; there are {', '.join(KINDS)}")
        return row


@dataclass(frozen=True)
class Tuned:
    """Result of `tune`; its str() is a table. `apply_tofu` takes it, or the folder it was saved to.

    Attributes:
        choices: By speed-up, the configurations that were best.
        rows: What was measured, see `Measured`.
        denoisers: Class names of the pipeline's denoisers.
        about: Of the search: pipeline, scheduler, steps, size of the references, time and so on.
    """

    choices: Mapping[float, tuple[Config, ...]]
    rows: tuple[Measured, ...]
    denoisers: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def configs(self, speedup: float | None = None) -> tuple[Config, ...]:
        """The configurations for a speed-up.

        One that was not tuned gets those of the nearest that was, with its own number of computed steps, to
        which nothing is fitted.

        Args:
            speedup: None: the one that was tuned.

        Raises:
            TypeError: if it is not a number.
            ValueError: if none is given and several were tuned, or it is below 1.
        """
        known = sorted(self.choices)
        if speedup is None:
            if len(known) > 1:
                raise ValueError(
                    f"tuned for speedup {', '.join(f'{each:g}' for each in known)}; say which: speedup="
                    f"{known[0]:g}"
                )
            speedup = known[0]
        asked = checked_speedup(speedup)
        nearest = min(known, key=lambda each: abs(math.log(each / asked)))
        if asked == nearest:
            return self.choices[nearest]
        return tuple(
            each.replace(speedup=max(1.0, each.speedup * asked / nearest), fitted=None)
            if isinstance(each, StepSkipping)
            else each
            for each in self.choices[nearest]
        )

    def check_fits(self, pipe: Any, denoisers: Sequence[Any]) -> None:
        """Raise ValueError if this was tuned on other classes of denoisers; warn of another pipeline's class.

        Args:
            pipe: The pipeline, or a denoiser alone.
            denoisers: Its denoisers.
        """
        classes = tuple(type(each).__name__ for each in denoisers)
        if classes != self.denoisers:
            raise ValueError(
                f"this was tuned on {' and '.join(self.denoisers)}, and the pipeline has "
                f"{' and '.join(classes)}; tune it: tune(pipe, prompts)"
            )
        mine, its = type(pipe).__name__, self.about.get("pipeline")
        if its is not None and its != mine and all(pipe is not each for each in denoisers):
            warnings.warn(
                f"this was tuned on a {its}, and is put on a {mine}, which may drift more; compare with "
                "unreduced pictures, or tune it: tune(pipe, prompts)",
                stacklevel=4,
            )

    @property
    def overfitted(self) -> tuple[float, ...]:
        """Speed-ups whose best setting lost on the prompts kept apart what it won in the search.

        There the default was taken.
        """
        return tuple(self.about.get("overfitted", ()))

    def save(self, folder: str | Path) -> Path:
        """Write it into a folder, such as a saved pipeline's; returns the file's path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "choices": [
                {"speedup": speedup, "configs": [json.loads(each.to_json()) for each in configs]}
                for speedup, configs in self.choices.items()
            ],
            "rows": [asdict(each) for each in self.rows],
            "denoisers": self.denoisers,
            "about": self.about,
        }
        state = {"type": "Tuned", "version": VERSION, "data": data}
        path.write_text(json.dumps(state) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tuned:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if the folder holds no tuned settings.
            ValueError: if the file is none, or of another version.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            way = "write one with tune(pipe, prompts).save(folder)"
            others = [each for each in CONFIGS if (path.parent / each.file_name).is_file()]
            if path.parent.is_file():
                way = f"give its folder, {str(path.parent.parent)!r}"
            elif others:
                way = (
                    f"it has {others[0].file_name}: give {others[0].__name__}.load({str(folder)!r})"
                )
            raise FileNotFoundError(f"no {FILE_NAME} in {str(folder) or 'an empty path'}; {way}")
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            kind, version = state["type"], state["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no tuned settings ({error!r}); tune again") from error
        if (kind, version) != ("Tuned", VERSION):
            raise ValueError(
                f"{path} holds {kind} of version {version}, and this reads Tuned of version {VERSION}; "
                "update tofu_diffusers, or tune again"
            )
        try:
            return cls._of(state["data"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no tuned settings ({error!r}); tune again") from error

    @classmethod
    def _of(cls, data: Any) -> Tuned:
        types = {each.__name__: each for each in CONFIGS}
        choices = {
            float(each["speedup"]): tuple(
                types[config["type"]].from_json(json.dumps(config)) for config in each["configs"]
            )
            for each in data["choices"]
        }
        if not choices or not all(1 < each < math.inf for each in choices):
            raise ValueError(f"speed-ups {[*choices]}")
        if not all(choices.values()):
            raise ValueError("a speed-up without configurations")
        if not isinstance(data["denoisers"], list) or not isinstance(data["about"], dict):
            raise TypeError("denoisers must be a list, and about an object")
        rows = tuple(map(Measured._of, data["rows"]))
        overfitted = [float(each) for each in data["about"].get("overfitted", ())]
        about = {**data["about"], "overfitted": overfitted}
        return cls(choices, rows, tuple(map(str, data["denoisers"])), about)

    def __str__(self) -> str:
        header = ("speedup", "", "setting", "FLOPs", "latents, dB", "pixels, dB", "steps")
        table = [
            (
                f"{row.speedup:g}x",
                row.kind,
                row.name,
                f"{row.flops:.2f}x",
                with_error(row.held_out_db),
                with_error(row.pixels_db),
                row.plan,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, *table]
        ]
        lines += [
            "dB on prompts kept apart, with twice the standard error: higher is nearer to the unreduced",
            'generation. "profile": the default; "own trajectory": steps planned on this pipeline;',
            '"fitted": forecasts, too',
        ]
        lines += [
            f"{speedup:g}x: the search's best lost on them what it won (overfitted), the default stays"
            for speedup in self.overfitted
        ]
        lines += [f"{name}: {value}" for name, value in self.about.items() if name != "overfitted"]
        return "\n".join(lines)


def with_error(values: Sequence[float]) -> str:
    """The mean and twice its standard error; of nothing a dash, of one value the value alone."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {2 * statistics.stdev(values) / len(values) ** 0.5:.1f}"
