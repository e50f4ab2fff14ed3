"""The rooms of the project: imports point one way, and each secret is kept in one place."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import tofu_diffusers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tofu_diffusers"

# A package may use those before it, and none after it.
PACKAGES = ("tofu_diffusers", "pipelines", "eval")
# So may a layer of a package, directly or through any file. A file is of the layer that names it, or else its
# room.
LAYERS = (
    {"kernels"},
    {"tokens"},
    {"steps"},
    {"config"},
    {"tuned"},
    {"families"},
    {"profiles"},
    {"runtime"},
    # Fits what a source reads; puts nothing on a model.
    {"tuning.probes"},
    {"hooks"},
    {"report"},
    {"encoders"},
    {"api"},
    {"tuning"},
)
PIPELINES_LAYERS = (
    {"gpu_command", "loading", "recipe", "timer"},
    {
        "cogvideox",
        "flux",
        "flux2",
        "hunyuan_video15",
        "ltx2",
        "pixart",
        "sd15",
        "sd3",
        "sdxl",
        "wan",
        "z_image",
    },
    {"emoji.captions", "emoji.loop", "emoji.sd3", "emoji.sheet"},
    # Loads them; its other files are all named here.
    {"emoji"},
    {"emoji.data", "emoji.prompts", "emoji.text", "emoji.vae"},
    {"emoji.ceiling", "emoji.denoise", "emoji.mmdit", "emoji.scorer", "emoji.unet"},
    {"emoji.export", "emoji.train", "emoji.vit"},
    {"emoji.card", "emoji.reference"},
    {"emoji.samples"},
    {"emoji.__main__", "emoji.gpu"},
)
EVAL_LAYERS = (
    {"denoiser", "files", "provenance", "statistics"},
    {"jsonl"},
    {"baselines"},
    {"generate"},
    {"metrics"},
    {"bench"},
    {"report", "studies.stages"},
    {"calibrate", "sweep", "tune"},
    {"studies"},
    {"__main__"},
)
ALL_LAYERS = dict(zip(PACKAGES, (LAYERS, PIPELINES_LAYERS, EVAL_LAYERS), strict=True))
# What may be traced sees what a generation hands over, never the generation, whose numbers change.
TRACED = (
    "runtime.setup", "runtime.sites", "runtime.call", "runtime.caches", "runtime.grid_reader",
    "runtime.text_padding", "runtime.runtime", "hooks.state", "hooks.block", "hooks.attention",
    "hooks.keys_values", "hooks.norm",
)  # fmt: skip
PRIVATE_STATE = ("_diffusers_hook", "_old_forward", "_hf_hook")
REGISTRY_HOST = re.compile(
    r"\b(pypi|pythonhosted|npmjs|yarnpkg|unpkg|jsdelivr|debian|crates)\.(org|com|net|io)\b"
)


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """What a file imports, for types too, as dotted names; for `from a import b` both a and a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_graph(*packages: str) -> dict[str, set[str]]:
    """Each module of these packages with those it imports.

    Left out are the roots, which every import runs and which therefore must import and do no more.
    """
    names = {
        module_name(path): path for path in sources(*packages) if module_name(path) not in packages
    }
    return {name: {*imports(path)} & {*names} - {name} for name, path in names.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def layer_of(name: str) -> int:
    """The layer that names a module, or else its room."""
    package, *path = name.split(".")
    for length in (2, 1):
        for depth, layer in enumerate(ALL_LAYERS[package]):
            if ".".join(path[:length]) in layer:
                return depth
    raise AssertionError(f"{name} is in no layer")


def test_no_module_imports_itself_by_a_detour():
    graph = package_graph(*PACKAGES)
    assert [name for name in graph if name in reachable(graph, name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_uses_one_after_it(package):
    after = PACKAGES[PACKAGES.index(package) + 1 :]
    for path in sources(package):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {*after}, f"{module_name(path)} uses {', '.join(used & {*after})}"


def test_what_may_be_traced_never_sees_the_generation():
    graph = package_graph("tofu_diffusers")
    for name in TRACED:
        seen = reachable(graph, f"tofu_diffusers.{name}")
        assert "tofu_diffusers.runtime.generation" not in seen, name


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    graph, layers = package_graph(package), ALL_LAYERS[package]
    present = {name.removeprefix(f"{package}.") for name in graph}
    assert present >= set().union(*layers)
    assert {layer_of(name) for name in graph} == {*range(len(layers))}
    for name in graph:
        own = layer_of(name)
        wrong = sorted(used for used in reachable(graph, name) if layer_of(used) > own)
        assert not wrong, f"{name} uses {', '.join(wrong)}"


def test_every_file_of_the_pipelines_is_in_a_layer_by_its_own_name():
    present = {name.removeprefix("pipelines.") for name in package_graph("pipelines")}
    assert present == set().union(*PIPELINES_LAYERS)


@pytest.mark.parametrize("path", sources("eval", "pipelines"), ids=module_name)
def test_checkout_rooms_use_public_names_only(path):
    public = {"tofu_diffusers", *(f"tofu_diffusers.{name}" for name in tofu_diffusers.__all__)}
    used = {name for name in imports(path) if name.split(".")[0] == "tofu_diffusers"}
    assert used <= public, f"not public: {', '.join(sorted(used - public))}"


def test_one_file_touches_private_state_of_the_hosts():
    """In the package; among the baselines other packages are cleaned up after."""
    touching = {
        path.relative_to(ROOT).as_posix()
        for path in sources("tofu_diffusers", "eval", "pipelines")
        if any(name in path.read_text(encoding="utf-8") for name in PRIVATE_STATE)
    }
    assert touching == {"tofu_diffusers/hooks/patch.py", "eval/baselines/host_state.py"}


def test_every_folder_of_the_tests_is_a_room():
    """A folder of tests is named as what it tests, and a test's file name stands once."""
    tests = ROOT / "tests"
    folders = {path.name for path in tests.iterdir() if path.is_dir() and path.name[0] not in "._"}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= rooms | {"eval", "pipelines", "denoisers", "compatibility"}
    # As packages they would shadow those that they test.
    packages = {path.parent.name for path in tests.rglob("__init__.py")}
    assert packages <= {"denoisers", "compatibility"}
    names = [path.name for path in tests.rglob("test_*.py")]
    assert len(names) == len({*names})


def test_the_package_is_typed_and_exports_what_it_says():
    assert (PACKAGE / "py.typed").is_file()
    missing = [name for name in tofu_diffusers.__all__ if not hasattr(tofu_diffusers, name)]
    assert missing == []


def test_no_file_names_the_host_of_a_package_registry():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the project's files cannot be told from others")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    naming = []
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        if path.is_file():
            content = path.read_bytes()
            binary = b"\0" in content[:8192]
            if not binary and REGISTRY_HOST.search(content.decode("utf-8", "replace")):
                naming.append(name)
    assert naming == []
