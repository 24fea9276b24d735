"""torchao on the Hugging Face model: int8, activations as they come, compiled by Inductor."""

from pathlib import Path

from benchmarks.peers import _torchao

REQUIRES = ()
FORMAT, PRECISION = "torchao_dynamic", "int8-dynamic"
load = _torchao.load


def compress(task: Path, out: Path) -> None:
    """task/huggingface -> out/{image,text}.pt; below is all that a user writes."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(task / "huggingface").eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    _torchao.save(model, out)
