"""Tiny networks of attention written in ways in which heads are hard to see, all with 4 heads of 3 features."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS = 12, 4


class Attention(nn.Module):
    """Plain attention, whose sizes are written with those of its input; the others differ from it in one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, size: int = 0) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Interleaved(Attention):
    """The features of a head are read as many heads apart."""

    def forward(self, x: Tensor, size: int = 0) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).reshape(B, N, C))


class Reduced(nn.Module):
    """Keys and values come from fewer tokens, normalised on the way; a size stands beside a −1."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.sr, self.norm = nn.Conv1d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, size: int = 0) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        fewer = self.norm(self.sr(x.transpose(1, 2)).transpose(1, 2))
        k, v = self.kv(fewer).reshape(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Held(nn.Module):
    """A layer that stands alone in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).clamp(-50.0, 50.0)


class Wrapped(nn.Module):
    """Projections that are modules around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Held() for _ in range(4))
        self.q_norm = nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x: Tensor, size: int = 0) -> Tensor:
        B, N, _ = x.shape
        parts = (layer(x).view(B, N, self.num_heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(self.q_norm(q), k, v)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, N, -1))


class Normed(Wrapped):
    """A norm across all heads of the queries, in front of the layer that writes the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, size: int = 0) -> Tensor:
        B, N, _ = x.shape
        parts = (self.q_norm(self.q_proj(x)), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.view(B, N, self.num_heads, -1).transpose(1, 2) for part in parts)
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, -1))


class Biased(Attention):
    """What is added to the scores comes from outside, the same for every block."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=shared_rel_pos)
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class Asked(nn.Module):
    """Queries come from outside, the same for every block."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        assert q_global is not None and x.shape[-1] == q_global.shape[-1]
        k, v = self.qkv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q = q_global.reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Fixed(Attention):
    """The number of heads stands in the code."""

    def forward(self, x: Tensor, size: int = 0) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, 4, 3).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Network(nn.Module):
    """Two blocks of attention and one of neurons, each added to what it reads; images of 16 pixels a side."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.shared = nn.Parameter(torch.randn(1, HEADS, 16, 16)) if attention is Biased else None
        self.ask = nn.Linear(WIDTH, WIDTH) if attention is Asked else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attns = nn.ModuleList(attention() for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        handed = (self.shared,) if self.shared is not None else ()
        handed = (self.ask(x),) if self.ask is not None else handed
        for norm, attention in zip(self.norms, self.attns, strict=False):
            x = x + attention(norm(x), *handed)
        x = x + self.mlp(self.norms[2](x))
        return self.head(x.mean(1))


def build(attention: type[nn.Module], *, seed: int = 0) -> nn.Module:
    """The tiny network with this attention, random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(attention).eval()


def images() -> Tensor:
    """Two random images that it takes."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
