"""Shards of a reinforced store made by Ray Data workers: the same function as in one process."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.errors import PocketclipError

if TYPE_CHECKING:
    from compress.stages.reinforce import Worker


class RemoteWorker:
    """Lives in a Ray worker; decodes the data and opens the teachers there, once."""

    def __init__(self, worker: "Worker") -> None:
        self.worker = worker

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.worker.make(int(row["shard"]))
        return row


def share(worker: "Worker", shards: list[int], num_workers: int) -> None:
    """Let `num_workers` make these shards; joins a running Ray cluster, or starts one here."""
    try:
        import ray
    except ImportError:
        raise PocketclipError(
            "reinforce.workers needs Ray: pip install 'pocketclip[distributed]', or set it to 0"
        ) from None
    data = worker.work.data
    # Without what this process has decoded: each worker reads the shards that it can see.
    bare = replace(worker, work=replace(worker.work, data=replace(data)))
    rows = ray.data.from_items([{"shard": number} for number in shards])
    gpus: dict[str, Any] = {"num_gpus": 1} if worker.work.device.startswith("cuda") else {}
    each: Any = RemoteWorker
    made = rows.repartition(max(1, len(shards))).map(
        each, fn_constructor_args=(bare,), concurrency=num_workers, **gpus
    )
    done = sorted(row["shard"] for row in made.take_all())
    assert done == sorted(shards), (done, shards)
