"""Copying: does the model repeat what it has just read, or what it has just written?

That is what unshifted labels, or a missing mask, teach a model. It reads text, where the likeliest next token is seldom
the current one, and writes after it at temperature 1.
Limit: five times the share of repeats in the text itself, or ten points above it.

Shapes: B sequences, T tokens.
"""

import math
from dataclasses import replace

import torch
from torch import nn

from smolseek.audit.finding import Check, Finding, skipped
from smolseek.audit.probe import call, device_of
from smolseek.audit.subject import Subject

NEW_TOKENS = 32
PROMPT_TOKENS = 8

ARG_MAX = Check(
    name="copying: arg-max",
    limit=0.1,
    meaning="the model predicts the token that it has just read",
    look="unshifted labels (target), or a missing mask (causality): at the last position nothing follows, and what "
    "such a model has learnt to copy is the token itself",
    hint="mend the failure above this one and train anew",
)
SAMPLES = replace(ARG_MAX, name="copying: samples", meaning='the model writes words again and again ("how how how")')


def check_copying(subject: Subject) -> list[Finding]:
    """Return the findings on copying over the text `subject.sequences`.

    Weights whose loss is no better than 0.85 ln V are untrained: a tied head repeats by itself then.
    """
    ids_BT = subject.sequences
    if ids_BT is None:
        return [skipped("copying", "it needs text and a tokenizer (--data, --tokenizer)")]
    if subject.trained is False:
        return [skipped("copying", "the weights are untrained")]
    loss, copies, repeats = _read(subject.model, ids_BT)
    guess = math.log(subject.vocab)
    if not loss < 0.85 * guess:
        reason = f"the weights are untrained: {loss:.2f} nats a token, ln(vocabulary) is {guess:.2f}"
        return [ARG_MAX.skip(reason), SAMPLES.skip(reason)]
    limit = max(5 * repeats, repeats + 0.1)
    prompts_BT = ids_BT[:4, : max(2, min(PROMPT_TOKENS, subject.context // 2))]
    written = _write(subject.model, prompts_BT, subject.context)
    return [
        replace(ARG_MAX, limit=limit).judge(
            f"share of {ids_BT[:, 1:].numel():,} positions whose likeliest next token is the current one; in the text "
            f"{repeats:.2%}",
            copies,
        ),
        replace(SAMPLES, limit=limit).judge(
            f"share of {4 * NEW_TOKENS} sampled tokens (temperature 1) that repeat the one before; in the text "
            f"{repeats:.2%}",
            written,
        ),
    ]


@torch.no_grad()
def _read(model: nn.Module, ids_BT: torch.Tensor) -> tuple[float, float, float]:
    """Return mean loss in nats, share of arg-max that repeat the current token, and that share in the text itself."""
    nats, copies, repeats, count = 0.0, 0, 0, 0
    for ids in ids_BT.split(2):
        logits = call(model, ids[:, :-1]).float().cpu()
        current, targets = ids[:, :-1].cpu(), ids[:, 1:].cpu()
        nats -= float(logits.log_softmax(-1).gather(2, targets[..., None]).sum())
        copies += int((logits.argmax(-1) == current).sum())
        repeats += int((targets == current).sum())
        count += targets.numel()
    return nats / count, copies / count, repeats / count


@torch.no_grad()
def _write(model: nn.Module, prompts_BT: torch.Tensor, context: int) -> float:
    """Return the share of sampled tokens that repeat the one before."""
    generator = torch.Generator().manual_seed(14)
    ids = prompts_BT.cpu()
    for _ in range(NEW_TOKENS):
        last = call(model, ids[:, -context:].to(device_of(model)))[:, -1].float().cpu()
        ids = torch.cat((ids, torch.multinomial(last.softmax(-1), 1, generator=generator)), dim=1)
    new = ids[:, prompts_BT.shape[1] - 1 :]
    return float((new[:, 1:] == new[:, :-1]).double().mean())
