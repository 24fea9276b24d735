"""Which arithmetic training takes where the recipe leaves it open."""

import pytest
import torch

from compress.precision import autocast, fastest

AMD = {"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC"}
INTEL = {"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (AMD, "bf16"),
        (INTEL, "fp32"),
        (INTEL | {"amx_bf16": True}, "bf16"),
        (AMD | {"avx512_bf16": False}, "fp32"),
        ({"bf16": True, "architecture": "aarch64"}, "fp32"),
    ],
)
def test_cpus_that_multiply_bfloat16_faster_get_it(monkeypatch, cpu, expected) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert fastest("cpu") == expected
    weight = torch.ones(2, 2)
    with autocast("auto", "cpu"):
        found = torch.nn.functional.linear(weight, weight).dtype
    assert found == (torch.bfloat16 if expected == "bf16" else torch.float32)


def test_a_named_precision_stands_on_any_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: INTEL)
    weight = torch.ones(2, 2)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        with autocast(name, "cpu"):
            assert torch.nn.functional.linear(weight, weight).dtype == dtype
