"""Fake quantization against integer arithmetic written out, and its gradients."""

import pytest
import torch
from torch import Tensor

from compress.nn import power, quant
from compress.nn.fake import ActRounding, RoundedEmbedding, WeightCodes
from compress.nn.rounding import gptq, ridge

CPU = torch.device("cpu")


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_fake_quantization_equals_a_slow_loop(bits: int, symmetric: bool) -> None:
    x = randoms(40) * 3
    scale, zero = quant.scale_and_zero(x.min() / 2, x.max() / 2, bits, symmetric)
    low, high = quant.code_limits(bits, symmetric)
    found = quant.fake_quantize(x, scale, zero, (low, high))
    for value, rounded in zip(x.tolist(), found.tolist()):
        code = min(max(round(value / float(scale)) + int(zero), low), high)
        assert rounded == pytest.approx((code - int(zero)) * float(scale), abs=1e-6)
    assert quant.fake_quantize(torch.zeros(()), scale, zero, (low, high)) == 0


def test_scale_has_lsq_gradient() -> None:
    """Inside: round(v) - v; outside: the last code (LSQ, eq. 3). x passes inside only."""
    scale = torch.tensor(0.5, requires_grad=True)
    for value, wanted, passes in ((0.6, 1 - 1.2, 1.0), (9.0, 7.0, 0.0), (-9.0, -7.0, 0.0)):
        x = torch.tensor(value, requires_grad=True)
        out = quant.fake_quantize(x, scale, torch.tensor(0.0), (-7, 7))
        slope, through = torch.autograd.grad(out, (scale, x))
        assert float(slope) == pytest.approx(wanted, abs=1e-6)
        assert float(through) == passes


def test_the_fast_path_of_static_ranges_is_the_plain_one() -> None:
    act = ActRounding(8, "static", False, 4, CPU)
    x = randoms(64, 4)
    act.calibrate_(x, x.min(), x.max())
    with torch.no_grad():
        fast = act(x)
    torch.testing.assert_close(fast, act(x).detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_searched_ranges_lose_less_than_extremes_with_an_outlier(method: str) -> None:
    x = torch.cat([randoms(20_000), torch.tensor([60.0])])

    def error(method: str) -> float:
        scale, zero = quant.scale_and_zero(*quant.search_range(x, 4, False, method), 4, False)
        return float((quant.fake_quantize(x, scale, zero, (0, 15)) - x).square().mean())

    assert error(method) < error("minmax") / 2


def test_weight_scales_are_per_channel_and_group() -> None:
    weight = randoms(3, 8)
    scale, zero = quant.weight_scales(weight, 4, True, 4, search=False)
    assert scale.shape == (3, 2) and not zero.any()
    assert float(scale[1, 1]) == pytest.approx(float(weight[1, 4:].abs().max()) / 7)


def test_search_by_gram_lowers_the_output_error() -> None:
    weight, x = randoms(6, 16), randoms(200, 16, seed=1) * torch.linspace(0.05, 4, 16)

    def error(gram: Tensor | None) -> float:
        scale, zero = quant.weight_scales(weight, 3, True, 0, True, gram)
        rounded = quant.fake_quantize(weight, scale, zero, quant.code_limits(3, True))
        return float(((rounded - weight) @ x.T).square().mean())

    assert error(x.T @ x) < error(None)


def test_gptq_beats_the_nearest_codes_and_stays_on_the_grid() -> None:
    weight = randoms(8, 24)
    x = randoms(300, 6, seed=1) @ randoms(6, 24, seed=2) + 0.1 * randoms(300, 24, seed=3)
    scale, zero = quant.weight_scales(weight, 3, False, 0, search=False)
    scale, zero = quant.expand(scale, 24), quant.expand(zero, 24)
    limits = quant.code_limits(3, False)
    nearest = quant.fake_quantize(weight, scale, zero, limits)
    chosen = gptq(weight, scale, zero, limits, x.T @ x)
    torch.testing.assert_close(quant.fake_quantize(chosen, scale, zero, limits), chosen)
    error = [float(((w - weight) @ x.T).square().mean()) for w in (nearest, chosen)]
    assert error[1] < error[0] / 2


def test_ridge_takes_back_what_rounded_inputs_cost() -> None:
    weight = randoms(5, 12)
    x = randoms(400, 3, seed=1) @ randoms(3, 12, seed=2) + 0.3 * randoms(400, 12, seed=3)
    scale, zero = quant.scale_and_zero(x.min(), x.max(), 3, False)
    rounded = quant.fake_quantize(x, scale, zero, (0, 7))
    change, offset = ridge(weight, x, rounded)
    before = (rounded @ weight.T - x @ weight.T).square().mean()
    after = (rounded @ (weight + change).T + offset - x @ weight.T).square().mean()
    assert after < 0.8 * before


def test_log_quantizers_give_powers_of_their_base() -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(0))
    for rate in (1.0, 0.5, 5 / 37):
        found = power.log_quantize(x, torch.tensor(1.0), rate, 4)
        for value, rounded in zip(x.tolist(), found.tolist()):
            code = round(-float(torch.tensor(value).log2()) / rate)
            assert rounded == pytest.approx(2 ** (-rate * code) if code < 16 else 0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["twin", "adalog"])
def test_research_quantizers_beat_equal_steps_where_they_are_meant_to(kind: str) -> None:
    peaked = (2 * randoms(200, 200)).softmax(-1)
    bent = torch.nn.functional.gelu(2 * randoms(200, 50))
    for x in (peaked, bent) if kind == "adalog" else (peaked,):
        errors = []
        for name in ("static", kind):
            act = ActRounding(4, name, False, 50, CPU)
            act.calibrate_(x, x.min(), x.max())
            with torch.no_grad():
                errors.append(float((act(x) - x).square().mean()))
        assert errors[1] < errors[0]


def test_power_of_two_factors_serve_channels_of_unequal_reach() -> None:
    x = randoms(500, 8) * torch.tensor([8.0, 1, 1, 1, 1, 1, 1, 1])
    errors = []
    for kind in ("static", "ptf"):
        act = ActRounding(6, kind, False, 8, CPU)
        act.calibrate_(x, x.min(), x.max())
        with torch.no_grad():
            errors.append((act(x) - x).square().mean(0)[1:].mean())
    assert errors[1] < errors[0] / 4


def test_dynamic_ranges_do_not_depend_on_neighbours() -> None:
    act = ActRounding(8, "dynamic", False, 4, CPU)
    x = randoms(3, 5, 4) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    with torch.no_grad():
        alone = torch.cat([act(row[None]) for row in x])
    torch.testing.assert_close(act(x), alone, rtol=0, atol=1e-6)


def test_a_table_rounds_each_row_by_its_own_scale() -> None:
    table = torch.nn.Embedding(6, 4)
    codes = WeightCodes(8, True, 6, 1, CPU)
    codes.set_(*quant.weight_scales(table.weight.detach(), 8, True, 0, search=False))
    rounded = RoundedEmbedding.around(table, codes)
    ids = torch.tensor([[1, 5], [0, 1]])
    torch.testing.assert_close(rounded(ids), rounded.rounded_weight()[ids])
    bound = table.weight.detach().abs().amax(1)[ids] / 254 * 1.001
    assert ((rounded(ids) - table(ids)).detach().abs().amax(-1) <= bound).all()
