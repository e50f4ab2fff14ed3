"""Train the emoji pipelines: `python -m pipelines.emoji.train --stage all --minutes 120`."""

import argparse
from pathlib import Path

import torch

from pipelines.emoji import HERE, data
from pipelines.emoji.data import Emoji
from pipelines.emoji.export import export
from pipelines.emoji.loop import Budget, Loop
from pipelines.emoji.mmdit import train_mmdit
from pipelines.emoji.text import train_text
from pipelines.emoji.unet import train_unet
from pipelines.emoji.vae import encode_all, train_decoder, train_vae

STAGES = (
    "vae", "decoder", "text", "unet32", "unet64", "unet128", "mmdit32", "mmdit64", "mmdit128",
)  # fmt: skip
SHARES = dict(zip(STAGES, (0.08, 0.12, 0.02, 0.16, 0.13, 0.1, 0.16, 0.13, 0.1), strict=True))
"""The stages in their order, each with its part of the minutes of "all".

A sample of 32 pixels costs a twentieth of one of 128, and what a thing looks like is learned there.
"""

# CPUs learn most in a minute from many small steps. With much smaller batches a GPU would wait for Python;
# with more captions, too many of a batch would be of one concept, and right for each other's pictures.
BATCHES = {
    "cpu": dict(zip(STAGES, (4, 4, 192, 64, 32, 8, 64, 32, 8), strict=True)),
    "cuda": dict(zip(STAGES, (32, 32, 384, 512, 256, 128, 512, 256, 128), strict=True)),
}
# For either batch: those of a CPU are near what Adam takes at all, and larger batches make up by less noise.
RATES = {
    "unet32": 1e-3, "unet64": 8e-4, "unet128": 5e-4, "mmdit32": 1e-3, "mmdit64": 8e-4, "mmdit128": 5e-4,
}  # fmt: skip


def run_stage(stage: str, budget: Budget, emoji: Emoji, work: Path, device: torch.device) -> Loop:
    """Train, or train further, from the stages before that lie in `work`."""
    shards = 1 if device.type == "cuda" else min(torch.get_num_threads(), 4)
    batch = BATCHES.get(device.type, BATCHES["cpu"])[stage]
    if stage == "vae":
        return train_vae(emoji, work, budget, device, batch, shards)
    latents = encode_all(emoji, work, device)
    if stage == "decoder":
        return train_decoder(emoji, latents, work, budget, device, batch, shards)
    if stage == "text":
        # One shard: a caption is compared with every picture of the batch.
        return train_text(emoji, latents, work, budget, device, batch)
    train = train_unet if stage.startswith("unet") else train_mmdit
    return train(emoji, latents, work, budget, device, stage, batch, RATES[stage], shards)


def main() -> None:
    """Train the stages that are asked for, or export what was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=(*SHARES, "export", "all"), default="all")
    parser.add_argument("--minutes", type=float, default=120, help="of training, all runs together")
    parser.add_argument("--work", type=Path, default=data.WORK, help="data, checkpoints, log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # averages of squares that fade away are slow to add
    emoji, device = data.load(args.work / "emoji.npz"), torch.device(args.device)
    for stage in (*SHARES, "export") if args.stage == "all" else (args.stage,):
        if stage == "export":
            export(emoji, args.work, HERE)
            continue
        share = SHARES[stage] if args.stage == "all" else 1.0
        run_stage(stage, Budget(minutes=args.minutes * share), emoji, args.work, device)


if __name__ == "__main__":
    main()
