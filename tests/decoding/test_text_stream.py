"""Parts of a growing text: together they are the whole text, whatever the tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lm.data.tokenizers.basic import ByteTokenizer
from lm.data.tokenizers.hf import HuggingFaceTokenizer
from lm.decoding.text_stream import TextStream, text_after, text_before


def llama():
    """Bytes that a decoder replaces as a whole where they are no UTF-8, and two letters."""
    ids = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], byte_fallback=True))
    fallback, fuse = tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
    made.decoder = tokenizers.decoders.Sequence([fallback, fuse])
    return HuggingFaceTokenizer(made.to_str().encode())


TOKENIZERS = {"bytes": ByteTokenizer(), "byte fallback": llama()}
LIKELY = st.sampled_from([*"ab é€😀".encode(), 0x80, 0xE2, 0xF0])
STOPS = st.lists(st.text("ab é€\ufffd", min_size=1, max_size=3), max_size=2)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    prompt=st.lists(LIKELY, max_size=40),
    new=st.lists(LIKELY, max_size=80),
    stop=STOPS,
    cuts=st.sets(st.integers(1, 79)),
)
def test_parts_concatenate_to_the_text(name, prompt, new, stop, cuts):
    tokenizer = TOKENIZERS[name]
    prompt = [*prompt, ord("a")]  # a prompt is whole characters
    stream = TextStream(tokenizer, prompt, stop)
    edges = [0, *sorted(cuts), len(new)]
    parts = [stream.push(new[a:b]) for a, b in pairwise(edges)]
    whole = text_before(stop, text_after(tokenizer, prompt, new))
    assert whole.startswith("".join(parts))
    assert "".join(parts) + stream.finish() == whole


def test_decoding_cost_per_token_is_constant(monkeypatch):
    lengths = []

    class Counting(ByteTokenizer):
        def decode(self, ids):
            lengths.append(len(ids))
            return super().decode(ids)

    stream = TextStream(Counting(), [97] * 1000)
    for i in range(3000):
        stream.push([0xFF if i % 100 else 97])
    assert max(lengths) < 64
    assert len(lengths) < 20_000
