"""The text encoder: a small CLIPTextModel and its BPE, pretrained against pictures.

The pretraining is contrastive (Radford et al. 2021): a caption should find its own picture's
latents among those of the batch. The picture tower is thrown away afterwards.
"""

import json
import random
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipelines.emoji.captions import COLOURS, STYLES, caption, subject
from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import Budget, Loop, autocast, averaged
from pipelines.emoji.vae import Latents

VOCABULARY, LENGTH, WIDTH = 1800, 32, 128
VARIANTS = 16  # captions a picture
START, END = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer(emoji: Emoji) -> CLIPTokenizer:
    """Byte pairs of the words in the training side's names and keywords."""
    words = [
        text
        for name, keywords, held in zip(emoji.names, emoji.keywords, emoji.held_out, strict=True)
        if not held
        for text in (name, *keywords)
    ] + [*COLOURS, *STYLES, "a", "an", *"abcdefghijklmnopqrstuvwxyz0123456789,.-'!?"] * 100
    trained = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    split = trained.pre_tokenizer.pre_tokenize_str
    pieces = [piece for text in words for piece, _ in split(text.lower())]
    # Pairs that are equally frequent are merged in the order of their letters' ids. The trainer would draw
    # the ids of last letters anew in every process, and "car" could be "cat" to the next stage.
    alphabet = sorted({c for piece in pieces for c in piece})
    last = sorted({piece[-1] for piece in pieces}, key=lambda c: (c == "i", c))  # as in weights/
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=[*alphabet, *(f"{c}</w>" for c in last)],
    )
    trained.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in _merges(trained)]
    # Every letter must also stand inside a word and at its end, or a typo becomes "unknown".
    letters = sorted({c for text in words for c in text if not c.isspace()})
    known = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters)])
    known |= dict.fromkeys(sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__))
    vocab = {piece: i for i, piece in enumerate([*known, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def _merges(trained: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(trained.to_str())["model"]["merges"]
    return merges


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[B, LENGTH], padded as the pipeline pads."""
    encoded = tokenizer(
        texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


def row_caption(emoji: Emoji, latents: Latents, row: int, rng: random.Random) -> str:
    i = int(latents.source[row])
    return caption(
        emoji.names[i],
        emoji.keywords[i],
        emoji.styles[i],
        latents.colours[row],
        rng,
        recoloured=bool(latents.recoloured[row]),
    )


class Captions:
    """Token ids of captions of every row, drawn and tokenised once, on the device.

    empty: [LENGTH], of no caption.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, emoji: Emoji, latents: Latents, device: torch.device
    ) -> None:
        count = len(latents.source)
        # A generator a row: the captions are the same in each run.
        rngs = map(random.Random, range(count))
        texts = [
            row_caption(emoji, latents, row, rng)
            for row, rng in enumerate(rngs)
            for _ in range(VARIANTS)
        ]
        different = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids = tokens(tokenizer, list(different)).short()  # pieces are fewer than 2,000
        index = torch.tensor([different[text] for text in texts])
        self.table = ids[index].view(count, VARIANTS, LENGTH).to(device)
        self.empty = tokens(tokenizer, [""])[0].to(device)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """[B] -> [B, LENGTH]"""
        which = torch.randint(VARIANTS, rows.shape, generator=generator, device=rows.device)
        return self.table[rows, which].long()

    def first(self, rows: Tensor) -> Tensor:
        """The same one at every call.  [B] -> [B, LENGTH]"""
        return self.table[rows, 0].long()


class Rows:
    """Which latents are trained on: originals mostly, a quarter recoloured.

    Each subject is drawn equally often: a third of the emoji are people in two or three genders.
    """

    def __init__(self, emoji: Emoji, latents: Latents, device: torch.device) -> None:
        held = torch.from_numpy(emoji.held_out)[latents.source]
        original = (~held & ~latents.recoloured).nonzero().flatten()
        recoloured = (~held & latents.recoloured).nonzero().flatten()
        test = (held & ~latents.recoloured).nonzero().flatten()
        subjects = [subject(emoji.names[i]) for i in latents.source.tolist()]
        sizes = Counter(subjects)
        weights = torch.tensor([1.0 / sizes[s] for s in subjects], dtype=torch.float64)
        self.original, self.recoloured, self.test = (
            rows.to(device) for rows in (original, recoloured, test)
        )
        # Cumulated, as torch.multinomial makes a GPU wait.
        self.ends = [weights[rows].cumsum(0).to(device) for rows in (original, recoloured)]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """[count]"""
        turned = count // 4 if len(self.recoloured) else 0
        kinds, counts = (self.original, self.recoloured), (count - turned, turned)
        picks = []
        for rows, ends, n in zip(kinds, self.ends, counts, strict=True):
            if n:
                place = torch.rand(n, generator=generator, device=rows.device) * ends[-1]
                picks.append(rows[torch.searchsorted(ends, place).clamp(max=len(rows) - 1)])
        return torch.cat(picks)


def tower() -> nn.Sequential:
    """latents [B, 4, 32, 32] -> [B, WIDTH]"""
    layers: list[nn.Module] = []
    for into, out in ((4, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, WIDTH))


def train_text(
    emoji: Emoji,
    latents: Latents,
    work: Path,
    budget: Budget,
    device: torch.device,
    batch: int = 192,
    stop_after: int | None = None,
) -> Loop:
    torch.manual_seed(1)
    tokenizer = new_tokenizer(emoji)
    rows, captions = Rows(emoji, latents, device), Captions(tokenizer, emoji, latents, device)
    data = latents.large.to(device)
    text = new_text_encoder(tokenizer)
    module = nn.ModuleDict({"text": text, "tower": tower()})
    loop = Loop("text", module, work, budget, 1e-3, device, seed=1)

    def similarity(row: Tensor, ids: Tensor) -> Tensor:
        with autocast(device):
            words = text(ids).pooler_output
            pictures = module["tower"](data[row].float())
        a, b = F.normalize(words.float(), dim=1), F.normalize(pictures.float(), dim=1)
        return a @ b.T / 0.07

    def loss_fn(generator: torch.Generator, rng: random.Random) -> dict[str, Tensor]:
        row = rows.draw(batch, generator)
        scores = similarity(row, captions.draw(row, generator))
        target = torch.arange(len(scores), device=device)
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        return {"loss": loss, "top1": (scores.argmax(1) == target).float().mean()}

    def evaluate() -> dict[str, float]:
        flat = rows.test[::2]  # one style, so that every concept is there once
        scores = similarity(flat, captions.first(flat))
        right = scores.argmax(1) == torch.arange(len(scores), device=device)
        return {"top1": right.float().mean().item(), "concepts": float(len(flat))}

    loop.run(loss_fn, evaluate, stop_after=stop_after)
    return loop


def trained_text_encoder(emoji: Emoji, work: Path, stage: str) -> CLIPTextModel:
    """The text encoder as a stage left it, averaged."""
    text = new_text_encoder(new_tokenizer(emoji))
    text.load_state_dict(averaged(work / f"{stage}.pt", "text."))
    return text
