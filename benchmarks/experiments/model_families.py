"""Small random models of every family, as their own library writes them, for `models.py`.

Each is written into a folder in the library's format and opened through the same door as anybody's
checkpoint; the library's own module stays beside it to compare with.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from compress import plugin
from compress.clip import Clip

Encode = Callable[[Tensor], Tensor]

EMBED, SIDE, TOKENS = 32, 64, 16
VIT = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": TOKENS, "width": 64, "heads": 4, "layers": 2}
BIDIRECTIONAL = {
    **TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
SIGLIP = {"timm_model_name": "vit_pocket_siglip", "timm_pool": "map", "timm_proj": "none"}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "OpenAI, LAION, DataComp, DFN, MetaCLIP": {"vision_cfg": VIT, "text_cfg": TEXT},
    "OpenAI with QuickGELU": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "MetaCLIP 2": {"vision_cfg": VIT, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 1}},
    "CLIPA": {
        "vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
    },
    "SigLIP, SigLIP2": {"vision_cfg": SIGLIP, "text_cfg": BIDIRECTIONAL, "init_logit_bias": -10},
    "CoCa": {
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_queries": 5},
        "text_cfg": {**TEXT, "embed_cls": True},
    },
    "MobileCLIP, MobileCLIP2 (fastvit)": {
        "vision_cfg": {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None},
        "text_cfg": {**TEXT, "no_causal_mask": True},
    },
    "MobileCLIP-B (ViT with a convolutional stem)": {
        "vision_cfg": {
            "timm_model_name": "vit_pocket_stem",
            "timm_pool": "token",
            "timm_proj": None,
        },
        "text_cfg": TEXT,
    },
    "ViTamin": {
        "vision_cfg": {
            "timm_model_name": "vitamin_small_224",
            "image_size": 224,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
    "ConvNeXt": {
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "EVA02 (rotary positions)": {
        "vision_cfg": {"timm_model_name": "eva_pocket", "timm_pool": "token", "timm_proj": None},
        "text_cfg": TEXT,
    },
    "ResNet": {
        "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
        "text_cfg": TEXT,
    },
}
HF_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HF_VISION = {**HF_TOWER, "image_size": SIDE, "patch_size": 16}
HF_TEXT = {**HF_TOWER, "max_position_embeddings": TOKENS, "eos_token_id": 1}
BERT = {**HF_TOWER, "max_position_embeddings": TOKENS, "type_vocab_size": 1, "pad_token_id": 0}
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers CLIPModel, TinyCLIP": (
        "CLIPModel",
        {"text_config": HF_TEXT, "vision_config": HF_VISION, "projection_dim": EMBED},
    ),
    "transformers SiglipModel": (
        "SiglipModel",
        {"text_config": HF_TEXT, "vision_config": HF_VISION},
    ),
    "transformers ChineseCLIPModel (BERT text)": (
        "ChineseCLIPModel",
        {"text_config": BERT, "vision_config": HF_VISION, "projection_dim": EMBED},
    ),
    "transformers AltCLIPModel (XLM-R text)": (
        "AltCLIPModel",
        {
            "text_config": {**BERT, "max_position_embeddings": TOKENS + 1, "project_dim": 48},
            "vision_config": HF_VISION,
            "projection_dim": EMBED,
        },
    ),
}
FAMILIES = (*OPEN_CLIP, *HUGGING_FACE)


@dataclass(frozen=True)
class Pair:
    """A model as its library holds it, and as we do."""

    clip: Clip
    image: Encode
    text: Encode
    preprocess: Callable[[Any], Tensor] | None = None
    tokenize: Callable[[list[str]], Tensor] | None = None


def open_pair(family: str, folder: Path) -> Pair:
    """Write the family's small model into a folder of its library and open it in both."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return _open_clip(family, folder) if family in OPEN_CLIP else _transformers(family, folder)


def _open_clip(family: str, folder: Path) -> Pair:
    import open_clip

    _register_small_networks()
    vocabulary = _tokenizer(folder, canonical="SigLIP" in family)
    model_cfg = {"embed_dim": 64 if "SigLIP" in family else EMBED, **OPEN_CLIP[family]}
    vision = {"image_size": SIDE, **model_cfg["vision_cfg"]}
    text = {**model_cfg["text_cfg"], "vocab_size": vocabulary, "hf_tokenizer_name": "tokenizer"}
    model_cfg = {**model_cfg, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    theirs = _random(open_clip.CustomTextCLIP(**_built(model_cfg)))
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": {}, "license": "none: random weights"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    name = f"local-dir:{folder}"
    clip = plugin.source(f"open_clip:{name}", Path.cwd())
    transform = open_clip.image_transform(vision["image_size"], is_train=False)
    tokenize = open_clip.get_tokenizer(name)
    return Pair(clip, theirs.encode_image, theirs.encode_text, transform, tokenize)


def _built(model_cfg: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model_cfg.items() if key != "custom_text"}


def _transformers(family: str, folder: Path) -> Pair:
    import transformers

    vocabulary = _tokenizer(folder)
    name, config = HUGGING_FACE[family]
    model_class = getattr(transformers, name)
    text = {**config["text_config"], "vocab_size": vocabulary}
    theirs = _random(model_class(model_class.config_class(**{**config, "text_config": text})))
    theirs.save_pretrained(folder)
    pictures = {
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    clip = plugin.source(str(folder), Path.cwd())
    masked = "BERT" in family or "XLM-R" in family

    def text_features(tokens: Tensor) -> Tensor:
        mask = {"attention_mask": (tokens != 0).long()} if masked else {}
        return _pooled(theirs.get_text_features(input_ids=tokens.long(), **mask))

    def tokenize(texts: list[str]) -> Tensor:
        fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        texts = [" ".join(text.split()) for text in texts]
        length = clip.tokenizer.contract.context_length
        return fast(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    return Pair(
        clip,
        lambda pixels: _pooled(theirs.get_image_features(pixel_values=pixels)),
        text_features,
        tokenize=tokenize,
    )


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _random(model: nn.Module) -> Any:
    """The module in evaluation mode with random norms, biases and running statistics too."""
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.numel() > 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.eval()


def _tokenizer(folder: Path, canonical: bool = False) -> int:
    """A byte-level tokenizer with marks of its own in the folder -> its vocabulary's size.

    Ids: padding 0, end 1, start 2, then the bytes, then a second end mark for models whose end of
    text is the highest id.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "</s>", "<s>", *letters, "<end>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    file = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    file.normalizer = normalizers.NFC()
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    end = "</s>" if canonical else "<end>"
    file.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}", special_tokens=[("<s>", 2), (end, vocabulary[end])]
    )
    file.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(names)


def _register_small_networks() -> None:
    """timm's networks in sizes that a laptop tests in seconds; timm has none of these itself."""
    from timm.models import _registry, eva, vision_transformer, vision_transformer_hybrid

    shared: dict[str, Any] = {"img_size": SIDE, "embed_dim": 64, "depth": 2, "num_heads": 4}

    def build(network: Any, kwargs: dict[str, Any], **settings: Any) -> nn.Module:
        wanted: dict[str, Any] = {
            key: kwargs[key] for key in ("num_classes", "global_pool") if key in kwargs
        }
        built: nn.Module = network(**(shared | settings | wanted))
        return built

    def vit_pocket_siglip(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        vit = vision_transformer.VisionTransformer
        return build(vit, kwargs, patch_size=16, class_token=False, act_layer="gelu_tanh")

    def vit_pocket_stem(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        hybrid = vision_transformer_hybrid
        stem = hybrid.ConvStem(
            channels=(16, 16, 64), kernel_size=(4, 2, 2), stride=(4, 2, 2), padding=0
        )

        def embed(**sizes: Any) -> nn.Module:
            return hybrid.HybridEmbed(backbone=stem, proj=False, **sizes)

        vit = vision_transformer.VisionTransformer
        return build(vit, kwargs, patch_size=1, embed_layer=embed, no_embed_class=True)

    def eva_pocket(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(eva.Eva, kwargs, patch_size=16, use_rot_pos_emb=True, swiglu_mlp=True)

    for network in (vit_pocket_siglip, vit_pocket_stem, eva_pocket):
        _registry._model_entrypoints[network.__name__] = network
