"""Train the emoji pipeline: `python -m pipelines.emoji.train --stage all --minutes 120`."""

import argparse
from pathlib import Path

import torch

from pipelines.emoji import data
from pipelines.emoji.export import export
from pipelines.emoji.loop import Budget
from pipelines.emoji.text import train_text
from pipelines.emoji.unet import ceiling, new_unet, train_unet
from pipelines.emoji.vae import cache_latents, load_latents, train_vae

WEIGHTS = Path(__file__).parent / "weights"
STAGES = ("vae", "text", "unet64", "unet128", "export")
SHARES = {"vae": 0.11, "text": 0.04, "unet64": 0.5, "unet128": 0.35}  # of the minutes of "all"


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
    else:
        export(emoji, work, WEIGHTS)


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
