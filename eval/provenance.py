"""Where and with what something was made or measured."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import tofu_diffusers

ROOT = Path(__file__).parent.parent
# Where and with what an image was made: by right it changes rounding at most, so a run may go on with others.
PROVENANCE = ("device", "threads", "versions", "commit")


def provenance(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Device, threads, versions and commit of what runs here and now."""
    device = torch.device(device)
    names = {"cpu": f"CPU ({platform.machine()})"}
    if device.type == "cuda":
        names["cuda"] = torch.cuda.get_device_name(device)
    return {
        "device": names.get(device.type, device.type),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "tofu_diffusers": tofu_diffusers.__version__,
        },
        "commit": commit(ROOT),
    }


def commit(root: Path) -> str:
    """Of a checkout, "+dirty" behind it if a tracked file differs; "unknown" of any other folder."""

    def git(*command: str) -> str:
        # Without its optional locks, looking changes nothing.
        run = ["git", "--no-optional-locks", "-C", str(root), *command]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout

    try:
        top, head = git("rev-parse", "--show-toplevel", "HEAD").split("\n")[:2]
        if Path(top).resolve() != root.resolve():  # unpacked inside the checkout of something else
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed else "")
