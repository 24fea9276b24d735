"""Optimum's OpenVINO quantizer on the Hugging Face folder, weights and activations in int8."""

import json
import shutil
from pathlib import Path
from typing import Any

REQUIRES = ("optimum-intel[openvino]==2.2.0",)
FORMAT, PRECISION = "openvino", "int8-optimum"
OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}
INPUTS = {"image": "pixel_values", "text": "input_ids"}


def compress(task: Path, out: Path) -> None:
    """task/huggingface and task/calibration -> out/model; below is all that a user writes."""
    import nncf
    import numpy as np
    from optimum.intel import OVConfig, OVModelForZeroShotImageClassification, OVQuantizer
    from optimum.intel import OVQuantizationConfig as Quantization

    model = OVModelForZeroShotImageClassification.from_pretrained(
        task / "huggingface", export=True, compile=False
    )
    images, texts = (np.load(task / "calibration" / f"{tower}.npy") for tower in INPUTS)
    rows = [
        {
            "pixel_values": image[None],
            "input_ids": text[None].astype(np.int64),
            "attention_mask": np.ones((1, len(text)), np.int64),
        }
        for image, text in zip(images, texts)
    ]
    OVQuantizer.from_pretrained(model).quantize(
        calibration_dataset=nncf.Dataset(rows),
        ov_config=OVConfig(quantization_config=Quantization()),
        save_directory=out / "model",
    )


def towers(task: Path, out: Path) -> None:
    """Split Optimum's one graph for both towers into image.xml and text.xml, batch 1."""
    import openvino

    for tower, name in OUTPUTS.items():
        whole = openvino.Core().read_model(out / "model" / "openvino_model.xml")
        inputs = {port.any_name: port.get_node() for port in whole.inputs}
        result = next(port.get_node() for port in whole.outputs if name in port.names)
        if tower == "text":
            _without_mask(inputs)
        model = openvino.Model([result], [inputs[INPUTS[tower]]], tower)
        model.reshape(_shape(task, tower))
        openvino.save_model(model, out / f"{tower}.xml", compress_to_fp16=False)
    shutil.rmtree(out / "model")


def _without_mask(inputs: dict[str, Any]) -> None:
    """A constant in place of the mask: a causal tower ends where its end mark is."""
    import numpy as np
    from openvino import opset13

    mask = inputs.get("attention_mask")
    if mask is not None:
        ids = opset13.shape_of(inputs["input_ids"])
        ones = opset13.broadcast(opset13.constant(np.int64(1)), ids)
        mask.output(0).replace(ones.output(0))


def _shape(task: Path, tower: str) -> list[int]:
    about = json.loads((task / "onnx" / "bundle.json").read_text(encoding="utf-8"))
    return list(about[tower]["input"]["shape"])
