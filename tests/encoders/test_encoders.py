"""Laws of encoders whose tokens leave, over all families."""

import copy
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import tiny_sd
from tests.tiny_encoders import BUILDERS, END, arguments, build
from tofu_diffusers import (
    ENCODERS,
    EncoderReduction,
    StepSkipping,
    TokenReduction,
    apply_tofu,
    remove_tofu,
)
from tofu_diffusers.encoders import encoders_in
from tofu_diffusers.encoders.call import EncoderCall
from tofu_diffusers.hooks.patch import state_of
from tofu_diffusers.tokens.sources import BlockReading

TEXTS = ("bert", "t5")
IMPORTANCE = {"method": "importance", "method_options": {"source": {"attention": 1, "key_norm": 2}}}
# A group's members stand where they stood, and see the others from there, but for these.
PLACELESS = sorted({*BUILDERS} - {"clip_text", "t5"})


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in BUILDERS}


@pytest.fixture(params=BUILDERS)
def case(request, models):
    yield from fresh(request.param, models)


@pytest.fixture(params=TEXTS)
def text_case(request, models):
    yield from fresh(request.param, models)


@pytest.fixture(params=PLACELESS)
def placeless_case(request, models):
    yield from fresh(request.param, models)


def fresh(name, models):
    """Name, a model in float64, its call, its encoder."""
    model = models[name].double().eval()
    model.set_attn_implementation("sdpa")
    yield name, model, arguments(name, model, torch.float64), encoders_in(model, None)[0][0]
    remove_tofu(model)


@pytest.fixture
def calls(monkeypatch):
    """Every call with tokens left, and what was kept of it behind each block."""
    seen = []
    leave = EncoderCall.leave

    def spied(self, *args):
        if not seen or seen[-1][0] is not self:
            seen.append((self, []))
        out = leave(self, *args)
        seen[-1][1].append(None if self.positions is None else self.positions.clone())
        return out

    monkeypatch.setattr(EncoderCall, "leave", spied)
    return seen


def tensors(out):
    return [each for each in out.to_tuple() if isinstance(each, torch.Tensor)]


@torch.no_grad()
def run(model, given, seed=0, **more):
    torch.manual_seed(seed)
    return model(**given, **more)


def rows_of(root, model, given):
    """What the last block gives for every token."""
    seen = []
    last = root.get_submodule(state_of(root).blocks[-1])
    hook = last.register_forward_hook(lambda _, __, out: seen.append(out))
    run(model, given)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def close(a, b, most=1e-9):
    torch.testing.assert_close(a, b, rtol=most, atol=most)


def test_every_family_has_a_model():
    assert {*BUILDERS} == {*ENCODERS}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_ratio_0_and_removal_are_exact(case, implementation, dtype, training):
    name, model, _, root = case
    model.to(dtype).train(training).set_attn_implementation(implementation)
    given = arguments(name, model, dtype)
    before = run(model, given)
    with apply_tofu(model, ratio=0.0):
        assert equal(run(model, given), before)
    handle = apply_tofu(model, ratio=0.5)
    assert not equal(run(model, given), before)
    handle.remove()
    assert equal(run(model, given), before)
    assert all(state_of(each) is None for each in model.modules())
    assert "forward" not in vars(root)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", ["constant", "share"])
def test_kept_tokens_see_each_other_alone(case, calls, implementation, schedule):
    """The unmodified model in which removed tokens are hidden as keys from the next block on."""
    _, model, given, root = case
    model.set_attn_implementation(implementation)
    how = {"method": "tome", "merge": "prune", "proportional_attention": False}
    with apply_tofu(model, ratio=0.6, **how, schedule=schedule):
        found = rows_of(root, model, given)
        blocks = state_of(root).blocks
    kept, final = calls[0][1], calls[0][1][-1]
    hooks, seen = [], []
    for i, name in enumerate(blocks):
        block = root.get_submodule(name)
        hidden = None if i == 0 else kept[i - 1]
        hooks.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, hidden=hidden: hide(args, kwargs, hidden), with_kwargs=True
            )
        )
    hooks.append(block.register_forward_hook(lambda _, __, out: seen.append(out)))
    run(model, given)
    for hook in hooks:
        hook.remove()
    whole = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    index = final[..., None].expand(-1, -1, whole.shape[2])
    # Padding that is left is seen by nobody and sees what it sees.
    real = given.get("attention_mask", torch.ones(whole.shape[:2])).gather(1, final).bool()
    # Eager attention has a softmax in float32.
    most = 1e-9 if implementation == "sdpa" else 1e-4
    close(found.gather(1, index)[real], whole.gather(1, index)[real], most)


def hide(args, kwargs, positions):
    if positions is None:
        return args, kwargs
    x, mask, *rest = args
    least = torch.finfo(x.dtype).min
    visible = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, positions, True)
    hidden = torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, least)[:, None, None]
    if mask is None and kwargs.get("is_causal"):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, least)
    mask = hidden if mask is None else torch.minimum(mask, hidden)
    return (x, mask.expand(-1, -1, x.shape[1], -1), *rest), kwargs


@pytest.mark.parametrize("merge", ["mean", "prune"])
def test_tome_is_the_slow_reference(placeless_case, merge):
    """All tokens are computed; those of a group are given one row between attention and feed-forward.

    It is their mean, or that of the kept token.

    Equal tokens, each seen for itself, weigh as one with the logarithm of their number on its logits.
    """
    name, model, given, root = placeless_case
    family, ratio = ENCODERS[name], 0.6
    given.pop("attention_mask", None)
    with apply_tofu(model, ratio=ratio, method="tome", merge=merge):
        found = rows_of(root, model, given)
        blocks = [root.get_submodule(each) for each in state_of(root).blocks]
    first, noted = [], []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))]
    for block in blocks:
        keys = block.get_submodule(family.attention).get_submodule(family.keys)
        hooks.append(keys.register_forward_hook(lambda _, __, out: noted.append(out)))
    run(model, given)
    noted.clear()
    x = first[0]
    tokens = x.shape[1]
    whole = int((tokens - family.prefix) * ratio)
    groups = [[[place] for place in range(tokens)] for _ in range(len(x))]
    for i, block in enumerate(blocks):
        remove = round(whole * (i + 1) / len(blocks)) - round(whole * i / len(blocks))
        with torch.no_grad():
            x = family.attend(block, x, None, {})[0].clone()
            heads = getattr(block.get_submodule(family.attention), family.heads)
            for row, own in enumerate(groups):
                keys = noted[i][row].view(tokens, heads, -1).mean(1).numpy()
                fuse(own, keys, family.prefix, remove)
                for group in own:
                    members = x[row, group]
                    x[row, group] = members.mean(0) if merge == "mean" else members[0].clone()
            x = family.feed_forward(block, x)
    for hook in hooks:
        hook.remove()
    close(found, x)


def fuse(groups, keys, prefix, remove):
    """Bipartite soft matching of groups, each by the key of the token that names it."""
    free = groups[prefix:]
    metric = np.stack([keys[group[0]] for group in free])
    metric = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    targets = list(range(0, len(free) // 2 * 2, 2))
    sources = [i for i in range(len(free)) if i not in targets]
    best = {i: max(targets, key=lambda j, i=i: metric[i] @ metric[j]) for i in sources}
    sources.sort(key=lambda i: -(metric[i] @ metric[best[i]]))
    for i in sources[:remove]:
        free[best[i]].extend(free[i])
    gone = {*sources[:remove]}
    groups[prefix:] = [group for i, group in enumerate(free) if i not in gone]


@pytest.mark.parametrize("schedule", ["constant", "share"])
@pytest.mark.parametrize("method", ["tome", "pitome"])
def test_groups_hold_all_tokens_and_the_ratio_is_kept(case, calls, method, schedule):
    _, model, given, _ = case
    with apply_tofu(model, ratio=0.5, method=method, schedule=schedule) as handle:
        run(model, given)
        last = handle.stats()[-1]
    call, _ = calls[0]
    tokens = call.assign.shape[1]
    real = given.get("attention_mask", torch.ones(2, tokens)).sum(1).float()
    assert torch.equal(call.weights.sum(1), real)
    fixed = call.prefix + (call.kept is not None)
    assert last["tokens_kept"] == tokens - int((tokens - fixed) * 0.5) == call.weights.shape[1]
    assert torch.equal(
        call.positions.gather(1, call.assign).gather(1, call.positions), call.positions
    )


@pytest.mark.parametrize(
    "options", [{}, {"method": "pitome"}, {"method": "random"}, IMPORTANCE], ids=str
)
def test_rows_do_not_influence_each_other(case, options):
    _, model, given, root = case
    with apply_tofu(model, ratio=0.5, **options):
        both = rows_of(root, model, given)
        for row in range(2):
            alone = {name: each[row : row + 1] for name, each in given.items()}
            close(rows_of(root, model, alone)[0], both[row])


@pytest.mark.parametrize(
    "options", [{"method": "tome"}, {}, {"method": "pitome"}, IMPORTANCE], ids=str
)
def test_padding_says_nothing(text_case, options):
    _, model, given, root = text_case
    other = {**given, "input_ids": given["input_ids"].where(given["attention_mask"].bool(), 7)}
    real = given["attention_mask"].bool()
    with apply_tofu(model, ratio=0.6, **options):
        close(rows_of(root, model, given)[real], rows_of(root, model, other)[real])


def test_padding_stays_padding_whatever_is_pruned_into_it():
    """Tokens that point away from all others are most like padding, which nobody may see for that."""
    config = EncoderReduction(method="tome", merge="prune")
    real = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    call = EncoderCall(
        config, config.make_method(), ("prune",), 0, False, padded=True, weights=real
    )
    keys = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    call.leave(
        keys, 2, 0, 1, lambda: BlockReading(keys, lambda: keys, lambda: keys, lambda: 1, None)
    )
    assert call.assign.tolist() == [[0, 1, 1, 1]] and call.weights.tolist() == [[1, 0]]


def test_padding_leaves_first(text_case, calls):
    _, model, given, root = text_case
    given["attention_mask"][:] = 1
    given["attention_mask"][:, 10:] = 0
    with apply_tofu(model, ratio=0.0):
        whole = rows_of(root, model, given)
    with apply_tofu(model, ratio=0.5, method="tome"):
        reduced = rows_of(root, model, given)
    close(reduced[:, :10], whole[:, :10])


@pytest.mark.parametrize("method", ["tome", "tofu", "random"])
def test_tokens_that_are_pooled_stay(case, calls, method):
    name, model, given, _ = case
    with apply_tofu(model, ratio=0.6, method=method):
        run(model, given)
    call, _ = calls[0]
    front = torch.arange(call.prefix).expand(2, -1)
    assert torch.equal(call.positions[:, : call.prefix], front)
    if name == "clip_text":
        ends = (given["input_ids"] == END).int().argmax(1, keepdim=True)
        assert (call.positions == ends).any(1).all()


def test_every_token_is_given_a_row_and_hidden_states_too(case):
    _, model, given, root = case
    plain = run(model, given, output_hidden_states=True)
    with apply_tofu(model, ratio=0.5) as handle:
        out = run(model, given, output_hidden_states=True)
        last = rows_of(root, model, given)
        kept = [each["tokens_kept"] for each in handle.stats()]
    assert [each.shape for each in tensors(out)] == [each.shape for each in tensors(plain)]
    assert [each.shape for each in out.hidden_states] == [
        each.shape for each in plain.hidden_states
    ]
    # The first block computes all tokens up to its feed-forward; T5 and BERT tie the last to the output.
    assert torch.equal(out.hidden_states[0], plain.hidden_states[0])
    distinct = [len(each[0].unique(dim=0)) for each in out.hidden_states]
    assert all(rows <= most for rows, most in zip(distinct[1:], kept, strict=True))
    assert len(last[0].unique(dim=0)) == distinct[-1]


def test_compiled_whole(case):
    _, model, given, _ = case
    with apply_tofu(model, ratio=0.5):
        plain = run(model, given)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            for a, b in zip(tensors(run(compiled, given)), tensors(plain), strict=True):
                close(a, b)
    torch.compiler.reset()


def test_gradients_flow_through_merges(case):
    _, model, given, root = case
    for kind in ("mean", "mlerp"):
        with apply_tofu(model, ratio=0.6, merge=kind):
            first = []
            hook = root.get_submodule(state_of(root).blocks[0]).register_forward_pre_hook(
                lambda _, args, first=first: (
                    (first.append(args[0].detach().requires_grad_()), *args[1:])
                    and (first[-1], *args[1:])
                )
            )
            out = model(**given)
            (gradient,) = torch.autograd.grad(out[0].square().sum(), first)
            hook.remove()
        real = given.get("attention_mask", torch.ones(gradient.shape[:2])).bool()
        if "input_ids" not in given or "attention_mask" in given:
            assert (gradient.norm(dim=-1)[real] > 0).all()
        assert gradient.isfinite().all()


def test_flops_are_counted(case):
    _, model, given, root = case
    with apply_tofu(model, ratio=0.5, method="tome") as handle:
        nominal = handle.summary()
        assert nominal.nominal and nominal.speedup > 1
        run(model, given)
        summary = handle.summary()
    assert summary.speedup > 1 and not summary.nominal
    assert len(summary.rows) == 4 and "encoder FLOPs (last call)" in str(summary)
    name = type(root).__name__
    assert {row.denoiser for row in summary.rows} == {name}
    with apply_tofu(model, ratio=0.5) as handle:
        assert repr(handle) == f"Handle(EncoderReduction on {name})"
    assert repr(handle) == "Handle(removed)"


def test_copies_second_applies_and_errors_leave_no_trace(case, tmp_path):
    _, model, given, root = case
    before = run(model, given)
    first = apply_tofu(model, ratio=0.25)
    reduced = run(model, given)
    twin = copy.deepcopy(model)
    second = apply_tofu(model, ratio=0.5)
    assert first.removed and not second.removed
    assert second.configs == (EncoderReduction(ratio=0.5),)
    assert equal(run(twin, given), reduced)
    remove_tofu(twin)
    assert equal(run(twin, given), before)
    last = root.get_submodule(state_of(root).blocks[-1])
    hook = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, given)
    hook.remove()
    assert state_of(root).call is None
    blocks = [root.get_submodule(name) for name in state_of(root).blocks]
    attention = blocks[-1].get_submodule(state_of(root).family.attention)
    hook = attention.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, given)
    hook.remove()
    assert all(state_of(each).keys is None and state_of(each).queries is None for each in blocks)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    remove_tofu(model)
    assert second.removed and equal(run(model, given), before)
    with pytest.raises(RuntimeError, match="was removed"):
        second.summary()


def test_an_encoder_of_an_unknown_class_is_of_the_family_that_is_named():
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = RobertaForMaskedLM(RobertaConfig(**sizes, hidden_size=32, vocab_size=50)).eval()
    given = {"input_ids": torch.randint(3, END, (2, 20))}
    before = run(model, given)
    with pytest.raises(ValueError, match="name the family whose blocks are the same"):
        apply_tofu(model, ratio=0.5)
    with pytest.raises(ValueError, match="give the part of the model that holds them"):
        apply_tofu(model, ratio=0.5, family="bert")
    with apply_tofu(model.roberta, ratio=0.5, family="bert") as handle:
        reduced = run(model, given)
        assert handle.stats()[-1]["tokens_kept"] == 20 - int(19 * 0.5)
    assert reduced.logits.shape == before.logits.shape and not equal(reduced, before)
    assert equal(run(model, given), before)


def test_a_call_without_arguments_is_refused_by_the_model_itself(case):
    _, model, _, _ = case
    with pytest.raises(Exception) as own:
        model()
    with (
        apply_tofu(model, ratio=0.5),
        pytest.raises(type(own.value), match=re.escape(f"{own.value}")),
    ):
        model()


def test_summaries_are_of_the_last_call_that_ended_well(models):
    model = models["vit"].float().eval()
    with apply_tofu(model, ratio=0.5) as handle:
        run(model, arguments("vit", model))
        before = (str(handle.summary()), handle.stats())
        with pytest.raises(ValueError, match="doesn't match model"):
            run(model, {"pixel_values": torch.zeros(1, 3, 40, 40)})
        assert (str(handle.summary()), handle.stats()) == before


def test_a_second_threads_call_is_refused(models):
    """Its tokens would take the place of the first one's; that one ends as if it had been alone."""
    model = models["vit"].float().eval()
    given = arguments("vit", model)
    with apply_tofu(model, ratio=0.5):
        alone, refused = run(model, given), []

        def call():
            with pytest.raises(RuntimeError, match="another thread's call"):
                run(model, given)
            refused.append(True)

        def meanwhile(*_):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

        hook = model.vit.layers[2].register_forward_pre_hook(meanwhile)
        assert equal(run(model, given), alone) and refused == [True]
        hook.remove()
        assert equal(run(model, given), alone)


@pytest.mark.parametrize("encoder_first", [True, False])
def test_a_pipelines_encoder_beside_its_denoiser(encoder_first):
    pipe = tiny_sd()
    targets = [(pipe.text_encoder, {"ratio": 0.5}), (pipe, {"speedup": 2.0})]
    handles = [apply_tofu(target, **how) for target, how in targets[:: 1 if encoder_first else -1]]
    assert not any(handle.removed for handle in handles)
    ids = torch.randint(3, 40, (1, 77))
    run(pipe.text_encoder, {"input_ids": ids})
    remove_tofu(pipe)
    assert all(handle.removed for handle in handles)
    parts = (pipe.text_encoder, pipe.unet)
    assert all(state_of(each) is None for part in parts for each in part.modules())


def test_what_an_encoder_has_not_is_refused_with_a_way_out(models):
    model = models["vit"].float().eval()
    given = arguments("vit", model)
    for config in (TokenReduction(ratio=0.5), StepSkipping()):
        with pytest.raises(ValueError, match="EncoderReduction"):
            apply_tofu(model, config)
    for how in ({"speedup": 2.0}, {"ratio": 0.5, "speedup": 2.0}):
        with pytest.raises(ValueError, match=r"speedup 2\.0 asks"):
            apply_tofu(model, **how)
    for how in ({}, {"method": "tome"}):
        with pytest.raises(ValueError, match="how much"):
            apply_tofu(model, **how)
    with pytest.raises(ValueError, match="scope"):
        apply_tofu(model, ratio=0.5, scope="block")
    with pytest.raises(TypeError, match="int is not for an encoder"):
        apply_tofu(model, 2)
    with pytest.raises(ValueError, match=r"apply_tofu\(pipe.text_encoder"):
        apply_tofu(tiny_sd(), EncoderReduction())
    with pytest.raises(ValueError, match="unknown family 'unet'"):
        apply_tofu(model, ratio=0.5, family="unet")
    with apply_tofu(model, ratio=0.5) as handle:
        with pytest.raises(ValueError, match="first_block 4"):
            apply_tofu(model, ratio=0.5, first_block=4)
        with pytest.raises(ValueError, match="not built like family 'bert'"):
            apply_tofu(model, ratio=0.5, family="bert")
        assert not handle.removed
    assert all(state_of(each) is None for each in model.modules())
    with apply_tofu(model, ratio=0.5) as handle:
        with pytest.raises(TypeError, match="no denoising steps"):
            handle.step(0, 2)
        with pytest.raises(ValueError, match="output_attentions"):
            run(model, given, output_attentions=True)
        with pytest.raises(ValueError, match="return_dict"):
            run(model.vit, given, output_hidden_states=True, return_dict=False)
    with (
        apply_tofu(model, ratio=0.9, method="tome", first_block=3),
        pytest.raises(ValueError, match="at block 3, and method 'tome' can let 15 go"),
    ):
        run(model, given)
    model.config._attn_implementation = "flash_attention_2"
    with apply_tofu(model, ratio=0.5), pytest.raises(ValueError, match="takes no bias"):
        run(model, given)
    model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "importance"}, "source 'change' .* needs denoising steps"),
        ({"method": "importance", "method_options": {"source": "cfg"}}, "source 'cfg'"),
        ({**IMPORTANCE, "method_options": {"source": "key_norm", "max_age": 4}}, "'max_age'"),
        (
            {"method": "importance", "method_options": {"source": "gradient"}},
            "calibrate_gradient",
        ),
        ({"schedule": "linear"}, "unknown schedule"),
        ({"ratio": 1.0}, "outside"),
        ({"merge": "median"}, "unknown merge"),
        ({"first_block": -1}, "below 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderReduction(**options)


def test_a_configuration_reads_back(tmp_path):
    config = EncoderReduction(ratio=0.3, **IMPORTANCE, schedule="share", family="vit")
    config.save(tmp_path)
    assert EncoderReduction.load(tmp_path) == config


@pytest.mark.parametrize("schedule", ["constant", "share"])
def test_what_has_left_at_the_end_is_the_ratio(schedule):
    for ratio in (0.0, 0.3, 0.5, 0.9):
        for first in (0, 3):
            config = EncoderReduction(ratio=ratio, schedule=schedule, first_block=first)
            removed = config.removed(196, 12)
            assert sum(removed) == int(196 * ratio) and len(removed) == 12
            assert removed[:first] == [0] * first and min(removed) >= 0


def test_of_a_model_of_two_sides_the_image_side_is_reduced():
    from transformers import CLIPConfig, CLIPModel

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    texts = {**small, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=texts, vision_config={**small, "image_size": 24, "patch_size": 4}
    )
    model: nn.Module = CLIPModel(config)
    with apply_tofu(model, ratio=0.5):
        assert any(state_of(each) is not None for each in model.vision_model.modules())
        assert all(state_of(each) is None for each in model.text_model.modules())


def test_classes_around_and_beside_those_of_the_table():
    from transformers import (
        BertConfig,
        BertForTokenClassification,
        Dinov2Config,
        Dinov2Model,
        SiglipConfig,
        SiglipModel,
    )

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    sides = {"image_size": 24, "patch_size": 4}
    both = SiglipConfig(text_config={**small, "vocab_size": 50}, vision_config={**small, **sides})
    wide = {"vocab_size": 50, "max_position_embeddings": 24, "num_labels": 3}
    models = {
        "vision_model": SiglipModel(both),
        "bert": BertForTokenClassification(BertConfig(**small, **wide)),
        "": Dinov2Model(Dinov2Config(**small, **sides)),
    }
    ids = torch.randint(3, END, (2, 20))
    pixels = torch.randn(2, 3, 24, 24)
    given = {
        "vision_model": {"input_ids": ids, "pixel_values": pixels},
        "bert": {"input_ids": ids},
        "": {"pixel_values": pixels},
    }
    for inner, model in models.items():
        model.eval()
        before = run(model, given[inner])
        with apply_tofu(model, ratio=0.5) as handle:
            reduced = run(model, given[inner])
            own = model.get_submodule(inner)
            changed = [each for each in model.modules() if state_of(each) is not None]
            assert changed and {*changed} <= {*own.modules()}
            first, *_, last = handle.stats()
            assert last["tokens_kept"] < first["tokens_in"]
        shapes = [each.shape for each in tensors(reduced)]
        assert shapes == [each.shape for each in tensors(before)]
        assert not equal(reduced, before)
        # The text side and what is given for every token stay as long as they were.
        if inner == "bert":
            assert reduced.logits.shape == (2, 20, 3)
        if inner == "vision_model":
            assert torch.equal(reduced.text_embeds, before.text_embeds)
        assert equal(run(model, given[inner]), before)
