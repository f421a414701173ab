"""Distillation: open the teacher, choose the trained parameters, and let a model write the training text."""

import contextlib
import dataclasses
import hashlib
import json
import shlex
from pathlib import Path

import torch

from smolseek.config import DataConfig, TrainConfig
from smolseek.convert.calibrate import written_sequences
from smolseek.convert.card import source_of
from smolseek.data.datasets import open_dataset
from smolseek.data.sequences import TooFewTokens, build_sequences
from smolseek.data.sources import read_documents
from smolseek.data.split import EmptySide, split
from smolseek.errors import SmolseekError
from smolseek.files import write_atomically
from smolseek.model.transformer import CausalLM
from smolseek.run_folder import RunFolder
from smolseek.storage.hf_folder import load_causal_lm, read_config, resolve
from smolseek.tokenizer import encoder, load_tokenizer, tokenizer_of, vocabulary_digest

_ATTEMPTS = 8
"""How often a model may try to write enough text."""


def open_teacher(path: str, vocab_size: int, device: torch.device) -> CausalLM:
    """Open the model `path` as the teacher, with frozen weights.

    Raises:
        SmolseekError: if the teacher cannot be opened, or its vocabulary does not have `vocab_size` tokens.
    """
    teacher = load_causal_lm(path, device=str(device)).requires_grad_(False)
    if teacher.config.vocab_size != vocab_size:
        raise SmolseekError(
            f"teacher {path} has {teacher.config.vocab_size:,} tokens, but the model has {vocab_size:,}: "
            "use a teacher with the same vocabulary"
        )
    return teacher


def digest(model: CausalLM) -> str:
    """Return a digest of each parameter's name, shape and first values, which identifies the teacher in checkpoints."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in model.named_parameters():
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:64].float().tolist()}".encode())
    return hasher.hexdigest()


def attention_only(model: CausalLM) -> None:
    """Freeze all parameters except those of the attention."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)


def source_of_model(model: str) -> str:
    """Return the model that `model` was converted from, according to the model card or the configuration of the run.

    Raises:
        SmolseekError: if neither the model card nor the run names a source model, or if the source model does not exist
            any more.
    """
    path = resolve(model)
    source, run = source_of(path), RunFolder(path.parent.parent)
    if source is None and path.parent == run.checkpoints and run.config.exists():
        config = run.read_config()
        source = config.distill.teacher or (source_of_model(config.init) if config.init else None)
    if source is None:
        raise SmolseekError(
            f"{model} does not name its source model: give --teacher, the model that it was converted from"
        )
    try:
        resolve(source)
    except SmolseekError as error:
        raise SmolseekError(
            f"{model} was converted from {source}, but {error}: give the path of this model by --teacher"
        ) from None
    return source


def check_teacher(teacher: str, model: str) -> None:
    """Raise SmolseekError if the model `model` cannot have been converted from the model `teacher`.

    A conversion keeps the vocabulary, the hidden size, and the numbers of layers and heads.
    """
    theirs, ours = read_config(teacher), read_config(model)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(theirs, name) != getattr(ours, name):
            raise SmolseekError(
                f"{model} was not converted from {teacher}: the {name} of the former is "
                f"{getattr(ours, name):,}, that of "
                f"the latter {getattr(theirs, name):,}, so leave out --teacher, or distil from any model with the same "
                f"vocabulary: smolseek train --init {shlex.quote(model)} --distill.teacher {shlex.quote(teacher)} "
                "--distill.attention-only"
            )
    tokenizers = [tokenizer for name in (teacher, model) if (tokenizer := tokenizer_of(resolve(name))) is not None]
    if len({vocabulary_digest(tokenizer) for tokenizer in tokenizers}) > 1:
        raise SmolseekError(
            f"{teacher} and {model} have different tokenizers: give the source model of the conversion by --teacher"
        )


def fills_validation(config: TrainConfig, sources: tuple[str, ...], all_of_it: bool = False) -> bool:
    """Return whether the validation side of the text `sources` fills a sequence, or with `all_of_it` the whole text.

    Raises:
        SmolseekError: if the text cannot be read.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    data = dataclasses.replace(config.data, sources=sources, val_sources=())
    try:
        if all_of_it:
            documents = list(read_documents(sources, data.text_column))
        else:
            documents = open_dataset(data, config.eval_tokens, tokenizer).validation
        build_sequences(documents, encoder(tokenizer), 0, config.seq_len, config.eval_tokens)
    except (TooFewTokens, EmptySide):
        return False
    return True


def write_text(model: str, path: Path, tokens: int, seed: int, key: str = "text", least: int = 0) -> None:
    """Generate `tokens` tokens of text with the model `model`, and write them to `path` as JSON lines.

    Each sequence is one document, stored under the JSON key `key`. Generation is repeated until the training side of
    the text has `least` tokens.

    Raises:
        SmolseekError: if the model cannot be opened, has no tokenizer, or writes too little text.
    """
    folder = resolve(model)
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise SmolseekError(
            f"{model} has no tokenizer, which generating text needs: put its tokenizer.json into the folder"
        )
    generator, encode, texts, written = load_causal_lm(folder), encoder(tokenizer), [], 0
    for attempt in range(_ATTEMPTS):
        sequences = written_sequences(generator, tokenizer, tokens, seed + attempt * 1_000_003)
        texts += tokenizer.batch_decode(sequences, skip_special_tokens=True)
        with contextlib.suppress(EmptySide):
            documents = split(list(dict.fromkeys(texts)), DataConfig.val_fraction, needs_validation=False).train
            written = sum(len(ids) + 1 for ids in encode(documents))
        if written >= least:
            break
    else:
        raise SmolseekError(f"{model} generated only {written:,} of {least:,} tokens of text: give files instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps({key: text}) + "\n" for text in texts))
