"""What holds for every test: no network beyond this machine, one thread, no deadline."""

import gc
import os
import socket

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# Tiny models spend their time handing work between threads: with two threads on two busy cores
# they run a hundred times longer than with one.
torch.set_num_threads(1)

# First calls compile kernels or load weights; a slow machine is not a failing test.
settings.register_profile("tofu", deadline=None, derandomize=True)
settings.load_profile("tofu")


def pytest_collection_finish() -> None:
    """Collect less garbage: half a million objects of the libraries would be looked through each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_unconfigure() -> None:
    """Else extensions of the libraries would report all that is left as leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails, instead of passing where there is one."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"a test asked the network for {host}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
