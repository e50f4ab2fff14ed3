"""The kept-token oracle: a pruned span equals the unmodified blocks on the kept tokens alone.

Token counts are seen by a spy on the linear layers, not by the library's own statistics.
"""

import pytest
import torch

from tests import tiny
from tests.inputs import sd3_inputs, unet_inputs
from tofu_diffusers import apply_tofu, remove_tofu


class Spy:
    """Sequence lengths that a module's forward was given."""

    def __init__(self, module):
        self.lengths = []
        module.register_forward_pre_hook(lambda _, args: self.lengths.append(args[0].shape[1]))


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("size", [(12, 20), (16, 16)])
@pytest.mark.parametrize("method", ["tome", "random", "pitome"])
@torch.no_grad()
def test_sd3_span_is_the_model_on_the_kept_tokens(dual, size, method):
    model = tiny.tiny_sd3(dual=dual).transformer
    inputs = sd3_inputs(height=size[0], width=size[1])
    tokens = size[0] * size[1] // 4
    entering = {}
    # First hook: what the run is given, before the library's innermost forward.
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: entering.update(kwargs), with_kwargs=True
    )
    leaving = {}
    model.norm_out.register_forward_pre_hook(lambda module, args: leaving.update(x=args[0]))
    spies = [Spy(block.ff.net[0].proj) for block in model.transformer_blocks]
    handle = apply_tofu(
        model, ratio=0.5, method=method, merge="prune", unmerge="copy", scope="span"
    )
    model(**inputs)
    plan = next(iter(handle._generations[0][1].runtime.setup.plan_caches[0].plans.values()))
    kept = tokens - tokens // 2
    assert plan.kept.shape == (2, kept)
    assert [spy.lengths for spy in spies] == [[kept]] * len(spies)
    reduced = leaving["x"]
    remove_tofu(model)

    hidden, text = plan.rows(entering["hidden_states"]), entering["encoder_hidden_states"]
    for block in model.transformer_blocks:
        text, hidden = block(
            hidden_states=hidden, encoder_hidden_states=text, temb=entering["temb"]
        )
    torch.testing.assert_close(plan.rows(reduced), hidden, rtol=0, atol=0)


@torch.no_grad()
def test_block_scope_runs_as_a_span_where_that_is_the_same():
    """Prune, one plan: block by block and span differ by rounding only."""
    for model, inputs in (
        (tiny.tiny_sd3(num_layers=4).transformer, sd3_inputs()),
        (tiny.tiny_sd(transformer_layers=2).unet, unet_inputs()),
    ):
        for merge, unmerge in (("prune", "copy"), ("mean", "copy")):
            options = {"ratio": 0.5, "method": "tome", "merge": merge, "unmerge": unmerge}
            with apply_tofu(model, scope="block", **options) as handle:
                as_block = model(**inputs)[0]
                names = [row["name"] for row in handle.stats()]
                assert any(name.endswith(("0-3", "0-1")) for name in names)
            with apply_tofu(model, scope="block", depth_schedule=[(0.0, 1.0)], **options) as handle:
                singly = model(**inputs)[0]
                assert not any("-" in row["name"] for row in handle.stats())
            torch.testing.assert_close(as_block, singly, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scope", ["attention", "block", "span"])
@torch.no_grad()
def test_unet_token_counts_are_real(scope):
    unet = tiny.tiny_sd().unet
    attentions, feeds = {}, {}
    for name, module in unet.named_modules():
        block = name.split(".attn1")[0].split(".ff")[0]
        if name.endswith("attn1.to_q"):
            attentions[block] = Spy(module)
        if name.endswith("ff.net.0.proj"):
            feeds[block] = Spy(module)
    handle = apply_tofu(unet, ratio=0.5, method="tome", scope=scope)
    unet(**unet_inputs())
    rows = handle.stats()
    assert len(rows) == len(attentions) == 7
    for row in rows:
        block = row["name"].removesuffix(".attn1")
        assert attentions[block].lengths == [row["tokens_kept"]]
        expected = "tokens_in" if scope == "attention" else "tokens_kept"
        assert feeds[block].lengths == [row[expected]]
    assert all(row["tokens_kept"] == row["tokens_in"] - row["tokens_in"] // 2 for row in rows)


@torch.no_grad()
def test_cached_keys_values_shrink_all_but_keys_and_values():
    unet = tiny.tiny_sd().unet
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    query, feed = Spy(block.attn1.to_q), Spy(block.ff.net[0].proj)
    keys = []
    block.attn1.to_k.register_forward_hook(lambda module, args, out: keys.append(out.shape[1]))
    handle = apply_tofu(unet, ratio=0.5, method="random", keys_values="cached", warmup_steps=1)
    for step in range(2):
        handle.step(step, 2)
        unet(**unet_inputs())
    assert query.lengths == feed.lengths == [140, 70]
    assert keys == [140, 140]


@torch.no_grad()
def test_controlnet_residuals_between_blocks_run_block_by_block():
    model = tiny.tiny_sd3(num_layers=4).transformer
    inputs = sd3_inputs()
    residuals = [
        torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)
    ]
    inputs["block_controlnet_hidden_states"] = residuals
    with apply_tofu(model, ratio=0.5, method="tome", merge="prune") as handle:
        out = model(**inputs)[0]
        assert torch.isfinite(out).all()
        assert len(handle.stats()) == 4
    with (
        apply_tofu(model, ratio=0.5, method="tome", scope="span"),
        pytest.raises(ValueError, match=r"block_controlnet_hidden_states.*use scope='block'"),
    ):
        model(**inputs)
    # With every token's residual zero the split changes nothing but rounding.
    inputs["block_controlnet_hidden_states"] = [torch.zeros_like(r) for r in residuals]
    with apply_tofu(model, ratio=0.5, method="tome", merge="prune"):
        split = model(**inputs)[0]
        joined = model(**{**inputs, "block_controlnet_hidden_states": None})[0]
    torch.testing.assert_close(split, joined, rtol=1e-3, atol=1e-3)
