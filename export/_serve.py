"""A local web server for pages that compute: the headers without which WebAssembly has one thread.

Browsers share memory between threads only on a page that is isolated from other origins, which
its server asks for by two headers (COOP and COEP).
"""

import threading
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from compress.errors import PocketclipError

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}


class Server:
    """Serves folders of this machine to this machine, until it is closed.

    folders: first part of an address -> folder; "" is what no other part claims.
    """

    def __init__(self, folders: Mapping[str, Path], port: int = 0) -> None:
        handler = partial(_Handler, {part: Path(f).resolve() for part, f in folders.items()})
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as error:
            raise PocketclipError(f"port {port}: {error.strerror}; choose another --port") from None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def run(self) -> None:
        """Serve until Ctrl-C."""
        self._server.serve_forever()

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **TYPES}  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def __init__(self, folders: Mapping[str, Path], *arguments: Any) -> None:
        self.folders = folders
        super().__init__(*arguments)

    def translate_path(self, path: str) -> str:
        """The file of an address; nothing outside the folders has one."""
        parts = PurePosixPath(unquote(urlsplit(path).path)).parts[1:]
        root = self.folders.get(parts[0]) if parts else None
        if root is None:
            root = self.folders.get("", Path("/nonexistent"))
        else:
            parts = parts[1:]
        found = root.joinpath(*parts).resolve()
        return str(found if found.is_relative_to(root) else root / "nonexistent")

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the page shows its own errors."""
