"""Special token ids that objectives insert around, between or in place of text tokens.

Ids that a vocabulary lacks are assigned after the tokenizer's last id, known only to the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lm.config.registry import listed
from lm.data.tokenizer import Template, Tokenizer
from lm.errors import UserError

_NO_TEMPLATE = Template()


@dataclass(frozen=True)
class SpecialTokens:
    """Special token ids by purpose; several may be equal, as BERT's bos is its [CLS].

    Attributes:
        pad: padding.
        bos: start of a decoder input.
        eos: end of a text.
        cls: start of an encoder input.
        sep: end of each text of an encoder input.
        mask: replacement of a masked token.
        vocab_size: vocabulary size of the tokenizer.
        template: ids around an encoder–decoder's source; without ids after it, eos ends it.
    """

    pad: int
    bos: int
    eos: int
    cls: int
    sep: int
    mask: int
    vocab_size: int
    template: Template = _NO_TEMPLATE

    @property
    def around_source(self) -> Template:
        """Ids before and after the source of an encoder–decoder."""
        return Template(self.template.before, self.template.after or (self.eos,))

    @property
    def between(self) -> tuple[int, ...]:
        """Ids between the two texts of an encoder input: [SEP], or those of the model folder."""
        return self.template.between or (self.sep,)

    def source(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Return the input of an encoder–decoder: truncated tokens with the ids around them."""
        around = self.around_source
        kept = tokens[: max(0, length - len(around.before) - len(around.after))]
        return np.concatenate([around.before, kept, around.after]).astype(np.int32)

    @property
    def ids(self) -> tuple[int, ...]:
        """Special ids in the order of the fields."""
        return (self.pad, self.bos, self.eos, self.cls, self.sep, self.mask)

    def n_extra_ids(self, *used: int) -> int:
        """Return the number of ids after the tokenizer's, up to the largest of `used`."""
        return max(0, max(used) + 1 - self.vocab_size)


def special_tokens(tokenizer: Tokenizer | None) -> SpecialTokens:
    """Return the special ids of a tokenizer; all 0 without one, when only shapes matter.

    Ids from a model folder take precedence; others are found under their usual names. Fallbacks:
    pad is eos, bos is pad (T5), cls is bos, sep is eos. A missing end-of-text gets the first id
    after the vocabulary, a missing mask the next.
    """
    if tokenizer is None:
        return SpecialTokens(0, 0, 0, 0, 0, 0, vocab_size=1)

    def named(role: str, *names: str, default: int) -> int:
        stated = tokenizer.role_id(role)
        return _first(stated, *map(tokenizer.token_id, names), default=default)

    free = tokenizer.vocab_size
    eos = _first(tokenizer.eos_id, tokenizer.bos_id, tokenizer.token_id("[SEP]"), default=free)
    pad = named("pad", "[PAD]", "<pad>", default=eos)
    bos = _first(tokenizer.role_id("decoder_start"), tokenizer.bos_id, default=pad)
    return SpecialTokens(
        pad=pad,
        bos=bos,
        eos=eos,
        cls=named("cls", "[CLS]", "<cls>", default=bos),
        sep=named("sep", "[SEP]", "<sep>", default=eos),
        mask=named("mask", "[MASK]", "<mask>", default=max(free, eos + 1)),
        vocab_size=free,
        template=tokenizer.template if tokenizer.template.after else _NO_TEMPLATE,
    )


def target_start(tokenizer: Tokenizer | None, prefix: str = "") -> tuple[int, ...]:
    """Return the ids before a target in a decoder's input: the start token and a prefix.

    Args:
        tokenizer: tokenizer of the data; None where only shapes matter, and all ids are 0.
        prefix: `data.target_prefix`.

    Raises:
        UserError: a name in the prefix is not a token.
    """
    names = listed(prefix)
    ids = [tokenizer.token_id(name) if tokenizer else 0 for name in names]
    if unknown := [name for name, i in zip(names, ids, strict=True) if i is None]:
        raise UserError(f"--config.data.target_prefix: the tokenizer has no token {unknown[0]!r}")
    return special_tokens(tokenizer).bos, *(i for i in ids if i is not None)


def _first(*ids: int | None, default: int) -> int:
    return next((i for i in ids if i is not None), default)
