"""`lm tokenizer train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryFile

from lm import config as configs
from lm.cli.arguments import (
    Overrides,
    Parser,
    at_least,
)
from lm.cli.used_keys import Patterns
from lm.errors import UserError

# Keys for reading a corpus.
_READING = (
    "data.directory",
    "data.field",
    "data.documents",
    "data.split",
    "data.validation_source",
    "data.validation_fraction",
    "data.validation_seed",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--source", required=True, help="training text, in the form of data.source")
    parser.add_argument("--vocab_size", type=at_least(2), required=True, metavar="N", help="pieces")
    kind = "segmentation algorithm"
    parser.add_argument("--model_type", choices=("bpe", "unigram"), default="bpe", help=kind)
    parser.add_argument("--output", required=True, metavar="FILE.model", help="model to write")


def used_keys(args: argparse.Namespace) -> Patterns:
    """Return patterns of the configuration keys that the command uses."""
    return _READING


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """Run the command; return the exit code."""
    from lm.config.registry import listed
    from lm.data.dataset import open_corpus
    from lm.data.tokenizers.sentencepiece import train_sentencepiece

    config = configs.default()
    config.data.source = args.source
    for path, text in overrides.items():
        configs.set_value(config, path, configs.parse_value(path, text))
    configs.validate(config)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=output.parent):
        pass  # fail before the work if the folder is not writable
    texts = (
        chunk.text
        for spec in listed(config.data.source)
        for chunk in open_corpus(spec, config.data, "train").chunks()
    )
    try:
        model = train_sentencepiece(texts, args.vocab_size, args.model_type)
    except UserError as error:  # the vocabulary size is not possible
        message = str(error).replace("--config.data.tokenizer_vocab_size", "--vocab_size")
        raise UserError(message) from error
    output.write_bytes(model)
    print(f"{output}: {args.vocab_size} pieces; use --config.data.tokenizer=sentencepiece:{output}")
    return 0
