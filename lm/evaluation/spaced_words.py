"""Texts whose words are between spaces, so that the perplexity of a word means something."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lm.data.store import TokenStore
from lm.data.tokenizer import Tokenizer

_PLACES, _TOKENS = 8, 2000  # of a sample from each store
# Chinese, Japanese, Thai, Lao, Tibetan, Burmese and Khmer; Korean has spaces.
_UNSPACED = re.compile(
    r"[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\ua9e0-\ua9ff\uaa60-\uaa7f]"
)
_OF_CODE = re.compile(r"[_(){}\[\]<>=;\\*#@$%^&|~+/]")


def has_spaced_words(text: str) -> bool:
    """Return whether a text is of words between spaces: no script without spaces, no code."""
    n_letters = sum(character.isalpha() for character in text)
    n_visible = sum(not character.isspace() for character in text)
    return (
        10 * len(_UNSPACED.findall(text)) < max(n_letters, 1)
        and 15 * len(_OF_CODE.findall(text)) < n_visible
    )


def stores_have_words(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> bool:
    """Return `has_spaced_words` of a sample of the stores' text."""
    texts = []
    for store in stores:
        last = max(store.n_tokens - _TOKENS, 0)
        starts = sorted({round(last * i / (_PLACES - 1)) for i in range(_PLACES)})
        parts = (store.tokens[start : start + _TOKENS] for start in starts)
        texts += [tokenizer.decode(part.tolist()) for part in parts]
    return has_spaced_words("".join(texts))
