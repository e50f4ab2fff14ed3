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

from pipelines.emoji import WEIGHTS
from pipelines.emoji.captions import COLOURS, caption
from pipelines.emoji.data import Emoji
from pipelines.emoji.loop import Budget, Loop, autocast, begin_with, trained_on
from pipelines.emoji.vae import SIDES, Latents

VOCABULARY, LENGTH, WIDTH = 1200, 16, 128
VARIANTS = 16  # captions a picture
START, END = "<|startoftext|>", "<|endoftext|>"


def new_tokenizer(emoji: Emoji) -> CLIPTokenizer:
    """Byte pairs of the words in the training side's names."""
    known = dict.fromkeys(
        name
        for names, held in zip(emoji.names, emoji.held_out, strict=True)
        if not held
        for name in names
    )
    words = [*known, *[*COLOURS, "a", "an", *"abcdefghijklmnopqrstuvwxyz0123456789,.-'!?"] * 100]
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
    last = sorted({piece[-1] for piece in pieces})
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
    """A CLIP text model of three layers, untrained."""
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


class Captions:
    """Token ids of captions of every row, drawn and tokenised once, on the device.

    empty: [LENGTH], of no caption.
    """

    def __init__(self, tokenizer: CLIPTokenizer, emoji: Emoji, device: torch.device) -> None:
        rows = zip(emoji.names, emoji.colours, emoji.recoloured.tolist(), strict=True)
        texts = []
        for i, (names, colour, recoloured) in enumerate(rows):
            rng = random.Random(i)  # the captions are the same in each run
            texts += [caption(names, colour, recoloured, rng) for _ in range(VARIANTS)]
        different = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids = tokens(tokenizer, list(different)).short()  # there are fewer than 2,000 pieces
        index = torch.tensor([different[text] for text in texts])
        self.table = ids[index].view(-1, VARIANTS, LENGTH).to(device)
        self.empty = tokens(tokenizer, [""])[0].to(device)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids of one caption of each picture, drawn anew at every call.  [B] -> [B, LENGTH]."""
        which = torch.randint(VARIANTS, rows.shape, generator=generator, device=rows.device)
        return self.table[rows, which].long()

    def first(self, rows: Tensor) -> Tensor:
        """Token ids of each picture's first caption.  [B] -> [B, LENGTH]."""
        return self.table[rows, 0].long()


class Rows:
    """Which rows are trained on: each concept equally often, half of that in another colour if there is one.

    original: of the training side in their own colours; test: of held-out concepts.
    """

    def __init__(self, emoji: Emoji, device: torch.device) -> None:
        trained, turned = torch.from_numpy(emoji.trained), torch.from_numpy(emoji.recoloured)
        self.trained = trained.nonzero().flatten().to(device)
        self.original = (trained & ~turned).nonzero().flatten().to(device)
        self.test = torch.from_numpy(emoji.held_out).nonzero().flatten().to(device)
        counts = Counter(emoji.concepts[i] for i in (trained & turned).nonzero().flatten().tolist())
        weights = [
            0.5 / counts[concept] if recoloured else 0.5 if counts[concept] else 1.0
            for concept, recoloured in zip(emoji.concepts, emoji.recoloured, strict=True)
        ]
        # Cumulated, as torch.multinomial makes a GPU wait.
        chosen = torch.tensor(weights, dtype=torch.float64)[trained]
        self.ends = chosen.cumsum(0).to(device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of pictures that training sees, drawn by their weights.  [count]."""
        place = torch.rand(count, generator=generator, device=self.trained.device) * self.ends[-1]
        return self.trained[torch.searchsorted(self.ends, place).clamp(max=len(self.trained) - 1)]


def tower() -> nn.Sequential:
    """The network that pulls latents and captions together.  [B, 4, 32, 32] -> [B, WIDTH]."""
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
    """Train the text encoder to find the latents that a caption is of, by a tower that is then dropped."""
    torch.manual_seed(1)
    tokenizer = new_tokenizer(emoji)
    rows, captions = Rows(emoji, device), Captions(tokenizer, emoji, device)
    data = latents.by_side[SIDES[-1]].to(device)
    text, _ = _text_encoder(emoji, work)
    module = nn.ModuleDict({"text": text, "tower": tower()})
    loop = Loop("text", module, work, budget, 1e-3, device, latents.basis, seed=1)

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
        scores = similarity(rows.test, captions.first(rows.test))
        right = scores.argmax(1) == torch.arange(len(scores), device=device)
        return {"top1": right.float().mean().item(), "concepts": float(len(rows.test))}

    loop.run(loss_fn, evaluate, stop_after=stop_after)
    return loop


def latest_text_encoder(emoji: Emoji, work: Path) -> CLIPTextModel:
    """To be trained further: of stage unet32, else of stage text, else as embedded, else untrained."""
    return _text_encoder(emoji, work, "unet32", "text")[0]


def trained_text_encoder(emoji: Emoji, work: Path) -> CLIPTextModel:
    """As stage unet32 left it, averaged, or else as embedded.

    Raises:
        SystemExit: if there is neither, for these data.
    """
    text, trained = _text_encoder(emoji, work, "unet32")
    if not trained:
        raise SystemExit(
            f"no text encoder for these data, in {work} or embedded; train it first: "
            "python -m pipelines.emoji.train --stage unet32 --minutes 10"
        )
    return text


def _text_encoder(emoji: Emoji, work: Path, *stages: str) -> tuple[CLIPTextModel, bool]:
    """Of the first of these stages that has a checkpoint, else as embedded; and whether either was there.

    With other data the pieces of words have other ids: what was trained on these is not taken.
    """
    tokenizer = new_tokenizer(emoji)
    text = new_text_encoder(tokenizer)
    embedded, words = WEIGHTS / "text_encoder", WEIGHTS / "tokenizer"
    paths = [work / f"{stage}.pt" for stage in stages]
    paths = [path for path in paths if path.exists() and trained_on(path) == emoji.digest]
    if not paths:
        if not words.is_dir():
            return text, False
        theirs = CLIPTokenizer.from_pretrained(words, local_files_only=True)
        if theirs.get_vocab() != tokenizer.get_vocab():
            print(f"begins anew: {embedded} is of other words than these data", flush=True)
            return text, False
    begin_with(text, embedded, paths, "text.")
    return text, True
