"""The Triton kernels compile for a Hopper GPU, without one: the compiler forgives less than the interpreter.

Nothing is run.
"""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tofu_diffusers.kernels.triton import _tiles, energy, gather, match, merge, unmerge

INDICES = {"tiles", "index", "order", "offsets", "positions", "kept", "assign"}
FLOATS = {"inverse", "inverse_q", "inverse_c", "total", "last", "step", "before_last"}
NUMBERS = {"margin", "alpha", "eps", "tiny", "limit", "max_age"}
PRODUCT = {"PADDED": 128, "BLOCK_M": 64, "BLOCK_N": 64, "WIDEN": False}
HALF = {**PRODUCT, "BLOCK_K": 64, "PRECISION": "ieee"}
SINGLE = {**PRODUCT, "BLOCK_K": 32, "PRECISION": "tf32x3"}
ROWS = {"ROWS": 4, "BLOCK": 512}
UNMERGE = {"HAS_X": True, "HAS_COMPUTED": True, "CACHED": True, "TAYLOR": False, "BLEND": False}
CASES = {
    "unit": (_tiles._unit_rows, "bf16", {"PADDED": 320, **ROWS}),
    "match": (match._match, "bf16", {**HALF, "TILED": False}),
    "match_tiles": (match._match, "fp32", {**SINGLE, "TILED": True}),
    "energy": (energy._energy, "fp32", {**SINGLE, "TILED": False}),
    "energy_tiles": (energy._energy, "fp16", {**HALF, "TILED": True}),
    "mean": (merge._mean, "bf16", ROWS),
    "mlerp": (merge._mlerp, "fp16", ROWS),
    "copy": (unmerge._unmerge, "bf16", {**ROWS, **UNMERGE, "CACHED": False}),
    "taylor": (unmerge._unmerge, "fp32", {**ROWS, **UNMERGE, "TAYLOR": True}),
    "blend": (unmerge._unmerge, "fp16", {**ROWS, **UNMERGE, "BLEND": True}),
    "take": (gather._take, "bf16", ROWS),
    "put": (gather._put, "fp32", ROWS),
}
POINTERS = {
    *INDICES,
    *FLOATS,
    *("x", "q", "c", "rows", "out", "update", "computed", "value", "slope", "before", "allowed"),
}


def type_of(name: str, dtype: str, kernel: object) -> str:
    """Of an argument, by its name."""
    if name in NUMBERS:
        return "fp32"
    if name not in POINTERS:
        return "i32"
    if name == "allowed":
        return "*u8"
    if name in INDICES:
        return "*i64"
    best = name == "value" and kernel is match._match
    return "*fp32" if best or name in FLOATS else f"*{dtype}"


@pytest.mark.parametrize("case", CASES)
def test_compiles_for_sm_90(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, dtype, constants = CASES[case]
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else type_of(n, dtype, kernel) for n in names}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()})
    options = {"num_warps": 4 if "PRECISION" in constants else 8, "num_stages": 3}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"]
    if "PRECISION" in constants:
        assert "wgmma" in built.asm["ptx"]
