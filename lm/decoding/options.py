"""From the section "decode" of a resolved configuration to the values that decoding takes."""

from __future__ import annotations

from ml_collections import ConfigDict

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.decoding.beam import Search
from lm.decoding.controls import Controls
from lm.objectives.special_tokens import special_tokens


def search_of(config: ConfigDict, tokenizer: Tokenizer) -> Search:
    """The search that a configuration asks for."""
    decode = config.decode
    controls = controls_of(config, tokenizer)
    return Search(decode.beam_size, decode.max_length, decode.length_penalty, controls)


def controls_of(config: ConfigDict, tokenizer: Tokenizer) -> Controls:
    """Return the end token, and what a configuration forbids and discourages."""
    decode = config.decode
    # A target always ends, if need be with an id beyond the tokenizer's; a document may not.
    has_targets = "encoder_decoder" in config.model.family
    end_id = special_tokens(tokenizer).eos if has_targets else tokenizer.eos_id
    words = [word for word in map(str.strip, decode.banned.split(",")) if word]
    return Controls(
        end_id, decode.repetition_penalty, banned_sequences(tokenizer, words), decode.min_length
    )


def banned_sequences(tokenizer: Tokenizer, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """How the tokenizer writes the words, at the start of a text and after a space.

    What a vocabulary of pieces could spell in other ways as well is banned in these only. A word
    that is no entry of a vocabulary of words cannot be written anyway.
    """
    unknown = tokenizer.token_id("<unk>")
    spelt = (
        tuple(tokenizer.encode(text).tolist()) for word in words for text in (word, f" {word}")
    )
    return tuple(dict.fromkeys(ids for ids in spelt if ids and unknown not in ids))
