"""handle.summary() and handle.stats(): tokens and FLOPs are those of the real forward."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.bench.models import SD15, SDXL
from tests import tiny
from tofu_diffusers import apply_tofu
from tofu_diffusers.report.numberless import without_numbers

SETTINGS = {
    "tome": {"ratio": 0.5, "method": "tome"},
    "attention": {"ratio": 0.5, "method": "tofu", "scope": "attention"},
    "step": {"speedup": 5 / 3},
    "tokens": {"ratio": 0.5, **tiny.SHORT},
    "few_steps": {"ratio": 0.5},
    "cached": {"ratio": 0.5, "keys_values": "cached", **tiny.SHORT},
    "scheduled": {"ratio": 0.5, "method": "random", "schedule": "linear"},
}


def generation_flops(pipe, steps, **size):
    """FLOPs of the denoiser alone over a generation, counted on the real forward."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    counts = []
    counter = None

    def begin(module, args, kwargs):
        nonlocal counter
        counter = FlopCounterMode(display=False)
        counter.__enter__()

    def end(module, args, out):
        counter.__exit__(None, None, None)
        counts.append(counter.get_total_flops())

    hooks = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
    ]
    # FlopCounterMode does not know the CPU's fused attention; the plain form is the same product.
    with sdpa_kernel(SDPBackend.MATH):
        tiny.generate(pipe, ["a cat", "a dog"], steps=steps, **size)
    for hook in hooks:
        hook.remove()
    return sum(counts)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("make", [tiny.tiny_sd, tiny.tiny_sdxl])
def test_flops_saved_are_those_of_the_real_forward(make, setting):
    pipe = make()
    whole = generation_flops(pipe, 5, height=72, width=104)
    with apply_tofu(pipe, **SETTINGS[setting]) as handle:
        run = generation_flops(pipe, 5, height=72, width=104)
        summary = handle.summary()
    assert summary.flops_unreduced == pytest.approx(whole, rel=0.02)
    assert summary.flops_run == pytest.approx(run, rel=0.02)
    assert summary.flops_saved == pytest.approx(1 - run / whole, abs=0.02)
    assert summary.flops_saved > 0.005
    assert summary.speedup == pytest.approx(whole / run, rel=0.03)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"speedup": 2.0}], ids=str)
def test_a_model_edited_by_hand_is_counted_as_it_runs(options):
    """Of one joint block, where its configuration says two."""
    pipe = tiny.tiny_flux()
    as_configured = generation_flops(pipe, 9, height=64, width=96)
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    whole = generation_flops(pipe, 9, height=64, width=96)
    with apply_tofu(pipe, **options) as handle:
        run = generation_flops(pipe, 9, height=64, width=96)
        summary = handle.summary()
    assert run < whole < 0.8 * as_configured
    assert summary.flops_unreduced == pytest.approx(whole, rel=0.005)
    assert summary.flops_run == pytest.approx(run, rel=0.01)


@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"speedup": 2.0, "rule": "late"}], ids=str)
@torch.no_grad()
def test_a_bare_model_that_takes_more_channels_than_configured_is_counted(amount):
    unet = tiny.tiny_sd(channels=(32,)).unet
    draw = torch.Generator().manual_seed(0)
    unet.conv_in = tiny.randomise(torch.nn.Conv2d(8, 32, 3, padding=1))
    latents = torch.randn(2, 8, 16, 16, generator=draw)
    words = torch.randn(2, 5, 32, generator=draw)

    def steps(tell):
        for step in range(10):
            tell(step, 10)
            unet(latents, 500, encoder_hidden_states=words)

    counts = []
    for reduced in (False, True):
        handle = apply_tofu(unet, **amount) if reduced else None
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            steps(handle.step if reduced else lambda *_: None)
        counts.append(counter.get_total_flops())
    whole, run = counts
    summary = handle.summary()
    assert summary.flops_unreduced == pytest.approx(whole, rel=0.005)
    assert summary.flops_run == pytest.approx(run, rel=0.02) and run < 0.95 * whole


@pytest.mark.parametrize("make", [tiny.tiny_pixart, tiny.tiny_dit])
def test_one_step_is_counted_before_guidance_is_known(make):
    """The pipeline does not say whether it guides; all tokens are computed until that is seen."""
    pipe = make()
    with apply_tofu(pipe, ratio=0.5, method="tome") as handle:
        with pytest.warns(UserWarning, match="removes nothing in these 1 steps"):
            run = generation_flops(pipe, 1)
        summary = handle.summary()
    assert not summary.nominal and summary.flops_saved == 0.0
    assert summary.flops_run == pytest.approx(run, rel=0.02)


@torch.no_grad()
def test_calls_that_nobody_saw_are_counted_at_a_typical_size():
    """As those of a compiled denoiser, of which the grid alone is known."""
    model = tiny.tiny_sd3().transformer
    with apply_tofu(model, ratio=0.5, method="tome") as handle:
        typical = handle.summary()
        model(**tiny.model_inputs(model))
        handle._all[0].runtime.call.inputs.clear()
        summary = handle.summary()
    assert not summary.nominal and summary.rows[0].tokens_in != typical.rows[0].tokens_in
    assert summary.flops_unreduced == typical.flops_unreduced
    assert summary.flops_run == typical.flops_run


def test_the_table_says_what_happened():
    pipe = tiny.tiny_sd3(num_layers=4)
    with apply_tofu(pipe, ratio=0.5, method="tofu", scope="span") as handle:
        nominal = handle.summary()
        assert nominal.nominal and "no generation yet" in str(nominal)
        tiny.generate(pipe, steps=3)
        summary = handle.summary()
        assert not summary.nominal
        (row,) = summary.rows
        assert (row.name, row.calls, row.tokens_in, row.tokens_kept) == (
            "transformer_blocks.0-3",
            3,
            256,
            128,
        )
        text = str(summary)
        assert "transformer_blocks.0-3" in text and "% saved" in text and "256" in text
        assert handle.stats() == [
            {
                "name": "transformer_blocks.0-3",
                "scope": "span",
                "calls": 3,
                "tokens_in": 768,
                "tokens_kept": 384,
            }
        ]


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.5}, {"ratio": 0.5, **tiny.SHORT}, {"speedup": 4 / 3}],
    ids=str,
)
def test_asking_does_not_change_what_is_generated(options):
    pipe = tiny.tiny_sd()
    with apply_tofu(pipe, **options):
        expected = tiny.generate(pipe, steps=4)
    with apply_tofu(pipe, **options) as handle:
        handle.summary()
        assert torch.equal(tiny.generate(pipe, steps=4), expected)
        handle.summary()
        assert torch.equal(tiny.generate(pipe, steps=4), expected)


SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}


@pytest.mark.parametrize(
    ("cls", "config", "tera", "least"),
    [
        # Whole-block ceilings at ratio 0.5: SD 1.5 1.35x, SDXL 1.66x; SD3 nearly all of it.
        (UNet2DConditionModel, SD15, 0.80, 1.30),
        (UNet2DConditionModel, SDXL, 6.76, 1.55),
        (SD3Transformer2DModel, SD3, None, 1.75),
    ],
    ids=["sd15", "sdxl", "sd3"],
)
def test_full_size_models_are_counted_without_weights(cls, config, tera, least):
    with torch.device("meta"):
        model = cls.from_config(config)
    with apply_tofu(model, ratio=0.5, method="tome", merge="prune", share="resolution") as handle:
        summary = handle.summary()
    if tera is not None:
        # The example has a batch of two.
        assert summary.flops_unreduced / 2e12 == pytest.approx(tera, rel=0.02)
    assert summary.flops_unreduced / summary.flops_run > least


def test_computed_says_where_the_work_went():
    pipe = tiny.tiny_sd()
    options = {"resolutions": (0,), "max_age": 4, **tiny.SHORT}
    with apply_tofu(pipe, ratio=0.5, **options) as handle:
        assert handle.computed() == {}
        tiny.generate(pipe, ["a cat", "a dog"], steps=6, height=120, width=136)
        maps = handle.computed()
    shares = maps[0]
    assert shares.shape == (2, 1, 15, 17) and not torch.equal(shares[0], shares[1])
    # Two steps of six ran whole, and four on the 128 tokens of 255 that ratio 0.5 keeps.
    expected = torch.full((2,), (2 * 255 + 4 * 128) / 6)
    torch.testing.assert_close(shares.flatten(1).sum(1), expected)
    assert shares.min() > 2.9 / 6  # max_age 4: every token is computed at least once more


@pytest.mark.parametrize("numbers", ["bfloat16", "float8", "int8"])
def test_flops_do_not_depend_on_the_format_of_numbers(numbers):
    def put(model):
        if numbers == "bfloat16":
            model.to(torch.bfloat16)
        elif numbers == "float8":
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        else:
            quantization = pytest.importorskip("torchao.quantization")
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())

    for pipe in (tiny.tiny_sd(channels=(32,)), tiny.tiny_flux()):
        for options in ({"ratio": 0.5, "method": "tome"}, {"speedup": 2.0}):
            counted = []
            for build in (lambda model: None, put):
                model = copy.deepcopy(tiny.denoisers(pipe)[0])
                build(model)
                with apply_tofu(model, **options) as handle:
                    summary = handle.summary()
                assert not summary.uncounted
                counted.append((summary.flops_unreduced, summary.flops_run))
            assert counted[0] == counted[1]


X = torch.empty(2, 8, 3, device="meta")
HEADS, OTHERS = (torch.empty(2, 4, tokens, 8, device="meta") for tokens in (5, 7))


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.group_norm(X, 4),
        lambda: functional.group_norm(input=X, num_groups=4),
        lambda: functional.layer_norm(input=X, normalized_shape=(3,)),
        lambda: functional.silu(X),
        lambda: functional.gelu(input=X),
        lambda: X.clamp(0, 1),
        lambda: X.clone().clamp_(min=0),
        lambda: X + X[:1, :, :1],
        lambda: 2 * X - 1,
        lambda: X.add(X, alpha=2.0),
        lambda: X.sub(other=X.half()),
        lambda: X.bool() * 3,
        lambda: X.half() * X[0, 0, 0],
        lambda: X + torch.tensor(1.0),
        lambda: functional.linear(X, torch.empty(5, 3, device="meta")),
        lambda: functional.linear(X, torch.empty(5, 3, device="meta"), X.new_empty(5)),
        lambda: functional.linear(input=X[0, 0], weight=torch.empty(5, 3, device="meta")),
        lambda: functional.scaled_dot_product_attention(HEADS, OTHERS, OTHERS),
        lambda: functional.scaled_dot_product_attention(query=HEADS, key=OTHERS, value=OTHERS),
        lambda: functional.scaled_dot_product_attention(HEADS[0], OTHERS[0], OTHERS[0, ..., :3]),
        lambda: functional.scaled_dot_product_attention(HEADS[:1], OTHERS, OTHERS, dropout_p=0.0),
        lambda: functional.scaled_dot_product_attention(
            HEADS, OTHERS[:, :2], OTHERS[:, :2], enable_gqa=True
        ),
        lambda: functional.scaled_dot_product_attention(
            HEADS, OTHERS, OTHERS, torch.empty(2, 1, 5, 7, device="meta"), scale=1.0
        ),
    ],
)
def test_what_is_counted_another_way_has_the_same_shape_and_flops(call):
    found = []
    for context in (nullcontext(), without_numbers()):
        with context, FlopCounterMode(display=False) as counter:
            out = call()
        found.append((out.shape, out.dtype, out.device, counter.get_total_flops()))
    assert found[0] == found[1]


def test_threads_that_count_leave_autocast_as_it_was():
    autocast = torch.autocast
    inside, both, out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with without_numbers():
            inside.set()
            both.wait(0.1)
        out.set()

    def second():
        inside.wait()
        with without_numbers():
            both.set()
            out.wait()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.autocast is autocast


@pytest.mark.parametrize("options", [{"speedup": 2.0}, {"ratio": 0.5, "method": "tofu"}], ids=str)
def test_steps_behind_the_end_of_guidance_count_for_half(options):
    def without_guidance(pipe, step, timestep, given):
        if step == 6:
            pipe._guidance_scale = 1.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[1]
        return given

    changes = {
        "callback_on_step_end": without_guidance,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    pipe = tiny.small_sd()
    whole = generation_flops(pipe, 10, **changes)
    with apply_tofu(pipe, **options) as handle:
        run = generation_flops(pipe, 10, **changes)
        summary = handle.summary()
    assert summary.flops_unreduced == pytest.approx(whole, rel=0.02)
    assert summary.flops_run == pytest.approx(run, rel=0.02) and run < 0.8 * whole
