"""The README is right: its Python runs, its commands exist, its tables name all there is."""

import argparse
import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from eval.__main__ import COMMANDS
from tests.tiny import tiny_sd, tiny_sdxl
from tofu_diffusers import MERGES, METHODS, UNMERGES, TokenReduction, apply_tofu
from tofu_diffusers.config import KEYS_VALUES, SCOPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = "\n".join(fenced("bash")).splitlines()
    return [line for line in lines if line.strip()]


def first_lines(snippet: str) -> str:
    return snippet.splitlines()[0]


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """What a snippet may take for granted, tiny; and no hub, no compiler, no file left behind.

    pipe: a pipeline. unet, scheduler, latents, text: the parts of a denoising loop.
    """
    tiny = {"StableDiffusionPipeline": tiny_sd, "StableDiffusionXLPipeline": tiny_sdxl}
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", classmethod(lambda cls, _: tiny[cls.__name__]())
    )
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd()
    with torch.no_grad():
        yield {
            "apply_tofu": apply_tofu,
            "TokenReduction": TokenReduction,
            "pipe": pipe,
            "unet": pipe.unet,
            "scheduler": pipe.scheduler,
            "latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
            "text": torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1)),
        }
    torch.compiler.reset()


@pytest.mark.parametrize("snippet", fenced("python"), ids=first_lines)
def test_python_runs(snippet, stand_ins):
    exec(compile(snippet, "README.md", "exec"), stand_ins)


@pytest.mark.parametrize("line", commands())
def test_commands_exist(line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in words[1:]:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    elif words[:2] == ["python", "-m"]:
        spec = importlib.util.find_spec(words[2])
        assert spec is not None
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{words[2]}.__main__") is not None
        if words[2] == "eval":
            parser = argparse.ArgumentParser(exit_on_error=False)
            importlib.import_module(COMMANDS[words[3]][0]).add_arguments(parser)
            parser.parse_args(words[4:])
    else:
        assert words == ["pip", "install", "."], f"nothing checks this command: {line}"


def test_the_tables_name_all_there_is():
    for name in [*METHODS, *MERGES, *UNMERGES, *SCOPES, *KEYS_VALUES]:
        assert re.search(rf"^\| `{name}` \|", README, flags=re.MULTILINE), name


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert script[-1] == "make test"
    assert "make test" in "\n".join(commands())


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in ("LICENSE", "NOTICE", "constraints.txt"):
        assert (ROOT / name).exists(), name
