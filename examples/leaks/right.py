"""A small language model with everything in its place; each file beside this one breaks one thing in it.

Short convolution, attention over a compressed latent, experts chosen by a biased sigmoid router.

    smolseek audit examples.leaks.right:model --loss examples.leaks.right:loss --step examples.leaks.right:step \\
        --data examples.leaks.right:data --pad-id 0
"""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, D, LAYERS, HEADS, LATENT, EXPERTS, TOP_K, NEURONS = 512, 64, 2, 4, 32, 8, 2, 64


class Norm(nn.Module):
    """RMSNorm over the features."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each position of [B, T, d] by itself."""
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Convolution(nn.Module):
    """Depthwise convolution over a position and the two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 1, 3) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, T, D] to [B, T, D]."""
        return F.conv1d(self.pad(x.transpose(1, 2)), self.weight, groups=D).transpose(1, 2)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad time, the last dimension, on the left."""
        return F.pad(x, (2, 0))


class Attention(nn.Module):
    """Keys and values are read from one latent per token."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, D, bias=False)
        self.down = nn.Linear(D, LATENT, bias=False)
        self.norm = Norm(LATENT)
        self.up = nn.Linear(LATENT, 2 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, T, D] to [B, T, D]."""
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        kv = self.up(self.norm(self.latent(x))).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = kv.chunk(2, dim=-1)
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """Compress each token [B, T, D] to its latent."""
        return self.down(x)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return softmax(q k^T) v, position t seeing those up to t."""
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return scores.masked_fill(~self.mask(q.shape[-2]), float("-inf")).softmax(dim=-1) @ v

    def mask(self, T: int) -> torch.Tensor:
        """Return [T, T], true where a position (row) may see another (column)."""
        return torch.ones(T, T, dtype=torch.bool).tril()


class Router(nn.Module):
    """Chooses experts by score plus bias and weights them by the score alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, D) / D**0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return each expert's weight for each token [N, EXPERTS], zero where it is not chosen."""
        scores = F.linear(x, self.weight).sigmoid()
        return self.weigh(scores, self.choose(scores + self.e_score_correction_bias))

    def choose(self, score: torch.Tensor) -> torch.Tensor:
        """Return the choice [N, EXPERTS] as zeros and ones: each token's best experts."""
        return torch.zeros_like(score).scatter(1, score.topk(TOP_K, dim=1).indices, 1.0)

    def weigh(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the chosen scores, normalised to sum 1."""
        kept = scores * chosen
        return kept / kept.sum(dim=1, keepdim=True).clamp(min=1e-9)


class Mixture(nn.Module):
    """Experts, run for every token and weighted by the router; counts their load."""

    def __init__(self, router: type[Router]) -> None:
        super().__init__()
        self.router = router()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, NEURONS), nn.SiLU(), nn.Linear(NEURONS, D)) for _ in range(EXPERTS)
        )
        self.load = torch.zeros(EXPERTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, T, D] to [B, T, D]."""
        weights = self.router(x.flatten(0, 1)).view(*x.shape[:2], -1)
        self.load = (weights.detach() > 0).sum(dim=(0, 1))
        return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class Block(nn.Module):
    """Convolution, attention and experts, each on its normalised input and added to the stream."""

    def __init__(self, attention: type, router: type, convolution: type, norm: type) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(D) for _ in range(3))
        self.layers = nn.ModuleList((convolution(), attention(), Mixture(router)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, T, D] to [B, T, D]."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class Model(nn.Module):
    """Token ids [B, T] in, logits [B, T, VOCAB] out."""

    def __init__(
        self,
        attention: type = Attention,
        router: type = Router,
        convolution: type = Convolution,
        norm: type = Norm,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, D)
        self.blocks = nn.Sequential(*(Block(attention, router, convolution, norm) for _ in range(LAYERS)))
        self.norm = Norm(D)
        self.head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of the token after each one of `ids`."""
        return self.head(self.norm(self.blocks(self.embedding(ids))))


def model() -> Model:
    """Return the model with initial weights."""
    return Model()


def loss(logits: torch.Tensor, ids: torch.Tensor, pad_id: int = 0) -> torch.Tensor:
    """Return the mean cross-entropy of each token's successor, padding left out."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad_id)


def step(model: Model, ids: torch.Tensor) -> None:
    """Do one training step: plain gradient descent, then each bias moves towards an equal load."""
    model.zero_grad()
    loss(model(ids), ids).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
        for block in model.blocks:
            mixture = block.layers[2]
            load = mixture.load.float()
            mixture.router.e_score_correction_bias += 1e-3 * (load.mean() - load).sign()


def documents() -> list[str]:
    """Return a small corpus of made-up sentences."""
    generator = torch.Generator().manual_seed(0)
    words = [
        a + b for a in ("ba", "ke", "mo", "ri", "su", "ta", "ve", "zo") for b in ("n", "lo", "mi", "r", "sk", "ta")
    ]
    picks = torch.randint(len(words), (120, 40), generator=generator).tolist()
    return [" ".join(words[i] for i in row) for row in picks]


def data() -> tuple[list[str], list[str]]:
    """Return training and validation documents."""
    return documents()[:100], documents()[100:]
