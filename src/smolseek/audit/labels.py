"""Targets: which token is the target of each position in the loss, and what is its weight?

The loss function is called with known sequences of distinct tokens, and with a model that returns chosen logits. For a
position of weight w with uniform logits, the gradient of the loss is w/V - w at the target token and w/V at every other
token. So the most negative entry of the gradient shows the target, and its size shows the weight.

Shapes: B sequences, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mode
from typing import Any, NamedTuple

import torch
from torch import nn

from smolseek.audit.check import Check
from smolseek.errors import reason
from smolseek.model.transformer import Hidden

LENGTH = 24
"""Number of tokens in a test sequence."""
SHIFTS = range(-1, 4)

SHIFT = Check(
    name="target: shift",
    unit="tokens off",
    meaning="the loss compares some positions with a token that is not the next token",
    look="what shifts the labels: exactly one of data loader, model (Hugging Face's, if given labels) and "
    "loss must do it",
    hint="compute cross_entropy(logits[:, :-1], ids[:, 1:]), with ids that are not shifted elsewhere",
)
WRONG_SHIFTS = {
    0: "the labels are not shifted: each position is compared with the token it has just read, and learns to copy it",
    2: "the labels are shifted twice: the model learns the token after next, and sampling skips words",
}
PADDING = Check(
    name="target: padding",
    unit="of the loss",
    meaning="padding counts in the loss: it is easy to predict, so more padding makes the loss look lower",
    look="ignore_index, the label mask, the collator",
    hint="set labels to -100 where the attention mask is 0, or pack documents without padding",
)
END_OF_TEXT = Check(
    name="target: end of text",
    limit=0.5,
    least=True,
    unit="x mean weight",
    meaning="the end of a text does not count in the loss: the model will not learn to stop",
    look="padding and end token with the same id, which the loss ignores",
    hint="mask padding by position (the attention mask), not by id",
)
MEAN = Check(
    name="target: mean",
    limit=0.01,
    unit="relative error",
    meaning="the loss is not the mean over the tokens that it should predict",
    look="the divisor, which must be the number of tokens that count; means of means over sequences of unequal length",
    hint="divide the sum of the token losses by the number of tokens that count",
)


class PlantedModel(nn.Module):
    """A fake model that returns chosen logits for the known sequences `ids_BT`.

    At position t, the model predicts the token at t + `shift` with near certainty. If `shift` is None, the logits are
    uniform.

    The model has the methods `forward` and `hidden` and the attribute `lm_head` of `CausalLM`; the head is the
    identity.
    """

    def __init__(self, ids_BT: torch.Tensor, vocab: int, shift: int | None) -> None:
        super().__init__()
        self.ids_BT, self.vocab, self.shift = ids_BT, vocab, shift
        self.outputs: list[tuple[int, torch.Tensor]] = []
        """The position of the first token and the returned logits of each call."""
        self.lm_head = nn.Linear(vocab, vocab, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def forward(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return logits [B, t, V] for `ids` [B, t], which must be a part of the known sequences."""
        B, T = self.ids_BT.shape
        t = ids.shape[1]
        starts = range(T - t + 1) if ids.shape[0] == B else ()
        begin = next((i for i in starts if torch.equal(ids.cpu(), self.ids_BT[:, i : i + t])), None)
        if begin is None:
            raise ValueError(
                f"the loss calls the model with other ids than those that it received (shape {list(ids.shape)})"
            )
        logits = torch.zeros(B, t, self.vocab)
        for i in range(t):
            if self.shift is not None and 0 <= begin + i + self.shift < T:
                logits[range(B), i, self.ids_BT[:, begin + i + self.shift]] = 30.0
        logits.requires_grad_()
        self.outputs.append((begin, logits))
        logits.logits = logits  # type: ignore[attr-defined]
        return logits

    def hidden(self, ids: torch.Tensor, **_: Any) -> Hidden:
        """Return the logits as the hidden state, with an empty load and a balance loss of 0."""
        logits = self(ids)
        return Hidden(logits, ids.new_zeros((0, 0)), logits.new_zeros(()))


class Position(NamedTuple):
    """A position of a sequence that contributes to the loss."""

    shift: int
    """Distance from the position to its target token; 99 if the target is not within `SHIFTS`."""
    target: int
    weight: float


def check_loss(loss: Callable[..., Any], *, pad_id: int | None = None, eos_id: int | None = None) -> list[Check]:
    """Check how a loss function shifts targets, treats padding and end of text, and computes the mean.

    Args:
        loss: a function of (logits [B, T, V], ids [B, T]) that returns a scalar. If its first parameter is named
            `model`, the function gets (model, ids) instead.
        pad_id: id of the padding token, or None if there is no padding.
        eos_id: id of the token that ends a text, or None if there is no such token.
    """
    vocab = max(2 * LENGTH + 8, (pad_id or 0) + 1, (eos_id or 0) + 1)
    ids_BT = _distinct_tokens(pad_id, eos_id)
    try:
        values = {shift: _run(loss, ids_BT, vocab, shift)[0].item() for shift in SHIFTS}
        value, outputs = _run(loss, ids_BT, vocab, None)
        gradients = torch.autograd.grad(value, [logits for _, logits in outputs], allow_unused=True)
    except Exception as error:
        return [Check(name="target").skip(f"the loss fails on test logits ({reason(error)})")]
    positions = list(_positions(ids_BT, [begin for begin, _ in outputs], gradients))
    if not positions:
        return [Check(name="target").skip("the loss has no gradient with respect to the logits")]
    total = sum(position.weight for position in positions)
    shift = mode(position.shift for position in positions)
    tokens = "token t" if shift == 0 else f"token t{shift:+d}"
    shift_check = replace(SHIFT, meaning=WRONG_SHIFTS.get(shift, SHIFT.meaning)).judge(
        abs(shift - 1) + (0.0 if all(position.shift == shift for position in positions) else 0.5),
        f"position t is compared with {tokens}, as the gradient shows (plus 0.5 if other positions differ); losses of "
        "logits that predict only one token: " + ", ".join(f"t{k:+d} {values[k]:.2f}" for k in SHIFTS),
    )
    padding = PADDING.skip("no padding token (--pad-id)")
    end = END_OF_TEXT.skip("no end token (--eos-id)")
    if pad_id is not None:
        padding = replace(PADDING, limit=0.0 if pad_id != eos_id else 1.0).judge(
            sum(position.weight for position in positions if position.target == pad_id) / total,
            f"share of the loss on padding (id {pad_id}) at the end of a sequence",
        )
    if eos_id is not None:
        end = END_OF_TEXT.judge(
            sum(position.weight for position in positions if position.target == eos_id) / (total / len(positions)),
            f"weight of an end token (id {eos_id}) in the middle of a sequence, relative to the mean weight",
        )
    weights = [position.weight for position in positions if position.target not in (pad_id, eos_id)]
    expected = ids_BT[:, 1:].numel() if pad_id is None else int((ids_BT[:, 1:] != pad_id).sum())
    if pad_id is not None and pad_id == eos_id:
        expected = len(positions)
    uneven = max(weights) / min(weights) - 1 if weights else float("nan")
    # The checks above already judge a wrong shift and padding in the loss.
    judged_above = shift != 1 or any(position.target == pad_id for position in positions)
    missing = 0.0 if judged_above else abs(len(positions) / expected - 1)
    mean = MEAN.judge(
        max(abs(total - 1), uneven, missing),
        f"largest of three errors: {len(positions)} of {expected} tokens are counted, their weights sum to "
        f"{total:.4f}, "
        f"and the weights differ by {uneven:.1%}",
    )
    return [shift_check, padding, end, mean]


def _distinct_tokens(pad_id: int | None, eos_id: int | None) -> torch.Tensor:
    """Return two sequences of distinct tokens [2, T].

    The first sequence has `eos_id` in its middle. The second sequence has padding at its end.
    """
    free = [i for i in range(2 * LENGTH + 8) if i not in (pad_id, eos_id)]
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(0))[: 2 * LENGTH]
    ids_BT = torch.tensor(free)[order].view(2, LENGTH).clone()
    if eos_id is not None:
        ids_BT[0, LENGTH // 2] = eos_id
    if pad_id is not None:
        ids_BT[1, -LENGTH // 3 :] = pad_id
    return ids_BT


def _run(
    loss: Callable[..., Any], ids_BT: torch.Tensor, vocab: int, shift: int | None
) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """Return the loss of a `PlantedModel`, and the outputs of this model."""
    model = PlantedModel(ids_BT, vocab, shift)
    takes_model = next(iter(inspect.signature(loss).parameters), None) == "model"
    value = loss(model if takes_model else model(ids_BT), ids_BT)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise TypeError(f"it returned {type(value).__name__}, not one number")
    return value, model.outputs


def _positions(
    ids_BT: torch.Tensor, begins: list[int], gradients: tuple[torch.Tensor | None, ...]
) -> Iterator[Position]:
    """Yield each position that contributes to the loss, from the gradients [B, t, V] of the logits.

    The logits of a call begin at the position in `begins`.
    """
    for begin, gradient in zip(begins, gradients, strict=True):
        if gradient is None:
            continue
        least, target_BT = gradient.min(dim=-1)
        for b, t in (least < -1e-9).nonzero().tolist():
            target = int(target_BT[b, t])
            shifts = [k for k in SHIFTS if 0 <= begin + t + k < ids_BT.shape[1] and ids_BT[b, begin + t + k] == target]
            # Several shifts can match in padding: assume that the target is the next token.
            shift = 1 if 1 in shifts else shifts[0] if shifts else 99
            yield Position(shift, target, float(-least[b, t]) / (1 - 1 / gradient.shape[-1]))
