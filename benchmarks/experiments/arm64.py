"""Numbers, not times, of bundles on arm64: ONNX Runtime's own arm64 build under qemu.

    python -m benchmarks.experiments.arm64 --bundles FOLDER     FOLDER holds bundles of ONNX files

qemu and an arm64 interpreter come from the system's own apt sources, arm64 wheels from pip's index;
they are unpacked under runs/arm64 (500 MB), nothing is installed. Each tower embeds its goldens
under emulation, and here; both are compared with the torch model's embeddings. Where apt-get or the
network is missing, the reason is all there is.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bundles, machine, run
from compress.atomic import write_json
from export import Unavailable

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/arm64.json"
PLACE = ROOT / "runs/arm64"
BUNDLES = ROOT / "runs/quickstart/export"
CPU = "neoverse-n1"
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = [
    *(f"{PYTHON}-minimal", f"lib{PYTHON}-minimal", f"lib{PYTHON}-stdlib"),
    *("libc6", "libexpat1", "zlib1g", "libstdc++6", "libgcc-s1", "libffi8"),
    *("libbz2-1.0", "liblzma5", "libcrypt1"),
]
"""An interpreter and what ONNX Runtime needs beside it."""
EMULATOR = "usr/bin/qemu-aarch64-static"
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
# ONNX Runtime looks at the processor before it computes; under qemu it would see this machine's.
PROCESSOR = """\
processor\t: 0
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""
CORES = {"possible": "0\n", "present": "0\n"}
SCRIPT = """\
import json, sys
import numpy as np
import onnxruntime

folder, out = sys.argv[1:]
bundle = json.load(open(f"{folder}/bundle.json"))
golden = json.load(open(f"{folder}/golden/golden.json"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
found = {}
for tower in ("image", "text"):
    path = f"{folder}/{bundle[tower]['file']}"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    if tower == "text":
        rows = [np.array(entry["ids"], np.int32) for entry in golden["texts"]]
    else:
        rows = [np.load(f"{folder}/golden/{entry['pixels']}") for entry in golden["images"]]
    found[tower] = np.stack([session.run(None, {name: row[None]})[0][0] for row in rows])
np.savez(out, **found)
"""


def emulator(place: Path) -> list[str]:
    """The words that run Python for arm64 here. Raises Unavailable with the reason."""
    root = place / "root"
    if not (root / EMULATOR).exists() or not (place / "site" / "onnxruntime").exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise Unavailable("no apt-get here to fetch qemu and an arm64 interpreter with")
        _fetch_debian(place)
        _fetch_wheels(place)
    for name, text in CORES.items():
        _say(root / "sys/devices/system/cpu" / name, text)
    _say(root / "proc/cpuinfo", PROCESSOR)
    return [str(root / EMULATOR), "-cpu", CPU, "-L", str(root), str(root / "usr/bin" / PYTHON)]


def _fetch_debian(place: Path) -> None:
    """qemu for this machine, the rest for arm64, unpacked under place/root."""
    for folder in ("lists/partial", "cache/archives/partial", "debs", "root"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State::lists": place / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": place / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
    }
    apart = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _command(["apt-get", *apart, "update"], place)
    _command(["apt-get", *apart, "download", *PACKAGES], place / "debs")
    _command(["apt-get", "download", "qemu-user-static"], place / "debs")
    for archive in sorted((place / "debs").glob("*.deb")):
        _command(["dpkg", "-x", str(archive), str(place / "root")], place)


def _fetch_wheels(place: Path) -> None:
    """numpy and ONNX Runtime as installed here, built for arm64, unpacked under place/site."""
    wanted = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    words += ["--only-binary", ":all:", "--python-version", PYTHON.removeprefix("python")]
    words += [word for name in PLATFORMS for word in ("--platform", name)]
    _command([*words, "-d", str(place / "wheels"), *wanted], place)
    for wheel in sorted((place / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place / "site")


def _command(words: list[str], folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")


def _say(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def compared(bundle: bundles.Bundle, words: list[str], place: Path) -> list[dict[str, Any]]:
    """A row for each tower: worst cosines to the torch model's goldens, there and here."""
    out = place / "found.npz"
    _say(place / "embed.py", SCRIPT)
    environment = {"PYTHONPATH": str(place / "site"), "HOME": str(place)}
    command = [*words, str(place / "embed.py"), str(bundle.folder.resolve()), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise Unavailable(f"exit code {done.returncode} under qemu: {done.stderr.strip()[-300:]}")
    golden = json.loads((bundle.folder / "golden/golden.json").read_text(encoding="utf-8"))
    native, rows = bundle.encoder(threads=1), []
    with np.load(out) as emulated:
        for tower in bundles.TOWERS:
            wanted = _goldens(bundle.folder, golden, tower)
            own = _native(native, bundle, tower)
            rows.append(
                {
                    "bundle": bundle.folder.name,
                    "tower": tower,
                    "goldens": len(wanted),
                    "worst_cosine_arm64": _worst(emulated[tower], wanted),
                    "worst_cosine_here": _worst(own, wanted),
                    "arm64_to_here": _worst(emulated[tower], own),
                    "min_cosine": golden["min_cosine"][tower],
                }
            )
    return rows


def _goldens(folder: Path, golden: dict[str, Any], tower: str) -> np.ndarray:
    """The torch model's embeddings [Q, E]."""
    entries = golden["images" if tower == "image" else "texts"]
    return np.stack([np.load(folder / "golden" / entry["embedding"]) for entry in entries])


def _native(encoder: Any, bundle: bundles.Bundle, tower: str) -> np.ndarray:
    import torch

    rows = torch.from_numpy(bundle.queries(tower))
    found: np.ndarray = getattr(encoder, f"encode_{tower}")(rows).numpy()
    return found


def _worst(a: np.ndarray, b: np.ndarray) -> float:
    """The lowest cosine of rows [Q, E]."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return float((a * b).sum(axis=1).min())


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every tower stays above the gate of its goldens on arm64 too."""
    found = []
    for place, row in enumerate(rows):
        if "worst_cosine_arm64" not in row:
            continue
        value, goal = row["worst_cosine_arm64"], row["min_cosine"]
        name = f"{row['bundle']}, {row['tower']}: worst cosine to torch on arm64"
        about = {"name": name, "value": value, "goal": goal, "unit": "cosine", "better": "higher"}
        found.append({**about, "holds": value >= goal, "rows": [place]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundles", type=Path, default=BUNDLES, help="a folder of bundles")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        words = emulator(PLACE)
        for folder in run.bundle_folders(given.bundles):
            bundle = bundles.read(folder)
            if bundle.about["image"]["file"].endswith(".onnx"):
                rows += compared(bundle, words, PLACE)
    except Unavailable as reason:
        rows.append({"bundle": str(given.bundles.name), "unavailable": str(reason)})
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.arm64", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe() | {"emulated": CPU},
        "versions": machine.versions(),
        "seeds": [0],
        "rows": rows,
        "claims": claims(rows),
    }
    write_json(RESULTS, result)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
