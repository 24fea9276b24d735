"""A headless Chromium on this machine: bundles of ONNX files in onnxruntime-web.

`browser` runs WebAssembly, `browser:webgpu` WebGPU where the browser has an adapter. Every worker
is a browser of its own; the clock is the page's, which the isolation of the page makes fine enough
(5 microseconds).
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.hosts.local import pick_cores as pick_cores
from benchmarks.timing import Artifact, Samples
from compress.errors import PocketclipError
from export import Unavailable, _npm
from export._browser import BrowserPage, packed
from export._chromium import Chromium

PROVIDERS = {"": "wasm", "wasm": "wasm", "webgpu": "webgpu"}


class Worker:
    """A browser with one tower loaded. Raises Unavailable where it cannot run."""

    def __init__(self, artifact: Artifact, cores: list[int], timeout_seconds: float) -> None:
        about = json.loads((artifact.folder / "bundle.json").read_text(encoding="utf-8"))
        if not about[artifact.tower]["file"].endswith(".onnx"):
            raise Unavailable(f"browsers run ONNX files, not those of {about['target']}")
        if artifact.scope == "search":
            raise Unavailable("the browser host times the model, with preprocessing or without")
        provider = _provider(artifact.host.partition(":")[2])
        self._page = BrowserPage(artifact.folder, provider, cores, timeout_seconds)
        try:
            self._memory_before = self._memory("VmRSS")
            self.opened: dict[str, Any] = self._page.open(artifact.threads, [artifact.tower])
            if self.opened.pop("software"):
                raise Unavailable(
                    "this browser's WebGPU is computed by the CPU: no adapter of a GPU"
                )
            self.opened |= self._page.call("prepare", artifact.tower, *_queries(artifact))
        except (Unavailable, PocketclipError):
            self.close()
            raise

    def run(self, queries: int, seconds: float) -> Samples:
        """Up to `queries` queries, stopping after `seconds`: [Q, 2] milliseconds.

        The second column is the processor time of the page's process, even over the turn.
        """
        before = self._processor_seconds()
        wall = np.array(self._page.call("run", queries, 1e3 * seconds))
        spent = 1e3 * (self._processor_seconds() - before) / len(wall)
        return np.stack([wall, np.full_like(wall, spent)], axis=1)

    def peak_memory_bytes(self) -> int | None:
        """Highest resident memory of the page's process, less what stood before loading."""
        peak = self._memory("VmHWM")
        return None if not peak else max(0, peak - self._memory_before)

    def placement(self) -> dict[str, Any] | None:
        """Not known: onnxruntime-web doesn't tell."""
        return None

    def close(self) -> None:
        """End the browser."""
        self._page.close()

    def _processor_seconds(self) -> float:
        self._page.chromium.call("Performance.enable")
        metrics = self._page.chromium.call("Performance.getMetrics")["metrics"]
        return float(next(m["value"] for m in metrics if m["name"] == "ProcessTime"))

    def _memory(self, field: str) -> int:
        """Bytes of the largest page process, as Linux counts them; 0 elsewhere."""
        found = self._page.chromium.browser("SystemInfo.getProcessInfo")["processInfo"]
        pids = [entry["id"] for entry in found if entry["type"] == "renderer"]
        return max((_status_bytes(pid, field) for pid in pids), default=0)


def describe(place: str = "") -> dict[str, Any]:
    """What this machine and its browser are."""
    provider = _provider(place)
    with Chromium() as chromium:
        version = chromium.browser("Browser.getVersion")
    return {
        **machine.describe(),
        "browser": version["product"],
        "onnxruntime-web": _npm.PACKAGES["onnxruntime-web"][0],
        "provider": provider,
    }


def _provider(place: str) -> str:
    if place not in PROVIDERS:
        raise PocketclipError(f"host browser:{place}: there is browser and browser:webgpu")
    return PROVIDERS[place]


def _queries(artifact: Artifact) -> tuple[list[Any], bool]:
    """What `prepare` takes: inputs as base64, or addresses of pictures and sentences."""
    if artifact.scope == "model":
        return [packed(row) for row in artifact.inputs], False
    golden = json.loads((artifact.folder / "golden/golden.json").read_text(encoding="utf-8"))
    if artifact.tower == "text":
        return [entry["text"] for entry in golden["texts"]], True
    return [f"/bundle/golden/{entry['file']}" for entry in golden["images"]], True


def _status_bytes(pid: int, field: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
