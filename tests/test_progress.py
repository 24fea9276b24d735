"""Bars of long work: every step is gone through, and only a terminal is drawn on."""

import io

import pytest
from rich.console import Console

from compress import progress
from compress.progress import tracked


def drawn(monkeypatch: pytest.MonkeyPatch, terminal: bool, steps: list[int], **more: int) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    assert list(tracked(steps, "rounding layers", **more)) == steps
    return out.getvalue()


def test_a_terminal_shows_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rounding layers" in drawn(monkeypatch, True, [1, 2, 3])


def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, False, [1, 2, 3]) == ""


def test_few_steps_need_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, True, [1]) == ""
    assert drawn(monkeypatch, True, [1, 2, 3], least=4) == ""


def test_steps_that_come_one_by_one_are_not_asked_for_beforehand() -> None:
    asked = []
    steps = (asked.append(n) or n for n in range(3))
    bar = iter(tracked(steps, "reading", total=3))
    assert next(bar) == 0 and len(asked) < 3
