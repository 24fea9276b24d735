"""What a model is, as data: the configs of both towers, written to model.json.

Plain transformers are described layer by layer and are ours to change. A tower of another kind
(convolutions, hybrids) names the library that builds it and the arguments; it distils, folds,
quantizes and exports, but structural stages refuse it.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import PocketclipError
from compress.schedule import Reduction
from compress.scheme import Scheme

Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "relu"]


class TowerConfig(BaseModel):
    """What both towers share; one entry of `heads` and `mlp_width` per layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    """Residual stream width D."""
    head_width: int
    """Width K of each attention head."""
    heads: tuple[int, ...]
    """Number of attention heads, per layer; heads * head_width may differ from width."""
    mlp_width: tuple[int, ...]
    """Hidden width of the MLP, per layer."""
    activation: Activation = "gelu"
    """MLP activation; OpenAI's checkpoints use quick_gelu."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""
    post_norm: bool = False
    """Whether a block normalises the sum after each branch (BERT), not each branch's input."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """From the pooled width to the embedding: one matrix, two around a GELU, or nothing."""
    projection_width: int = 0
    """Hidden width of the projection, for projection mlp."""
    projection_bias: bool = False
    """Whether the linear projection has a bias."""
    last_block: Literal["all", "pooled"] = "all"
    """Whether the last block is computed for all tokens, or only for the one that is pooled: the
    same embedding from fewer multiply-adds (set by the exact stage)."""

    @model_validator(mode="after")
    def _layers_agree(self) -> "TowerConfig":
        if len(self.heads) != len(self.mlp_width):
            raise ValueError(
                f"heads names {len(self.heads)} layers, mlp_width {len(self.mlp_width)}"
            )
        return self

    @property
    def num_layers(self) -> int:
        return len(self.heads)


class VisionConfig(TowerConfig):
    """The image tower: patches of `patch_size` pixels, a class token, a transformer."""

    image_size: int
    """Side of the square input in pixels."""
    patch_size: int
    """Side of a patch in pixels; divides image_size."""
    pooling: Literal["class", "mean", "attention"] = "class"
    """What becomes the embedding: the class token, the mean over patch tokens, or what one learnt
    query reads from all tokens (SigLIP, CoCa)."""
    class_token: bool = True
    """Whether a learnt class token stands before the patch tokens."""
    pre_norm: bool = True
    """Whether a layer norm stands before the first block."""
    patch_bias: bool = False
    """Whether the patch projection has a bias."""
    norm_before_pooling: bool = True
    """Whether a layer norm stands after the last block, over all tokens."""
    norm_after_pooling: bool = False
    """Whether a layer norm stands after the pooling (CLIPA, CoCa)."""
    pool_heads: int = 0
    """Heads of the attention pooling."""
    pool_head_width: int = 0
    """Width of each of them."""
    pool_width: int = 0
    """Width that the attention pooling gives out; 0 for the tower's width."""
    pool_mlp_width: int = 0
    """Hidden width of the attention pooling's MLP; 0 for none."""
    patch_as: Literal["conv", "matmul"] = "conv"
    """How patches are projected: a convolution, or the same as a matrix product."""
    reduction: Reduction | None = None
    """Where the tower goes on with fewer tokens (set by the prune_tokens stage)."""

    @model_validator(mode="after")
    def _one_token_pooled(self) -> "VisionConfig":
        if self.last_block == "pooled" and (self.pooling != "class" or self.post_norm):
            raise ValueError(f"last_block: pooled needs pooling class, not {self.pooling}")
        return self

    @model_validator(mode="after")
    def _reduction_fits(self) -> "VisionConfig":
        if self.reduction is not None:
            self.reduction.check(self.grid, self.num_layers, self.class_token, self.pooling)
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2 + int(self.class_token)

    @property
    def pooled_width(self) -> int:
        """Width of what the projection reads."""
        return self.pool_width or self.width


class TextConfig(TowerConfig):
    """The text tower: token and position embeddings, a transformer, one pooled token."""

    vocab_size: int
    """Rows of the token embedding."""
    context_length: int
    """Tokens of one text, padding included."""
    pooling: Literal["argmax", "end", "last", "first", "mean"] = "argmax"
    """Which token becomes the embedding: the highest id (CLIP's end of text), the first `end_id`,
    the last, the first; or the mean over the tokens that aren't padding."""
    end_id: int = 0
    """Id of the end of text, for pooling end."""
    causal: bool = True
    """Whether a token sees only those before it."""
    pad_id: int | None = None
    """Id of tokens that nobody attends to; None where padding is seen like any token (CLIP)."""
    embedding_norm: bool = False
    """Whether a layer norm stands after the embeddings (BERT)."""
    final_norm: bool = True
    """Whether a layer norm stands after the last block."""
    class_token: bool = False
    """Whether a learnt token follows the text and becomes the embedding (CoCa)."""
    mixer_kernel: int = 0
    """Tokens that a convolution mixes before the first and after the last block, odd; 0 for no such
    convolutions (MobileCLIP-S0 has 11)."""

    @model_validator(mode="after")
    def _one_token_pooled(self) -> "TextConfig":
        odd = (self.post_norm, self.class_token, self.pad_id is not None, self.mixer_kernel)
        plain = not any(odd)
        if self.last_block == "pooled" and (self.pooling not in ("argmax", "end") or not plain):
            raise ValueError("last_block: pooled needs a plain tower that pools its end of text")
        return self

    @property
    def num_tokens(self) -> int:
        return self.context_length + int(self.class_token)

    @property
    def sees_no_padding(self) -> bool:
        """Whether the embedding stays the same when a text is cut after the highest id."""
        return (
            self.causal
            and self.pooling == "argmax"
            and not self.class_token
            and not self.mixer_kernel
        )


class UpstreamConfig(BaseModel):
    """A tower that its own library builds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """What tables and errors call it, such as fastvit_mci0."""
    builder: Literal["open_clip"]
    """Who builds it: a function of `upstream.py`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What the builder is called with, besides the embedding width."""
    folded: bool = False
    """Whether branches that exist for training only are folded into one convolution each."""


class UpstreamVision(UpstreamConfig):
    """An image tower that its own library builds."""

    image_size: int
    """Side of the square input in pixels."""


class UpstreamText(UpstreamConfig):
    """A text tower that its own library builds."""

    vocab_size: int
    """Rows of the token embedding."""
    context_length: int
    """Tokens of one text, padding included."""


class ClipConfig(BaseModel):
    """Structure of a whole model, as written to model.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed_dim: int
    """Width E of the shared embedding space."""
    vision: VisionConfig | UpstreamVision
    """The image tower."""
    text: TextConfig | UpstreamText
    """The text tower."""
    logit_bias: bool = False
    """Whether a learnt logit bias exists (SigLIP)."""
    scheme: Scheme | None = None
    """What is quantized and how; None computes in float."""

    @model_validator(mode="after")
    def _widths_agree(self) -> "ClipConfig":
        for name, tower in (("vision", self.vision), ("text", self.text)):
            width = getattr(tower, "pooled_width", getattr(tower, "width", self.embed_dim))
            if getattr(tower, "projection", "linear") == "none" and width != self.embed_dim:
                raise ValueError(
                    f"{name}: {width} wide without a projection, the embedding has {self.embed_dim}"
                )
        return self


def plain_vision(config: ClipConfig, place: str) -> VisionConfig:
    """The image tower's structure; PocketclipError unless it is a vision transformer of ours.

    `place` is the stage that asks.
    """
    if isinstance(config.vision, UpstreamVision):
        raise PocketclipError(f"{place} needs a ViT image tower; this is {config.vision.name}")
    return config.vision


def plain_text(config: ClipConfig, place: str) -> TextConfig:
    """The text tower's structure; PocketclipError unless it is a transformer of ours."""
    if isinstance(config.text, UpstreamText):
        raise PocketclipError(f"{place} needs a transformer text tower; this is {config.text.name}")
    return config.text


def require_float(config: ClipConfig, place: str) -> None:
    """Raise PocketclipError for a quantized model: `place` is the stage that changes shapes."""
    if config.scheme is not None:
        raise PocketclipError(f"{place}: the model is quantized; put this stage before quantize")
