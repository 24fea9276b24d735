"""An environment for each peer, over ours: only what differs is installed again.

    python -m benchmarks.peers.environment            make all of them (network, minutes)
    python -m benchmarks.peers.environment nncf       make one

Each lies in runs/peers/NAME/environment. It sees our packages through a .pth file, and what the
peer's `REQUIRES` names comes before them, so that the peer gets the versions it asks for.
"""

import argparse
import importlib
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from benchmarks.bundles import PEERS
from compress import plugin
from compress.errors import PocketclipError

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "runs" / "peers"
NOT_PEERS = ("environment", "task")


def names() -> list[str]:
    """All peers: the files beside this one."""
    return [name for name in plugin.names(PEERS) if name not in NOT_PEERS]


def python(name: str, place: Path = PLACE) -> Path:
    """The interpreter of a peer's environment. Raises PocketclipError where it is not made."""
    found = place / name / "environment" / "bin" / "python"
    if not found.exists():
        raise PocketclipError(
            f"{found}: no such environment; run python -m benchmarks.peers.environment {name}"
        )
    return found


def make(name: str, place: Path = PLACE) -> Path:
    """Make a peer's environment, or keep it if it was made for the same requirements."""
    requires = list(importlib.import_module(f"{PEERS}.{name}").REQUIRES)
    folder = place / name / "environment"
    mark = folder / "made-for.json"
    if mark.exists() and json.loads(mark.read_text()) == requires:
        return python(name, place)
    venv.create(folder, with_pip=True, clear=True)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    below = [sysconfig.get_path("purelib"), str(ROOT)]
    (packages / "below.pth").write_text("\n".join(below) + "\n")
    if requires:
        command = [str(python(name, place)), "-m", "pip", "install", "--quiet", *requires]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PocketclipError(f"{name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    mark.write_text(json.dumps(requires))
    return python(name, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names())}")
    for name in parser.parse_args().names or names():
        print(f"{name}: {make(name)}", flush=True)


if __name__ == "__main__":
    main()
