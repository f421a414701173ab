"""Command `smolseek prepare`, which tokenizes text once."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smolseek import console
from smolseek.cli.arguments import parse
from smolseek.config import DataConfig, option
from smolseek.errors import SmolseekError


@dataclass(frozen=True)
class PrepareArgs:
    """Tokenize text once, then train with smolseek train PRESET --data OUT.

    After an interruption, the same command continues where it stopped.
    """

    out: str
    """Folder to write, created if missing."""
    data: tuple[str, ...] = ("builtin",)
    """Text as in `smolseek train --data`: builtin, files, folders or hub data sets."""
    tokens: int | None = option(None, least=1)
    """Largest number of tokens; None is all text."""
    tokenizer: str = "smollm2"
    """Tokenizer: `smollm2`, a hub name, a folder or a .gguf file."""
    eos_id: int = 0
    """Id of the token that ends each document: the model's eos_token_id."""
    init: str | None = None
    """Model that the training will start from (train --init). The tokenizer and end token of the model are used, and
    documents begin with BOS if the tokenizer adds BOS."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) that holds the text."""
    document_separator: str | None = None
    """Separator of the documents in a text file, such as "<|endoftext|>"; with None, each file is one document."""
    give_up_after: float = option(1800.0, least=0, may_be_infinite=True)
    """Stop after this many seconds without an answer from the hub."""


def prepare(argv: Sequence[str]) -> None:
    """Carry out `smolseek prepare OUT`."""
    args = parse(PrepareArgs, "prepare", argv)
    from smolseek.data import datasets, preparing
    from smolseek.data.shards import read_index
    from smolseek.data.spelling import Spelling
    from smolseek.tokenizer import decoder, encoder, for_training, load_tokenizer, vocabulary_digest

    if args.init is None:
        name, eos_id = args.tokenizer, args.eos_id
        tokenizer = for_training(load_tokenizer(name), eos_id)
    else:
        name, eos_id = _text_of(args.init, args)
        tokenizer = load_tokenizer(name)
    data = DataConfig(
        sources=args.data,
        text_column=args.text_column,
        document_separator=args.document_separator,
        give_up_after=args.give_up_after,
    )
    begun = read_index(args.out)
    data = datasets.pin(data, DataConfig(sources=tuple(source.name for source in begun.sources)) if begun else None)
    spelling = Spelling(tokenizer, name)
    target = preparing.Target(
        path=Path(args.out),
        encode=encoder(tokenizer),
        decode=decoder(tokenizer),
        eos_id=eos_id,
        vocab=len(tokenizer),
        tokenizer=vocabulary_digest(tokenizer),
        tokenizer_name=name,
        spelling=spelling,
    )
    sources = preparing.open_texts(data)
    tokens = preparing.prepare(sources, target, args.tokens)
    for texts in (source.texts for source in sources):
        if isinstance(texts, preparing.LocalShard):
            if hint := texts.last_read.report.separator_hint():
                console.warn(hint)
            if notes := texts.last_read.notes():
                console.say(f"{' '.join(args.data)}: {notes}")
    if spelling.lost:
        console.say(f"The tokenizer cannot encode {spelling.lost:.2%} of the characters; these are left out")
    console.say(
        f"{args.out} holds {tokens:,} tokens. To train on them: smolseek train PRESET --data {shlex.quote(args.out)}"
    )


def _text_of(init: str, args: PrepareArgs) -> tuple[str, int]:
    """Return the tokenizer's name and the end token of the model `init`.

    Raises:
        SmolseekError: if the model does not exist, if it has no tokenizer or end token, or if `args` has another
            tokenizer or end token.
    """
    from smolseek.storage.hf_folder import read_config, resolve

    if (args.tokenizer, args.eos_id) != (PrepareArgs.tokenizer, PrepareArgs.eos_id):
        raise SmolseekError(
            f"--init {init} already defines the tokenizer and the end token: leave out --tokenizer and --eos-id"
        )
    eos_ids = read_config(init).eos_ids
    if not eos_ids:
        raise SmolseekError(f"--init {init} has no end token: set eos_token_id in its generation_config.json")
    return str(resolve(init)), eos_ids[0]
