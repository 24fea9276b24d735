"""The guard for x86 CPUs without VNNI: they add two u8 * s8 products in 16 bits, which overflow.

A bundle says `weight_bits` where a kernel multiplies integers: with 7 no sum can overflow, with 8
some may, silently. Whoever opens such a bundle on such a CPU is warned.
"""

import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.scheme import Scheme

VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8"})


def weight_bits(scheme: Scheme) -> int:
    """Most bits of a weight that is multiplied with integers; 0 where none is."""
    layers = scheme.layers.values()
    return max((entry.weight_bits or 0 for entry in layers if entry.act_bits), default=0)


def warn(folder: Path, runtime: Mapping[str, Any], remedy: str) -> None:
    """Warn where this CPU's sums can overflow with the weights of a bundle; `runtime` is its own.

    remedy: what avoids it, as the end of a sentence.
    """
    if runtime.get("weight_bits") == 8 and here():
        warnings.warn(
            f"{folder}: this CPU has no VNNI, its 8-bit sums can overflow with these weights; "
            f"check with `pocketclip verify`, or {remedy}",
            stacklevel=3,
        )


def hint(runtime: Mapping[str, Any]) -> str:
    """The end of a message about a bundle that fails its gate: the CPU may be why."""
    if runtime.get("weight_bits") != 8 or not here():
        return ""
    return (
        "; this CPU has no VNNI and its 8-bit sums can overflow: use 7-bit weights (quantize: "
        "{weight_bits: 7}), or export on a CPU that has it"
    )


def saturates(flags: set[str] | None) -> bool:
    """Whether a CPU with these flags adds u8 * s8 products in 16 bits; None is not x86."""
    return flags is not None and not flags & VNNI


def here() -> bool:
    """Whether this CPU's 8-bit sums can overflow."""
    return saturates(machine_flags())


def machine_flags() -> set[str] | None:
    """Flags of this x86 CPU as Linux names them; None elsewhere, where nothing is known."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return None
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
