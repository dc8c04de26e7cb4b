"""The ids that objectives put around, between and in place of a text's tokens.

What a vocabulary lacks gets an id of its own beyond the tokenizer's, which only the model knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from lm.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class SpecialTokens:
    """Ids by what they are for; several may be one id, as BERT's bos is its [CLS].

    pad: fills rows up; bos: starts a decoder's input; eos: ends a text; cls, sep: start and
    separate an encoder's texts; mask: hides a token; vocab_size: of the tokenizer.
    """

    pad: int
    bos: int
    eos: int
    cls: int
    sep: int
    mask: int
    vocab_size: int

    @property
    def ids(self) -> tuple[int, ...]:
        return (self.pad, self.bos, self.eos, self.cls, self.sep, self.mask)

    def n_extra_ids(self, *used: int) -> int:
        """How many ids beyond the tokenizer's a model needs to have all that are `used`."""
        return max(0, max(used) + 1 - self.vocab_size)


def special_tokens(tokenizer: Tokenizer | None) -> SpecialTokens:
    """The special ids of a tokenizer; all are 0 where there is none and only shapes matter.

    Ids are found under their usual names. What has none falls back: pad to eos, bos to pad (T5),
    cls to bos, sep to eos. Where no id is known to end a text, the first beyond the vocabulary
    delimits texts; where no mask is known, the next one masks.
    """
    if tokenizer is None:
        return SpecialTokens(0, 0, 0, 0, 0, 0, vocab_size=1)

    def named(*names: str, otherwise: int) -> int:
        return _first(*map(tokenizer.token_id, names), otherwise=otherwise)

    free = tokenizer.vocab_size
    eos = _first(tokenizer.eos_id, tokenizer.bos_id, tokenizer.token_id("[SEP]"), otherwise=free)
    pad = named("[PAD]", "<pad>", otherwise=eos)
    bos = _first(tokenizer.bos_id, otherwise=pad)
    return SpecialTokens(
        pad=pad,
        bos=bos,
        eos=eos,
        cls=named("[CLS]", "<cls>", otherwise=bos),
        sep=named("[SEP]", "<sep>", otherwise=eos),
        mask=named("[MASK]", "<mask>", otherwise=max(free, eos + 1)),
        vocab_size=free,
    )


def _first(*ids: int | None, otherwise: int) -> int:
    return next((i for i in ids if i is not None), otherwise)
