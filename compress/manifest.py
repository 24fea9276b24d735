"""manifest.json: what a run folder holds, what each part was made from, and what is still true.

It is written last, atomically: a step that it lists is finished, whatever happened afterwards.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import atomic
from compress.errors import PocketclipError

SCHEMA_VERSION = 1
DIGESTS = ("data", "model files")
"""Inputs that are digests: that they changed is all there is to say."""
KEY_FILE = ".key"
"""Stands in the folder of a step in progress: what its checkpoint, if any, belongs to."""

UNAVAILABLE = "unavailable.json"
"""Stands in the folder of an export whose runtime cannot run here."""


@dataclass(frozen=True)
class Job:
    """One step of a run: a stage, an export, the benchmark."""

    folder: str
    """Where it writes, relative to the run folder; also its name in the manifest."""
    inputs: dict[str, Any]
    """All that its result depends on, as JSON values: the resume key is their digest."""
    action: Callable[[Path], None]
    """Does the work in the given folder."""
    parents: tuple[str, ...] = ()
    """Folders of the jobs whose output it reads."""
    files: tuple[str, ...] = ()
    """Its output files, for a job that shares its folder; empty: all files of the folder."""

    @property
    def key(self) -> str:
        text = json.dumps(self.inputs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Manifest:
    """The finished steps of a run folder, by their folder name."""

    out: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def why(self, job: Job, ran: set[str]) -> str | None:
        """Why this job has to run, in words for a user; None if its result stands.

        ran: folders of the jobs that ran, or will run, before it.
        """
        record = self.steps.get(job.folder)
        again = [parent for parent in job.parents if parent in ran]
        if record is None:
            if (self.out / job.folder / UNAVAILABLE).exists():
                return "was unavailable"
            return "continues where it stopped" if self._resumes(job, ran) else "not run yet"
        if record["key"] != job.key:
            changes = _differences(record["inputs"], job.inputs)
            return "; ".join(changes) or f"{again[0] if again else 'an earlier step'} ran again"
        return f"{again[0]} ran again" if again else self._damage(record)

    def forget(self, jobs: list[Job]) -> None:
        """Drop what is known of jobs that will run, before the first of them does.

        So a run that is killed between two jobs cannot leave the second looking up to date.
        """
        going = {job.folder for job in jobs}
        for job in jobs:
            self.steps.pop(job.folder, None)
            if not self._resumes(job, going):
                (self.out / job.folder / KEY_FILE).unlink(missing_ok=True)
        self.save()

    def begin(self, job: Job) -> Path:
        """Make the folder ready: empty, unless it holds the unfinished work of this very job."""
        if job.files:
            return self.out
        folder = self.out / job.folder
        if not self._resumes(job, set()):
            shutil.rmtree(folder, ignore_errors=True)
            atomic.write_text(folder / KEY_FILE, job.key)
        return folder

    def finish(self, job: Job, seconds: float) -> None:
        """Record the job and the digest of every file that it wrote."""
        folder = self.out / job.folder
        written = [self.out / name for name in job.files] if job.files else _files(folder)
        (folder / KEY_FILE).unlink(missing_ok=True)
        self.steps[job.folder] = {
            "folder": job.folder,
            "key": job.key,
            "seconds": round(seconds, 2),
            "inputs": job.inputs,
            "files": {str(path.relative_to(self.out)): atomic.sha256(path) for path in written},
        }
        self.save()

    def save(self) -> None:
        """Write manifest.json; it lists the steps in the order in which they finished."""
        content = {"schema_version": SCHEMA_VERSION, "steps": list(self.steps.values())}
        atomic.write_json(self.out / "manifest.json", content)

    def _resumes(self, job: Job, ran: set[str]) -> bool:
        """Whether the folder holds unfinished work that still fits."""
        path = self.out / job.folder / KEY_FILE
        return path.exists() and path.read_text() == job.key and not ran & set(job.parents)

    def _damage(self, record: dict[str, Any]) -> str | None:
        """What happened to the files since they were recorded."""
        for name, digest in record["files"].items():
            path = self.out / name
            if not path.is_file():
                return f"output file missing: {name}"
            if atomic.sha256(path) != digest:
                return f"output file changed: {name}"
        return None


def open_manifest(out: Path) -> Manifest:
    """Read the manifest of a run folder; an empty one where there is none yet."""
    path = out / "manifest.json"
    if not path.exists():
        return Manifest(out)
    try:
        content = json.loads(path.read_text())
        version, steps = content["schema_version"], content["steps"]
        known = {step["folder"]: step for step in steps}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PocketclipError(f"{path}: damaged ({error}); delete it to run again") from error
    if version != SCHEMA_VERSION:
        raise PocketclipError(
            f"{path}: written by another version of pocketclip (schema {version}, this one reads "
            f"{SCHEMA_VERSION}); choose another --out"
        )
    return Manifest(out, known)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run folder; the system lets go of it when the process ends, even by SIGKILL.

    Raises PocketclipError where another run holds it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / ".lock").open("w")
    except OSError as error:
        raise atomic.explain(error, out) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PocketclipError(
                f"{out}: another run is using this folder; wait for it, or choose another --out"
            ) from error
        yield


def _files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if not path.name.startswith("."))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between the inputs of two runs of a step, in words."""
    found = []
    for name in {**new, **old}:
        before, after = old.get(name), new.get(name)
        if before == after or name == "parent":
            continue
        if name in DIGESTS:
            found.append(f"{name} changed")
        elif isinstance(before, dict) and isinstance(after, dict):
            found.append(f"{name} changed: {', '.join(_changes(before, after))}")
        else:
            found.append(f"{name} {before} -> {after}")
    return found


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`training.steps 100 -> 200` for each setting that differs."""
    found = []
    for key in {**new, **old}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} {before} -> {after}")
    return found
