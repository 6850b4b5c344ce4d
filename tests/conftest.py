"""What all tests share: one thread (tensors are small), reproducible property tests, Triton's interpreter where no GPU can
run its kernels, which combinations run (pairs.py), and files with slow tests before the others, so that no process is left
with one of them at the end."""

import os

import pytest
import torch
from hypothesis import settings

from tests import pairs

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the first kernel is decorated

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    pairs.pytest_collection_modifyitems(config, items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
