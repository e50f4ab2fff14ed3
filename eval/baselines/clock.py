"""Where in its generation a denoiser is, for what has to know and is not told."""

from __future__ import annotations

from typing import Any

import torch


class Clock:
    """Where in its generation a denoiser's call is, told by the timestep.

    Attributes:
        time: The timestep.
        step: Of the generation.
        call: Of the step; guidance in two calls has two.
    """

    def __init__(self) -> None:
        self.time: float | None = None
        self.step = -1
        self.call = 0

    def starts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take note of a call with these arguments; whether it is the first of a generation."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        time = float(torch.as_tensor(timestep).flatten()[0])
        if time == self.time:
            self.call += 1
            return False
        # Timesteps fall; a rise is the next generation.
        again = self.time is None or time > self.time
        self.step = 0 if again else self.step + 1
        self.time, self.call = time, 0
        return again
