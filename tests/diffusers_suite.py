"""diffusers' own fast tests of pipelines and denoisers, with tofu on what they call or build.

    pip install parameterized ftfy requests-mock
    python -m tests.diffusers_suite FOLDER SETTING [--out FOLDER] [arguments of pytest]

FOLDER holds the `tests` folder of diffusers' repository, at the tag of the installed version. A run writes
OUT/SETTING.json and prints how the tests ended; run `none` first, with which the others are compared. This
file is a plugin of the pytest that it starts, too, where no other file of this folder is imported.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve()
# What tofu is asked for; where no denoiser is of a known class, tokens are not. Ratio 0 changes no number, so
# that it can stay on from where a pipeline or a denoiser is built, in all tests. The others are on during one
# call of a pipeline.
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "ratio0": {"ratio": 0, "method": "tome"},
    "ratio": {"ratio": 0.5},
    "blocks": {"ratio": 0.5, "method": "tofu", "scope": "block"},
    "speedup": {"speedup": 2.0},
}
BUILT = "ratio0"
# What is run unless pytest is told otherwise: the fast tests of these pipelines and denoisers; with tofu in
# one call, those that generate.
PIPELINES = (
    "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "pixart_alpha", "pixart_sigma",
    "dit", "wan", "qwenimage",
)  # fmt: skip
DENOISERS = (
    "unets/test_models_unet_2d_condition", "transformers/test_models_transformer_sd3",
    "transformers/test_models_transformer_flux", "transformers/test_models_pixart_transformer2d",
    "transformers/test_models_dit_transformer2d", "transformers/test_models_transformer_wan",
    "transformers/test_models_transformer_qwenimage",
)  # fmt: skip
FAST = "not Integration and not Slow and not Nightly"
GENERATING = (
    f"{FAST} and not offload and not load and not batch_consistent and ("
    "inference_batch_single_identical or test_output or num_images_per_prompt or callback_inputs or "
    "callback_cfg or fused_qkv or test_ip_adapter or from_pipe_consistent_forward or interrupt or "
    "cache_inference or attention_slicing or karras or two_xl or three_xl or test_inference)"
)
# Of an object, in a message.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Most tests take two steps, of which the warm-up leaves nothing to skip or to reduce.
STEPS = 10


class Suite:
    """Puts tofu on what a test calls, and keeps how each test ended."""

    def __init__(self, setting: str, out: Path) -> None:
        self.setting, self.out = setting, out
        self.tests: dict[str, dict[str, Any]] = {}
        self.test: dict[str, Any] = {}
        file = out / "none.json"
        self.plain = json.loads(file.read_text()) if file.exists() else {}
        self.summed: set[type] = set()
        self.inside = False
        self.of_denoisers = False

    def wrap(self, plain: Any) -> Any:
        """The `__call__` of a class of pipelines, of ten steps at least, with tofu on for this one call."""

        @functools.wraps(plain)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self.inside:  # a pipeline that is called by another, or a parent's `__call__`
                return plain(pipe, *args, **kwargs)
            if isinstance(kwargs.get("num_inference_steps"), int):
                kwargs["num_inference_steps"] = max(STEPS, kwargs["num_inference_steps"])
            self.inside = True
            try:
                return self.generate(plain, pipe, args, kwargs)
            finally:
                self.inside = False

        return call

    def wrap_init(self, plain: Any) -> Any:
        """The `__init__` of a class of pipelines or denoisers, with tofu on what was built."""

        @functools.wraps(plain)
        def init(built: Any, *args: Any, **kwargs: Any) -> None:
            outermost = not self.inside  # and not a parent's `__init__`
            self.inside = True
            try:
                plain(built, *args, **kwargs)
            finally:
                self.inside = not outermost
            if outermost:
                self.put_on(built)

        return init

    def put_on(self, built: Any) -> None:
        """What a test is about gets tofu, if it has none: denoisers in tests of denoisers, else pipelines."""
        from torch.nn import Module

        from tofu_diffusers import apply_tofu
        from tofu_diffusers.families import known_family
        from tofu_diffusers.hooks.patch import state_of

        if isinstance(built, Module) != self.of_denoisers:
            return
        parts = [built] if self.of_denoisers else [*built.components.values()]
        known = [part for part in parts if known_family(part) is not None]
        if known and not any(map(state_of, known)):
            apply_tofu(built, **SETTINGS[BUILT])
            self.test["built"] = True

    def generate(self, plain: Any, pipe: Any, args: Any, kwargs: Any) -> Any:
        """One call of a pipeline; notes whether less was computed."""
        from tofu_diffusers import apply_tofu
        from tofu_diffusers.families import known_family

        options = SETTINGS[self.setting]
        known = any(map(known_family, pipe.components.values()))
        if not options or self.setting == BUILT or ("ratio" in options and not known):
            return plain(pipe, *args, **kwargs)
        with apply_tofu(pipe, **options) as handle:
            out = plain(pipe, *args, **kwargs)
            skipped = any(step.skipped for each in handle.inspect() for step in each.steps)
            removed = any(row["tokens_kept"] < row["tokens_in"] for row in handle.stats())
            self.test["less"] = self.test.get("less", False) or skipped or removed
            if type(pipe) not in self.summed:  # it counts FLOPs, which takes as long as a test
                self.summed.add(type(pipe))
                str(handle.summary())
        return out

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        from diffusers.training_utils import set_seed

        self.test = self.tests[item.nodeid] = {"outcome": "skipped"}
        self.of_denoisers = "/models/" in item.nodeid
        set_seed(0)  # what a test draws without a seed must be the same in every setting

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed:
            last = call.excinfo.traceback[-1]
            ours = "tofu_diffusers" in Path(last.path).parts
            self.test |= {
                "outcome": "failed",
                "error": f"{call.excinfo.typename}: {call.excinfo.value}"[:400],
                "where": f"{Path(last.path).name}:{last.lineno + 1}",
                "refused": ours and str(last.statement).lstrip().startswith("raise"),
            }
        elif report.when == "call" and report.passed:
            self.test["outcome"] = "passed"
        return report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write what is known by now: a run takes a while, and may be broken off."""
        self.test["kind"] = self.kind(self.test, self.plain.get(nodeid, {}))
        (self.out / f"{self.setting}.json").write_text(json.dumps(self.tests, indent=1))

    def pytest_sessionfinish(self) -> None:
        print("\n", dict(Counter(test["kind"] for test in self.tests.values())))
        for note, text in (
            ("less", "less was computed:"),
            ("built", "tofu was on from the start:"),
        ):
            print(text, sum(test.get(note, False) for test in self.tests.values()))

    def kind(self, test: dict[str, Any], plain: dict[str, Any]) -> str:
        """How a test ended; a crash is what nobody wanted."""
        if test["outcome"] != "failed" or self.setting == "none":
            return str(test["outcome"])
        if test["refused"]:
            return "refused"
        if self.setting == BUILT:  # changes nothing, to the last digit of a message
            same = [ADDRESS.sub("", each.get("error", "")) for each in (test, plain)]
            return "fails without tofu" if same[0] == same[1] else "crash"
        if plain.get("outcome") == "failed" and plain["where"] == test["where"]:
            return "fails without tofu"
        return "numeric" if test["error"].startswith("AssertionError") else "crash"


def pytest_configure(config: pytest.Config) -> None:
    from diffusers import DiffusionPipeline, ModelMixin

    suite = Suite(os.environ["SUITE_SETTING"], Path(os.environ["SUITE_OUT"]))

    def wrapped(cls: Any, **_: Any) -> None:
        if suite.setting == BUILT:
            cls.__init__ = suite.wrap_init(cls.__init__)
        if "__call__" in vars(cls) and issubclass(cls, DiffusionPipeline):
            cls.__call__ = suite.wrap(cls.__call__)

    # diffusers imports its pipelines when they are asked for, and some denoisers at once.
    for base in (DiffusionPipeline, ModelMixin):
        for each in subclasses(base):
            wrapped(each)
        base.__init_subclass__ = classmethod(wrapped)
    config.pluginmanager.register(suite)


def subclasses(base: type) -> set[type]:
    """All that derive from it by now."""
    return {found for each in base.__subclasses__() for found in (each, *subclasses(each))}


def build_hub(folder: Path) -> None:
    """Lay out tiny models as the hub's cache, under the names that diffusers' tests load: no network."""
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizer,
        GemmaTokenizer,
        LlamaTokenizer,
        UMT5EncoderModel,
    )

    from tests import tiny, tiny_parts

    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<s>", "</s>", "<mask>"]
    pieces = {piece: i for i, piece in enumerate(special + tiny_parts.byte_letters())}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny_parts.byte_letters()]
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    qwen = tiny_parts.qwen_tokenizer()
    named = ("vision_start", "vision_end", "image_pad", "video_pad")
    qwen.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in named]})
    qwen.chat_template = "{% for each in messages %}{{ each['content'] }}{% endfor %}"
    t5, llama = tiny_parts.t5_tokenizer(), LlamaTokenizer(vocab=pieces, merges=[])
    hub: dict[str, tuple[Any, ...]] = {
        "tiny-random-t5": (t5, tiny_parts.t5(32)),
        "tiny-random-T5Model": (t5,),
        "tiny-random-T5ForConditionalGeneration": (t5, tiny_parts.t5(32)),
        "tiny-random-umt5": (t5, tiny_parts.t5(32, UMT5EncoderModel)),
        "tiny-random-clip": (tiny_parts.clip_tokenizer(),),
        "tiny-random-Qwen2VLForConditionalGeneration": (qwen,),
        "dummy-gemma": (GemmaTokenizer(vocab=pieces, merges=[]),),
        "llama-tokenizer": (llama,),
        "tiny-random-BertModel": (BertTokenizer(vocab={w: i for i, w in enumerate(words)}), bert),
        "tiny-stable-diffusion-torch": (tiny.tiny_sd(),),
        "tiny-sd-pipe": (tiny.tiny_sd(),),
        "tiny-stable-diffusion-xl-pipe": (tiny.tiny_sdxl(),),
        "tiny-sdxl-pipe": (tiny.tiny_sdxl(),),
        "finetrainers/dummy-hunyaunvideo/tokenizer": (llama,),
        "Qwen/Qwen3-Embedding-0.6B": (qwen,),
    }
    for name, parts in hub.items():
        owner, model, *inside = (name if "/" in name else f"hf-internal-testing/{name}").split("/")
        cached, commit = folder / f"models--{owner}--{model}", "0" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        for part in parts:
            part.save_pretrained(cached.joinpath("snapshots", commit, *inside))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=Path("build/diffusers_suite"))
    options, rest = parser.parse_known_args()
    if not rest:
        rest = [f"tests/pipelines/{name}" for name in PIPELINES]
        if options.setting in ("none", BUILT):
            rest += ["-k", FAST, *(f"tests/models/{name}.py" for name in DENOISERS)]
        else:
            rest += ["-k", GENERATING]
    out = options.out.resolve()
    if not (out / "hub").exists():
        build_hub(out / "hub")
    environment = os.environ | {"HF_HUB_CACHE": str(out / "hub"), "HF_HUB_OFFLINE": "1"}
    environment |= {"SUITE_SETTING": options.setting, "SUITE_OUT": str(out)}
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "pytest", "-p", HERE.stem, "-p", "no:cacheprovider", "-q"]
    command += ["--tb=no", "-W", "ignore", "--continue-on-collection-errors", *rest]
    return subprocess.run(command, cwd=options.folder, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
