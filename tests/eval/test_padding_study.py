"""eval.studies.emoji.padding: only padding is left out, and a row says what became of the pictures."""

import json

import torch

from eval.studies.emoji import padding as study
from pipelines.emoji import load_pipeline

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}


def test_texts_lose_their_padding_and_nothing_else():
    pipe = load_pipeline("mmdit")
    pipe.set_progress_bar_config(disable=True)
    lengths = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]),
        with_kwargs=True,
    )
    prompts = ["a cat", "a red apple"]
    whole = study.pictures(pipe, prompts, CALL, dropped=False)
    own = pipe(
        prompts, generator=[torch.Generator().manual_seed(i) for i in (0, 1)], output_type="pt", **CALL
    ).images  # fmt: skip
    assert whole.shape == (2, 3, 32, 32)
    assert (whole.float() - own.mul(255).round()).abs().max() <= 1
    study.pictures(pipe, prompts, CALL, dropped=True)
    # Each of two steps of one picture; start, the words and the end are left.
    assert lengths == [16] * 6 + [4, 4, 5, 5]


def test_a_row_is_added_once(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = ["--side", "32", "--steps", "2", "-n", "2", "--out", str(out)]
    study.main(command)
    study.main(command)
    (line,) = out.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["text_tokens"][0] == 16 and 2 < row["text_tokens"][1] <= row["text_tokens"][2] < 16
    assert len(row["psnr_db"]) == 2 and row["metrics"]["psnr_db"]["n"] == 2
