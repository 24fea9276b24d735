"""What a figure was measured on: processor, memory, system, versions, and how busy it was."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Instructions that decide how fast int8 and bfloat16 run: what explains a surprising figure.
TELLING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
INTEGER_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp", "avx2", "neon")
"""The strongest first."""
PACKAGES = (
    "pocketclip",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "executorch",
    "ai-edge-litert",
    "ncnn",
    "MNN",
    "coremltools",
    "numpy",
    "open_clip_torch",
)


def describe() -> dict[str, Any]:
    """The machine as JSON values; a fact that the system does not tell is None."""
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_allowed": len(allowed_cores()),
        "flags": _telling(cpu.get("flags", cpu.get("Features", ""))),
        "virtual": "hypervisor" in cpu.get("flags", "").split(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "turbo": _turbo(),
        "memory_bytes": _memory_bytes(),
        "os": _system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def short() -> str:
    """The processor and what it multiplies integers with, for a row: `AMD EPYC, avx2`."""
    about = describe()
    known = (flag for flag in INTEGER_FLAGS if flag in about["flags"])
    return f"{about['cpu']}, {next(known, 'no integer products')}"


def versions() -> dict[str, str]:
    """Versions of the installed packages that shape the figures."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def allowed_cores() -> list[int]:
    """Cores this process may use; all of them where the system has no such notion."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def load_average() -> list[float] | None:
    """Mean number of running processes over 1, 5 and 15 minutes, this one among them."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cpu_seconds() -> dict[str, float] | None:
    """Seconds all cores have spent since start-up, by kind; None outside Linux.

    `stolen` is what a virtual machine wanted to run and its host did not give.
    """
    text = _read("/proc/stat")
    if text is None:
        return None
    ticks = [int(word) for word in text.splitlines()[0].split()[1:9]]
    user, nice, system, idle, wait, irq, soft_irq, stolen = (t / _ticks_a_second() for t in ticks)
    busy = user + nice + system + irq + soft_irq
    return {"busy": busy, "idle": idle + wait, "stolen": stolen}


def heat() -> dict[str, Any]:
    """Clock in MHz, times that a core was throttled since start-up, highest temperature in degrees.

    What the system does not tell is None: virtual machines mostly show neither.
    """
    cores = Path("/sys/devices/system/cpu").glob("cpu[0-9]*")
    events = [_read(f"{core}/thermal_throttle/core_throttle_count") for core in cores]
    known = [int(event) for event in events if event]
    zones = Path("/sys/class/thermal").glob("thermal_zone*")
    degrees = [text for zone in zones if (text := _read(f"{zone}/temp"))]
    clock = _cpu_info().get("cpu MHz")
    return {
        "clock_mhz": float(clock) if clock else None,
        "throttle_events": sum(known) if known else None,
        "celsius": max(int(text) / 1e3 for text in degrees) if degrees else None,
    }


def _ticks_a_second() -> int:
    return os.sysconf("SC_CLK_TCK")


def _turbo() -> bool | None:
    """Whether the clock may rise above its rated speed; None where the system does not tell."""
    for path, on in (("intel_pstate/no_turbo", "0"), ("cpufreq/boost", "1")):
        if (state := _read(f"/sys/devices/system/cpu/{path}")) is not None:
            return state == on
    return None


def _cpu_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    lines = (_read("/proc/cpuinfo") or "").split("\n\n")[0].splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def _telling(flags: str) -> list[str]:
    has = set(flags.split())
    return [flag for flag in TELLING_FLAGS if flag in has]


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _system() -> str:
    release = _read("/etc/os-release") or ""
    names = [line for line in release.splitlines() if line.startswith("PRETTY_NAME=")]
    return names[0].split("=", 1)[1].strip('"') if names else platform.platform()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
