"""A stand-in for a phone that the real adb talks to: its daemon's side of the protocol, over TCP.

After adb's own pages: messages of 24 bytes and data (protocol.txt), the shell protocol with its
exit code (shell_v2), and files sent by the sync service (SYNC.TXT). Commands run in this machine's
shell, with the phone's folder /data/local/tmp in a folder of ours and the programs of `bin` first.
What was asked and answered is kept in `said`.
"""

import os
import socket
import struct
import subprocess
import threading
from pathlib import Path

VERSION, LARGEST = 0x01000001, 256 * 1024
BANNER = b"device::ro.product.name=stand_in;ro.product.model=Stand_in;features=shell_v2"
HOME = "/data/local/tmp"
STDOUT, EXIT = 1, 3


class Phone(threading.Thread):
    """One connection at `address` until `close`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.home, self.bin = folder / "tmp", folder / "bin"
        self.home.mkdir(parents=True)
        self.bin.mkdir()
        self.said: list[tuple[str, str]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._streams: dict[int, Stream] = {}

    def program(self, name: str, script: str) -> None:
        """Give the phone a command."""
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)

    def here(self, text: str) -> str:
        """A path or command of the phone as one of this machine."""
        return text.replace(HOME, str(self.home))

    def run(self) -> None:
        try:
            self._socket, _ = self._listener.accept()
            while True:
                self._answer(*self._message())
        except (OSError, EOFError):
            return

    def close(self) -> None:
        self._listener.close()
        if hasattr(self, "_socket"):
            self._socket.close()

    def shell(self, command: str) -> bytes:
        """Packets of the shell protocol: what the command printed, and its exit code."""
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", self.here(command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path},
        )
        output = done.stdout.decode().replace(str(self.home), HOME)
        self.said.append((command, output))
        code = struct.pack("<BIB", EXIT, 1, done.returncode)
        return struct.pack("<BI", STDOUT, len(output.encode())) + output.encode() + code

    def _message(self) -> tuple[bytes, int, int, bytes]:
        command, first, second, length, _, _ = struct.unpack("<4s5I", self._exactly(24))
        return command, first, second, self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            part = self._socket.recv(length - len(found))
            if not part:
                raise EOFError
            found += part
        return found

    def _send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        magic = struct.unpack("<I", command)[0] ^ 0xFFFFFFFF
        head = struct.pack("<4s5I", command, first, second, len(data), sum(data), magic)
        self._socket.sendall(head + data)

    def _answer(self, command: bytes, theirs: int, ours: int, data: bytes) -> None:
        if command == b"CNXN":
            self._send(b"CNXN", VERSION, LARGEST, BANNER)
        elif command == b"OPEN":
            stream = self._streams[theirs] = Stream(self, data.rstrip(b"\0").decode())
            self._send(b"OKAY", theirs, theirs)
            self._go_on(theirs, stream)
        elif command == b"WRTE":
            self._send(b"OKAY", ours, theirs)
            self._streams[theirs].take(data)
            self._go_on(theirs, self._streams[theirs])
        elif command == b"OKAY" and theirs in self._streams:
            self._streams[theirs].waiting = False
            self._go_on(theirs, self._streams[theirs])

    def _go_on(self, number: int, stream: "Stream") -> None:
        """Send the next part, if the last one has been acknowledged, or close."""
        if stream.waiting:
            return
        if stream.output:
            part, stream.output = stream.output[:LARGEST], stream.output[LARGEST:]
            stream.waiting = True
            self._send(b"WRTE", number, number, part)
        elif stream.ended:
            self._send(b"CLSE", number, number)
            del self._streams[number]


class Stream:
    """One service that adb has opened: a shell command, or files on their way."""

    def __init__(self, phone: Phone, service: str) -> None:
        self.phone, self.waiting = phone, False
        self.output, self.ended, self._input = b"", False, b""
        if service.startswith("shell"):
            self.output, self.ended = phone.shell(service.partition(":")[2]), True

    def take(self, data: bytes) -> None:
        """Requests of the sync service, as far as they have arrived."""
        self._input += data
        while len(self._input) >= 8:
            name, length = struct.unpack("<4sI", self._input[:8])
            size = 0 if name in (b"DONE", b"QUIT") else length
            if len(self._input) < 8 + size:
                return
            body, self._input = self._input[8 : 8 + size], self._input[8 + size :]
            self._request(name, body)

    def _request(self, name: bytes, body: bytes) -> None:
        if name == b"STAT":
            path = Path(self.phone.here(body.decode()))
            about = path.stat() if path.exists() else None
            mode, size = (about.st_mode, about.st_size) if about else (0, 0)
            self.output += struct.pack("<4s3I", b"STAT", mode, size, 0)
        elif name == b"SEND":
            place = body.decode().rpartition(",")[0]
            self._file, self._content = Path(self.phone.here(place)), b""
            self.phone.said.append(("push", place))
        elif name == b"DATA":
            self._content += body
        elif name == b"DONE":
            self._file.write_bytes(self._content)
            self.output += struct.pack("<4sI", b"OKAY", 0)
        elif name == b"QUIT":
            self.ended = True
