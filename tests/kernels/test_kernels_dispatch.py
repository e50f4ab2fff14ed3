"""Which kernels run: as TOFU_KERNELS says, else as the device does, and an error that names the choices."""

import os
import subprocess
import sys

import pytest
import torch

from tofu_diffusers.kernels import dispatch, reference


def test_the_reference_where_there_is_no_gpu():
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    if dispatch.CHOICE == "triton":
        pytest.skip("TOFU_KERNELS=triton is set for this run")
    assert not dispatch.use_triton(x) and not dispatch.use_triton(x.to("meta"))
    for got, expected in zip(
        dispatch.best_match(x, x[:, :3]), reference.best_match(x, x[:, :3]), strict=True
    ):
        assert torch.equal(got, expected)
    assert torch.equal(dispatch.energy(x, 0.9), reference.energy(x, 0.9))
    tiles = torch.arange(6).view(2, 3)
    assert torch.equal(dispatch.energy_tiles(x, tiles, 0.9), reference.energy_tiles(x, tiles, 0.9))
    for got, expected in zip(
        dispatch.best_match_tiles(x, x[..., 0] > 0, tiles),
        reference.best_match_tiles(x, x[..., 0] > 0, tiles),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("value", "choice"), [(None, None), ("", None), ("triton", "triton")])
def test_the_choice_is_read(value, choice):
    assert dispatch.read_choice(value) == choice


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "CHOICE", "triton")
    monkeypatch.setattr(dispatch, "LOADED", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1.*reference, triton"):
        dispatch.use_triton(torch.zeros(1))
    # Shapes without data need no kernel; float64 and very wide rows have none.
    assert not dispatch.use_triton(torch.zeros(1, dispatch.WIDEST + 1))
    assert not dispatch.use_triton(torch.zeros(1, device="meta"))
    assert not dispatch.use_triton(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cuda", "TOFU_KERNELS is 'cuda'; choose one of reference, triton"),
        ("triton", "triton cannot be imported"),
    ],
)
def test_a_choice_that_cannot_be_had_is_an_error(value, message):
    # None in sys.modules: an import of it fails, installed or not.
    code = "import sys; sys.modules['triton'] = None; import tofu_diffusers.kernels.dispatch"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TOFU_KERNELS": value},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "ValueError" in run.stderr and message in run.stderr
