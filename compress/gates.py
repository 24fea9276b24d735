"""Bounds that a recipe sets for its result."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from compress.errors import GateFailed

NAMED_BY = ("artifact", "target", "precision", "tower")


class Gate(BaseModel):
    """A bound that rows of summary.json must keep; otherwise the run ends with exit code 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Column of summary.json, such as top1, parity_worst_cosine, p50_ms, size_bytes."""
    at_least: float | None = None
    """Smallest value that passes."""
    at_most: float | None = None
    """Largest value that passes."""
    where: dict[str, str] = {}
    """Only rows with these values, such as {target: onnxruntime, precision: int8, tower: image}."""


def check_gates(gates: tuple[Gate, ...], rows: list[dict[str, Any]]) -> None:
    """Raise GateFailed, naming each bound that a row misses and each gate that finds no row."""
    failures = [failure for gate in gates for failure in _gate_failures(gate, rows)]
    if failures:
        raise GateFailed("the result misses its gates:\n  " + "\n  ".join(failures))


def _gate_failures(gate: Gate, rows: list[dict[str, Any]]) -> list[str]:
    chosen = [row for row in rows if all(row.get(k) == v for k, v in gate.where.items())]
    measured = [row for row in chosen if row.get(gate.key) is not None]
    if not measured:
        return [f"{gate.key}: no row of summary.json has it where {gate.where or 'anything'}"]
    failures = []
    for row in measured:
        value = row[gate.key]
        name = " ".join(
            str(row[k]) for k in ("artifact", "target", "precision", "tower") if row.get(k)
        )
        if gate.at_least is not None and value < gate.at_least:
            failures.append(f"{name}: {gate.key} {value:.4g}, at least {gate.at_least:.4g} needed")
        if gate.at_most is not None and value > gate.at_most:
            failures.append(f"{name}: {gate.key} {value:.4g}, at most {gate.at_most:.4g} allowed")
    return failures
