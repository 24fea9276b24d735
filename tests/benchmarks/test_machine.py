"""The machine's description against what the system says by other means."""

import json
import os
import time

import pytest
import torch

from benchmarks import machine


def test_description_is_json_and_names_this_machine():
    about = json.loads(json.dumps(machine.describe()))
    assert about["cores"] == os.cpu_count()
    assert about["cpu"] and about["python"].count(".") == 2
    assert about["memory_bytes"] > 2**28


def test_versions_are_those_that_are_imported():
    assert machine.versions()["torch"] == torch.__version__.split("+")[0]


def test_only_telling_instructions_are_listed(monkeypatch):
    monkeypatch.setattr(machine, "_cpu_info", lambda: {"flags": "fpu avx2 sse avx512_vnni"})
    assert machine.describe()["flags"] == ["avx2", "avx512_vnni"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("avx2 avx_vnni avx512_vnni amx_int8", "amx_int8"),
        ("fpu avx2", "avx2"),
        ("fpu", "no integer products"),
    ],
)
def test_a_row_names_what_multiplies_integers(monkeypatch, flags, said):
    monkeypatch.setattr(machine, "_cpu_info", lambda: {"model name": "X 1", "flags": flags})
    assert machine.short() == f"X 1, {said}"


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="no /proc/stat on this system")
def test_work_shows_in_the_processor_seconds():
    before, own = machine.cpu_seconds(), time.process_time()
    while time.process_time() - own < 0.3:
        pass
    after = machine.cpu_seconds()
    assert after["busy"] - before["busy"] > 0.25
    assert after["idle"] >= before["idle"]
