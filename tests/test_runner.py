"""A run does what is missing, says why, and survives being killed, crowded and starved of disk."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
import yaml

import compress.clip
from compress import jobs, runner
from compress import recipe as recipes
from compress.errors import GateFailed, PocketclipError
from compress.manifest import locked
from tests.tiny import tiny_clip

pytestmark = pytest.mark.usefixtures("toys")

ROOT = Path(__file__).parents[1]
JOBS = ["teacher", "00-nudge", "01-count", "teacher/onnxruntime-fp32", "export/onnxruntime-int8"]
SCRIPT = """
import signal, sys; sys.path[:0] = [{root!r}, {tests!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
import toy; toy.install()
from compress import cli
sys.argv = ["pocketclip", "run", {recipe!r}, "--out", {out!r}, *{arguments!r}]
cli.main()
"""


def run(recipe: Path, *overrides: str) -> list[str]:
    """Run a recipe here; the lines that it said."""
    said: list[str] = []
    runner.run(recipes.load(recipe, list(overrides)), recipe.parent / "run", said.append)
    return said


def process(recipe: Path, *overrides: str) -> list[str]:
    """The command that runs a recipe in a process of its own."""
    arguments = [word for override in overrides for word in ("--set", override)]
    script = SCRIPT.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        recipe=str(recipe),
        out=str(recipe.parent / "run"),
        arguments=arguments,
    )
    return [sys.executable, "-c", script]


def started(said: list[str]) -> dict[str, str]:
    """Folder -> reason, of the steps that ran."""
    pairs = [line.split(": starts (", 1) for line in said if ": starts (" in line]
    return {folder: reason.rstrip(")") for folder, reason in pairs}


def digests(out: Path) -> dict[str, str]:
    steps = json.loads((out / "manifest.json").read_text())["steps"]
    return {name: digest for step in steps for name, digest in step["files"].items()}


def test_first_run_makes_every_step_and_a_second_does_nothing(recipe_file: Path) -> None:
    assert list(started(run(recipe_file))) == [*JOBS, "bench"]
    out = recipe_file.parent / "run"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    said = run(recipe_file)
    assert started(said) == {}
    assert said[-1] == f"nothing to do: {out / 'report.html'}"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_stages_pass_the_model_on(recipe_file: Path) -> None:
    run(recipe_file, "stages.nudge.noise=0")
    out = recipe_file.parent / "run"
    teacher = compress.clip.load(out / "teacher").model.logit_scale
    student = compress.clip.load(out / "01-count").model.logit_scale
    assert torch.isclose(student, teacher + 0.25)
    written = (out / "export" / "onnxruntime-int8" / "scale.txt").read_text()
    assert written == f"int8 {student.item():.4f}"
    assert compress.clip.load(out / "01-count").name == "small"
    metrics = json.loads((out / "01-count" / "metrics.json").read_text())
    parameters = compress.clip.load(out / "01-count").model.parameters()
    assert metrics["num_params"] == sum(p.numel() for p in parameters)


def test_a_stage_gets_only_what_stages_before_it_have_made(recipe_file: Path) -> None:
    out = recipe_file.parent / "run"
    for name in ("01-curate/curated.tar", "02-reinforce/store/store.json"):
        (out / name).parent.mkdir(parents=True)
        (out / name).touch()
    compress.clip.save(tiny_clip(), out / "teacher")
    models = jobs._Models(recipes.load(recipe_file), out)
    found = [models._made_before(f) for f in ("00-nudge", "01-curate", "02-reinforce")]
    pictures, curated = [recipe_file.parent / "pictures"], [out / "01-curate/curated.tar"]
    assert [data.train for data, _ in found] == [pictures, curated, curated]
    assert [store for _, store in found] == [None, None, out / "02-reinforce/store"]


def test_unsized_data_is_decoded_once_as_large_as_the_teacher_takes(recipe_file: Path) -> None:
    out = recipe_file.parent / "run"
    compress.clip.save(tiny_clip(), out / "teacher")
    models = jobs._Models(recipes.load(recipe_file, ["data.image_size=null"]), out)
    works = [models.work("teacher"), models.work("teacher")]
    assert works[0].data is works[1].data
    assert works[0].data.image_size == max(tiny_clip().preprocess.size)


def test_changed_setting_reruns_from_there_and_says_why(recipe_file: Path) -> None:
    run(recipe_file)
    assert started(run(recipe_file, "stages.count.steps=4")) == {
        "01-count": "settings changed: steps 3 -> 4",
        "export/onnxruntime-int8": "01-count ran again",
        "bench": "01-count ran again",
    }


def test_changed_bench_setting_reruns_the_bench_only(recipe_file: Path) -> None:
    run(recipe_file)
    said = run(recipe_file, "evaluate.batch_size=2")
    assert started(said) == {"bench": "evaluate changed: batch_size 64 -> 2"}


@pytest.mark.parametrize("change", ["seed", "data", "version", "model"])
def test_everything_a_stage_depends_on_is_in_its_key(
    recipe_file: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe_file)
    overrides = []
    if change == "seed":
        overrides, reason = ["seed=1"], "seed 0 -> 1"
    elif change == "data":
        (recipe_file.parent / "pictures" / "red-bar.json").write_text('{"caption": "a bar"}')
        reason = "data changed"
    elif change == "version":
        monkeypatch.setattr("toy.stages.nudge.VERSION", 2)
        reason = "version 1 -> 2"
    else:
        (recipe_file.parent / "model" / "notes.txt").write_text("new")
        reason = "teacher ran again"
    assert started(run(recipe_file, *overrides))["00-nudge"] == reason


def test_evaluation_data_does_not_rerun_training(recipe_file: Path) -> None:
    run(recipe_file)
    text = recipe_file.read_text().replace("{val: [pictures]}", "{val: [pictures], b: [pictures]}")
    recipe_file.write_text(text)
    assert list(started(run(recipe_file))) == ["bench"]


@pytest.mark.parametrize("damage", ["change", "delete"])
def test_damaged_output_is_made_again(recipe_file: Path, damage: str) -> None:
    run(recipe_file)
    weights = recipe_file.parent / "run" / "00-nudge" / "model.safetensors"
    if damage == "delete":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    reasons = started(run(recipe_file))
    verb = {"change": "changed", "delete": "missing"}[damage]
    assert reasons["00-nudge"] == f"output file {verb}: 00-nudge/model.safetensors"
    assert list(reasons) == ["00-nudge", "01-count", "export/onnxruntime-int8", "bench"]


def test_removed_step_leaves_the_report_and_is_kept_aside(recipe_file: Path) -> None:
    run(recipe_file)
    recipe_file.write_text(recipe_file.read_text().replace("  - count: {steps: 3}\n", ""))
    said = run(recipe_file)
    out = recipe_file.parent / "run"
    assert not (out / "01-count").exists()
    assert (out / "old" / "01-count" / "model.json").exists()
    assert any(line.startswith("01-count: no longer in the recipe") for line in said)


def test_kill_in_a_stage_loses_only_the_step_since_its_checkpoint(recipe_file: Path) -> None:
    killed = subprocess.run(process(recipe_file, "stages.count.kill_at=2"), capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    reasons = started(run(recipe_file, "stages.count.kill_at=2"))
    assert reasons["01-count"] == "continues where it stopped"
    assert "00-nudge" not in reasons
    log = recipe_file.parent / "run" / "01-count" / "log.txt"
    assert log.read_text().split() == ["0", "1", "2"]


def test_resumed_run_equals_an_uninterrupted_one(recipe_file: Path) -> None:
    subprocess.run(process(recipe_file, "stages.count.kill_at=2"), capture_output=True)
    run(recipe_file, "stages.count.kill_at=2")
    resumed = digests(recipe_file.parent / "run")
    (recipe_file.parent / "run").rename(recipe_file.parent / "first")
    run(recipe_file)
    whole = digests(recipe_file.parent / "run")
    for name in ("00-nudge/model.safetensors", "01-count/model.safetensors"):
        assert whole[name] == resumed[name]


def test_checkpoint_of_other_settings_is_not_continued(recipe_file: Path) -> None:
    subprocess.run(process(recipe_file, "stages.count.kill_at=2"), capture_output=True)
    reasons = started(run(recipe_file, "stages.count.steps=4"))
    assert reasons["01-count"] == "not run yet"
    log = recipe_file.parent / "run" / "01-count" / "log.txt"
    assert log.read_text().split() == ["0", "1", "2", "3"]


def test_kill_between_two_steps_cannot_leave_the_second_up_to_date(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe_file)
    (recipe_file.parent / "run" / "00-nudge" / "model.safetensors").unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("toy.stages.count.run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe_file)
    assert {"01-count", "bench"} <= set(started(run(recipe_file)))


def test_second_run_on_one_folder_stops_with_a_message(recipe_file: Path) -> None:
    first = subprocess.Popen(
        process(recipe_file, "stages.count.steps=5000", "stages.count.seconds=0.2"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout
    while "01-count: starts" not in first.stdout.readline():
        assert first.poll() is None
    second = subprocess.run(process(recipe_file), capture_output=True, text=True)
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert "another run is using this folder" in second.stderr
    assert "Traceback" not in second.stderr
    with locked(recipe_file.parent / "run"):
        pass  # the kill let go of the folder


def test_interrupt_ends_with_130(recipe_file: Path) -> None:
    running = subprocess.Popen(
        process(recipe_file, "stages.count.steps=5000", "stages.count.seconds=0.2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout and running.stderr
    while "01-count: starts" not in running.stdout.readline():
        assert running.poll() is None
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130
    assert "Traceback" not in running.stderr.read()


def test_unavailable_runtime_is_a_file_with_its_reason(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "  - absent: {}\n")
    said = run(recipe_file)
    assert "export/absent: unavailable (needs a machine from the future)" in said
    out = recipe_file.parent / "run"
    row = json.loads((out / "export" / "absent" / "unavailable.json").read_text())
    reason = "needs a machine from the future"
    assert row == {"target": "absent", "precision": None, "reason": reason}
    again = run(recipe_file)
    assert list(started(again)) == ["export/absent"]
    assert again[-1].startswith("nothing to do")


def test_runtime_that_becomes_available_is_exported_and_measured(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file.write_text(recipe_file.read_text() + "  - absent: {}\n")
    run(recipe_file)
    monkeypatch.setattr(
        "toy.exporters.absent.write", lambda clip, cfg, out: (out / "model.bin").write_text("x")
    )
    assert started(run(recipe_file)) == {
        "export/absent": "was unavailable",
        "bench": "export/absent ran again",
    }
    assert started(run(recipe_file)) == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_in_a_stage_names_the_folder_and_records_nothing(recipe_file: Path) -> None:
    with pytest.raises(PocketclipError, match=r"01-count.*the disk is full: free some space"):
        run(recipe_file, "stages.count.fill_disk=true")
    out = recipe_file.parent / "run"
    steps = json.loads((out / "manifest.json").read_text())["steps"]
    assert [step["folder"] for step in steps] == ["teacher", "00-nudge"]
    assert not list(out.rglob(".partial-*"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs a read-only place, even for root")
def test_read_only_output_is_one_message(recipe_file: Path) -> None:
    with pytest.raises(PocketclipError, match=r"cannot write /proc/none: .*--out|cannot write"):
        runner.run(recipes.load(recipe_file), Path("/proc/none"), print)


def test_file_in_place_of_the_run_folder_is_one_message(recipe_file: Path) -> None:
    (recipe_file.parent / "run").write_text("a file")
    with pytest.raises(PocketclipError, match="a file stands where a folder is needed"):
        run(recipe_file)


def test_damaged_manifest_is_one_message(recipe_file: Path) -> None:
    run(recipe_file)
    (recipe_file.parent / "run" / "manifest.json").write_text("{")
    with pytest.raises(PocketclipError, match=r"manifest\.json: damaged"):
        run(recipe_file)


def test_plan_tells_what_run_will_do_and_writes_nothing(recipe_file: Path) -> None:
    out = recipe_file.parent / "run"
    planned = runner.plan(recipes.load(recipe_file), out)
    assert [row.folder for row in planned] == [*JOBS, "bench"]
    assert {row.why for row in planned} == {"not run yet"}
    assert not out.exists()
    run(recipe_file)
    planned = runner.plan(recipes.load(recipe_file, ["stages.count.steps=6"]), out)
    will_run = {row.folder: row.why for row in planned if row.why}
    assert will_run == started(run(recipe_file, "stages.count.steps=6"))


def test_estimate_scales_with_the_number_of_steps(recipe_file: Path) -> None:
    run(recipe_file, "stages.count.seconds=0.1")
    recipe = recipes.load(recipe_file, ["stages.count.seconds=0.1", "stages.count.steps=30"])
    planned = {row.folder: row for row in runner.plan(recipe, recipe_file.parent / "run")}
    assert 3.0 <= (planned["01-count"].seconds or 0) <= 8.0
    assert planned["00-nudge"].seconds == 0.0


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"key": "top1", "at_least": 0.6}, "student onnx image: top1 0.5, at least 0.6 needed"),
        ({"key": "p50_ms", "at_most": 1.0}, "student onnx image: p50_ms 2, at most 1 allowed"),
        ({"key": "top1", "where": {"target": "x"}}, "no row of summary.json has it"),
    ],
)
def test_missed_gate_fails_after_the_report_is_written(
    recipe_file: Path, gate: dict[str, object], message: str
) -> None:
    with pytest.raises(GateFailed, match=message):
        run(recipe_file, f"gates=[{json.dumps(gate)}]")
    assert (recipe_file.parent / "run" / "report.html").exists()


def test_a_gate_holds_at_its_bound_and_not_beyond(recipe_file: Path) -> None:
    gate = "gates=[{key: top1, at_least: %s, where: {artifact: student}}]"
    assert run(recipe_file, gate % 0.5)[-1].startswith("report: ")
    with pytest.raises(GateFailed, match=r"top1 0\.5, at least 0\.51 needed"):
        run(recipe_file, gate % 0.51)
    assert run(recipe_file, "gates=[{key: p50_ms, at_most: 2.0}]")[-1].startswith("nothing to do: ")


def test_run_folder_holds_the_resolved_recipe(recipe_file: Path) -> None:
    run(recipe_file, "stages.count.steps=2")
    written = recipes.load(recipe_file.parent / "run" / "recipe.yaml")
    assert written.stages[1].config.steps == 2
    assert yaml.safe_load((recipe_file.parent / "run" / "recipe.yaml").read_text())["seed"] == 0


def test_toys_take_the_place_of_the_real_folders() -> None:
    assert toy.STAGES == "toy.stages"
    assert runner.benchmarks.report.write is toy.write_report
