"""The small ViT: its pictures, its training, its weights."""

import json

import pytest
import torch

from pipelines.emoji import vit
from tests.tiny import emoji_data


def test_a_turn_of_hues_keeps_greys_and_moves_colours_around():
    turns = vit._turns(torch.tensor([0.0, 120.0, 240.0]))
    torch.testing.assert_close(turns[0], torch.eye(3))
    torch.testing.assert_close(turns[1], torch.eye(3).roll(1, 0), rtol=0, atol=1e-6)
    torch.testing.assert_close(turns[1] @ turns[1], turns[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(turns.sum(2), torch.ones(3, 3), rtol=0, atol=1e-6)


def test_pictures_are_drawn_anew_and_their_background_stays_white():
    originals = torch.ones(3, 3, 40, 40)
    originals[:, :, 18:22, 18:22] = 0.2
    first = vit.augmented(originals, torch.Generator().manual_seed(0))
    assert first.shape == (3, 3, 32, 32)
    again = vit.augmented(originals, torch.Generator().manual_seed(0))
    other = vit.augmented(originals, torch.Generator().manual_seed(1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    border = torch.cat([first[..., :4, :].flatten(1), first[..., -4:, :].flatten(1)], dim=1)
    assert (border.mean(1) - 1).abs().max() < 0.02
    assert first[..., 12:20, 12:20].min(-1).values.min(-1).values.max() < 0


def test_training_writes_what_is_loaded(tmp_path, monkeypatch):
    emoji = emoji_data()
    monkeypatch.setattr(vit.data, "load", lambda _: emoji)
    monkeypatch.setattr(vit.EmojiScorer, "load", lambda: None)
    vectors = torch.nn.functional.normalize(torch.randn(500, vit.WIDTH), dim=1)
    monkeypatch.setattr(vit, "name_vectors", lambda _, names: vectors[: len(names)])
    with pytest.raises(FileNotFoundError, match=r"emoji\.vit --train"):
        vit.load_vit(tmp_path)
    for folder in ("a", "b"):
        vit.train(tmp_path, tmp_path / folder, steps=2)
    report = json.loads((tmp_path / "a" / "training.json").read_text())
    rows, names, labels = vit.concepts_of(emoji)
    assert report["pictures"] == len(rows) == len(labels) and report["concepts"] == len(names)
    assert all(emoji.trained[row] for row in rows)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b")]
    assert files[0] == files[1]
    pixels = vit.augmented(vit.pictures(emoji), torch.Generator().manual_seed(0))
    found = vit.vectors_of(vit.load_vit(tmp_path / "a"), pixels)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    assert len(files[0]) < 2_000_000
    model = vit.load_vit(tmp_path / "a")
    assert not model.training and model.vit.embeddings.patch_embeddings.num_patches == 64
