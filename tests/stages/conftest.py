"""Reading a training log."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def loss_at() -> Callable[[Path, int], float]:
    """The loss that out/log.jsonl notes for a step."""

    def read(out: Path, step: int) -> float:
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return next(line["loss"] for line in lines if line["step"] == step)

    return read
