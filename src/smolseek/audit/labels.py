"""Target: which token does a loss compare each position with, and with what weight? The loss function alone tells.

Leaks it finds: labels that are not shifted, or shifted twice; padding that is predicted like text; ends of texts that
are not; a divisor that counts other tokens than the sum. The loss is given planted logits over sequences of distinct
tokens. At uniform logits d loss / d logits[b, t] = w (1/V - [target]), so the most negative entry of the gradient is
the target, and w its weight in the mean.
Limits: t+1 exactly, no weight on padding, half of the mean weight or more on ends, weights that sum to 1 within 1%.

Shapes: B sequences, T tokens, V vocabulary.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from smolseek.audit.finding import Check, Finding, skipped
from smolseek.errors import reason
from smolseek.model.transformer import Hidden

LENGTH = 24
"""Tokens of a planted sequence."""
SHIFTS = range(-1, 4)
_SURE = 30.0

SHIFT = Check(
    name="target: shift",
    limit=0.0,
    meaning="some positions are compared with other tokens than the next",
    look="who shifts: the data loader, the model (Hugging Face's do, given labels) or the loss: exactly one",
    hint="loss = cross_entropy(logits[:, :-1], ids[:, 1:]) with ids that nobody else has shifted",
)
PADDING = Check(
    name="target: padding",
    limit=0.0,
    meaning="padding is predicted like text: it is easy, so the loss looks lower the more of it there is",
    look="ignore_index, the label mask, the collator",
    hint="set labels to -100 where the attention mask is 0, or pack documents and pad nothing",
)
END_OF_TEXT = Check(
    name="target: end of text",
    limit=0.5,
    least=True,
    meaning="the end of a text is never predicted: the model will not learn to stop",
    look="padding and end token share one id, and the loss ignores it",
    hint="mask padding by position (the attention mask) rather than by id",
)
MEAN = Check(
    name="target: mean",
    limit=0.01,
    meaning="the loss is not the mean over the tokens it should predict",
    look="the divisor (all tokens, or only those counted?), means of means over sequences of unequal length",
    hint="sum the token losses and divide by the number of counted tokens",
)


class Planted(nn.Module):
    """Stands in for a model: gives logits that were thought out beforehand for the known sequences `ids_BT`.

    It can be called, and has the `hidden` and `lm_head` of our own `CausalLM`; the head is the identity.
    """

    def __init__(self, ids_BT: torch.Tensor, vocab: int, shift: int | None) -> None:
        super().__init__()
        self.ids_BT, self.vocab, self.shift = ids_BT, vocab, shift
        self.given: list[tuple[int, torch.Tensor]] = []
        self.lm_head = nn.Linear(vocab, vocab, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(vocab))

    def forward(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return logits [B, t, V] that are sure of the token `shift` places on, or uniform for `shift` None."""
        B, T = self.ids_BT.shape
        t = ids.shape[1]
        starts = range(T - t + 1) if ids.shape[0] == B else ()
        begin = next((i for i in starts if torch.equal(ids.cpu(), self.ids_BT[:, i : i + t])), None)
        if begin is None:
            raise ValueError(f"the loss gave its model ids {list(ids.shape)} that are no part of those it was given")
        logits = torch.zeros(B, t, self.vocab)
        if self.shift is not None:
            for i in range(t):
                if 0 <= begin + i + self.shift < T:
                    logits[range(B), i, self.ids_BT[:, begin + i + self.shift]] = _SURE
        logits.requires_grad_()
        self.given.append((begin, logits))
        logits.logits = logits  # type: ignore[attr-defined]
        return logits

    def hidden(self, ids: torch.Tensor, **_: Any) -> Hidden:
        """Return the planted logits as the hidden state, no load and no balance loss."""
        logits = self(ids)
        return Hidden(logits, ids.new_zeros((0, 0)), logits.new_zeros(()))


class Counted(NamedTuple):
    """A position that counts in the loss."""

    shift: int
    """The position is compared with the token so many places on; 99 where that token stands nowhere near."""
    target: int
    weight: float


def check_loss(loss: Callable[..., Any], *, pad_id: int | None = None, eos_id: int | None = None) -> list[Finding]:
    """Return the findings on a loss function: the shift, padding, EOS, and the mean.

    Args:
        loss: (logits [B, T, V], ids [B, T]) -> scalar, or (model, ids) -> scalar if its first parameter is `model`.
        pad_id: id of padding tokens, None if there is no padding.
        eos_id: id of the end of a text, None if there is none.
    """
    vocab = max(2 * LENGTH + 8, (pad_id or 0) + 1, (eos_id or 0) + 1)
    ids_BT = _plant(pad_id, eos_id)
    try:
        values = {shift: _run(loss, ids_BT, vocab, shift)[0].item() for shift in SHIFTS}
        value, given = _run(loss, ids_BT, vocab, None)
        gradients = torch.autograd.grad(value, [logits for _, logits in given], allow_unused=True)
    except Exception as error:
        return [skipped("target", f"the loss does not run on planted logits ({reason(error)})")]
    counted = _counted(ids_BT, given, gradients)
    if not counted:
        return [skipped("target", "the loss has no gradient to the planted logits")]
    shift = Counter(position.shift for position in counted).most_common(1)[0][0]
    total = sum(position.weight for position in counted)
    padding = PADDING.skip("there is no padding token (--pad-id names one)")
    end = END_OF_TEXT.skip("no end token is known")
    if pad_id is not None:
        padding = replace(PADDING, limit=0.0 if pad_id != eos_id else 1.0).judge(
            f"sequences that end in padding (id {pad_id}); share of the loss that falls on it",
            sum(position.weight for position in counted if position.target == pad_id) / total,
        )
    if eos_id is not None:
        end = END_OF_TEXT.judge(
            f"an end token (id {eos_id}) in the middle of a sequence; its weight, in units of the mean weight",
            sum(position.weight for position in counted if position.target == eos_id) / (total / len(counted)),
        )
    weights = [position.weight for position in counted if position.target not in (pad_id, eos_id)]
    expected = ids_BT[:, 1:].numel() if pad_id is None else int((ids_BT[:, 1:] != pad_id).sum())
    if pad_id is not None and pad_id == eos_id:
        expected = len(counted)
    uneven = max(weights) / min(weights) - 1 if weights else float("nan")
    # A wrong shift and counted padding are failures of their own.
    judged_above = shift != 1 or any(position.target == pad_id for position in counted)
    missing = 0.0 if judged_above else abs(len(counted) / expected - 1)
    mean = MEAN.judge(
        f"{len(counted)} of {expected} predictable tokens are counted, with weights that sum to {total:.4f} (1 for "
        f"a mean) and differ by {uneven:.1%}; the figure is the largest of these errors",
        max(abs(total - 1), uneven, missing),
    )
    return [_judge_shift(counted, shift, values), padding, end, mean]


def _judge_shift(counted: list[Counted], shift: int, values: dict[int, float]) -> Finding:
    check = SHIFT
    if shift != 1:
        meanings = {
            0: "the labels are not shifted: each position is asked for the token it has just read, and copies it",
            2: "the labels are shifted twice: the token after next is learnt, and sampling skips words",
        }
        other = f"position t is compared with token t{shift:+d}, in places even others"
        check = replace(SHIFT, meaning=meanings.get(shift, other))
    planted = ", ".join(f"t{k:+d} {values[k]:.2f}" if k else f"t {values[k]:.2f}" for k in SHIFTS)
    return check.judge(
        f"loss on logits planted for {planted}; from its gradient, position t is compared with token t{shift:+d}"
        " (the figure is how far that is from t+1)",
        abs(shift - 1) + (0.0 if all(position.shift == shift for position in counted) else 0.5),
    )


def _plant(pad_id: int | None, eos_id: int | None) -> torch.Tensor:
    """Return [2, T] distinct tokens; the first has an end token in its middle, the second ends in padding."""
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
    """Return the loss on planted logits, and those logits with the position of their first token."""
    planted = Planted(ids_BT, vocab, shift)
    takes_model = next(iter(inspect.signature(loss).parameters), None) == "model"
    value = loss(planted if takes_model else planted(ids_BT), ids_BT)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise TypeError(f"it returned {type(value).__name__}, not one number")
    return value, planted.given


def _counted(
    ids_BT: torch.Tensor, given: list[tuple[int, torch.Tensor]], gradients: tuple[torch.Tensor | None, ...]
) -> list[Counted]:
    """Return every position that counts in the loss."""
    counted = []
    for (begin, _), gradient in zip(given, gradients, strict=True):
        if gradient is None:
            continue
        V = gradient.shape[-1]
        least, target_BT = gradient.min(dim=-1)
        for b, t in (least < -1e-9).nonzero().tolist():
            target = int(target_BT[b, t])
            places = [k for k in SHIFTS if 0 <= begin + t + k < ids_BT.shape[1] and ids_BT[b, begin + t + k] == target]
            # Padding repeats itself: the next token is the kindest reading of it.
            shift = 1 if 1 in places else places[0] if places else 99
            counted.append(Counted(shift, target, float(-least[b, t]) / (1 - 1 / V)))
    return counted
