"""Copying: does the model repeat the token that it has just read or written?

A model learns to copy if labels are not shifted or the causal mask is missing. The limit is the larger of two numbers:
five times the share of repeated tokens in the text itself, and this share plus 0.1.

Shapes: B sequences, T tokens.
"""

import math
from dataclasses import replace

import torch
from torch import nn

from smolseek.audit import probe
from smolseek.audit.check import Check
from smolseek.audit.probe import Subject

NEW_TOKENS = 32
PROMPT_TOKENS = 8

ARG_MAX = Check(
    name="copying: arg-max",
    limit=0.1,
    unit="of positions",
    meaning="the model predicts the token that it has just read",
    look="unshifted labels (target: shift) or a missing mask (causality)",
    hint="fix the failed checks listed above this check, and train again",
)
SAMPLES = replace(
    ARG_MAX,
    name="copying: samples",
    unit="of sampled tokens",
    meaning='the model repeats itself when it generates text ("how how how")',
)


def check_copying(subject: Subject) -> list[Check]:
    """Check for copying on the text `subject.sequences`.

    The check is skipped for untrained models, because an untrained model with a tied head repeats tokens anyway. A
    model counts as untrained if its loss is not below 0.85 ln V.
    """
    ids_BT = subject.sequences
    if ids_BT is None:
        return [Check(name="copying").skip("no text or no tokenizer (--data, --tokenizer)")]
    if subject.trained is False:
        return [Check(name="copying").skip("the weights are untrained")]
    loss, copies, repeats = _read(subject.model, ids_BT)
    log_vocab = math.log(subject.vocab)
    if not loss < 0.85 * log_vocab:
        reason = (
            f"the weights are untrained: the loss is {loss:.2f} nats per token, and {log_vocab:.2f} with uniform logits"
        )
        return [ARG_MAX.skip(reason), SAMPLES.skip(reason)]
    limit, in_text = max(5 * repeats, repeats + 0.1), f"the text itself has {repeats:.2%}"
    prompts_BT = ids_BT[:4, : max(2, min(PROMPT_TOKENS, subject.context // 2))]
    return [
        replace(ARG_MAX, limit=limit).judge(
            copies,
            f"share of {ids_BT[:, 1:].numel():,} positions whose most likely next token is the current one; {in_text}",
        ),
        replace(SAMPLES, limit=limit).judge(
            _repeats_in_samples(subject.model, prompts_BT, subject.context),
            f"share of {4 * NEW_TOKENS} tokens sampled at temperature 1 that repeat the previous token; {in_text}",
        ),
    ]


@torch.no_grad()
def _read(model: nn.Module, ids_BT: torch.Tensor) -> tuple[float, float, float]:
    """Return the mean loss in nats, and the share of repeated tokens in arg-max predictions and in the text itself."""
    nats, copies, repeats, count = 0.0, 0, 0, 0
    for ids in ids_BT.cpu().split(2):
        logits = probe.call(model, ids[:, :-1]).float().cpu()
        current, targets = ids[:, :-1], ids[:, 1:]
        nats -= float(logits.log_softmax(-1).gather(2, targets[..., None]).sum())
        copies += int((logits.argmax(-1) == current).sum())
        repeats += int((targets == current).sum())
        count += targets.numel()
    return nats / count, copies / count, repeats / count


@torch.no_grad()
def _repeats_in_samples(model: nn.Module, prompts_BT: torch.Tensor, context: int) -> float:
    """Return the share of sampled tokens that repeat the token before them."""
    generator = torch.Generator().manual_seed(14)
    ids = prompts_BT.cpu()
    for _ in range(NEW_TOKENS):
        last = probe.call(model, ids[:, -context:])[:, -1].float().cpu()
        ids = torch.cat((ids, torch.multinomial(last.softmax(-1), 1, generator=generator)), dim=1)
    new = ids[:, prompts_BT.shape[1] - 1 :]
    return float((new[:, 1:] == new[:, :-1]).double().mean())
