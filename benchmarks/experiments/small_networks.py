"""timm's networks in sizes that a laptop tests in seconds, which timm has not; random weights."""

from typing import Any

from torch import nn

SIDE = 64


def register() -> None:
    """Make them known to timm by their names."""
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


def random_(model: nn.Module) -> Any:
    """The module in evaluation mode with random norms, biases, scales and running statistics."""
    for parameter in model.parameters():
        if 1 < parameter.numel() == max(parameter.shape):
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.eval()
