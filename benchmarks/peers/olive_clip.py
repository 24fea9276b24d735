"""Olive's passes for CLIP, as its example examples/clip/qdq chains them for each tower.

Conversion, graph surgery, fused layer normalisation, static quantization with uint16 activations
and uint8 weights. The calibration data is that of all peers; shapes are fixed at once, where the
example fixes them by a pass of its own.
"""

import shutil
from pathlib import Path
from typing import Any

REQUIRES = ("olive-ai==0.13.0",)
FORMAT, PRECISION = "onnx", "int8-olive-clip"
INPUTS = {"image": "pixel_values", "text": "input_ids"}


def compress(task: Path, out: Path) -> None:
    """task/huggingface and task/calibration -> out/image, out/text; a user writes all below."""
    import numpy as np
    import olive
    import torch
    from olive.data.registry import Registry
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    rows = {
        tower: torch.from_numpy(np.load(task / "calibration" / f"{tower}.npy"))
        for tower in ("image", "text")
    }

    @Registry.register_dataset()
    def calibration(tower: str) -> list[Any]:
        if tower == "image":
            return [({"pixel_values": row}, 0) for row in rows["image"]]
        return [
            ({"input_ids": row, "attention_mask": torch.ones_like(row)}, 0) for row in rows["text"]
        ]

    gemm = {"surgeon": "MatMulAddToGemm"}
    mask = {"surgeon": "ReplaceAttentionMaskValue", "replacement": -100.0}
    for tower, loader, inputs, model_type, surgeries in (
        ("image", CLIPVisionModelWithProjection, ["pixel_values"], "vit", [gemm]),
        (
            "text",
            CLIPTextModelWithProjection,
            ["input_ids", "attention_mask"],
            "bert",
            [mask, gemm],
        ),
    ):
        io_config = {
            "input_names": inputs,
            "input_shapes": [[1, *rows[tower].shape[1:]]] * len(inputs),
            "input_types": [str(rows[tower].dtype).removeprefix("torch.")] * len(inputs),
            "output_names": ["embeds"],
        }
        config = {
            "input_model": {
                "type": "PyTorchModel",
                "model_path": str(task / "huggingface"),
                "model_loader": loader.from_pretrained,
                "io_config": io_config,
            },
            "data_configs": [
                {
                    "name": "calibration",
                    "load_dataset_config": {"type": "calibration", "params": {"tower": tower}},
                    "dataloader_config": {"batch_size": 1},
                }
            ],
            "passes": {
                "conversion": {"type": "OnnxConversion", "target_opset": 20},
                "surgery": {"type": "GraphSurgeries", "surgeries": surgeries},
                "fusion": {
                    "type": "OrtTransformersOptimization",
                    "model_type": model_type,
                    "opt_level": 1,
                    "optimization_options": {
                        "enable_gelu": False,
                        "enable_bias_gelu": False,
                        "enable_layer_norm": True,
                        "enable_skip_layer_norm": False,
                        "enable_bias_skip_layer_norm": False,
                        "enable_attention": False,
                    },
                },
                "quantization": {
                    "type": "OnnxStaticQuantization",
                    "data_config": "calibration",
                    "quant_preprocess": True,
                    "activation_type": "uint16",
                    "precision": "uint8",
                },
            },
            "cache_dir": str(out / "cache" / tower),
            "output_dir": str(out / tower),
        }
        olive.run(config)


def towers(task: Path, out: Path) -> None:
    """Give Olive's graphs the inputs of the other peers' and unit length: {image,text}.onnx."""
    import onnx
    from onnx import helper, numpy_helper

    for tower, name in INPUTS.items():
        model = onnx.load(out / tower / "model.onnx")
        graph, embeds = model.graph, model.graph.output[0]
        for given in list(graph.input):
            if given.name != name:  # a causal tower ends where its end mark is: no mask is needed
                shape = [dim.dim_value for dim in given.type.tensor_type.shape.dim]
                ones = numpy_helper.from_array(_ones(shape), given.name)
                graph.initializer.append(ones)
                graph.input.remove(given)
        norm = helper.make_node("LpNormalization", [embeds.name], ["embedding"], axis=-1, p=2)
        graph.node.append(norm)
        embeds.name = "embedding"
        onnx.save(model, out / f"{tower}.onnx")
        shutil.rmtree(out / tower)
    shutil.rmtree(out / "cache")


def _ones(shape: list[int]) -> Any:
    import numpy as np

    return np.ones(shape, np.int32)
