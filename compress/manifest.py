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
KEY_FILE = ".key"
"""Stands in the folder of a step in progress: what its checkpoint, if any, belongs to."""


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
        if record is None:
            started = _read_key(self.out / job.folder) == job.key
            resumes = started and not ran & set(job.parents)
            return "continues where it was interrupted" if resumes else "not run yet"
        again = [parent for parent in job.parents if parent in ran]
        if record["key"] != job.key:
            changes = _differences(record["inputs"], job.inputs)
            return "; ".join(changes) or f"{', '.join(again) or 'an earlier step'} ran again"
        return f"{again[0]} ran again" if again else self._damage(record)

    def begin(self, job: Job, ran: set[str]) -> Path:
        """Make the folder ready: empty, unless it holds the unfinished work of this very job."""
        folder = self.out / job.folder
        if job.files:
            self.steps.pop(job.folder, None)
            return self.out
        resumes = self.why(job, ran) == "continues where it was interrupted"
        if self.steps.pop(job.folder, None):
            self.save()
        if not resumes:
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


def _read_key(folder: Path) -> str | None:
    path = folder / KEY_FILE
    return path.read_text() if path.exists() else None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between the inputs of two runs of a step, most telling first."""
    found = []
    for name in [*new, *(set(old) - set(new))]:
        before, after = old.get(name), new.get(name)
        if before == after or name == "parent":
            continue
        if name == "settings":
            found.append(f"settings changed: {_changed_settings(before or {}, after or {})}")
        elif name in ("data", "model files"):
            found.append(f"{name} changed")
        else:
            found.append(f"{name} {before} -> {after}")
    return found


def _changed_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in keys)
