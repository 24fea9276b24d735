"""The command reads well, prints one message for a mistake, and ends with the right code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compress.clip
from compress import cli, doctor
from compress.errors import GateFailed, PocketclipError
from tests.tiny import tiny_clip

ROOT = Path(__file__).parents[1]
Command = Callable[..., tuple[int, str, str]]


def pocketclip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["pocketclip", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: pocketclip(monkeypatch, capsys, *arguments)


VERBS = [
    "run",
    "plan",
    "check",
    "inspect",
    "eval",
    "export",
    "serve",
    "bench",
    "compare",
    "report",
    "verify",
    "doctor",
]


def test_help_lists_every_verb_with_a_sentence(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert [verb for verb in VERBS if f" {verb} " not in out] == []
    assert "Exit codes" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(command: Command, verb: str) -> None:
    code, out, _ = command(verb, "--help")
    assert code == 0 and "Usage" in out


def test_help_is_quick_because_it_imports_no_torch() -> None:
    script = (
        "import sys; from compress import cli; sys.argv = ['pocketclip', 'run', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_inspect_writes_json(command: Command, tmp_path: Path) -> None:
    clip = tiny_clip()
    compress.clip.save(clip, tmp_path / "model")
    code, said, _ = command("inspect", tmp_path / "model", "--json")
    told = json.loads(said)
    assert code == 0 and told["embed_dim"] == clip.model.config.embed_dim
    assert told["num_params"] == sum(p.numel() for p in clip.model.parameters())


@pytest.mark.usefixtures("toys")
def test_run_then_plan_then_check(command: Command, recipe_file: Path) -> None:
    out = recipe_file.parent / "run"
    code, said, _ = command("run", recipe_file, "--out", out, "--set", "stages.count.steps=2")
    assert code == 0 and f"report: {out / 'report.html'}" in said
    code, said, _ = command("plan", recipe_file, "--out", out)
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines() if line}
    assert rows["00-nudge"].startswith("kept: up to date")
    assert rows["01-count"].startswith("runs: settings changed: steps 2 -> 3")
    code, said, _ = command("check", recipe_file)
    assert code == 0 and "no mistakes; steps: nudge, count, onnxruntime-int8" in said


@pytest.mark.usefixtures("toys")
def test_mistake_is_one_message_on_stderr_and_code_2(command: Command, recipe_file: Path) -> None:
    code, out, err = command("check", recipe_file, "--set", "stages.count.stepz=2")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {recipe_file}: 1 mistake")
    assert "stages[1].count.stepz: unknown key, did you mean 'steps'?" in err


@pytest.mark.usefixtures("toys")
def test_missed_gate_is_code_1(command: Command, recipe_file: Path) -> None:
    gate = "gates=[{key: top1, at_least: 0.9}]"
    code, _, err = command("run", recipe_file, "--out", recipe_file.parent / "run", "--set", gate)
    assert code == 1 and "at least 0.9 needed" in err


@pytest.mark.usefixtures("toys")
def test_debug_shows_where_an_error_came_from(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["pocketclip", "check", str(recipe_file) + "x", "--debug"])
    with pytest.raises(PocketclipError):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "nowhere/summary.json: no such file; run the recipe first"),
        (("check", "none.yaml"), "none.yaml: cannot read the recipe"),
        (("inspect", "nowhere"), "nowhere"),
        (("nonsense",), "No such command"),
        (("run",), "Missing argument"),
    ],
)
def test_bad_input_is_code_2(command: Command, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = command(*arguments)
    assert code == 2 and message in err
    assert "Traceback" not in err


def test_gate_and_input_errors_have_their_codes() -> None:
    assert (GateFailed.exit_code, PocketclipError.exit_code) == (1, 2)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert cli.duration(seconds) == text


def test_doctor_prints_the_extra_that_is_missing(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["pytest>=1", 'no-such-runtime>=3; extra == "phone"']
    monkeypatch.setattr(doctor, "installed_requirements", lambda: rows)
    code, out, _ = command("doctor")
    assert code == 0 and "pip install 'pocketclip[phone]'" in out
    monkeypatch.setattr(doctor, "installed_requirements", lambda: ["pytest<1"])
    code, _, err = command("doctor")
    assert code == 2 and "outside the supported versions: pytest" in err


@pytest.mark.parametrize("vnni", [True, False])
def test_doctor_says_what_to_expect_of_int8(
    command: Command, vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"avx2", "avx512_vnni"} if vnni else {"avx2"}
    monkeypatch.setattr("export._saturation.machine_flags", lambda: flags)
    monkeypatch.setattr(doctor, "installed_requirements", lambda: [])
    code, out, _ = command("doctor")
    assert code == 0 and ("no VNNI" in out) == (not vnni)


def test_doctor_tells_missing_from_outside_from_good() -> None:
    rows = doctor.check(
        [
            "pytest>=1",
            "pytest<1",
            'no-such-runtime>=3; extra == "phone"',
            'pytest>=1; extra == "dev"',
            "no-such-package; sys_platform == 'beos'",
        ]
    )
    assert [(row.package, row.extra) for row in rows] == [
        ("pytest", ""),
        ("pytest", ""),
        ("no-such-runtime", "phone"),
    ]
    assert rows[0].verdict == "ok" and rows[0].installed == pytest.__version__
    assert rows[1].verdict == "pip install 'pytest<1'"
    assert rows[2].installed is None
    assert rows[2].verdict == "pip install 'pocketclip[phone]'"


def test_verify_prints_what_each_bundle_met(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from export import _verify

    monkeypatch.setattr(_verify, "verify", lambda folder: {"image": 0.99991, "text": 1.0})
    code, out, _ = command("verify", tmp_path / "a", tmp_path / "b")
    assert code == 0 and out.count("goldens met at cosine image 0.99991, text 1.00000") == 2


def test_verify_of_a_folder_without_bundle_is_bad_input(command: Command, tmp_path: Path) -> None:
    code, _, err = command("verify", tmp_path)
    assert code == 2 and "a bundle folder holds bundle.json" in err


def test_serving_a_folder_without_a_page_is_a_mistake(command: Command, tmp_path: Path) -> None:
    code, _, err = command("serve", tmp_path)
    assert code == 2 and "no page there" in err
