"""What this machine can do at best, and how much of it an artifact reaches.

Peaks are the best of several tries: a disturbance can only lower them. Shares come from Williams,
Waterman and Patterson's roofline model: a program is bound by arithmetic or by memory traffic,
whichever takes longer at the machine's peak.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

SIDES = (384, 768, 1536)
"""Square matrices that are multiplied: the smallest stay in the caches, the largest don't."""
TRIES_SECONDS = 0.25
"""Time spent on each kind and size."""
COPIED_BYTES = 256 * 2**20
"""Larger than any cache."""
INTEGER = ("int8", "int4", "w8a8", "uint8")


def peaks(threads: int) -> dict[str, Any]:
    """Gigaflops of matrix products in float32, bfloat16 and int8, and gigabytes a second of memory.

    A kind that cannot be multiplied here is None. A multiply-add counts as two operations. Of
    int8 the faster of torch and ONNX Runtime counts: without VNNI torch has a plain loop.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {
            "threads": threads,
            "fp32_gflops": _best(lambda side: _product(side, torch.float32)),
            "bf16_gflops": _best(lambda side: _product(side, torch.bfloat16)),
            "int8_gflops": max(filter(None, map(_best, int8_products(threads))), default=None),
            "memory_gbps": _bandwidth(),
        }
    finally:
        torch.set_num_threads(before)


def share(
    row: dict[str, Any], timing: dict[str, Any], measured: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Gigaflops that an artifact reached, and its shares of the peaks; None where unknown.

    `of_compute`: of the peak of its own precision. `of_bandwidth`: weights read once a query (token
    tables are looked up and don't count) as a share of what memory delivers. `limit`: the larger.
    """
    machine = next((p for p in measured if p["threads"] == timing.get("threads")), None)
    usual = (timing.get("scope"), timing.get("host")) == ("model", "local")
    if machine is None or not usual or not row.get("num_macs") or not timing.get("p50_ms"):
        return None
    seconds = timing["p50_ms"] / 1e3
    gflops = 2 * row["num_macs"] / seconds / 1e9
    weights = 1 - row["num_embedding_params"] / row["num_params"]
    traffic = row["size_bytes"] * weights / seconds / 1e9
    peak = machine[f"{kind(row['precision'])}_gflops"] or machine["fp32_gflops"]
    shares = {"compute": gflops / peak, "bandwidth": traffic / machine["memory_gbps"]}
    return {
        "gflops": gflops,
        "of_compute": shares["compute"],
        "of_bandwidth": shares["bandwidth"],
        "limit": max(shares, key=lambda name: shares[name]),
    }


def kind(precision: str | None) -> str:
    """The arithmetic that a precision's name stands for."""
    name = (precision or "fp32").lower()
    if any(word in name for word in INTEGER):
        return "int8"
    return "bf16" if "bf16" in name else "fp32"


def _best(tries: Callable[[int], Callable[[], Any] | None]) -> float | None:
    """The most gigaflops over all sizes."""
    found = []
    for side in SIDES:
        multiply = tries(side)
        if multiply is None:
            return None
        found.append(2 * side**3 / _fastest(multiply) / 1e9)
    return round(max(found), 2)


def _product(side: int, dtype: torch.dtype) -> Callable[[], Any]:
    a, b = (torch.rand(side, side).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def int8_products(threads: int) -> list[Callable[[int], Callable[[], Any] | None]]:
    """Ways to multiply square int8 matrices into int32: each side -> call, None where it can't."""
    return [_int8_in_torch, partial(_int8_in_onnxruntime, threads)]


def _int8_in_torch(side: int) -> Callable[[], Any] | None:
    a, b = (torch.randint(-127, 127, (side, side), dtype=torch.int8) for _ in range(2))
    try:
        torch._int_mm(a, b)
    except (RuntimeError, NotImplementedError):
        return None
    return lambda: torch._int_mm(a, b)


def _int8_in_onnxruntime(threads: int, side: int) -> Callable[[], Any] | None:
    """Unsigned by signed, as int8 graphs multiply."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    codes = np.random.default_rng(0)
    weight = codes.integers(-64, 65, (side, side)).astype(np.int8)
    rows = {"a": codes.integers(0, 256, (side, side)).astype(np.uint8)}
    kinds = onnx.TensorProto
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    values = [
        onnx.helper.make_tensor_value_info(name, kind, [side, side])
        for name, kind in (("a", kinds.UINT8), ("c", kinds.INT32))
    ]
    constant = onnx.numpy_helper.from_array(weight, "b")
    graph = onnx.helper.make_graph([node], "product", values[:1], values[1:], [constant])
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return lambda: session.run(None, rows)


def _bandwidth() -> float:
    """Gigabytes a second of a copy, reading and writing counted."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.zeros_like(source)
    seconds = _fastest(lambda: target.copy_(source))
    return round(2 * COPIED_BYTES / seconds / 1e9, 2)


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of as many runs as fit."""
    work()
    best, end = float("inf"), time.perf_counter() + TRIES_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
