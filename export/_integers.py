"""Integers in OpenVINO models that no scheme decides: NNCF's, with what has to stay float."""

import logging
from typing import Any

import numpy as np

from export import Unavailable, _calibration, _saturation


def compress(model: Any, tower: str, cfg: Any, samples: _calibration.Calibration | None) -> Any:
    """A float OpenVINO model -> the same with the integers that `cfg.precision` asks for.

    cfg: the exporter's settings.
    """
    if cfg.precision in ("fp32", "fp16"):
        return model
    nncf = load()
    if cfg.precision == "int8-weights":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    if cfg.precision == "int4":
        mode = nncf.CompressWeightsMode.INT4_SYM
        return nncf.compress_weights(
            model, mode=mode, group_size=cfg.group_size, ratio=1.0, all_layers=True
        )
    assert samples is not None
    alpha = -1.0 if cfg.smooth_quant is None else cfg.smooth_quant
    rows = [np.repeat(row, cfg.batch, axis=0) for row in samples.rows(tower)]
    return nncf.quantize(
        model,
        nncf.Dataset(rows),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
        fast_bias_correction=True,
        ignored_scope=nncf.IgnoredScope(names=floating(model)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=_overflow_fix(),
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha),
        ),
    )


def _overflow_fix() -> Any:
    """Weights of half the range in every layer where this CPU's sums overflow otherwise; elsewhere
    NNCF's default."""
    from nncf.quantization.advanced_parameters import OverflowFix

    return OverflowFix.ENABLE if _saturation.here() else None


def floating(model: Any) -> list[str]:
    """What stays float: products of two computed tensors outside fused attention (scores that
    choose tokens, and mixtures of tokens: small, and rounded scores choose other tokens), and
    attention with a computed mask, which the CPU plugin gets wrong behind rounded inputs (seen in
    2026.4)."""
    computed: set[str] = set()
    found = []
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        sources = [value.get_source_output().get_node() for value in node.inputs()]
        inside = [source.get_friendly_name() in computed for source in sources]
        if any(inside) or kind == "Parameter":
            computed.add(name)
        masked = kind == "ScaledDotProductAttention" and any(inside[3:4])
        if masked or (kind == "MatMul" and all(inside)):
            found.append(name)
    return found


def load() -> Any:
    """The package, or Unavailable."""
    try:
        import nncf
    except ImportError:
        raise Unavailable("nncf is not installed: pip install 'pocketclip[openvino]'") from None
    logging.getLogger("nncf").setLevel(logging.WARNING)
    return nncf
