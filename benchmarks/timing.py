"""What is timed, how, and what was measured: the types that the protocol and all hosts share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Samples = NDArray[np.float64]
Scope = Literal["model", "preprocess", "search"]


class Config(BaseModel):
    """The `bench:` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    hosts: tuple[str, ...] = ("local",)
    """Where to time: local, android[:SERIAL], remote:[USER@]NAME, cuda[:INDEX][:graph], browser,
    ios: files of benchmarks/hosts. Speed-ups compare within a host."""
    scopes: tuple[Scope, ...] = ("model",)
    """model: the runtime alone, its input in place and its embedding left there, where its API can
    (ONNX Runtime, OpenVINO by its own clock, ExecuTorch, LiteRT); of others ready tensors in, an
    embedding out. preprocess: a PNG file's bytes or a sentence in. search: the same, and the ten
    nearest of `index_size` embeddings out. Each gives rows."""
    index_size: int = Field(default=100_000, ge=10)
    """Embeddings that a query of scope search is compared with, float32, by one product."""
    threads: tuple[int, ...] = (1,)
    """Thread counts to time at; each is pinned to as many cores and gives rows of its own."""
    processes: int = Field(default=3, ge=1)
    """Fresh processes for each candidate, one after the other: load time is their median."""
    rounds: int = Field(default=8, ge=2)
    """Rounds in each process; in a round every candidate runs once, in random order."""
    round_seconds: float = Field(default=0.1, gt=0)
    """Time a candidate has in a round."""
    round_queries: int = Field(default=100, ge=1)
    """Queries after which a candidate's turn in a round ends early."""
    min_queries: int = Field(default=100, ge=1)
    """Queries that every candidate must have run at the end: rounds go on until then."""
    min_seconds: float = Field(default=0.0, ge=0)
    """Time that every candidate must have been timed for at the end: rounds go on until then."""
    max_interval: float = Field(default=0.03, gt=0)
    """Rounds go on until every median's 95 % interval is this narrow, as a share of it."""
    patience_seconds: float = Field(default=30, ge=0)
    """The most time spent on more rounds than `rounds` for the sake of `max_interval`."""
    max_seconds: float = Field(default=600, gt=0)
    """Rounds end here at the latest, whatever `min_queries` says; the row is then marked."""
    warmup_seconds: float = Field(default=1.0, ge=0)
    """Longest warm-up; it ends earlier when the median stops falling (by 3 % a step)."""
    discard: int = Field(default=2, ge=0)
    """Queries at the start of each turn that are not counted: the caches are another's."""
    memory_queries: int = Field(default=5, ge=1)
    """Queries of the extra process in which peak memory is read; none of them is timed."""
    roofline: bool = True
    """Measure the machine's peaks (5 s), so that the report can say how near each artifact is."""
    resamples: int = Field(default=500, ge=100)
    """Bootstrap resamples behind each 95 % interval."""
    timeout_seconds: float = Field(default=600, gt=0)
    """A process that does not answer for so long makes its row `unavailable`."""
    seed: int = 0
    """Draws the order within rounds, the index and the bootstrap resamples."""


@dataclass(frozen=True)
class Artifact:
    """One tower of one bundle, as one worker loads it."""

    exporter: str
    """File name in export/, or of a peer, whose `load` opens the folder."""
    folder: Path
    tower: str
    """image or text."""
    threads: int
    inputs: NDArray[Any]
    """Queries in rotation: pixels [Q, 3, H, W] float32 or tokens [Q, L] int32."""
    scope: Scope = "model"
    host: str = "local"
    """As in `Config.hosts`, what follows the colon included."""
    index_size: int = 0
    """Embeddings to search, for scope search."""


class Worker(Protocol):
    """What a host's `Worker(artifact, cores, timeout_seconds)` is: one tower, loaded and waiting.

    Raises Unavailable, in any method, where the host or its runtime cannot do it.
    """

    opened: dict[str, Any]
    """load_ms and first_ms of this fresh process."""

    def run(self, queries: int, seconds: float) -> Samples:
        """Up to `queries` queries, stopping after `seconds`: [Q, 2] milliseconds.

        The first column is time on the wall, the second the time that processors spent on it (NaN
        where the host does not tell).
        """
        ...

    def peak_memory_bytes(self) -> int | None:
        """Highest memory since before loading, less what stood before it; None if not known."""
        ...

    def placement(self) -> dict[str, Any] | None:
        """`requested` and `operators` ({provider: {operator: count}}); None if not known."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


@dataclass
class Timing:
    """What was measured of one artifact; `unavailable` says why nothing was."""

    artifact: Artifact
    cores: list[int]
    rounds: list[Samples] = field(default_factory=list)
    """Milliseconds of the counted queries of each round; round i of all timings ran together."""
    processor_rounds: list[Samples] = field(default_factory=list)
    """The same queries in processor time: less than on the wall where others took the core."""
    process_of_round: list[int] = field(default_factory=list)
    """Which fresh process, counted from 0, ran each round."""
    opened: list[dict[str, Any]] = field(default_factory=list)
    """load_ms and first_ms of each fresh process."""
    warmups: list[dict[str, Any]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    """Peak memory in bytes, each read in a process of its own."""
    joules: list[float] = field(default_factory=list)
    """Energy of one query, of each round where the platform counts energy."""
    placement: dict[str, Any] | None = None
    unavailable: str | None = None

    @property
    def num_queries(self) -> int:
        return sum(len(samples) for samples in self.rounds)

    @property
    def seconds(self) -> float:
        return float(sum(samples.sum() for samples in self.rounds)) / 1e3
