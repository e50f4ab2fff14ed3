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
from tests.tiny import small_sd, tiny_sd, tiny_sdxl
from tofu_diffusers import (
    KEYS_VALUES,
    MERGES,
    METHODS,
    SCOPES,
    SKIP_RULES,
    UNMERGES,
    StepSkipping,
    TokenReduction,
    apply_tofu,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = (
    "quickstart", "choosing", "models", "encoders", "how_it_works", "evaluation", "tuning", "compatibility",
    "limits", "extending", "results", "notebook", "speed", "papers",
)  # fmt: skip
DOCUMENTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{guide}.md" for guide in GUIDES))
}


def fenced(language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    found = (re.findall(pattern, text, re.DOTALL | re.MULTILINE) for text in DOCUMENTS.values())
    return [snippet for each in found for snippet in each]


def commands() -> list[str]:
    """Commands of all documents; those that go on over several lines as one."""
    found, waiting = [], ""
    for line in "\n".join(fenced("bash")).replace("\\\n", " ").splitlines():
        waiting = f"{waiting} {line}".strip()
        if waiting and waiting.count("'") % 2 == 0:
            found.append(waiting)
            waiting = ""
    return found


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
    pipe = small_sd()
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
    exec(compile(snippet, "a document", "exec"), stand_ins)


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
        assert words[:2] == ["pip", "install"], f"nothing checks this command: {line}"
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
        assert extra and words[3:] == [], line
        if extra[1]:
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert re.search(rf"^{extra[1]} = \[", project, flags=re.MULTILINE)


def test_the_tables_name_all_there_is():
    for name in [*METHODS, *MERGES, *UNMERGES, *SCOPES, *KEYS_VALUES, *SKIP_RULES]:
        choosing = DOCUMENTS["docs/choosing.md"]
        assert re.search(rf"^\| `{name}` \|", choosing, flags=re.MULTILINE), name
    for option in StepSkipping().field_names():
        if option not in ("memory_limit", "family"):
            assert f"| `{option}` |" in DOCUMENTS["docs/choosing.md"], option


def test_the_readme_is_short_and_names_every_guide():
    assert len(README.splitlines()) <= 150
    for guide in GUIDES:
        assert f"](docs/{guide}.md)" in README, guide
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == {*GUIDES}


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert script[-1] == "make test"
    assert "make test" in "\n".join(commands())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_files_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", DOCUMENTS[name]):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("name", [*DOCUMENTS, "pipelines/emoji/README.md"])
def test_rows_of_a_table_are_as_long_as_its_head(name):
    """A table whose second line has another number of cells is shown as text."""
    lines = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    lengths = [len(re.findall(r"(?<!\\)\|", line)) if line[:1] == "|" else 0 for line in lines]
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|(:?-+:?\|)+", line.replace(" ", "")):
            assert lengths[i - 1] == lengths[i], lines[i - 1]
        elif lengths[i] and lengths[i - 1]:
            assert lengths[i] == lengths[i - 1], line


def test_python_versions_are_said_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in project
    said = {
        version for text in DOCUMENTS.values() for version in re.findall(r"Python (3\.\d+)", text)
    }
    assert said == {"3.10"}
