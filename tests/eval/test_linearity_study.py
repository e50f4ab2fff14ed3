"""eval.studies.emoji.linearity: what is compared are parts of the blocks, and rows hold what was measured."""

import json

import pytest

from eval.studies.emoji import linearity as study
from tests.eval.test_study import tiny_study
from tofu_diffusers import Linearity, TokenReduction

MEANS = (0.94, 0.99, 0.91, 0.97, 0.95, 0.98, 0.92, 0.96)


def known(means):
    depths = tuple(i / (len(means) - 1) for i in range(len(means)))
    return Linearity(tuple(map(str, depths)), depths, (0.5,), tuple((mean,) for mean in means))


@pytest.mark.parametrize("means", [MEANS, MEANS[::-1], MEANS[:5], MEANS[3:]])
def test_the_most_and_the_least_linear_blocks_merge(means):
    made = known(means)
    ordered = sorted(means)
    merged = {}
    for trial in study.trials(made, "block", 25):
        config = TokenReduction(**trial.setting.options)
        merged[trial.setting.name.removeprefix("block-")] = [
            mean for depth, mean in zip(made.depths, means, strict=True) if config.merge_at(depth) == "mlerp"
        ]  # fmt: skip
    assert merged["prune"] == [] and sorted(merged["mlerp"]) == ordered
    assert sorted(merged["depth"]) == sorted(means[len(means) // 2 :])
    for share in study.SHARES:
        count = round(share * len(means))
        assert sorted(merged[f"most-{share:g}"]) == ordered[-count:]
        assert sorted(merged[f"least-{share:g}"]) == ordered[:count]


def test_a_row_holds_the_linearity_and_what_tells_it_from_others():
    made = tiny_study(prompts=2)
    made.loaded.pipe.set_progress_bar_config(disable=True)
    row = json.loads(json.dumps(study.measured(made, 4)))
    assert row["id"] == "tiny-64px-4steps-n2/linearity" and row["weights"] == "0" * 16
    assert study.linearity_of(row).means == pytest.approx(row["means"])
    assert len(row["blocks"]) == len(row["values"]) and len(row["levels"]) == study.CALLS
    assert study.about(made, 4).items() <= row.items()
