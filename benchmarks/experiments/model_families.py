"""Small random models of every family, as their own library writes them, for `models.py`.

Each is written into a folder in the library's format and opened through the same door as anybody's
checkpoint; the library's own module stays beside it to compare with.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from benchmarks.experiments import model_files, small_networks
from benchmarks.experiments.model_files import image_written_out, text_written_out
from benchmarks.experiments.small_networks import SIDE, random_
from compress import plugin
from compress.clip import Clip
from compress.sources import _bert

Encode = Callable[[Tensor], Tensor]

EMBED, TOKENS = 32, 16
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
HF_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _encoder(projection: str, pooler: str) -> dict[str, Any]:
    return {
        "context_length": TOKENS,
        "hf_model_pretrained": False,
        "hf_proj_type": projection,
        "hf_pooler_type": pooler,
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
    "XLM-R text of open_clip": {"vision_cfg": VIT, "text_cfg": _encoder("mlp", "mean_pooler")},
    "NLLB text of open_clip": {"vision_cfg": VIT, "text_cfg": _encoder("linear", "cls_pooler")},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "XLM-R text of open_clip": {
        "model_type": "xlm-roberta",
        **HF_TOWER,
        "max_position_embeddings": TOKENS + 1,
        "type_vocab_size": 1,
        "pad_token_id": 0,
    },
    "NLLB text of open_clip": {
        "model_type": "m2m_100",
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 8,
        "max_position_embeddings": TOKENS,
        "pad_token_id": 0,
    },
}
"""Encoders of transformers inside a model of open_clip."""
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
    "transformers Siglip2Model": (
        "Siglip2Model",
        {
            "text_config": HF_TEXT,
            "vision_config": {**HF_TOWER, "patch_size": 16, "num_patches": (SIDE // 16) ** 2},
        },
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
MULTILINGUAL = {
    "M-CLIP (XLM-R text)": model_files.m_clip,
    "sentence-transformers (DistilBERT text)": model_files.sentence_transformer,
}
TINYCLIP = ("TinyCLIP's file, manual", "TinyCLIP's file, auto")
FAMILIES = (*OPEN_CLIP, *HUGGING_FACE, *MULTILINGUAL, *TINYCLIP)


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
    if family in OPEN_CLIP:
        return _open_clip(family, folder)
    if family in MULTILINGUAL:
        return _multilingual(family, folder)
    return _tinyclip(family, folder) if family in TINYCLIP else _transformers(family, folder)


def _open_clip(family: str, folder: Path) -> Pair:
    import open_clip

    small_networks.register()
    vocabulary = byte_tokenizer(folder, canonical="SigLIP" in family)
    model_cfg = {"embed_dim": 64 if "SigLIP" in family else EMBED, **OPEN_CLIP[family]}
    vision = {"image_size": SIDE, **model_cfg["vision_cfg"]}
    text = {**model_cfg["text_cfg"], "vocab_size": vocabulary, "hf_tokenizer_name": "tokenizer"}
    if family in ENCODERS:
        text["hf_model_name"] = _described_encoder(family, vocabulary, folder / "encoder")
    model_cfg = {**model_cfg, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    theirs = random_(open_clip.CustomTextCLIP(**_built(model_cfg)))
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": {}, "license": "none: random weights"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    name = f"local-dir:{folder}"
    clip = plugin.source(f"open_clip:{name}", Path.cwd())
    transform = open_clip.image_transform(vision["image_size"], is_train=False)
    tokenize = open_clip.get_tokenizer(name)
    return Pair(clip, theirs.encode_image, theirs.encode_text, transform, tokenize)


def _described_encoder(family: str, vocabulary: int, folder: Path) -> str:
    """A folder that open_clip builds a text encoder from, known to us by the same name."""
    config = {**ENCODERS[family], "vocab_size": vocabulary}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    _bert.NAMED[str(folder)] = config
    return str(folder)


def _built(model_cfg: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model_cfg.items() if key != "custom_text"}


def _transformers(family: str, folder: Path) -> Pair:
    import transformers

    vocabulary = byte_tokenizer(folder)
    name, config = HUGGING_FACE[family]
    model_class = getattr(transformers, name)
    text = {**config["text_config"], "vocab_size": vocabulary}
    theirs = random_(model_class(model_class.config_class(**{**config, "text_config": text})))
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

    def image_features(pixels: Tensor) -> Tensor:
        inputs = patches(pixels, 16) if name == "Siglip2Model" else {"pixel_values": pixels}
        return _pooled(theirs.get_image_features(**inputs))

    return Pair(clip, image_features, text_features, tokenize=_tokenize(folder, clip))


def _tokenize(folder: Path, clip: Clip) -> Callable[[list[str]], Tensor]:
    """The folder's tokenizer in transformers, after the white space that our contract collapses."""
    import transformers

    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    length = clip.tokenizer.contract.context_length

    def tokenize(texts: list[str]) -> Tensor:
        texts = [" ".join(text.split()) for text in texts]
        ids: Tensor = fast(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return ids

    return tokenize


def patches(pixels: Tensor, side: int) -> dict[str, Tensor]:
    """Square pictures [B, 3, H, W] as SigLIP2 takes them: rows of patches, each pixel by pixel."""
    batch, _, height, _ = pixels.shape
    grid = height // side
    cut = pixels.reshape(batch, 3, grid, side, grid, side).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cut.reshape(batch, grid * grid, -1),
        "pixel_attention_mask": torch.ones(batch, grid * grid, dtype=torch.long),
        "spatial_shapes": torch.tensor([[grid, grid]] * batch),
    }


def _multilingual(family: str, folder: Path) -> Pair:
    """A text tower beside the small model of the first family."""
    beside = _open_clip(FAMILIES[0], _made(folder / "image"))
    texts = MULTILINGUAL[family](folder / "texts", EMBED)
    clip = plugin.source(f"mclip:{folder / 'texts'}+{folder / 'image'}", Path.cwd())
    return Pair(clip, beside.image, texts, beside.preprocess, _tokenize(folder / "texts", clip))


def _tinyclip(family: str, folder: Path) -> Pair:
    import open_clip

    path, tokenize = folder / "tinyclip.pt", open_clip.get_tokenizer("ViT-B-32")
    if "auto" in family:
        state = model_files.tinyclip(path)
        image, text = partial(image_written_out, state), partial(text_written_out, state)
    else:
        vision = {**VIT, "head_width": model_files.HEAD_WIDTH}
        theirs = random_(open_clip.CLIP(EMBED, vision, {"width": 64, "heads": 1, "layers": 2}))
        torch.save(model_files.wrapped(theirs.state_dict()), path)
        image, text = theirs.encode_image, theirs.encode_text
    return Pair(plugin.source(f"tinyclip:{path}", Path.cwd()), image, text, tokenize=tokenize)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def byte_tokenizer(folder: Path, canonical: bool = False) -> int:
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
