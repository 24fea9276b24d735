"""Small random models in formats whose own libraries are not needed here, for `models.py`.

M-CLIP's and sentence-transformers' folders around an encoder of transformers, and TinyCLIP's
checkpoints, each with what it computes by its authors' definition.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from compress.model import ClipModel, initialise_
from compress.sources import _plain
from compress.structure import ClipConfig, TextConfig, VisionConfig

EMBED, WIDTH = 16, 32
HEAD_WIDTH = 64
"""TinyCLIP's."""
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "vocab_size": 200,
}
DISTIL: dict[str, Any] = {
    "dim": WIDTH,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": 200,
}
CORPUS = ["a photo of a cat", "word " * 100, "crème brûlée", "一只猫坐在垫子上", "👩‍🚀 🚀"]


@dataclass(frozen=True)
class Texts:
    """A multilingual text tower as both libraries define it."""

    encoder: Any
    linear: nn.Linear

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Mean over the tokens that aren't padding, then the layer. [B, L] -> [B, E]."""
        mask = (tokens != 1).long()
        states = self.encoder(input_ids=tokens.long(), attention_mask=mask)[0]
        mean = (states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        embedded: Tensor = self.linear(mean)
        return embedded


def m_clip(folder: Path, embed_dim: int = EMBED) -> Texts:
    """M-CLIP's own layout, as its class saves it."""
    import transformers

    folder.mkdir(parents=True)
    encoder = _random(transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**SHAPE)))
    linear = _random(nn.Linear(WIDTH, embed_dim))
    state = {f"transformer.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"LinearTransformation.{name}": t for name, t in linear.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    config = {"model_type": "M-CLIP", "modelBase": "xlm-roberta-large", "numDims": embed_dim}
    shape = {**SHAPE, "layer_norm_eps": encoder.config.layer_norm_eps}
    (folder / "config.json").write_text(json.dumps({**config, **shape}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    sentence_pieces(folder)
    return Texts(encoder, linear)


def sentence_transformer(folder: Path, embed_dim: int = EMBED) -> Texts:
    """A folder of sentence-transformers: DistilBERT, a mean, a dense layer without a bias."""
    import transformers

    config = transformers.DistilBertConfig(**DISTIL, pad_token_id=1)
    encoder = _random(transformers.DistilBertModel(config))
    linear = _random(nn.Linear(WIDTH, embed_dim, bias=False))
    encoder.save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": n, "name": str(n), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for n, (place, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    dense = {"in_features": WIDTH, "activation_function": "torch.nn.modules.linear.Identity"}
    for place, content in (("1_Pooling", {"pooling_mode_mean_tokens": True}), ("2_Dense", dense)):
        (folder / place).mkdir()
        (folder / place / "config.json").write_text(json.dumps(content))
    save_file({"linear.weight": linear.weight.data}, folder / "2_Dense/model.safetensors")
    sentence_pieces(folder)
    return Texts(encoder, linear)


def sentence_pieces(folder: Path) -> None:
    """A tokenizer with XLM-R's marks; <pad> is 1."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    file = tokenizers.Tokenizer(models.Unigram())
    file.normalizer = normalizers.NFKC()
    file.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=190, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    file.train_from_iterator(CORPUS, trainer)
    file.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    file.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def irregular() -> ClipConfig:
    """Heads and MLP differ by layer, as TinyCLIP's automatic inheritance leaves them."""
    shared: dict[str, Any] = {"head_width": HEAD_WIDTH, "activation": "gelu"}
    return ClipConfig(
        embed_dim=24,
        vision=VisionConfig(
            image_size=32, patch_size=8, width=40, heads=(2, 1), mlp_width=(64, 30), **shared
        ),
        text=TextConfig(
            vocab_size=49408,
            context_length=77,
            width=36,
            heads=(1, 2),
            mlp_width=(20, 64),
            **shared,
        ),
    )


def tinyclip(path: Path) -> dict[str, Tensor]:
    """A checkpoint of TinyCLIP with irregular layers -> its state dict under open_clip's names."""
    model = ClipModel(irregular())
    initialise_(model)
    state = _plain.their_names(_random(model).state_dict())
    torch.save({"state_dict": {f"module.{k}": v for k, v in wrapped(state).items()}}, path)
    return state


def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names as TinyCLIP's trainer saves them, with its masks' parameters."""
    theirs = {"_image_encoder.l0_module.heads_loga": torch.zeros(2, 2)}
    for name, tensor in state.items():
        if name == "logit_scale":
            theirs["_logit_scale.logit_scale"] = tensor
        else:
            tower = "_image_encoder" if name.startswith("visual.") else "_text_encoder"
            theirs[f"{tower}.module.{name}"] = tensor
    return theirs


def image_written_out(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The image tower of a TinyCLIP, head by head. [B, 3, H, W] -> [B, E]."""
    own = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    x = F.conv2d(pixels, own["conv1.weight"], stride=own["conv1.weight"].shape[-1])
    x = x.flatten(2).transpose(1, 2)  # [B, N, D]
    x = torch.cat([own["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = _norm(x + own["positional_embedding"], own, "ln_pre")
    x = _blocks(x, own, causal=False)
    return _norm(x[:, 0], own, "ln_post") @ own["proj"]


def text_written_out(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The text tower of a TinyCLIP, head by head. [B, L] -> [B, E]."""
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = _norm(_blocks(x, state, causal=True), state, "ln_final")
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ state["text_projection"]


def _blocks(x: Tensor, state: dict[str, Tensor], causal: bool) -> Tensor:
    """x [B, N, D] through all blocks of a tower."""
    layer = 0
    while f"transformer.resblocks.{layer}.ln_1.weight" in state:
        place = f"transformer.resblocks.{layer}."
        own = {k.removeprefix(place): v for k, v in state.items() if k.startswith(place)}
        x = x + _attention(_norm(x, own, "ln_1"), own, causal)
        hidden = F.gelu(_linear(_norm(x, own, "ln_2"), own, "mlp.c_fc"))
        x = x + _linear(hidden, own, "mlp.c_proj")
        layer += 1
    return x


def _attention(x: Tensor, own: dict[str, Tensor], causal: bool) -> Tensor:
    parts = F.linear(x, own["attn.in_proj_weight"], own["attn.in_proj_bias"]).chunk(3, dim=-1)
    heads = []
    for start in range(0, parts[0].shape[-1], HEAD_WIDTH):
        query, key, value = (part[..., start : start + HEAD_WIDTH] for part in parts)
        heads.append(F.scaled_dot_product_attention(query, key, value, is_causal=causal))
    return _linear(torch.cat(heads, dim=-1), own, "attn.out_proj")


def _linear(x: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])


def _norm(x: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])


def _random(model: nn.Module) -> Any:
    """The module in evaluation mode; norms and biases are random too."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=0.3)
    return model.eval()
