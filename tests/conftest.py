"""What every test wants: no network, no progress bars, one thread, the same random numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import pytest
import torch

torch.set_num_threads(
    1
)  # the models are tiny: more threads only wait for each other, 20 times slower on a busy machine


COMPILATION = """
from gptj_train.training.engine import OpBuilder, compile_under_lock
from deepspeed.ops import op_builder
compile_under_lock(OpBuilder)
for builder in (op_builder.CPUAdamBuilder(), op_builder.FusedAdamBuilder(), op_builder.AsyncIOBuilder()):
    builder.is_compatible(verbose=False) and builder.load(verbose=False)
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile DeepSpeed's extensions while the tests without ranks run; a rank that needs one waits for it."""
    with_ranks = any(item.get_closest_marker("distributed") for item in session.items)
    if with_ranks and not torch.cuda.is_available() and not session.config.option.collectonly:
        subprocess.Popen(
            [sys.executable, "-c", COMPILATION],
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


_HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


for _number in _HANDLED:
    # A shell's background job ignores some of them, and so would the runs that the tests interrupt.
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A recipe run in this process would leave its handlers behind."""
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
