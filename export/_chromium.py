"""A headless Chromium, driven over its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from compress.errors import PocketclipError
from export import Unavailable

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
START_SECONDS = 60
SERIOUS = ("warning", "error", "assert")


class Chromium:
    """One browser with one page; a context manager. Raises Unavailable where there is none.

    extra: more command-line flags. timeout_seconds: the longest that one evaluation may take.
    cores: where all its processes may run; None for everywhere.
    """

    def __init__(
        self,
        extra: Sequence[str] = (),
        timeout_seconds: float = 300,
        cores: Sequence[int] | None = None,
    ) -> None:
        binary = find()
        try:
            from websockets.sync.client import connect
        except ImportError:
            raise Unavailable("websockets isn't installed: pip install 'pocketclip[web]'") from None
        self.timeout_seconds = timeout_seconds
        self.problems: list[str] = []
        """Warnings and errors of the console, failed requests, uncaught exceptions."""
        self._id = 0
        self._connection = ExitStack()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [binary, *FLAGS, *extra, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if cores is not None and hasattr(os, "sched_setaffinity"):
            # At once, before it has children: they inherit it.
            os.sched_setaffinity(self._process.pid, cores)
        try:
            self._socket = self._connection.enter_context(
                connect(self._address(), max_size=None, open_timeout=START_SECONDS)
            )
        except OSError as error:
            self.close()
            raise Unavailable(f"{binary} doesn't answer: {error}") from None
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.problems.clear()
        self.call("Page.navigate", url=url)
        self.evaluate(
            "new Promise(done => document.readyState === 'complete' ? done()"
            " : addEventListener('load', done))"
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited; PocketclipError with what it threw."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise PocketclipError(f"in the browser: {_thrown(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        """A key of the keyboard, down and up; `code` is its virtual key code."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )

    def insert(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Write the page as PNG at a size of the window, in its light or dark colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer; events that come before it are noted."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        return self._exchange(message)

    def browser(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to the browser itself, not to its page."""
        self._id += 1
        return self._exchange({"id": self._id, "method": method, "params": parameters})

    def close(self) -> None:
        """End the browser."""
        self._connection.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        method = message["method"]
        end = time.monotonic() + self.timeout_seconds
        try:
            self._socket.send(json.dumps(message))
            while True:
                answer = json.loads(self._socket.recv(timeout=max(0.0, end - time.monotonic())))
                if answer.get("id") == message["id"]:
                    break
                self._note(answer)
        except TimeoutError:
            seconds = f"{self.timeout_seconds:.0f} s"
            raise Unavailable(f"Chromium: no answer to {method} in {seconds}") from None
        except ConnectionClosed:
            raise Unavailable(f"Chromium ended on {method}") from None
        if "error" in answer:
            raise PocketclipError(f"Chromium, {method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _note(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(_thrown(about["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            entry = about["entry"]
            if entry["level"] in ("warning", "error"):
                self.problems.append(f"{entry['text']} {entry.get('url', '')}")
        elif event.get("method") == "Runtime.consoleAPICalled" and about["type"] in SERIOUS:
            words = [str(a.get("value", a.get("description"))) for a in about["args"]]
            self.problems.append(" ".join(words))

    def _address(self) -> str:
        """Where the browser listens: it writes its port into its profile."""
        port_file = Path(self._profile.name) / "DevToolsActivePort"
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            lines = port_file.read_text().split() if port_file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise ConnectionError("it didn't start")


def find() -> str:
    """The path of Chromium or Chrome; raises Unavailable where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"no browser here: none of {', '.join(NAMES)} is in the path")
    return found


def _thrown(details: dict[str, Any]) -> str:
    thrown = details.get("exception", {})
    return str(thrown.get("description") or thrown.get("value") or details["text"])
