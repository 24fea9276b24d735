"""A web bundle's towers as an `Encoder`: onnxruntime-web inside a headless Chromium."""

import base64
import json
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export import Unavailable, _npm
from export._chromium import Chromium
from export._serve import Server

DEMO = Path(__file__).with_name("demo")
WEBGPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan")
MODULES = {"wasm": "ort.wasm.min.mjs", "webgpu": "ort.webgpu.min.mjs"}
PADDED = 8
"""Texts of a call that keep their padding."""


class BrowserPage:
    """A page of its own for a bundle; `open` loads its towers, `close` ends it.

    cores: where the browser may run; None for everywhere. Raises Unavailable without a browser or
    npm.
    """

    def __init__(
        self,
        folder: Path,
        provider: str = "wasm",
        cores: Sequence[int] | None = None,
        timeout_seconds: float = 300,
    ) -> None:
        folders = {
            "bundle": folder,
            "demo": DEMO,
            "ort": _npm.package("onnxruntime-web") / "dist",
            "tokenizers": _npm.package("@huggingface/tokenizers") / "dist",
        }
        self._provider = provider
        with ExitStack() as stack:
            server = stack.enter_context(Server(folders))
            flags = WEBGPU if provider == "webgpu" else ()
            self.chromium = stack.enter_context(Chromium(flags, timeout_seconds, cores))
            self.chromium.open(f"{server.url}/demo/runner.html")
            self._open = stack.pop_all()

    def open(
        self,
        threads: int,
        towers: Sequence[str] = ("image", "text"),
        bundle: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load towers -> load_ms and the browser's name.

        bundle: bundle.json as data, while the folder lacks it. Raises Unavailable without an
        adapter or threads.
        """
        settings = {
            "module": f"/ort/{MODULES[self._provider]}",
            "provider": self._provider,
            "threads": threads,
            "towers": list(towers),
            "bundle": bundle,
        }
        opened: dict[str, Any] = self.call("open", settings)
        if "unavailable" in opened:
            raise Unavailable(opened["unavailable"])
        return opened

    def call(self, function: str, *arguments: Any) -> Any:
        """One of runner.mjs's functions."""
        words = ", ".join(json.dumps(argument) for argument in arguments)
        return self.chromium.evaluate(f"runner.{function}({words})")

    def close(self) -> None:
        """End the browser and the server."""
        self._open.close()


class BrowserEncoder:
    """Both towers in the browser; the arrays travel as base64.

    Of a call's texts the first eight fill the context, as a tokenizer pads them; where the tower
    takes any length, the others end with their end mark, as in the page. WebAssembly is slow enough
    that padding would be most of the time that a bundle takes to check.
    """

    def __init__(
        self, folder: Path, provider: str, threads: int, bundle: dict[str, Any] | None = None
    ) -> None:
        self._about = bundle or json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        self.page = BrowserPage(folder, provider)
        weakref.finalize(self, self.page.close)
        self.page.open(threads, bundle=bundle)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return self._rows("image", pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        rows = list(tokens.to(torch.int32).numpy(force=True))
        return self._rows("text", [*rows[:PADDED], *map(self._trimmed, rows[PADDED:])])

    def _trimmed(self, ids: np.ndarray) -> np.ndarray:
        """Token ids [L] up to the end mark, where the tower sees nothing behind it."""
        ends = np.flatnonzero(ids == self._about["tokenizer"]["end_id"])
        any_length = self._about.get("runtime", {}).get("any_text_length", False)
        return ids[: ends[0] + 1] if any_length and len(ends) else ids

    def _rows(self, tower: str, rows: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        found = [self.page.call("encode", tower, packed(row)) for row in rows]
        arrays = [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in found]
        return torch.from_numpy(np.stack(arrays).copy())


def packed(row: np.ndarray) -> str:
    """An array's bytes, little-endian, as base64."""
    return base64.b64encode(row.astype(row.dtype.newbyteorder("<")).tobytes()).decode()
