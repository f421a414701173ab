"""The original experiment with its mistakes, in any size: what `docs/seed.md` trains beside the honest model.

Its five mistakes: no causal mask (the labels are shifted, so position t reads token t+1, which it is to predict);
RoPE once, on the embeddings, instead of on queries and keys; every expert runs for every token, weighted by a softmax,
with nothing that balances them; documents cut to their first tokens; padding counted in the loss. `honest=True` mends
the first, the second and the last; the text is the caller's.

    smolseek audit examples.leaks.seed_experiment:model --loss examples.leaks.seed_experiment:loss --pad-id 0
"""

import torch
import torch.nn.functional as F
from torch import nn


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding over the whole last dimension; the second to last is the position."""
    T, d = x.shape[-2:]
    angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Grouped-query attention and experts that all run."""

    def __init__(self, d: int, heads: int, groups: int, experts: int, neurons: int, honest: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.honest = heads, groups, honest
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d // heads * groups, bias=False)
        self.v = nn.Linear(d, d // heads * groups, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.router = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, neurons), nn.SiLU(), nn.Linear(neurons, d)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the residual stream [B, T, d] to the next."""
        h = self.norm1(x)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(h).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        v = self.v(h).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        if self.honest:
            q, k = rotate(q), rotate(k)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.honest, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        weights = self.router(h).softmax(dim=-1)
        return x + sum(weights[..., i, None] * expert(h) for i, expert in enumerate(self.experts))


class SeedModel(nn.Module):
    """Embedding, blocks, norm, untied head."""

    def __init__(
        self,
        vocab: int = 512,
        d: int = 64,
        layers: int = 2,
        heads: int = 4,
        groups: int = 1,
        experts: int = 4,
        neurons: int = 128,
        honest: bool = False,
    ) -> None:
        super().__init__()
        self.honest = honest
        self.embedding = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, heads, groups, experts, neurons, honest) for _ in range(layers))
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        for p in self.parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, 0.0, 0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, T, vocab] for `ids` [B, T]."""
        x = self.embedding(ids)
        if not self.honest:
            x = rotate(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model() -> SeedModel:
    """Return it small, with initial weights."""
    torch.manual_seed(0)
    return SeedModel()


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The original's loss: shifted labels, padding counted like text."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def honest_loss(logits: torch.Tensor, ids: torch.Tensor, pad_id: int = 0) -> torch.Tensor:
    """The same without the padding."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad_id)
