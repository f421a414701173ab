"""Does the model repeat what it has just read, or what it has just written?

Shapes: B sequences, T tokens.
"""

import math
from typing import Any

import torch
from torch import nn

from smolseek.audit.finding import Finding, judged, skipped
from smolseek.audit.probe import call, device_of

NEW_TOKENS = 32
PROMPT_TOKENS = 8


@torch.no_grad()
def text_loss(model: nn.Module, ids_BT: torch.Tensor) -> tuple[float, float, float]:
    """Return mean loss in nats, share of arg-max that repeat the current token, and that share in the text itself."""
    nats, copies, repeats, count = 0.0, 0, 0, 0
    for row in ids_BT.split(2):
        logits = call(model, row[:, :-1]).float().cpu()
        targets = row[:, 1:].cpu()
        nats -= float(logits.log_softmax(-1).gather(2, targets[..., None]).sum())
        copies += int((logits.argmax(-1) == row[:, :-1].cpu()).sum())
        repeats += int((targets == row[:, :-1].cpu()).sum())
        count += targets.numel()
    return nats / count, copies / count, repeats / count


def check_copying(model: nn.Module, ids_BT: torch.Tensor, vocab: int, context: int) -> tuple[list[Finding], float]:
    """Return the findings on copying over text `ids_BT`, and the model's loss on it.

    Weights whose loss is no better than three quarters of ln V plus a nat are untrained: a tied head repeats by itself
    then, which says nothing.
    """
    loss, copies, repeats = text_loss(model, ids_BT)
    names = ("copying: arg-max", "copying: samples")
    if not loss < 0.85 * math.log(vocab):
        reason = f"the weights are untrained: {loss:.2f} nats a token, ln(vocabulary) is {math.log(vocab):.2f}"
        return [skipped(name, reason) for name in names], loss
    limit = max(5 * repeats, repeats + 0.1)
    advice: dict[str, Any] = {
        "look": "unshifted labels (target), or a missing mask (causality): at the last position nothing follows, and "
        "what such a model has learnt to copy is the token itself",
        "hint": "mend the failure above this one and train anew",
    }
    written = _repeats_in_samples(model, ids_BT[:4, : max(2, min(PROMPT_TOKENS, context // 2))], context)
    return [
        judged(
            names[0],
            f"share of {ids_BT[:, 1:].numel():,} positions whose likeliest next token is the current one; in the text "
            f"{repeats:.2%}",
            copies,
            limit,
            meaning="the model predicts the token that it has just read",
            **advice,
        ),
        judged(
            names[1],
            f"share of {4 * NEW_TOKENS} sampled tokens (temperature 1) that repeat the one before; in the text "
            f"{repeats:.2%}",
            written,
            limit,
            meaning='the model writes words again and again ("how how how")',
            **advice,
        ),
    ], loss


@torch.no_grad()
def _repeats_in_samples(model: nn.Module, prompts_BT: torch.Tensor, context: int) -> float:
    generator = torch.Generator().manual_seed(14)
    ids = prompts_BT.cpu()
    begin = ids.shape[1]
    for _ in range(NEW_TOKENS):
        last = call(model, ids[:, -context:].to(device_of(model)))[:, -1].float().cpu()
        ids = torch.cat((ids, torch.multinomial(last.softmax(-1), 1, generator=generator)), dim=1)
    new = ids[:, begin - 1 :]
    return float((new[:, 1:] == new[:, :-1]).double().mean())
