"""Write docs/results/what_people_bring.md: small networks of many kinds, pruned, or the sentence that is said.

    python scripts/what_people_bring.py [name …]     # names: only these, printed, no page

A run that is interrupted goes on where it stopped (outputs/what_people_bring.json).

Every network is tiny and untrained; what is tried is whether it is understood. A network counts as pruned if parameters
are gone, every group that was cut passed the slicing law on the way, and the edits, replayed on a copy of the dense
network, give the very answers of the pruned one. Decoders count if the law holds for parts of every layer.
"""

import copy
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modhifi_cli
from modhifi_cli.errors import ModHiFiError
from modhifi_cli.graph.answers import flattened
from modhifi_cli.graph.decoder import find_parts
from modhifi_cli.graph.experts import open_experts_
from modhifi_cli.graph.folded import copied, fold_
from modhifi_cli.graph.heads import free_heads_
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.models.called import Called, Form, named_inputs, read_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "what_people_bring.md"
KEPT = Path("outputs") / "what_people_bring.json"
HEAD = """# What people bring

Written by `scripts/what_people_bring.py`: small untrained networks of the kinds that people ask about, 25 % of their
parameters asked for (`modhifi_cli.prune(…, preset="fast")`, 48 samples). *Pruned* means that every group that was cut
passed the slicing law, and that the edits replayed on the dense network give the same answers bit by bit. Language models
are only looked at: the parts of their layers that pass the law on a randomised float64 copy. Where nothing is pruned the
sentence is shown that a user gets. The kind *written to fail* was made after the rest, to find what breaks.

| kind | network | outcome |
|---|---|---|
"""
Case = tuple[str, str, Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]
CASES: list[Case] = []
DECODERS: list[tuple[str, Callable[[], Any]]] = []


def case(kind: str, name: str, make: Callable[[], nn.Module], batches: Callable[[], Any], **options: Any) -> None:
    CASES.append((kind, name, make, batches, options))


def images(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(48, *(shape or (3, 16, 16)))


class Pooled(nn.Module):
    """Layers, a mean over all positions, and a classifier."""

    def __init__(self, *layers: nn.Module, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(inputs).flatten(2).mean(2))


def twice(kind: type, norm: Callable[[int], nn.Module] | None = None, act: Callable[[], nn.Module] = nn.ReLU, inputs: int = 3,
          **settings: Any) -> nn.Module:  # fmt: skip
    """Two convolutions along any number of dimensions."""
    first = [kind(inputs, 16, 3, padding=1, **settings)] + ([norm(16)] if norm else []) + [act()]
    return Pooled(*first, kind(16, 16, 3, padding=1, **settings), nn.ReLU())


def plain_cases() -> None:
    case("shapes", "Conv1d, sound", lambda: twice(nn.Conv1d, nn.BatchNorm1d, inputs=1), images(1, 64))
    case("shapes", "Conv1d, stride and dilation", lambda: Pooled(
        nn.Conv1d(2, 16, 9, 4, 4), nn.ReLU(), nn.Conv1d(16, 16, 3, dilation=2), nn.ReLU()), images(2, 128))
    case("shapes", "Conv3d, volumes", lambda: twice(nn.Conv3d, nn.BatchNorm3d, inputs=1), images(1, 6, 6, 6))
    case("shapes", "MLP on tables", lambda: nn.Sequential(
        nn.Linear(20, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 3)), images(20))
    case("shapes", "sequences [batch, steps, features]", lambda: nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Flatten(), nn.Linear(160, 3)), images(10, 8))
    for mode in ("reflect", "replicate", "circular"):
        case("padding", mode, lambda mode=mode: twice(nn.Conv2d, padding_mode=mode), images())
    for name, act in (("sigmoid", nn.Sigmoid), ("SiLU", nn.SiLU), ("Mish", nn.Mish), ("PReLU", nn.PReLU),
                      ("GELU", nn.GELU), ("hard swish", nn.Hardswish)):  # fmt: skip
        case("activations", name, lambda act=act: twice(nn.Conv2d, act=act), images())
    for name, norm in (("BatchNorm", nn.BatchNorm2d), ("GroupNorm of 4", lambda width: nn.GroupNorm(4, width)),
                       ("GroupNorm of 1", lambda width: nn.GroupNorm(1, width)),
                       ("InstanceNorm", lambda width: nn.InstanceNorm2d(width, affine=True)),
                       ("InstanceNorm without weights", nn.InstanceNorm2d)):  # fmt: skip
        case("norms", name, lambda norm=norm: twice(nn.Conv2d, norm), images())
    case("layers", "depthwise", lambda: Pooled(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
                                               nn.Conv2d(16, 16, 1), nn.ReLU()), images())
    case("layers", "grouped", lambda: Pooled(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(),
                                             nn.Conv2d(16, 16, 1), nn.ReLU()), images())
    case("layers", "transposed", lambda: Pooled(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, 2),
                                                nn.ReLU()), images())
    case("layers", "pixel shuffle", lambda: Pooled(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3),
                                                   nn.PixelShuffle(2), nn.ReLU()), images())
    case("layers", "GLU", lambda: Pooled(nn.Conv2d(3, 32, 3), nn.GLU(1), nn.Conv2d(16, 16, 3), nn.ReLU()), images())
    case("layers", "into an LSTM", lambda: Recurrent(nn.LSTM), images())
    case("layers", "into a GRU", lambda: Recurrent(nn.GRU), images())
    case("layers", "subclass of nn.Linear", lambda: nn.Sequential(
        nn.Flatten(), Written(48, 32), nn.ReLU(), Written(32, 3)), images(3, 4, 4))
    case("layers", "means far above the spread", lambda: Far(), images())


class Recurrent(nn.Module):
    """Feature maps read column by column."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.read, self.head = kind(16, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.read(self.maps(inputs).mean(2).transpose(1, 2))[0][:, -1])


class Written(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight.T + self.bias


class Far(nn.Module):
    """Features of 0.98 that move by hundredths."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(torch.sigmoid(0.3 * self.one(inputs) + 4)).relu().mean((2, 3)))


class Towers(nn.Module):
    """An image and some words."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.words, self.read, self.head = nn.Embedding(50, 8), nn.Linear(8, 24), nn.Linear(40, 4)

    def forward(self, image: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.seen(image).mean((2, 3)), self.read(self.words(words).mean(1)).relu()], 1))


class Heads(nn.Module):
    """A dictionary with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.one, self.other = nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, inputs: torch.Tensor) -> dict[str, Any]:
        found = self.body(inputs).mean((2, 3))
        return {"one": self.one(found), "others": [self.other(found)]}


def both(model: nn.Module, batch: Any) -> torch.Tensor:
    """Two pictures through one tower, stacked in one batch."""
    found = model(torch.cat(list(batch)))
    return found[: len(batch[0])] - found[len(batch[0]) :]


def input_cases() -> None:
    net, words = lambda: twice(nn.Conv2d, nn.BatchNorm2d), torch.randint(0, 50, (48, 5))
    pixels = torch.randn(48, 3, 16, 16)
    case("batches", "images, labels, paths", net, lambda: [(pixels, torch.zeros(48).long(), ["a"] * 48)])
    case("batches", "a dictionary", net, lambda: [{"image": pixels, "label": torch.zeros(48).long(), "path": ["a"] * 48}])
    case("batches", "a dictionary, key named", net, lambda: [{"scan": pixels, "mask": pixels}], inputs="scan")
    case("batches", "bfloat16", lambda: net().bfloat16(), lambda: pixels.bfloat16())
    case("inputs", "two towers by name", Towers, lambda: [{"image": pixels, "words": words}])
    case("inputs", "two towers by a function", Towers, lambda: [(words, pixels)], forward=lambda m, b: m(b[1], b[0]))
    case("inputs", "Siamese, stacked", net, lambda: [(pixels, -pixels)], forward=both)
    case("inputs", "Siamese, called twice", net, lambda: [(pixels, -pixels)], forward=lambda m, b: m(b[0]) - m(b[1]))
    case("answers", "a dictionary with a list", Heads, lambda: pixels)
    case("answers", "maps", lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                                                 nn.Conv2d(16, 2, 1)), lambda: pixels)
    rules = {"weight norm": nn.utils.parametrizations.weight_norm, "weight norm, hooks": nn.utils.weight_norm,
             "spectral norm": nn.utils.parametrizations.spectral_norm, "spectral norm, hooks": nn.utils.spectral_norm,
             "masks": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.3)}  # fmt: skip
    for name, rule in rules.items():
        case("computed weights", name, lambda rule=rule: Pooled(rule(nn.Conv2d(3, 16, 3)), nn.ReLU(),
                                                               rule(nn.Conv2d(16, 16, 3)), nn.ReLU()), lambda: pixels)


def library_cases() -> None:
    import transformers as library

    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
           "patch_size": 8, "num_labels": 5}  # fmt: skip
    size = images(3, 32, 32)
    stages = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
    case("transformers", "ResNet", lambda: library.ResNetForImageClassification(
        library.ResNetConfig(**stages, layer_type="basic")), size)
    case("transformers", "RegNet", lambda: library.RegNetForImageClassification(
        library.RegNetConfig(**stages, groups_width=8)), size)
    for name in ("ViT", "DeiT", "Beit", "Dinov2"):
        extra = {"mlp_ratio": 2} if name == "Dinov2" else {}
        case("transformers", name, lambda name=name, extra=extra: getattr(library, f"{name}ForImageClassification")(
            getattr(library, f"{name}Config")(**vit, **extra)), size)
    case("transformers", "Swin", lambda: library.SwinForImageClassification(library.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=5)), size)
    case("transformers", "ConvNeXt", lambda: library.ConvNextForImageClassification(library.ConvNextConfig(
        hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, num_labels=5)), size)
    case("transformers", "SegFormer", lambda: library.SegformerForSemanticSegmentation(library.SegformerConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[2, 4], sr_ratios=[2, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=24, num_labels=3)), size)
    case("transformers", "CLIP's image tower", lambda: library.CLIPVisionModelWithProjection(
        library.CLIPVisionConfig(**vit, projection_dim=16)), size)
    case("transformers", "SigLIP's image tower", lambda: library.SiglipVisionModel(library.SiglipVisionConfig(**vit)), size)
    backbone = library.ResNetConfig(**stages, layer_type="basic", out_features=["stage2"])
    case("transformers", "DETR", lambda: library.DetrForObjectDetection(library.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=5)), size)
    ids = torch.randint(5, 90, (48, 12))
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100,
            "num_labels": 3, "pad_token_id": 0}  # fmt: skip
    for name in ("Bert", "Roberta", "Electra", "ModernBert"):
        case("transformers", name, lambda name=name: getattr(library, f"{name}ForSequenceClassification")(
            getattr(library, f"{name}Config")(**text)), lambda: [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    case("transformers", "DistilBERT", lambda: library.DistilBertForSequenceClassification(library.DistilBertConfig(
        dim=32, n_layers=1, n_heads=4, hidden_dim=64, vocab_size=100, num_labels=3)),
        lambda: [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    case("transformers", "T5", lambda: library.T5ForConditionalGeneration(library.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100, decoder_start_token_id=0)),
        lambda: [{"input_ids": ids, "decoder_input_ids": ids[:, :6]}], forward=lambda m, b: m(**b).logits)
    case("transformers", "Whisper", lambda: library.WhisperForConditionalGeneration(library.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)),
        lambda: [{"input_features": torch.randn(48, 8, 20), "decoder_input_ids": ids[:, :6]}],
        forward=lambda m, b: m(**b).logits)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
             "max_position_embeddings": 64}  # fmt: skip
    gated = {**small, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
    DECODERS.extend([
        ("Llama", lambda: library.LlamaConfig(**gated)), ("SmolLM3", lambda: library.SmolLM3Config(**gated)),
        ("Gemma 3", lambda: library.Gemma3TextConfig(**gated, head_dim=8)),
        ("Mixtral", lambda: library.MixtralConfig(**gated, num_local_experts=4)),
        ("Qwen2-MoE", lambda: library.Qwen2MoeConfig(**gated, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2,
                                                    decoder_sparse_step=1)),
        ("OLMoE", lambda: library.OlmoeConfig(**gated, num_experts=4, num_experts_per_tok=2)),
        ("GPT-OSS", lambda: library.GptOssConfig(**gated, num_local_experts=4, num_experts_per_tok=2, head_dim=8)),
        ("DeepSeek-V3, latent attention", lambda: library.DeepseekV3Config(
            **{**gated, "num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
            moe_intermediate_size=16, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8)),
        ("GPT-2", lambda: library.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)),
        ("GPT-J", lambda: library.GPTJConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=64, rotary_dim=4)),
        ("Falcon", lambda: library.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)),
        ("BLOOM", lambda: library.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)),
        ("MPT", lambda: library.MptConfig(d_model=32, n_layers=1, n_heads=4, vocab_size=64)),
        ("BERT as a decoder", lambda: library.BertConfig(**small, intermediate_size=48, is_decoder=True)),
        ("Mamba", lambda: library.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)),
    ])  # fmt: skip


class Block(nn.Module):
    """Attention as it is written by hand everywhere: the width is read from what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        B, T, C = stream.size()
        q, k, v = self.c_attn(self.norm(stream)).split(C, dim=2)
        q, k, v = (each.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for each in (q, k, v))
        mixed = ((q @ k.transpose(-2, -1)) * (C // self.n_head) ** -0.5).softmax(-1) @ v
        stream = stream + self.c_proj(mixed.transpose(1, 2).reshape(B, T, C))
        return stream + self.mlp(self.norm2(stream))


class Words(nn.Module):
    """Token features through blocks to a class."""

    def __init__(self, block: Callable[[], nn.Module], width: int = 32) -> None:
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(8, width), nn.Sequential(block(), block()), nn.Linear(width, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.first(inputs)).mean(1))


class Deformed(nn.Module):
    """A deformable convolution between two ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.one, self.offsets = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 18, 3, padding=1)
        self.bent, self.two, self.head = DeformConv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 3), nn.Linear(24, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.one(images).relu()
        return self.head(self.two(self.bent(maps, self.offsets(maps)).relu()).relu().mean((2, 3)))


class Levels(nn.Module):
    """One head on maps of three sizes, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
                                   nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())  # fmt: skip
        self.score = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.stem(images).relu()
        return [self.score(self.tower(maps[:, :, ::step, ::step])) for step in (1, 2, 4)]


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.shift, self.head = nn.Linear(20, 32), nn.Parameter(torch.zeros(20)), nn.Linear(20, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.linear(self.code(rows).relu(), self.code.weight.t(), self.shift).relu())


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(inputs, outputs), nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.base(rows) + 2 * self.up(self.down(rows))


class Mixed(nn.Module):
    """Fourier mixing of tokens instead of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        stream = stream + torch.fft.fft(torch.fft.fft(stream, dim=-1), dim=-2).real
        return stream + self.mlp(self.norm(stream))


class Squeezed(nn.Module):
    """Channels weighted by what two small layers say of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)
        self.excite = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Sigmoid())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.one(images).relu()
        maps = maps * self.excite(maps.mean((2, 3)))[:, :, None, None]
        return self.head(self.two(maps).relu().mean((2, 3)))


class Ladder(nn.Module):
    """A U-Net with one step down, concatenation and bilinear resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.three, self.last = nn.Conv2d(40, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fine = self.one(images).relu()
        coarse = self.two(nn.functional.max_pool2d(fine, 2)).relu()
        coarse = nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(self.three(torch.cat([fine, coarse], 1)).relu())


class Summed(nn.Module):
    """Attention in einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 4, 8
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(stream).unflatten(-1, (-1, self.dim)) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return stream + self.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class Table(nn.Module):
    """Numbers and categories of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.city, self.kind, self.numbers = nn.Embedding(30, 6), nn.Embedding(5, 3), nn.BatchNorm1d(7)
        self.body = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, numbers: torch.Tensor, city: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([self.numbers(numbers), self.city(city), self.kind(kind)], 1))


def adversary_cases() -> None:
    """Inputs that were written to fail."""
    rows = images(10, 8)
    case("written to fail", "attention that computes C // n_head", lambda: Words(lambda: Block(32, 4)), rows)
    case("written to fail", "attention in einsum", lambda: Words(Summed), rows)
    case("written to fail", "Fourier mixing", lambda: Words(Mixed), rows)
    case("written to fail", "nn.TransformerEncoder", lambda: Words(lambda: nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True)), rows)
    case("written to fail", "nn.TransformerEncoder, norm first", lambda: Words(lambda: nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True, norm_first=True)), rows)
    case("written to fail", "low-rank adapters", lambda: nn.Sequential(
        Adapted(20, 48), nn.ReLU(), Adapted(48, 24), nn.ReLU(), nn.Linear(24, 3)), images(20))
    case("written to fail", "tied autoencoder", Tied, images(20))
    case("written to fail", "deformable convolution", Deformed, images())
    case("written to fail", "one head on three sizes of maps", Levels, images())
    case("written to fail", "squeeze and excitation", Squeezed, images())
    case("written to fail", "U-Net, bilinear", Ladder, images())
    case("written to fail", "nn.DataParallel around it", lambda: nn.DataParallel(twice(nn.Conv2d)), images())
    case("written to fail", "channels last", lambda: twice(nn.Conv2d, nn.BatchNorm2d).to(memory_format=torch.channels_last),
         lambda: images()().contiguous(memory_format=torch.channels_last))
    case("written to fail", "float16", lambda: twice(nn.Conv2d).half(), lambda: images()().half())
    case("written to fail", "compiled", lambda: torch.compile(twice(nn.Conv2d)), images())
    case("written to fail", "TorchScript", lambda: torch.jit.script(twice(nn.Conv2d)), images())
    case("written to fail", "quantised", lambda: torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)), {nn.Linear}), images(20))
    case("written to fail", "lazy layers", lambda: made_by_running(nn.Sequential(
        nn.LazyConv2d(16, 3), nn.ReLU(), nn.LazyConv2d(16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LazyLinear(4)), images()()), images())
    case("written to fail", "numbers and categories of a table", Table, lambda: [{
        "numbers": torch.randn(48, 7), "city": torch.randint(0, 30, (48,)), "kind": torch.randint(0, 5, (48,)),
        "label": torch.rand(48)}])


def made_by_running(network: nn.Module, inputs: torch.Tensor) -> nn.Module:
    network(inputs)
    return network


def pruned(make: Callable[[], nn.Module], batches: Any, options: dict[str, Any]) -> tuple[bool, str]:
    """Whether a network was pruned lawfully, and what is said of it."""
    torch.manual_seed(0)
    given = make().eval()
    dense = getattr(given, "_orig_mod", given)  # a compiled one is given back uncompiled
    try:
        narrow, result = modhifi_cli.prune(given, batches, sparsity=0.25, preset="fast", check_data=False, **options)
    except ModHiFiError as error:
        return False, str(error)
    again = copied(dense)
    fold_(again)
    for edit in result.edits:
        apply_edit_(again, edit)
    first = batches if isinstance(batches, torch.Tensor) else next(iter(batches))
    function, names = options.get("forward"), named_inputs(dense, first)
    read = read_of(first, names, function, options.get("inputs"))
    form = Form(read)
    packed = form.pack(read)
    with torch.inference_mode():
        one, other = (Called(copy.deepcopy(each), form, function).eval()(packed) for each in (narrow, again))
    same = torch.equal(flattened(one), flattened(other))
    share = result.achieved["params"]
    left = f"; left alone: {result.refused[0].reason}" if result.refused else ""
    return same and share > 0, f"{share:.0%} of parameters in {len(result.kept)} groups{left}" + ("" if same else "; UNEQUAL")


def looked_at(config: Callable[[], Any]) -> tuple[bool, str]:
    """Whether parts of every layer of a decoder obey the law, and what is said."""
    import transformers as library

    torch.manual_seed(0)
    model = library.AutoModelForCausalLM.from_config(config()).eval()
    open_experts_(model)
    free_heads_(model)
    try:
        found = find_parts(model)
    except ModHiFiError as error:
        return False, str(error)
    kinds = "; ".join(sorted({part.unit for part in found.parts}))
    left = f"; left alone: {found.refused[0].reason}" if found.refused else ""
    return len({part.layer for part in found.parts}) == len(found.layers), f"lawful: {kinds}{left}"


def tried() -> dict[str, tuple[bool, str]]:
    """What an interrupted run of this script has found: kind and name → outcome."""
    return {key: tuple(found) for key, found in json.loads(KEPT.read_text()).items()} if KEPT.is_file() else {}


def main(only: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain_cases()
    input_cases()
    adversary_cases()
    library_cases()
    every: list[tuple[str, str, Callable[[], tuple[bool, str]]]] = []
    for kind, name, make, batches, options in CASES:
        every.append((kind, name, functools.partial(brought, make, batches, options)))
    every += [("language models", name, functools.partial(looked_at, config)) for name, config in DECODERS]
    known = {} if only else tried()
    for kind, name, outcome in every:
        key = f"{kind}: {name}"
        if key not in known and (not only or name in only):
            known[key] = outcome()
            print(key, *known[key], flush=True)
            if not only:
                KEPT.parent.mkdir(parents=True, exist_ok=True)
                KEPT.write_text(json.dumps(known))
    if only:
        return
    rows = [(kind, name, *known[f"{kind}: {name}"]) for kind, name, _ in every]
    good = sum(row[2] for row in rows)
    lines = [f"| {kind} | {name} | {'pruned' if ok else '**not pruned**'}: {said} |" for kind, name, ok, said in rows]
    PAGE.write_text(HEAD + "\n".join(lines) + f"\n\n{good} of {len(rows)} are pruned.\n", encoding="utf-8")
    KEPT.unlink()


def brought(make: Callable[[], nn.Module], batches: Callable[[], Any], options: dict[str, Any]) -> tuple[bool, str]:
    """As `pruned`; a network that cannot even be made so is told like one that cannot be pruned."""
    try:
        return pruned(make, batches(), options)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, KeyError) as error:
        return False, f"CRASH {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


if __name__ == "__main__":
    main(sys.argv[1:])
