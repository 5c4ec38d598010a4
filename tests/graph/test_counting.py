"""Multiply-accumulates of attention against counts by hand, whatever kernels the installed torch takes for it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modhifi_cli.graph.counting import count

TOKENS, WIDTH, HEADS = 10, 16, 4


class Attention(nn.Module):
    """Projections around one call of PyTorch's attention: 4 query heads, ``kv`` key and value heads."""

    def __init__(self, kv: int, causal: bool) -> None:
        super().__init__()
        self.size, self.kv, self.causal = WIDTH // HEADS, kv, causal
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.both = nn.Linear(WIDTH, 2 * kv * self.size)

    def forward(self, tokens):
        query = self.query(tokens).unflatten(-1, (HEADS, self.size)).transpose(1, 2)
        key, value = self.both(tokens).unflatten(-1, (2 * self.kv, self.size)).transpose(1, 2).chunk(2, 1)
        several = {"enable_gqa": True} if self.kv != HEADS else {}
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, **several)
        return self.out(mixed.transpose(1, 2).flatten(2))


PRODUCTS = 2 * TOKENS**2 * WIDTH  # queries with keys, weights with values; a causal mask saves nothing of either
PROJECTIONS = 4 * TOKENS * WIDTH**2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_the_products_of_attention_are_counted_by_hand(kv, causal):
    narrower = 2 * TOKENS * WIDTH * (WIDTH - kv * WIDTH // HEADS)
    model = Attention(kv, causal).eval()
    assert count(model, torch.randn(1, TOKENS, WIDTH)).macs == PROJECTIONS - narrower + PRODUCTS


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_fast_paths_of_pytorchs_own_layers_hide_nothing(precision):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=32, batch_first=True).eval().to(precision)
    example = torch.randn(1, TOKENS, WIDTH, dtype=precision)
    mlp = 2 * TOKENS * WIDTH * 32
    fast = torch.backends.mha.get_fastpath_enabled()
    assert count(layer, example).macs == PROJECTIONS + PRODUCTS + mlp
    assert torch.backends.mha.get_fastpath_enabled() == fast
