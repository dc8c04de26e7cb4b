import io

import pytest
import sentencepiece

from lm.data.special_tokens import special_tokens
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer
from lm.data.tokenizers.hf import HuggingFaceTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer


def vocabulary(*words):
    tokenizers = pytest.importorskip("tokenizers")
    ids = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.WordLevel(ids, unk_token=words[-1])
    return HuggingFaceTokenizer(tokenizers.Tokenizer(model).to_str().encode())


def sentence_pieces(**ids):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c ab bc"] * 9),
        model_writer=model,
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=3,
        **ids,
    )
    return SentencePieceTokenizer(model.getvalue())


def check(tokenizer, **expected):
    found = special_tokens(tokenizer)
    assert {name: getattr(found, name) for name in expected} == expected
    return found


def test_names_of_bert():
    found = check(
        vocabulary("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"),
        pad=0, bos=2, eos=3, cls=2, sep=3, mask=4,
    )  # fmt: skip
    assert found.n_extra_ids(found.cls, found.sep, found.mask) == 0


def test_names_of_roberta():
    tokenizer = vocabulary("<s>", "<pad>", "</s>", "<unk>", "a", "<mask>")
    check(tokenizer, pad=1, bos=0, eos=2, cls=0, sep=2, mask=5)


def test_names_of_albert_whose_pieces_have_neither_bos_nor_eos():
    names = ["[CLS]", "[SEP]", "[MASK]"]
    tokenizer = sentence_pieces(pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=names)
    check(tokenizer, pad=0, bos=0, eos=3, cls=2, sep=3, mask=4)


def test_names_of_xlnet_which_has_both_kinds():
    tokenizer = vocabulary("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "a")
    check(tokenizer, pad=5, bos=1, eos=2, cls=3, sep=4, mask=6)


def test_t5_starts_its_decoder_with_pad():
    tokenizer = sentence_pieces(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    found = check(tokenizer, pad=0, bos=0, eos=1)
    assert found.n_extra_ids(found.bos, found.eos) == 0


def test_our_sentence_pieces_frame_with_bos_and_eos_and_lack_a_mask():
    tokenizer = sentence_pieces()
    found = check(tokenizer, bos=1, eos=2, cls=1, sep=2, mask=tokenizer.vocab_size)
    assert found.n_extra_ids(found.bos, found.eos) == 0
    assert found.n_extra_ids(found.cls, found.mask) == 1


def test_bytes_have_one_delimiter_for_all():
    check(ByteTokenizer(), pad=256, bos=256, eos=256, cls=256, sep=256, mask=257)


def test_missing_special_tokens_follow_the_vocabulary():
    found = check(CharTokenizer("abc"), pad=3, bos=3, eos=3, cls=3, sep=3, mask=4)
    assert found.n_extra_ids(found.bos, found.eos) == 1
    assert found.n_extra_ids(found.cls, found.sep, found.mask) == 2


def test_without_a_tokenizer_all_ids_are_zero():
    assert special_tokens(None).ids == (0, 0, 0, 0, 0, 0)
