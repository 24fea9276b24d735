"""Fixtures over the tiny objects of tiny.py."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_clip, tiny_data, tiny_work

from compress.clip import Clip
from compress.work import Data, Work


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    """Results of a test depend on nothing but the test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return tiny_data(tmp_path)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return tiny_work(tmp_path)
