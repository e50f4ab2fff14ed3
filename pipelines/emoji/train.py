"""Train the emoji pipelines: `python -m pipelines.emoji.train --stage all --minutes 120`."""

import argparse
from pathlib import Path

import torch

from pipelines.emoji import HERE, data
from pipelines.emoji.ceiling import ceiling
from pipelines.emoji.export import export
from pipelines.emoji.loop import Budget
from pipelines.emoji.mmdit import train_mmdit
from pipelines.emoji.text import train_text
from pipelines.emoji.unet import new_unet, train_unet
from pipelines.emoji.vae import cache_latents, load_latents, train_vae

STAGES = ("vae", "text", "unet64", "unet128", "mmdit64", "mmdit128", "export")
SHARES = {  # of the minutes of "all"
    "vae": 0.07, "text": 0.03, "unet64": 0.27, "unet128": 0.18, "mmdit64": 0.27, "mmdit128": 0.18,
}  # fmt: skip


def run_stage(stage: str, budget: Budget, work: Path, device: torch.device) -> None:
    gpu = device.type == "cuda"
    shards = 1 if gpu else min(torch.get_num_threads(), 4)
    scale = 8 if gpu else 1  # CPUs learn most in a minute from many small steps
    emoji = data.load(work / "emoji.npz")
    if stage == "vae":
        train_vae(emoji, work, budget, device, 4 * scale, shards)
        cache_latents(emoji, work, device)
    elif stage == "text":
        # One shard: a caption is compared with every picture of the batch.
        train_text(emoji, load_latents(work), work, budget, device)
    elif stage.startswith("unet"):
        latents = load_latents(work)
        print(ceiling(new_unet(), 32))
        batch, rate = (16, 8e-4) if stage == "unet64" else (8, 6e-4)
        train_unet(emoji, latents, work, budget, device, stage, batch * scale, rate, shards)
    elif stage.startswith("mmdit"):
        latents = load_latents(work)
        batch, rate = (16, 1e-3) if stage == "mmdit64" else (8, 5e-4)
        train_mmdit(emoji, latents, work, budget, device, stage, batch * scale, rate, shards)
    else:
        export(emoji, work, HERE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=120, help="of training, all runs together")
    parser.add_argument("--work", type=Path, default=data.WORK, help="data, checkpoints, log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for stage in STAGES if args.stage == "all" else (args.stage,):
        share = SHARES.get(stage, 0.0) if args.stage == "all" else 1.0
        run_stage(stage, Budget(minutes=args.minutes * share), args.work, torch.device(args.device))


if __name__ == "__main__":
    main()
