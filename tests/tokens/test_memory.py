"""65,536 tokens of 64 channels match within 1 GiB of extra memory; measured, in a process apart."""

import subprocess
import sys

import pytest

resource = pytest.importorskip("resource", reason="peak memory is read through getrusage")

GIB = 2**30
SCRIPT = """
import resource, sys, torch
from tofu_diffusers.tokens.grid import TokenGrid
from tofu_diffusers.tokens.methods import Evidence, make_method

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def plan(side, channels, remove, name, **options):
    g = torch.Generator().manual_seed(0)
    n = side * side
    e = Evidence(torch.randn(1, n, channels, generator=g), TokenGrid(side, side), remove,
                 age=torch.ones(1, n), importance={"change": torch.rand(1, n, generator=g)})
    before = peak()
    made = make_method(name, **options).plan(e)
    made.check()
    return peak() - before

name, side, remove, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
plan(16, 64, 100, name, **options)  # first calls load libraries and start threads
print(plan(side, 64, remove, name, **options))
"""


def extra(name: str, side: int, remove: int, options: dict) -> int:
    """Bytes by which one plan raises the peak of a fresh process."""
    argv = [sys.executable, "-c", SCRIPT, name, str(side), str(remove), repr(options)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("name", "options"),
    [("tome", {}), ("importance", {"window": (1, 16, 16)}), ("pitome", {"window": 16})],
)
def test_65536_tokens_match_within_a_gibibyte(name: str, options: dict) -> None:
    # One matrix of all similarities would be 3 GiB for tome (49,152 x 16,384).
    used = extra(name, 256, 32768, options)
    print(f"{name} {options}: {used / GIB:.2f} GiB")
    assert used < GIB


def test_pitome_energy_never_holds_all_pairs() -> None:
    # 16,384 tokens: one matrix of all pairs would be 1 GiB, and the formula needs several.
    used = extra("pitome", 128, 4096, {})
    print(f"pitome: {used / GIB:.2f} GiB")
    assert used < 0.5 * GIB
