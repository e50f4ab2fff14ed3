"""Every family against what its unmodified denoiser computes: the kept-token oracle, spies, laws."""

import copy
import inspect
import math

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

from tests import families_table, tiny
from tests.denoisers import DENOISERS
from tofu_diffusers import Handle, apply_tofu, remove_tofu
from tofu_diffusers.families import known_classes
from tofu_diffusers.runtime.generation import Generation

BUILDERS = {
    "unet": tiny.tiny_sd,
    "sd3": tiny.tiny_sd3,
    "sd35": lambda: tiny.tiny_sd3(dual=True),
    "pixart": tiny.tiny_pixart,
    "dit": tiny.tiny_dit,
    "flux": tiny.tiny_flux,
    "qwen": tiny.tiny_qwen,
    "wan": tiny.tiny_wan,
    "wan_per_token": lambda: tiny.tiny_wan(per_token=True),
    "unet2d": tiny.tiny_ddpm,
}
# The token profile, but reducing from the third step on: generations here are short.
EARLY = {"ratio": 0.5, **tiny.SHORT, "keys_values": "fresh"}
TOME = {"ratio": 0.5, "method": "tome"}
FEED_FORWARDS = ("ff.net.0.proj", "ffn.net.0.proj", "img_mlp.net.0.proj", "proj_mlp")


@pytest.fixture(scope="module", params=BUILDERS)
def built(request):
    """(name, denoiser, arguments of one call of a batch of two different images)"""
    model = tiny.denoisers(BUILDERS[request.param]())[0]
    inputs = tiny.model_inputs(model)
    if request.param == "wan_per_token":
        sides = zip(inputs["hidden_states"].shape[2:], model.config.patch_size, strict=True)
        tokens = math.prod(side // patch for side, patch in sides)
        draw = torch.Generator().manual_seed(3)
        inputs["timestep"] = torch.randint(0, 1000, (2, tokens), generator=draw).float()
    return request.param, model, inputs


@pytest.fixture
def case(built):
    yield built
    remove_tofu(built[1])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_readme_shows_what_every_family_does():
    assert {*families_table.CLASSES} == {*known_classes()}
    assert families_table.document() == families_table.DOCUMENT.read_text(encoding="utf-8")


def generation_of(handle):
    return handle._generations[0][1]


def plans_of(handle):
    """Plans over the whole batch, by resolution."""
    generation = generation_of(handle)
    return {
        plan_cache.resolution: plan
        for plan_cache in generation.runtime.setup.plan_caches
        for key, plan in plan_cache.plans.items()
        if "/" in key
    }


def run(model, inputs, steps=1, moving=False, **options):
    """The last of some steps, and the handle. Moving: every step's latents differ from the last one's."""
    handle = apply_tofu(model, **options)
    sample = generation_of(handle).runtime.setup.family.sample_name
    for step in range(steps):
        handle.step(step, steps)
        now = dict(inputs)
        if moving:
            now[sample] = inputs[sample] + 0.3 * inputs[sample].square().roll(step, dims=-1)
        out = model(**now)[0]
    return out, handle


def drift(out, expected):
    """Largest difference in units of the expected spread."""
    return float((out - expected).abs().max() / expected.std())


SETTINGS = [
    {"scope": scope, "keys_values": keys_values, "unmerge": unmerge}
    for scope in ("attention", "block", "span")
    for keys_values in ("dropped", "fresh", "cached")
    for unmerge in ("copy", "taylor")
    if (scope, keys_values) != ("span", "fresh")
]


def test_with_nothing_to_remove_and_after_removing_the_output_is_the_original(case):
    _, model, inputs = case
    expected = model(**inputs)[0]
    for setting in SETTINGS:
        # One token of a thousand: none of so few.
        out, handle = run(model, inputs, 3, ratio=0.001, method="random", **setting)
        assert torch.equal(out, expected)
        assert all(row["tokens_kept"] == row["tokens_in"] for row in handle.stats())
        run(model, inputs, 3, ratio=0.5, method="random", **setting)
        remove_tofu(model)
        assert torch.equal(model(**inputs)[0], expected)
    assert not any("_tofu" in module.__dict__ for module in model.modules())


# ---- the kept-token oracle ----------------------------------------------------------------------


def rows(x, positions):
    """x [B or 1, N, ...] at positions [B, K], by plain indexing."""
    x = x.expand(len(positions), *x.shape[1:])
    return torch.stack([part[at] for part, at in zip(x, positions, strict=True)])


def on_kept_alone(name, block, arguments, kept, hidden, text):
    """The unmodified block on the kept tokens of one image, with what must follow them cut by hand."""
    arguments = dict(arguments)
    if name in ("flux", "qwen"):
        rotary = arguments["image_rotary_emb"]
        if name == "flux":
            before = text.shape[1]
            at = torch.cat([torch.arange(before), kept[0] + before])
            arguments["image_rotary_emb"] = tuple(part[at] for part in rotary)
        else:
            arguments["image_rotary_emb"] = (rotary[0][kept[0]], rotary[1])
    if name.startswith("wan"):
        arguments["rotary_emb"] = tuple(rows(part, kept) for part in arguments["rotary_emb"])
        if arguments["temb"].ndim == 4:
            arguments["temb"] = rows(arguments["temb"], kept)
    out = block(**(arguments | {"hidden_states": hidden} | text_argument(text)))
    return (out[1], out[0]) if isinstance(out, tuple) else (out, text)


def text_argument(text):
    return {} if text is None else {"encoder_hidden_states": text}


def of_image(value, image, batch):
    """The part of an argument that belongs to one image."""
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch:
        return value[image : image + 1]
    return value


def watch_calls(blocks):
    """Records (arguments by name, output) of every block's next call, from outside."""
    calls = {}

    def record(module, args, kwargs, out):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        calls[module] = (dict(zip(names, args, strict=False)) | kwargs, out)

    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    return calls, hooks


@pytest.mark.parametrize("method", ["tome", "random", "pitome"])
def test_a_pruned_span_is_the_model_on_the_kept_tokens(case, method):
    name, model, inputs = case
    if name == "unet2d":  # its norms run over all tokens; see the test of one site by hand
        return
    family = generation_of(apply_tofu(model, ratio=0.5, method="tome")).runtime.setup.family
    remove_tofu(model)
    for run_ in family.block_stacks(model):
        blocks = [block for _, block in run_.blocks]
        calls, hooks = watch_calls([blocks[0], blocks[-1]])
        options = {"merge": "prune", "unmerge": "copy", "scope": "span", "share": "resolution"}
        _, handle = run(model, inputs, ratio=0.5, method=method, **options)
        kept = plans_of(handle)[run_.resolution].kept
        for hook in hooks:
            hook.remove()
        remove_tofu(model)
        arguments, _ = calls[blocks[0]]
        left = calls[blocks[-1]][1]
        left = left[1] if isinstance(left, tuple) else left
        joint = isinstance(calls[blocks[-1]][1], tuple)
        batch = len(kept)
        assert method == "random" or not torch.equal(kept[0], kept[1])
        for image in range(batch):
            own = {key: of_image(value, image, batch) for key, value in arguments.items()}
            hidden = rows(own.pop("hidden_states"), kept[image : image + 1])
            text = own.pop("encoder_hidden_states") if joint else None
            for block in blocks:
                hidden, text = on_kept_alone(
                    name, block, own, kept[image : image + 1], hidden, text
                )
            reduced = rows(left, kept)[image : image + 1]
            torch.testing.assert_close(reduced, hidden, rtol=1e-4, atol=1e-5)


def test_flux_is_the_whole_model_on_its_kept_tokens():
    """Both stacks under one plan: the model itself, called with fewer tokens and their positions."""
    model = tiny.denoisers(tiny.tiny_flux())[0]
    inputs = tiny.model_inputs(model)
    out, handle = run(
        model,
        inputs,
        ratio=0.5,
        method="tome",
        merge="prune",
        unmerge="copy",
        scope="block",
        share="resolution",
    )
    kept = plans_of(handle)[0].kept
    remove_tofu(model)
    assert not torch.equal(kept[0], kept[1])
    for image in range(2):
        own = {key: of_image(value, image, 2) for key, value in inputs.items()}
        own["hidden_states"] = own["hidden_states"][:, kept[image]]
        own["img_ids"] = inputs["img_ids"][kept[image]]
        own["txt_ids"] = inputs["txt_ids"]
        torch.testing.assert_close(
            out[image : image + 1][:, kept[image]], model(**own)[0], rtol=1e-4, atol=1e-5
        )


def test_a_site_of_an_unconditional_unet_by_hand():
    """Attention over the kept tokens, normalised by the statistics of all."""
    model = tiny.denoisers(tiny.tiny_ddpm(sample_size=(12, 20)))[0]
    inputs = tiny.model_inputs(model)
    site = model.down_blocks[0].attentions[0]
    calls, hooks = watch_calls([site])
    _, handle = run(model, inputs, ratio=0.5, method="tome", merge="prune", unmerge="copy")
    plan = next(
        p
        for k, p in generation_of(handle).runtime.setup.sites[0].plan_cache.plans.items()
        if "/" in k
    )
    hooks[0].remove()
    remove_tofu(model)
    arguments, out = calls[site]
    x = arguments["hidden_states"].flatten(2)
    normed = rows(site.group_norm(x).mT, plan.kept)
    heads = lambda y: y.unflatten(2, (site.heads, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = (heads(layer(normed)) for layer in (site.to_q, site.to_k, site.to_v))
    mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    update = site.to_out[0](mixed.transpose(1, 2).flatten(2))
    expected = (x.mT + plan.broadcast(update)).mT.view(out.shape)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# ---- keys and values ------------------------------------------------------------------------------


def test_fresh_keys_and_values_compute_kept_tokens_as_the_unreduced_block_would(case):
    """With the keys and values of all tokens a kept token cannot tell that others are gone."""
    _, model, inputs = case
    family = generation_of(apply_tofu(model, ratio=0.5, method="tome")).runtime.setup.family
    remove_tofu(model)
    first = family.block_stacks(model)[0].blocks[0][1]
    calls, hooks = watch_calls([first])
    model(**inputs)
    whole = calls[first][1]
    _, handle = run(
        model,
        inputs,
        ratio=0.5,
        method="tome",
        merge="prune",
        keys_values="fresh",
        share="resolution",
    )
    reduced = calls[first][1]
    for hook in hooks:
        hook.remove()
    plan = plans_of(handle)[0]
    assert plan.kept.shape[1] == plan.assign.shape[1] - plan.assign.shape[1] // 2
    image = lambda out: family.output(out)  # noqa: E731
    torch.testing.assert_close(
        plan.rows(image(reduced)), plan.rows(image(whole)), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(image(reduced), image(whole), atol=1e-3)
    if isinstance(whole, tuple) and whole[0] is not None:  # text sees everything too
        torch.testing.assert_close(reduced[0], whole[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["attention", "block"])
@pytest.mark.parametrize("keys_values", ["fresh", "cached"])
@pytest.mark.parametrize("unmerge", ["temporal", "taylor"])
def test_nothing_changes_while_the_input_does_not(case, scope, keys_values, unmerge):
    """Own last update, own keys and values: still inputs are reproduced with half of the tokens."""
    _, model, inputs = case
    expected = model(**inputs)[0]
    options = {"ratio": 0.5, "method": "random", "warmup_steps": 2, "unmerge": unmerge}
    out, handle = run(model, inputs, 4, scope=scope, keys_values=keys_values, **options)
    assert any(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
    assert drift(out, expected) < 1e-4
    out, _ = run(model, inputs, 4, scope=scope, keys_values="dropped", **options)
    assert drift(out, expected) > 1e-3


@pytest.mark.parametrize("keys_values", ["dropped", "fresh", "cached"])
def test_what_is_computed_shrinks(case, keys_values):
    """Rows that linear layers are given, seen from outside: queries and feed-forward of kept tokens."""
    name, model, inputs = case
    handle = apply_tofu(
        model, ratio=0.5, method="random", merge="prune", keys_values=keys_values, warmup_steps=1
    )
    generation = generation_of(handle)
    attentions = [
        attention
        for run_ in generation.runtime.setup.family.block_stacks(model)
        for _, block in run_.blocks
        for attention in generation.runtime.setup.family.attentions(block).values()
    ]
    computed = {}

    def given(module, args):
        computed.setdefault(module, []).append(args[0].shape[1])

    def returned(module, args, out):
        computed.setdefault(module, []).append(out.shape[1])

    feeds = [module for path, module in model.named_modules() if path.endswith(FEED_FORWARDS)]
    keys = [attention.to_k for attention in attentions]
    # Queries are counted where their outputs are projected, if the attention does that itself.
    outs = [attention.to_out[0] for attention in attentions if hasattr(attention, "to_out")]
    hooks = [layer.register_forward_pre_hook(given) for layer in [*feeds, *outs]]
    for layer in keys:
        # What a projection is given from outside is replaced by all tokens ("fresh"); what it returns
        # is filled up from memory ("cached").
        fresh = keys_values == "fresh"
        register = layer.register_forward_hook if fresh else layer.register_forward_pre_hook
        hooks.append(register(returned if fresh else given))
    for step in range(2):
        handle.step(step, 2)
        model(**inputs)
    for hook in hooks:
        hook.remove()
    assert feeds or name == "unet2d"
    assert len(computed) == len({*feeds, *keys, *outs})
    single = {
        layer
        for path, layer in model.named_modules()
        if path.startswith("single_transformer_blocks")
    }
    for layer, (whole, reduced) in computed.items():
        text = text_length(inputs) if layer in single else 0
        tokens = whole - text
        # keys_values "fresh" projects the keys and values of all tokens, and nothing else does.
        everything = layer in keys and keys_values == "fresh"
        assert reduced - text == (tokens if everything else tokens - tokens // 2)


def text_length(inputs):
    return inputs["encoder_hidden_states"].shape[1]


# ---- images of a batch -----------------------------------------------------------------------------


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(
    "options",
    # One of four steps is skipped.
    [{"speedup": 4 / 3, "warmup_steps": 2}, EARLY, TOME, EARLY | {"keys_values": "cached"}],
)
def test_images_of_a_batch_do_not_know_of_each_other(case, options, moving):
    _, model, inputs = case
    together, _ = run(model, inputs, 4, moving, **options)
    for image in range(2):
        own = {}
        for key, value in inputs.items():
            listed = isinstance(value, list)
            own[key] = value[image : image + 1] if listed else of_image(value, image, 2)
            if isinstance(value, dict):
                own[key] = {k: of_image(v, image, 2) for k, v in value.items()}
        alone, _ = run(model, own, 4, moving, **options)
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["tome", "pitome", "importance"])
def test_images_share_a_plan_on_request(case, method):
    _, model, inputs = case
    _, handle = run(model, inputs, 4, True, ratio=0.5, method=method, share_plan=True)
    shared = plans_of(handle)
    assert all(torch.equal(plan.kept[0], plan.kept[1]) for plan in shared.values())
    assert not generation_of(handle).runtime.call.per_image
    for plan in shared.values():
        plan.check()
    _, handle = run(model, inputs, 4, True, ratio=0.5, method=method)
    own = plans_of(handle)
    assert not all(torch.equal(plan.kept[0], plan.kept[1]) for plan in own.values())


def test_a_copy_of_the_model_carries_its_own_tofu(case):
    _, model, inputs = case
    out, _ = run(model, inputs, ratio=0.5, method="tome", merge="prune", keys_values="fresh")
    twin = copy.deepcopy(model)
    remove_tofu(model)
    assert torch.equal(twin(**inputs)[0], out)
    remove_tofu(twin)
    assert torch.equal(twin(**inputs)[0], model(**inputs)[0])


# ---- whole pipelines -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "sd35"])
@pytest.mark.parametrize(
    "options",
    [
        {"speedup": 1.5, "warmup_steps": 2, "rule": "late"},
        EARLY,
        EARLY | {"keys_values": "cached"},
        {"ratio": 0.5, "method": "tofu"},
    ],
)
def test_end_to_end(name, options):
    pipe = BUILDERS[name]()
    prompts = ["a cat", "a red dog"]
    before = tiny.generate(pipe, prompts, steps=6)
    with apply_tofu(pipe, **options) as handle:
        reduced = tiny.generate(pipe, prompts, steps=6)
        assert torch.equal(tiny.generate(pipe, prompts, steps=6), reduced)
        summary = handle.summary()
        assert 0.02 < summary.flops_saved < 0.75
        if "speedup" in options:
            assert all((each.steps, each.computed) == (6, 4) for each in summary.steps)
            assert summary.steps and summary.rows == () and handle.stats() == []
        else:
            assert any(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
            assert summary.steps == ()
    assert torch.isfinite(reduced).all()
    assert reduced.shape == before.shape and not torch.equal(reduced, before)
    assert torch.equal(tiny.generate(pipe, prompts, steps=6), before)


@pytest.mark.parametrize("name", ["pixart", "dit"])
@pytest.mark.parametrize("guided", [True, False])
def test_guidance_that_the_pipeline_does_not_announce(name, guided):
    """Two halves of one batch with the same latents are two conditions, and share their plans."""
    pipe = BUILDERS[name]()
    with apply_tofu(pipe, ratio=0.5, method="tome") as handle:
        generation, kept = generation_of(handle), []

        def look(module, args):
            kept.append([p.kept for p in plans_of(handle).values()])

        pipe.transformer.norm_out.register_forward_pre_hook(look)
        tiny.generate(
            pipe, ["a cat", "a dog"], steps=5, seed=3, guidance_scale=4.0 if guided else 1.0
        )
        assert generation.runtime.call.cfg_branches == ("2" if guided else "1")
        assert generation.runtime.call.images == 2
    # Known after two steps, which run whole.
    assert [bool(plans) for plans in kept] == [False, False, True, True, True]
    first, second = kept[-1][0].chunk(2) if guided else (kept[-1][0], None)
    assert not guided or torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


class Quiet(DiffusionPipeline):
    """A pipeline of a user's own, which says nothing of guidance."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, inputs, steps):
        self.scheduler.set_timesteps(steps)
        x = inputs["hidden_states"]
        for t in self.scheduler.timesteps:
            out = self.transformer(**inputs | {"hidden_states": x}, return_dict=False)[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def test_guidance_that_is_not_announced_where_positions_are_read_too():
    described = DENOISERS["BriaTransformer2DModel"]
    pipe = Quiet(described.build(), FlowMatchEulerDiscreteScheduler())
    with apply_tofu(pipe, ratio=0.5, method="tome") as handle:
        pipe(described.arguments(), 5)
        call = generation_of(handle).runtime.call
        assert (call.cfg_branches, call.images) == ("1", 2)
        assert all(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())


@pytest.mark.parametrize(
    "options",
    [
        EARLY | {"keys_values": "cached"},
        EARLY,
        EARLY | {"method_options": {"source": "cfg"}, "unmerge": "temporal"},
        {"speedup": 1.5, "warmup_steps": 2, "rule": "late"},
    ],
    ids=str,
)
def test_the_past_outlives_the_look_at_guidance(options, monkeypatch):
    """Latents and predictions are those of a pipeline that had announced its guidance."""

    def made():
        pipe = BUILDERS["pixart"]()
        with apply_tofu(pipe, **options) as handle:
            latents = tiny.generate(pipe, ["a cat", "a dog"], steps=6)
            steps = generation_of(handle).steps()
            less = [step.skipped or {*step.ratios} - {"0.0"} != set() for step in steps]
            assert less[:3] == [False, False, True]
            return latents

    looked_at = made()
    monkeypatch.setattr(Generation, "_branches_of", lambda self, pipeline: 2)
    assert torch.equal(made(), looked_at)


@pytest.mark.parametrize("name", ["wan", "qwen"])
def test_guidance_in_two_calls_shares_the_conditional_plan(name):
    pipe = BUILDERS[name]()
    with apply_tofu(pipe, ratio=0.5, method="tome") as handle:
        seen = []
        pipe.transformer.proj_out.register_forward_pre_hook(
            lambda module, args: seen.append(plans_of(handle)[0].kept)
        )
        tiny.generate(pipe, ["a cat", "a dog"], steps=3)
        assert generation_of(handle).runtime.call.images == 2
    assert len(seen) == 6
    for conditional, unconditional in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(conditional, unconditional)


def test_two_denoisers_warm_up_on_their_own():
    pipe = tiny.tiny_wan(two=True)
    with apply_tofu(pipe, **EARLY) as handle:
        tiny.generate(pipe, steps=8)
        generations = [generation for _, generation in handle._generations]
        assert len(generations) == 2
        ran = [len(generation.steps()) for generation in generations]
        assert sum(ran) == 8 and min(ran) >= 3
        for generation in generations:
            ratios = [set(step.ratios) for step in generation.steps()]
            assert ratios[:2] == [{"0.0"}] * 2
            assert all(later != {"0.0"} for later in ratios[2:])
        names = {row.denoiser for row in handle.summary().rows}
        assert names == {"WanTransformer3DModel"}


# ---- what stands around the image -------------------------------------------------------------------


def references(name):
    """(model, arguments with the tokens of a second picture behind the image's, how many)"""
    model = tiny.denoisers(BUILDERS[name]())[0]
    inputs = tiny.model_inputs(model)
    more = torch.randn(
        2, 12, inputs["hidden_states"].shape[2], generator=torch.Generator().manual_seed(5)
    )
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], more], dim=1)
    if name == "flux":
        row, column = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
        ids = torch.stack([torch.ones_like(row), row, column], -1).flatten(0, 1).float()
        inputs["img_ids"] = torch.cat([inputs["img_ids"], ids])
    else:
        inputs["img_shapes"] = [[*shapes, (1, 3, 4)] for shapes in inputs["img_shapes"]]
    return model, inputs, 12


@pytest.mark.parametrize("name", ["flux", "qwen"])
@pytest.mark.parametrize("options", [TOME, EARLY, EARLY | {"keys_values": "cached"}])
def test_reference_pictures_of_an_edit_stay(name, options):
    model, inputs, after = references(name)
    expected = model(**inputs)[0]
    out, handle = run(model, inputs, 4, **options)
    plan, total = plans_of(handle)[0], inputs["hidden_states"].shape[1]
    tokens = total - after
    assert plan.kept.shape[1] == tokens - tokens // 2 + after
    assert torch.equal(plan.kept[:, -after:], torch.arange(tokens, total).expand(2, -1))
    plan.check()
    assert torch.isfinite(out).all()
    if "method" not in options:
        assert drift(out, expected) < 1e-4


@pytest.mark.parametrize("keys_values", ["dropped", "fresh"])
def test_references_with_a_timestep_of_their_own(keys_values):
    """Qwen-Image-Edit 2511: references are modulated as clean, by an index for every token."""
    plain, inputs, _ = references("qwen")
    model = type(plain).from_config({**plain.config, "zero_cond_t": True})
    tiny.randomise(model).eval()
    options = {"method": "tome", "merge": "prune", "keys_values": keys_values, "ratio": 0.5}
    together, _ = run(model, inputs, **options)
    assert drift(together, run(plain, inputs, **options)[0]) > 1e-3
    for image in range(2):
        own = {
            key: value[image : image + 1] if isinstance(value, list) else of_image(value, image, 2)
            for key, value in inputs.items()
        }
        alone, _ = run(model, own, **options)
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("source", ["attention", "key_norm", "change", "cfg"])
def test_importance_from_every_source(case, source):
    _, model, inputs = case
    options = {"method": "importance", "method_options": {"source": source}, "ratio": 0.5}
    if source == "cfg":
        with pytest.raises(ValueError, match="needs classifier-free guidance"):
            run(model, inputs, 3, True, **options)
        return
    out, handle = run(model, inputs, 4, True, **options)
    assert torch.isfinite(out).all()
    for plan in plans_of(handle).values():
        plan.check()


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("keys_values", ["fresh", "cached"])
def test_lora_on_projections_added_before_or_after_is_the_same(name, keys_values):
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    options = {
        "method": "random",
        "unmerge": "temporal",
        "keys_values": keys_values,
        "warmup_steps": 1,
    }
    outputs = []
    for before in (True, False):
        model = tiny.denoisers(BUILDERS[name]())[0]
        inputs = tiny.model_inputs(model)
        if not before:
            apply_tofu(model, ratio=0.5, **options)
        torch.manual_seed(0)
        model.add_adapter(config)
        for module, weight in model.named_parameters():
            if "lora" in module:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        handle = apply_tofu(model, ratio=0.5, **options) if before else handle_of(model)
        for step in range(3):
            handle.step(step, 3)
            out = model(**inputs)[0]
        outputs.append(out)
        remove_tofu(model)
        assert drift(out, model(**inputs)[0]) < 1e-4  # still inputs are reproduced
        model.disable_adapters()
        assert drift(out, model(**inputs)[0]) > 1e-2
    torch.testing.assert_close(outputs[0], outputs[1])


def handle_of(model):
    return Handle([(model, model.__dict__["_tofu"])])


def test_flux_with_an_ip_adapter():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = tiny.denoisers(tiny.tiny_flux())[0]
    inputs = tiny.model_inputs(model)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    for block in model.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(width, 20, num_tokens=(4,))
        block.attn.set_processor(tiny.randomise(processor))
    pictures = [torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1))]
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": pictures}
    expected = model(**inputs)[0]
    without = dict(
        inputs, joint_attention_kwargs={"ip_hidden_states": [torch.zeros_like(pictures[0])]}
    )
    assert drift(model(**without)[0], expected) > 1e-2
    for scope in ("attention", "block"):
        for keys_values in ("fresh", "cached"):
            options = {"method": "random", "unmerge": "temporal", "warmup_steps": 1}
            out, _ = run(
                model, inputs, 3, ratio=0.5, scope=scope, keys_values=keys_values, **options
            )
            if scope == "block":
                assert drift(out, expected) < 1e-4
            assert torch.isfinite(out).all()
        out, _ = run(model, inputs, ratio=0.5, method="tome", scope=scope)
        assert torch.isfinite(out).all()


# ---- refusals --------------------------------------------------------------------------------------


class Classic:
    """Attention written out, without torch's fused product."""

    _attention_backend = _parallel_config = None

    def __call__(self, attn, hidden_states, *_, rotary_emb=None, **__):
        heads = lambda x: x.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def test_an_attention_without_the_fused_product_is_refused_with_keys_and_values():
    model = tiny.denoisers(tiny.tiny_wan())[0]
    inputs = tiny.model_inputs(model)
    for block in model.blocks:
        block.attn1.processor = Classic()
    run(model, inputs, ratio=0.5, method="tome")
    for keys_values in ("fresh", "cached"):
        with pytest.raises(RuntimeError, match=r"set_attention_backend\('native'\)"):
            run(model, inputs, 2, ratio=0.5, method="random", keys_values=keys_values)
    remove_tofu(model)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_fused_projections_behind_rotary_positions(name):
    model = tiny.denoisers(BUILDERS[name]())[0]
    inputs = tiny.model_inputs(model)
    options = {"ratio": 0.5, "method": "random", "unmerge": "temporal", "warmup_steps": 1}
    apart, _ = run(model, inputs, 3, keys_values="cached", **options)
    remove_tofu(model)
    model.fuse_qkv_projections()
    together, _ = run(model, inputs, 3, keys_values="cached", **options)
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
        apply_tofu(model, keys_values="fresh", **options)


@pytest.mark.parametrize("name", ["flux", "qwen", "sd3"])
def test_residuals_between_blocks_run_block_by_block(name):
    model = tiny.denoisers(BUILDERS[name]())[0]
    inputs = tiny.model_inputs(model)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    tokens = 60 if name == "sd3" else inputs["hidden_states"].shape[1]
    key = "block_controlnet_hidden_states" if name == "sd3" else "controlnet_block_samples"
    if name == "sd3":
        tokens = inputs["hidden_states"][0, 0].numel() // 4
    draw = torch.Generator().manual_seed(0)
    inputs[key] = [torch.randn(2, tokens, width, generator=draw) for _ in range(2)]
    _, handle = run(model, inputs, ratio=0.5, method="tome", merge="prune")
    assert not any("-" in row["name"] for row in handle.stats())
    with pytest.raises(ValueError, match=r"scope 'span' cannot run with .*controlnet"):
        run(model, inputs, ratio=0.5, method="tome", scope="span")
    remove_tofu(model)


def test_a_cache_that_skips_blocks_runs_block_by_block():
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.tiny_flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with apply_tofu(pipe, ratio=0.5, method="tome", merge="prune") as handle:
        assert torch.isfinite(tiny.generate(pipe, steps=4)).all()
        assert not any("-" in row["name"] for row in handle.stats())
    with (
        apply_tofu(pipe, ratio=0.5, method="tome", scope="span"),
        pytest.raises(ValueError, match="diffusers hook 'fbc"),
    ):
        tiny.generate(pipe, steps=4)


def test_pictures_of_different_sizes_in_one_batch_are_refused():
    model = tiny.denoisers(tiny.tiny_qwen())[0]
    inputs = tiny.model_inputs(model)
    ((frames, height, width),) = inputs["img_shapes"][0]
    inputs["img_shapes"] = [[(frames, height, width)], [(frames, width, height)]]
    with pytest.raises(ValueError, match="must have one size"):
        run(model, inputs, ratio=0.5, method="tome")
    remove_tofu(model)


# ---- video -----------------------------------------------------------------------------------------


def test_video_tokens_match_inside_frames_and_tiles():
    model = tiny.denoisers(tiny.tiny_wan())[0]
    inputs = tiny.model_inputs(model)
    grid = generation_of(apply_tofu(model, ratio=0.25, method="tome")).runtime.setup.family.grids(
        model, inputs
    )[0]
    remove_tofu(model)
    assert grid.frames > 1 and grid.height != grid.width
    frame = grid.height * grid.width
    for method in ("tome", "pitome", "random"):
        options = {"window": (1, None, None)}
        _, handle = run(model, inputs, ratio=0.5, method=method, method_options=options)
        plan = plans_of(handle)[0]
        own = torch.arange(grid.tokens) // frame
        # Per frame: every token goes to one of its own frame.
        assert torch.equal(
            plan.broadcast((plan.kept // frame)[..., None])[..., 0], own.expand(2, -1)
        )
    _, handle = run(
        model,
        inputs,
        ratio=0.5,
        method="tome",
        method_options={"window": (2, 2, 2), "frame_stride": 2},
    )
    plan = plans_of(handle)[0]
    place = torch.arange(grid.tokens)
    target = plan.broadcast(plan.kept[..., None])[..., 0]
    for unit, side in ((frame, grid.frames), (grid.width, grid.height), (1, grid.width)):
        mine, theirs = place // unit % side, target // unit % side
        # Tiles of two; the last is shifted inside, so a token may look back by one tile.
        assert ((mine - theirs).abs() <= 1).all()
