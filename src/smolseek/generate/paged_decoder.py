"""Runs a model on sequences in a `PagedCache`: chunks of prompts, and decode steps of several sequences.

On a CPU, the bits of a sequence do not depend on the other sequences.

Shapes: B sequences, T tokens of a chunk, V vocab_size, L layers with experts, K experts per token.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from smolseek.generate.cpu_decode import MAX_BATCH, bind
from smolseek.model.paged_cache import PAGE, PagedCache, PagedView
from smolseek.model.transformer import CausalLM

Experts = tuple[tuple[int, ...], ...]
"""The experts that one token uses: for each layer with experts, the K numbers in ascending order."""


class ChunkDetails(NamedTuple):
    """What a request may want to know about the tokens of a chunk of its prompt."""

    experts: list[Experts]
    """The experts of each token of the chunk."""
    logits_TV: torch.Tensor
    """The logits after each token, in float32."""


class PagedDecoder:
    """A model and a `PagedCache`.

    Args:
        model: the model, in the number format in which it computes.
        cache: the pool of pages.
    """

    def __init__(self, model: CausalLM, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        longest = min(model.config.max_position_embeddings, cache.pages * PAGE)
        self._cpu = bind(model, cache.layers, longest, MAX_BATCH)

    @torch.inference_mode()
    def read(self, table: torch.Tensor, start: int, ids: Sequence[int], *, logits: bool) -> torch.Tensor | None:
        """Append a chunk of a prompt to a sequence. With `logits`, return the logits [V] after it, in float32.

        Args:
            table: the pages of the sequence (int64).
            start: number of tokens of the sequence that are cached.
            ids: the tokens of the chunk.
            logits: whether this is the last chunk.
        """
        ids_1T = torch.tensor([list(ids)], device=self.cache.device)
        view = PagedView(self.cache, [table], [start], len(ids))
        hidden_11D = self.model.hidden(ids_1T, view, last=1).hidden_BTD
        return self._head(hidden_11D[0])[0] if logits else None

    @torch.inference_mode()
    def read_details(self, table: torch.Tensor, start: int, ids: Sequence[int]) -> ChunkDetails:
        """Append a chunk of a prompt, and return details. The arguments are those of `read`.

        `read` caches the same bits, but computes queries of the last layer for the last token only. Since the sizes of
        a product may change its rounding, the logits of the next token are those that `read` returns.
        """
        ids_1T = torch.tensor([list(ids)], device=self.cache.device)
        with _router_outputs(self.model) as chosen:
            hidden_1TD = self.model.hidden(ids_1T, PagedView(self.cache, [table], [start], len(ids))).hidden_BTD
        experts_LTK = self._stack(chosen, len(ids))
        return ChunkDetails(by_token(experts_LTK), self._head(hidden_1TD[0]))

    @torch.inference_mode()
    def step(
        self, tables: Sequence[torch.Tensor], lengths: Sequence[int], tokens: Sequence[int], *, experts: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Append one token to each sequence. Return the logits [B, V] in float32, and the experts [L, B, K] or None.

        Args:
            tables: the pages of each sequence (int64).
            lengths: number of cached tokens of each sequence.
            tokens: the token of each sequence.
            experts: whether the experts are returned.
        """
        if self._cpu is not None:
            first_BX = pad_sequence(list(tables), batch_first=True) * PAGE
            return self._cpu.step(torch.tensor(tokens), torch.tensor(lengths), first_BX, experts=experts)
        if not experts:
            return self._forward(tables, lengths, tokens), None
        with _router_outputs(self.model) as chosen:
            logits_BV = self._forward(tables, lengths, tokens)
        return logits_BV, self._stack(chosen, len(tokens))

    def _forward(self, tables: Sequence[torch.Tensor], lengths: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        if (
            self.cache.device.type == "cpu"
        ):  # one by one, since the rounding of PyTorch's products depends on their sizes
            batches = [slice(number, number + 1) for number in range(len(tokens))]
        else:
            batches = [slice(len(tokens))]
        ids_B1, logits = torch.tensor(tokens, device=self.cache.device)[:, None], []
        for batch in batches:
            view = PagedView(self.cache, tables[batch], lengths[batch])
            logits.append(self.model(ids_B1[batch], view)[:, 0].float())
        return torch.cat(logits)

    def _head(self, hidden_XD: torch.Tensor) -> torch.Tensor:
        return self._cpu.head(hidden_XD) if self._cpu is not None else self.model.lm_head(hidden_XD).float()

    @torch.inference_mode()
    def summarise(self, logits_BV: torch.Tensor) -> tuple[list[int], list[float]]:
        """Return the likeliest token and the logsumexp of each sequence, with the same bits in any batch."""
        if self._cpu is not None:
            return self._cpu.summarise(logits_BV.contiguous())
        return [int(one.argmax()) for one in logits_BV], [float(one.logsumexp(dim=-1)) for one in logits_BV]

    def _stack(self, chosen: list[torch.Tensor], tokens: int) -> torch.Tensor:
        """Return the outputs of the routers, from one or several forward passes, as [L, tokens, K]."""
        layers = len(self.model.routers)
        if not layers:
            return torch.empty(0, tokens, 0, dtype=torch.int64)
        return torch.stack([torch.cat(chosen[layer::layers]) for layer in range(layers)])


def by_token(experts_LNK: torch.Tensor) -> list[Experts]:
    """Return the experts of each token, in ascending order, because backends choose in different orders."""
    return [tuple(map(tuple, layers)) for layers in experts_LNK.sort(dim=-1).values.transpose(0, 1).tolist()]


@contextlib.contextmanager
def _router_outputs(model: CausalLM) -> Iterator[list[torch.Tensor]]:
    """Collect the output of each router that runs: the chosen experts [N, K], in the order of the layers."""
    chosen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _router, _inputs, routing: chosen.append(routing.experts_NK))
        for router in model.routers
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
