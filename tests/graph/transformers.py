"""Tiny vision transformers with random weights, one of each family: how each holds its heads and its neurons."""

import torch
from torch import Tensor, nn

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
WINDOWS = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "num_classes": 5,
}
DINO = {**PLAIN, "img_size": 28, "patch_size": 14}
# Name → (library, name there, options). DINOv2 has layer scale; its giant one and EVA-02 have gated neurons.
FAMILIES = {
    "vit": ("timm", "vit_tiny_patch16_224", PLAIN),
    "deit": ("timm", "deit_tiny_distilled_patch16_224", PLAIN),
    "qk_norm": ("timm", "vit_tiny_patch16_224", {**PLAIN, "qk_norm": True}),
    "swin": ("timm", "swin_tiny_patch4_window7_224", WINDOWS),
    "swinv2": ("timm", "swinv2_tiny_window8_256", WINDOWS),
    "cait": ("timm", "cait_xxs24_224", PLAIN),
    "dinov2": ("timm", "vit_small_patch14_dinov2", DINO),
    "packed_gate": ("timm", "vit_giant_patch14_dinov2", DINO),
    "beit": ("timm", "beit_base_patch16_224", PLAIN),
    "eva02": ("timm", "eva02_tiny_patch14_224", PLAIN),
    "position_mlp": ("timm", "vit_relpos_small_patch16_224", PLAIN),
    "position_table": ("timm", "vit_relpos_small_patch16_224", {**PLAIN, "rel_pos_type": "bias"}),
    "positional_heads": ("timm", "convit_tiny", {**PLAIN, "embed_dim": 8, "local_up_to_layer": 1}),
    "pooled_heads": (
        "timm",
        "hiera_tiny_224",
        {"img_size": (32, 32), "embed_dim": 16, "num_heads": 2, "stages": (1, 1, 1, 1), "num_classes": 5},
    ),
    "torchvision_vit": ("torchvision", "vit", {}),
    "torchvision_swin": ("torchvision", "swin", {}),
    "torchvision_swin_v2": ("torchvision", "swin_v2", {}),
}

# Networks of transformers, whose queries, keys and values are written apart: class, options beside those of `PLAIN`.
APART = {
    "hf_vit": ("ViT", {}),
    "hf_vit_without_biases": ("ViT", {"qkv_bias": False}),
    "hf_deit": ("DeiT", {}),  # with a token for distillation
    "hf_dinov2": ("Dinov2", {}),
    "hf_beit": ("Beit", {"use_relative_position_bias": True}),  # what is added to its scores comes from outside
}


def build(name: str, *, seed: int = 0) -> nn.Module:
    """The family's tiny network in evaluation mode."""
    if name in APART:
        return _apart(*APART[name], seed)
    library, named, options = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library == "timm":
            import timm

            return timm.create_model(named, **options).eval()
        from torchvision.models import VisionTransformer
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

        if named == "vit":
            return VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5).eval()
        second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if named == "swin_v2" else {}
        return SwinTransformer([2, 2], 16, [1, 2], [2, 4], [4, 4], num_classes=5, **second).eval()


def _apart(family: str, options: dict, seed: int) -> nn.Module:
    import transformers

    from modhifi_cli.models import hf_vision

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = getattr(transformers, f"{family}Config")(**sizes, intermediate_size=96, num_labels=5, **options).to_dict()
    kind = f"{family}ForImageClassification{'WithTeacher' if family == 'DeiT' else ''}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hf_vision.build(config=config, kind=kind)


def images(name: str, count: int = 2) -> Tensor:
    """Random images of the size that the family's network takes."""
    size = 28 if name in FAMILIES and FAMILIES[name][2] is DINO else 32
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
