"""Two processes that torchrun starts do what one does: gradients, checkpoints, world size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress import parallel
from compress.errors import PocketclipError

pytest.importorskip("accelerate")
HERE = Path(__file__).parent


def launch(processes: int, task: str, strategy: str, folder: Path, steps: int = 99) -> None:
    """Run tests/parallel_worker.py in this many processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    worker = [str(HERE / "parallel_worker.py"), task, strategy, str(folder), str(steps)]
    paths = [str(HERE.parent), str(HERE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + worker, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's gradients of the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    launch(1, "gradients", "ddp", folder)
    return folder


def loaded(folder: Path, strategy: str, dtype: str) -> Gradients:
    return torch.load(folder / f"gradients-{strategy}-torch.{dtype}.pt", weights_only=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(
    tmp_path: Path, strategy: str, alone: Path
) -> None:
    """Of every loss. In float64 they agree absolutely, so the sums are the same; in float32 they
    differ by rounding, which grows with the gradients: those of some losses are above 20.
    """
    launch(2, "gradients", strategy, tmp_path)
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-5)):
        one, shared = loaded(alone, "ddp", dtype), loaded(tmp_path, strategy, dtype)
        assert shared.keys() == one.keys() and len(one) > 50
        for name, gradient in one.items():
            largest = max(1.0, float(gradient.abs().max())) if dtype == "float32" else 1.0
            worst = float((shared[name] - gradient).abs().max())
            assert worst <= tolerance * largest, f"{name} in {dtype}: {worst:.1e}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_pretraining_shares_the_batch(tmp_path: Path, strategy: str) -> None:
    launch(2, "pretraining", strategy, tmp_path / "two")
    launch(1, "pretraining", strategy, tmp_path / "one")
    one = torch.load(tmp_path / "one/pretrained-0.pt", weights_only=True)
    assert one.pop("rows").tolist() == [8, 8, 8]
    for rank in range(2):
        shared = torch.load(tmp_path / f"two/pretrained-{rank}.pt", weights_only=True)
        assert shared.pop("rows").tolist() == [4, 4, 4]
        for name, value in one.items():
            # AdamW divides by small second moments, as below
            torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-4, msg=name)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two processes that share their weights (FSDP2) stop after 4 steps; one goes on, and ends
    where an unbroken run of one process does.
    """
    launch(2, "training", "fsdp2", tmp_path / "broken", steps=5)
    assert not (tmp_path / "broken/weights-99.pt").exists()
    for name in ("broken", "whole"):
        launch(1, "training", "fsdp2", tmp_path / name)
    weights = [
        torch.load(tmp_path / name / "weights-99.pt", weights_only=True)
        for name in ("broken", "whole")
    ]
    for name, value in weights[1].items():
        # AdamW divides by small second moments: rounding of 1e-7 grows to a part of the rate
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=1e-4, msg=name)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 3)
    with pytest.raises(PocketclipError, match="batch_size 8 cannot be shared evenly by 3"):
        parallel.own_rows(8)
