"""What a runtime computes instead of a scheme's entry that it has no kernel for."""

from typing import Literal

from compress.scheme import SITES, LayerScheme

Runtime = Literal["onnxruntime", "qdq"]


def nearest(asked: LayerScheme, name: str, runtime: Runtime) -> LayerScheme:
    """The entry that the runtime computes instead; weights keep their values.

    Codes of 2, 3 bits stand in 4, of 5 to 7 in 8. Inputs run in 8 bits with equal steps or in
    float.
    """
    if name.rsplit(".", 1)[-1] in SITES:
        return LayerScheme()
    if asked.act_bits is None or asked.weight_bits is None or name == "text.token":
        return replace_bits(asked, asked.weight_bits, None)
    static = asked.act == "static"
    if asked.weight_bits == 4 and asked.act == "dynamic" and runtime == "onnxruntime":
        return asked
    if asked.group or not (static or asked.act == "dynamic"):
        return replace_bits(asked, asked.weight_bits, None)
    if not static and runtime == "qdq":
        return replace_bits(asked, asked.weight_bits, None)
    return replace_bits(asked, max(asked.weight_bits, 7), 8)


def replace_bits(asked: LayerScheme, weight: int | None, act: int | None) -> LayerScheme:
    """The entry with runnable weight bits (4, 7 or 8) and these input bits."""
    if weight is not None:
        weight = 4 if weight <= 4 else max(weight, 7)
    kind = asked.act if act is not None else "static"
    symmetric = asked.act_symmetric and act is not None
    return asked.model_copy(
        update={"weight_bits": weight, "act_bits": act, "act": kind, "act_symmetric": symmetric}
    )
