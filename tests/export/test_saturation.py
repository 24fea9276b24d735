"""Who is warned of sums that overflow: whoever multiplies 8-bit codes on x86 without VNNI."""

import warnings
from pathlib import Path

import pytest

from compress.scheme import LayerScheme, Scheme
from export import _saturation


@pytest.mark.parametrize(
    ("flags", "overflow"),
    [({"avx2"}, True), ({"avx2", "avx_vnni"}, False), ({"avx512_vnni"}, False), (None, False)],
)
def test_only_x86_without_vnni_overflows(flags: set[str] | None, overflow: bool) -> None:
    assert _saturation.saturates(flags) == overflow


@pytest.mark.parametrize(("bits", "num_warnings"), [(8, 1), (7, 0), (0, 0), (None, 0)])
def test_only_whole_bytes_are_warned_of(
    bits: int | None, num_warnings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_saturation, "machine_flags", lambda: {"avx2"})
    runtime = {} if bits is None else {"weight_bits": bits}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _saturation.warn(Path("somewhere"), runtime, "take 7 bits")
    assert len(seen) == num_warnings
    assert all("somewhere: this CPU has no VNNI" in str(w.message) for w in seen)
    assert all(str(w.message).endswith("or take 7 bits") for w in seen)


def test_weights_beside_float_inputs_do_not_count() -> None:
    alone, pair = LayerScheme(weight_bits=8), LayerScheme(weight_bits=7, act_bits=8)
    assert _saturation.weight_bits(Scheme(layers={"a": alone})) == 0
    assert _saturation.weight_bits(Scheme(layers={"a": alone, "b": pair})) == 7
