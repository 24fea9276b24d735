"""The tables of docs/results.md that a plain list of rows would not say well: from rows alone."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.distillation_table import distillation
from benchmarks.labels import NOTHING, TARGETS, duration, megabytes, milliseconds, percent, times

Rows = list[dict[str, Any]]
TOWERS = ("image", "text")
PEAKS = {
    "fp32_gflops": "float32 Gflop/s",
    "bf16_gflops": "bfloat16 Gflop/s",
    "int8_gflops": "int8 Gop/s",
    "memory_gbps": "memory GB/s",
}
"""Figures of `roofline.peaks` with their columns."""


def peers(rows: Rows) -> list[str]:
    """A row for each artifact, then training throughput."""
    heads = ["artifact", "runtime", "precision", "image", "text", "files", "top-1"]
    heads += ["image speed-up", "lines", "compression, processor time", "note"]
    cells = []
    for image, text in both(rows, "artifact"):
        cells.append(
            [
                f"**{image['artifact']}**" if image.get("ours") else image["artifact"],
                TARGETS.get(image.get("target", ""), image.get("target") or NOTHING),
                image.get("precision") or NOTHING,
                median(image),
                median(text),
                files(image, text),
                percent(image.get("top1")),
                times(image.get("speedup")),
                _plain(image.get("lines")),
                duration(image.get("compress_processor_seconds")),
                image.get("note") or image.get("unavailable") or "",
            ]
        )
    trained = [row for row in rows if row.get("task") == "training"]
    lines = table(heads, cells)
    if trained:
        lines += ["Training, the student's shape, one thread, a batch of "]
        elsewhere = trained[0].get("measured_on")
        lines[-1] += f"{trained[0]['batch_size']} pairs"
        lines[-1] += f" (measured on {elsewhere}):" if elsewhere else ":"
        lines += ["", *table(("trainer", "pairs a second", "95 % interval"), map(_rate, trained))]
    return lines


def _rate(row: dict[str, Any]) -> list[str]:
    low, high = row["samples_per_second_ci95"]
    return [row["artifact"], f"{row['samples_per_second']:.0f}", f"{low:.0f} to {high:.0f}"]


def zoo(rows: Rows) -> list[str]:
    """Models x runtimes x precisions, then the machine's peaks and each file's shares of them."""
    heads = ["model", "runtime", "precision", "where", "image", "text"]
    heads += ["both, processor time", "files", "top-1"]
    lines, limits = [], []
    for image, text in both(rows, "model", "target", "precision"):
        where = "this CPU" if image["host"] == "local" else "Chromium"
        about = [image["model"], TARGETS.get(image["target"], image["target"]), image["precision"]]
        if image.get("p50_ms") is None:
            reason = image.get("unavailable") or "not measured"
            lines.append([*about, where, reason, "", "", "", ""])
            continue
        top1, note = image.get("top1"), image.get("accuracy_note") or ""
        accuracy = note if top1 is None else percent(top1)
        spent = " + ".join(milliseconds(row.get("processor_p50_ms")) for row in (image, text))
        measured = (median(image), median(text), spent, files(image, text), accuracy)
        lines.append([*about, where, *measured])
        limits += [
            [*about, row["tower"], *_share(row["roofline"])]
            for row in (image, text)
            if row.get("roofline")
        ]
    roofs = ("model", "runtime", "precision", "tower", "Gflop/s", "of arithmetic", "of memory")
    return [
        *table(heads, lines),
        "Processor time leaves out waiting for a core that other programs held.",
        "",
        "The machine's peaks, one thread, measured beside each model's files (matrix products of "
        "torch; a copy larger than the caches, reading and writing counted):",
        "",
        *table(("beside", *PEAKS.values(), "processor"), _peaks(rows)),
        "How near these limits each file comes in processor time (matrix products in its own "
        "precision, and weights read once a query):",
        "",
        *table((*roofs, "nearer to"), limits),
    ]


def _peaks(rows: Rows) -> list[list[str]]:
    """A line for each time that the peaks were measured."""
    found = [row for row in rows if row.get("task") == "peaks"]
    shown = lambda value: NOTHING if value is None else f"{value:.1f}"  # noqa: E731
    return [
        [row["model"], *(shown(row[key]) for key in PEAKS), _plain(row.get("cpu"))] for row in found
    ]


def _share(found: dict[str, Any]) -> list[str]:
    shares = [percent(found["of_compute"]), percent(found["of_bandwidth"]), found["limit"]]
    return [f"{found['gflops']:.1f}", *shares]


def both(rows: Rows, *keys: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Image and text rows of the same artifact together; one without towers stands for both.

    Rows with a `task` are about something else.
    """
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "task" in row:
            continue
        towers = found.setdefault(tuple(row.get(key) for key in keys), {})
        towers |= {row["tower"]: row} if "tower" in row else dict.fromkeys(TOWERS, row)
    return [(towers["image"], towers["text"]) for towers in found.values()]


def median(row: dict[str, Any]) -> str:
    """`5.06 ms`, with half the width of its interval where that is more than 1 %."""
    value = row.get("p50_ms")
    if value is None:
        return NOTHING
    low, high = row["p50_ms_ci95"]
    half = (high - low) / 2 / value
    return milliseconds(value) + (f" ±{percent(half, 0)}" if half > 0.01 else "")


def files(image: dict[str, Any], text: dict[str, Any]) -> str:
    """Both towers' bytes."""
    sizes = (image.get("size_bytes"), text.get("size_bytes"))
    return megabytes(None if None in sizes else sum(size for size in sizes if size))


def table(heads: Sequence[str], lines: Any) -> list[str]:
    """Markdown, with an empty line behind it."""
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    return ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *shown, ""]


def _plain(value: Any) -> str:
    return NOTHING if value is None else str(value)


BY_NAME: dict[str, Callable[[Rows], list[str]]] = {
    "distillation": distillation,
    "peers": peers,
    "zoo": zoo,
}
"""Results files with a table of their own."""
