"""What every peer is given, and how its files come back: the same teacher, data and contracts.

TASK/onnx/             the teacher's bundle in float32
TASK/huggingface/      the same as a CLIPModel folder, for those that start from one
TASK/calibration/      image.npy [N, 3, H, W], text.npy [N, L]: drawn from the training pairs
OUT/                   what the peer wrote, made a bundle with the teacher's contracts

python -m benchmarks.peers.task NAME TASK OUT      run by the peer's own interpreter
"""

import ast
import importlib
import inspect
import json
import shutil
import sys
import textwrap
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import atomic

if TYPE_CHECKING:
    from compress.clip import Clip
    from compress.work import Data

NUM_CALIBRATION = 300
RESULT = "result.json"
"""Written last: a peer whose process stays after it has nothing more to do."""
EXTENSIONS = {"onnx": "onnx", "openvino": "xml"}
SEED = 0


def prepare(clip: "Clip", data: "Data", task: Path) -> None:
    """Write the task folder, if it is not there yet."""
    import numpy as np

    import export.huggingface
    import export.onnx

    for exporter in (export.onnx, export.huggingface):
        folder = task / exporter.__name__.split(".")[-1]
        if not (folder / "bundle.json").exists():
            exporter.write(clip, exporter.Config(), folder)
    if (task / "calibration" / "text.npy").exists():
        return
    pairs = data.pairs
    chosen = np.random.default_rng(SEED).choice(
        len(pairs.captions), min(NUM_CALIBRATION, len(pairs.captions)), replace=False
    )
    with atomic.folder(task / "calibration") as folder:
        pixels = [clip.preprocess(pairs.image(int(i))).numpy() for i in chosen]
        np.save(folder / "image.npy", np.stack(pixels))
        captions = [pairs.captions[int(i)][0] for i in chosen]
        np.save(folder / "text.npy", clip.tokenizer(captions).numpy().astype(np.int32))


def run(name: str, task: Path, out: Path) -> None:
    """Inside the peer's environment: compress, and write what it took."""
    peer = importlib.import_module(f"benchmarks.peers.{name}")
    out.mkdir(parents=True, exist_ok=True)
    started, processor = time.perf_counter(), time.process_time()
    peer.compress(task, out)
    result = {
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "lines": num_lines(peer.compress),
    }
    if hasattr(peer, "towers"):  # what we need for measuring, and no user
        peer.towers(task, out)
    atomic.write_json(out / RESULT, result)


def versions() -> dict[str, str]:
    """What the peers were compressed with, where that is more than a requirement's text."""
    found = {}
    for name in ("openvino", "nncf", "torchao", "onnxruntime", "transformers", "open_clip_torch"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def num_lines(function: Any) -> int:
    """Lines of code a user writes: the function's, without its first lines and its docstring."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) else definition.body
    lines = {n for part in body for n in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
    source = textwrap.dedent(inspect.getsource(function)).splitlines()
    return sum(bool(source[n - 1].strip()) for n in lines)


def as_bundle(name: str, task: Path, out: Path) -> Path:
    """Give the peer's files the teacher's contracts, so that they are measured as ours are."""
    from export import _bundle

    peer = importlib.import_module(f"benchmarks.peers.{name}")
    about = json.loads((task / "onnx" / "bundle.json").read_text(encoding="utf-8"))
    extension = EXTENSIONS.get(peer.FORMAT, "pt")
    about |= {"target": peer.FORMAT, "precision": peer.PRECISION}
    about["model"]["name"] = name
    about["runtime"] = {"inference_precision": "f32"} if peer.FORMAT == "openvino" else {}
    for tower in _bundle.TOWERS:
        about[tower]["file"] = f"{tower}.{extension}"
    about.pop("files"), about.pop("parity")
    shutil.copy(task / "onnx" / "tokenizer.json", out)
    shutil.copytree(task / "onnx" / "golden", out / "golden", dirs_exist_ok=True)
    (out / "bundle.json").unlink(missing_ok=True)
    _bundle.write_description(out, about)
    return out


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
