"""Skips GPU tests where there is no GPU, and says so."""

import signal
from collections.abc import Iterator

import pytest
import torch

# A shell makes its background jobs ignore Ctrl-C, and their children with them: the tests that send it want it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _own_matmul_precision() -> Iterator[None]:
    """Training lowers the process's precision of fp32 products, also in a module's fixture; no test must see it."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def second_gpu() -> torch.device:
    """A GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", 1)
