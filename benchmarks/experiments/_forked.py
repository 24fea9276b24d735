"""A part of an experiment in a process of its own: what it calls may crash, hang or leak memory."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 3600
# Imported once by the process that parts are forked from: a core spends many seconds on them.
PRELOADED = ["open_clip", "transformers", "onnxscript", "onnxruntime", "torch._dynamo"]
PRELOADED += ["transformers.models.clip.modeling_clip", "export.onnx", "benchmarks.memory"]


def call(function: Callable[..., None], arguments: Sequence[Any], log: Path) -> str | None:
    """Call a function of a module; what it prints goes to `log`.

    -> None, or what it said last where it did not end well.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOADED)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_logged, args=(function, arguments, log))
    process.start()
    process.join(LIMIT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    return f"exit code {process.exitcode}: {last_words(log)}" if process.exitcode else None


def last_words(log: Path) -> str:
    """What a crashed process said last, without the places of this machine."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "Error" in line), (lines or [""])[-1])
    return said.strip()[:300].replace(str(ROOT), ".")


def _logged(function: Callable[..., None], arguments: Sequence[Any], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    function(*arguments)


def _end_with_the_caller() -> None:
    """A part that outlives a stopped experiment would write where the next one does."""
    caller = multiprocessing.parent_process()
    assert caller is not None, "runs in a process of its own"
    wait([caller.sentinel])
    os._exit(1)
