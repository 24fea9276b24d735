"""torchao on the Hugging Face model: weights in int8, computed in float, compiled by Inductor."""

from pathlib import Path

from benchmarks.peers import _torchao

REQUIRES = ()
FORMAT, PRECISION = "torchao_weights", "int8-weights"
load = _torchao.load


def compress(task: Path, out: Path) -> None:
    """task/huggingface -> out/{image,text}.pt; below is all that a user writes."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(task / "huggingface").eval()
    quantize_(model, Int8WeightOnlyConfig())
    _torchao.save(model, out)
