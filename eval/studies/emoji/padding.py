"""What becomes of the pictures of a denoiser that sees its text padding, once that is left out?

    python -m eval.studies.emoji.padding --out eval/results/padding_seen.jsonl

`drop_text_padding=True` is refused there. A row a size, of the embedded `mmdit`, whose 16 text tokens have no
mask. Stopped anywhere, the same command goes on with what has no row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.generate.prompts import first, load_prompts
from eval.jsonl import append, read
from eval.metrics.paired import psnr_db
from eval.provenance import provenance
from eval.statistics import of_mean
from pipelines.emoji import GUIDANCE, load_pipeline, weights_hash

MODEL = "mmdit"


def words(pipe: Any, prompt: str) -> int:
    """The tokens of a prompt that are no padding, its start and end among them."""
    return len(pipe.tokenizer(prompt, truncation=True).input_ids)


def pictures(pipe: Any, prompts: Sequence[str], call: dict[str, Any], dropped: bool) -> Tensor:
    """One of each prompt, the n-th with seed n, with its text padding or without.  uint8 [n, 3, H, W]."""
    parts = []
    for seed, prompt in enumerate(prompts):
        # The denoiser's pooled embedding is no token, and stays as it is.
        texts = pipe.encode_prompt(prompt, None, None)
        length = words(pipe, prompt) if dropped else texts[0].shape[1]
        made = pipe(
            prompt_embeds=texts[0][:, :length],
            negative_prompt_embeds=texts[1][:, :length],
            pooled_prompt_embeds=texts[2],
            negative_pooled_prompt_embeds=texts[3],
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **call,
        )
        parts.append(made.images)
    return torch.cat(parts).mul(255).round().to(torch.uint8)


def main(argv: Sequence[str] | None = None) -> None:
    """Add the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, nargs="+", default=[64, 128], help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="(%(default)s)")
    parser.add_argument("-n", type=int, default=32, help="prompts (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to add to")
    args = parser.parse_args(argv)
    about, done = provenance(), {row["id"] for row in read(args.out)}
    pipe = load_pipeline(MODEL)
    pipe.set_progress_bar_config(disable=True)
    prompts = first(load_prompts("emoji"), args.n, least=2)
    left = [words(pipe, prompt) for prompt in prompts]
    for side in args.side:
        name = f"{MODEL}-{side}px-{args.steps}steps-n{args.n}/without-padding"
        if name in done:
            continue
        size = {"height": side, "width": side}
        call = {"num_inference_steps": args.steps, "guidance_scale": GUIDANCE, **size}
        whole, without = (pictures(pipe, prompts, call, dropped) for dropped in (False, True))
        drift = psnr_db(without, whole)
        row = {
            "id": name,
            "pipeline": MODEL,
            "weights": weights_hash(MODEL),
            "n": args.n,
            "seed": 0,
            "steps": args.steps,
            "call": call,
            **about,
            "text_tokens": [pipe.tokenizer.model_max_length, min(left), max(left)],
            "metrics": {"psnr_db": of_mean(drift).entry()},
            "psnr_db": [round(value, 2) for value in drift.tolist()],
        }
        append(args.out, row)


if __name__ == "__main__":
    main()
