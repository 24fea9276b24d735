"""What a manifest says of a step is true of the files and of what they were made from."""

import json
from pathlib import Path

import pytest

from compress.errors import PocketclipError
from compress.manifest import Job, Manifest, locked, open_manifest


def job(folder: str = "00-a", parents: tuple[str, ...] = (), **inputs: object) -> Job:
    return Job(folder, dict(inputs), lambda out: None, parents)


def finished(out: Path, one: Job) -> Manifest:
    """A manifest in which this job is done."""
    manifest = open_manifest(out)
    folder = manifest.begin(one)
    (folder / "result.txt").write_text("result")
    manifest.finish(one, 1.5)
    return open_manifest(out)


def test_record_lists_files_with_digests_but_not_its_own_marks(tmp_path: Path) -> None:
    manifest = finished(tmp_path, job(settings={"steps": 1}))
    record = manifest.steps["00-a"]
    assert list(record["files"]) == ["00-a/result.txt"]
    assert (record["seconds"], record["inputs"]) == (1.5, {"settings": {"steps": 1}})
    assert not (tmp_path / "00-a" / ".key").exists()


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({"settings": {"a": 1}}, {"settings": {"a": 1}}, None),
        ({"settings": {"a": 1}}, {"settings": {"a": 2}}, "settings changed: a 1 -> 2"),
        (
            {"settings": {"a": 1}},
            {"settings": {"b": 1}},
            "settings changed: b None -> 1, a 1 -> None",
        ),
        (
            {"settings": {"training": {"steps": 100, "lr": 1}}},
            {"settings": {"training": {"steps": 200, "lr": 1}}},
            "settings changed: training.steps 100 -> 200",
        ),
        ({"version": 1, "data": "x"}, {"version": 2, "data": "y"}, "version 1 -> 2; data changed"),
        ({"parent": "x"}, {"parent": "y"}, "an earlier step ran again"),
        ({}, {"seed": 1}, "seed None -> 1"),
    ],
)
def test_reason_names_what_changed(
    tmp_path: Path, before: dict[str, object], after: dict[str, object], why: str | None
) -> None:
    assert finished(tmp_path, job(**before)).why(job(**after), set()) == why


def test_key_depends_on_every_input_and_not_on_their_order() -> None:
    assert job(a=1, b=2).key == job(b=2, a=1).key
    assert len({job(a=1).key, job(a=2).key, job(b=1).key, job().key}) == 4


def test_child_of_a_job_that_runs_again_runs_again(tmp_path: Path) -> None:
    child = job("01-b", ("00-a",))
    manifest = finished(tmp_path, child)
    assert manifest.why(child, set()) is None
    assert manifest.why(child, {"00-a"}) == "00-a ran again"


def test_new_job_empties_its_folder_and_the_same_job_continues(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    folder = manifest.begin(job(a=1))
    (folder / "checkpoint").write_text("half")
    assert (manifest.begin(job(a=1)) / "checkpoint").exists()
    assert manifest.why(job(a=1), set()) == "continues where it stopped"
    assert not (manifest.begin(job(a=2)) / "checkpoint").exists()


def test_finished_work_is_not_continued(tmp_path: Path) -> None:
    manifest = finished(tmp_path, job())
    (tmp_path / "00-a" / "result.txt").write_text("damaged")
    manifest.forget([job()])
    assert not (manifest.begin(job()) / "result.txt").exists()


def test_unfinished_work_of_a_changed_parent_is_not_continued(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    child = job("01-b", ("00-a",))
    (manifest.begin(child) / "checkpoint").write_text("half")
    manifest.forget([job(), child])
    assert not (manifest.begin(child) / "checkpoint").exists()


def test_other_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 99, "steps": []}))
    with pytest.raises(PocketclipError, match="another version of pocketclip"):
        open_manifest(tmp_path)


def test_folder_is_held_once_and_let_go(tmp_path: Path) -> None:
    taken = pytest.raises(PocketclipError, match="another run")
    with locked(tmp_path), taken, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
