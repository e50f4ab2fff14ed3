"""One string where prompts are expected is one prompt, not as many as it has letters."""

import pytest
import torch

from eval.bench.pipeline import Bench, one_batch
from eval.generate.manifest import Manifest
from eval.generate.run import generate, load
from eval.generate.settings import Setting
from eval.metrics.alignment import EmojiAlignment
from tests import tiny
from tofu_diffusers import TokenReduction, calibrate_gradient, learn_schedule

CALL = {"num_inference_steps": 4, "height": 64, "width": 64}


@pytest.fixture
def pipe(monkeypatch):
    """Notes in `asked` the prompts of every call."""
    found = tiny.small_sd()
    found.set_progress_bar_config(disable=True)
    asked, encode = [], found.encode_prompt

    def noted(prompt, *args, **kwargs):
        asked.append(prompt)
        return encode(prompt, *args, **kwargs)

    monkeypatch.setattr(found, "encode_prompt", noted)
    found.asked = asked
    return found


def test_a_schedule_is_learned_from_one_prompt(pipe):
    config = TokenReduction(method="tome", ratio=0.4)
    learned = learn_schedule(pipe, "a cat", config, rounds=1, candidates=2, **CALL)
    assert set(pipe.asked) == {"a cat"}
    listed = learn_schedule(tiny.small_sd(), ["a cat"], config, rounds=1, candidates=2, **CALL)
    assert learned == listed


def test_probes_are_not_fitted_on_one_prompt(pipe, tmp_path):
    path = tmp_path / "probes.safetensors"
    with pytest.raises(ValueError, match="1 prompts are too few"):
        calibrate_gradient(pipe, "a cat", path, **CALL)
    assert not pipe.asked and not path.exists()


def test_a_run_and_a_batch_are_of_one_prompt(pipe, tmp_path):
    assert len(one_batch(pipe, "a cat", 0, CALL).images) == 1
    Bench(pipe, "a cat", 0, CALL).once(pipe, Setting("unreduced"))
    assert pipe.asked == [["a cat"], ["a cat"]]
    tiny.small_sd().save_pretrained(tmp_path / "model")
    loaded = load(str(tmp_path / "model"), device="cpu")
    made = generate(
        loaded, Setting("unreduced"), "a cat", tmp_path / "run", call=CALL, device="cpu"
    )
    assert made.prompts == ("a cat",)
    with pytest.raises(ValueError, match="prompts is the text 'a cat'; give a list"):
        Manifest.from_dict({**made.to_dict(), "prompts": "a cat"})


def test_one_picture_is_scored_by_one_prompt():
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    alignment = EmojiAlignment()
    assert torch.equal(alignment(picture, "a cat"), alignment(picture, ["a cat"]))
