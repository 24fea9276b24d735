"""Where each figure of the report stands in bench.json, as a link: a JSON pointer (RFC 6901)."""

from typing import Any

FILE = "bench.json"
KEYS = ("path", "tower", "threads", "scope", "host")
Row = dict[str, Any]


class Places:
    """Links to the rows that the figures of a run were taken from."""

    def __init__(self, bench: dict[str, Any]) -> None:
        timings, artifacts = bench["timings"], bench["artifacts"]
        self.timings = {_key(t, KEYS): n for n, t in enumerate(timings)}
        self.artifacts = {_key(a, KEYS[:2]): n for n, a in enumerate(artifacts)}
        self.stages = {stage["folder"]: n for n, stage in enumerate(bench["stages"])}
        self.split = bench["headline_split"]

    def timing(self, row: Row, *keys: str) -> str:
        """A figure of the timing of a row of summary.json."""
        return pointer("timings", self.timings.get(_key(row, KEYS)), *keys)

    def artifact(self, row: Row, *keys: str) -> str:
        """A figure of the artifact of a row of summary.json."""
        return pointer("artifacts", self.artifacts.get(_key(row, KEYS[:2])), *keys)

    def accuracy(self, row: Row, key: str, split: str | None = None) -> str:
        """An accuracy of the artifact of a row; without `split` the headline's."""
        return self.artifact(row, "accuracy", split or self.split or "", key)

    def stage(self, folder: str, *keys: str) -> str | None:
        """A figure of the model after a stage; None for the first and the last one."""
        place = self.stages.get(folder)
        return None if place is None else pointer("stages", place, *keys)


def pointer(*parts: str | int | None) -> str:
    """`bench.json#/timings/3/p50_ms`; a part that is not known ends it."""
    known: list[str] = []
    for part in parts:
        if part is None:
            break
        known.append(str(part).replace("~", "~0").replace("/", "~1"))
    return f"{FILE}#/" + "/".join(known)


def _key(row: Row, keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in keys)
