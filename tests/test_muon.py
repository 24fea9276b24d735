"""Muon against torch's own, and in the number format of the processor."""

import pytest
import torch

from compress import muon

SHAPES = [(24, 96), (96, 24), (32, 32)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def trained(kind: type, **settings: float | str) -> list[torch.Tensor]:
    """Matrices after five steps towards targets."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(*shape)) for shape in SHAPES]
    targets = [torch.randn(*shape) for shape in SHAPES]
    optimizer = kind(matrices, lr=0.02, weight_decay=0.1, **settings)
    for _ in range(5):
        optimizer.zero_grad()
        sum(((m - t) ** 2).sum() for m, t in zip(matrices, targets)).backward()
        optimizer.step()
    return [m.detach() for m in matrices]


def test_in_bfloat16_it_is_torchs_own_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "fastest", lambda kind: "bf16")
    theirs = trained(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    for mine, wanted in zip(trained(muon.Muon), theirs, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_it_is_the_same_update_but_for_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(*shape)
    exact = muon.orthogonal(matrix, COEFFICIENTS, 5, torch.float64)
    errors = [
        (muon.orthogonal(matrix, COEFFICIENTS, 5, dtype).double() - exact).norm() / exact.norm()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert errors[0] < 1e-5 < errors[1] < 5e-2
    assert (torch.linalg.svdvals(exact) - 1).abs().max() < 0.5


def test_a_cpu_that_is_slow_at_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for found, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setattr(muon, "fastest", lambda kind, found=found: found)
        assert muon.orthogonal(torch.eye(8), COEFFICIENTS, 5).dtype == dtype


def test_a_matrix_without_gradient_stays_and_the_closure_is_asked() -> None:
    still, moved = (torch.nn.Parameter(torch.eye(8)) for _ in range(2))
    optimizer = muon.Muon([still, moved], lr=0.1, weight_decay=0.1)

    def closure() -> torch.Tensor:
        loss = (moved**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8
    assert torch.equal(still, torch.eye(8)) and not torch.equal(moved, torch.eye(8))
