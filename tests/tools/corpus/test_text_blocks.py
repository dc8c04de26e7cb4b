"""Block of `lm corpus`: personal data, words, languages."""

import pickle
import time

import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st

from lm.tools.corpus.text_blocks import Language, PersonalData, UnicodeWords, likely_languages

MASKED = PersonalData(regions=("US", "GB", "DE"))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("jane.doe@example.org, mailto:x@y.co.uk.", "<email>, mailto:<email>."),
        ("anna.müller@grün.de, иван@почта.рф", "<email>, <email>"),
        ("请联系anna@firma.de谢谢", "请联系<email>谢谢"),
        ("8.8.8.8, 10.0.0.1, 127.0.0.1", "<ip>, 10.0.0.1, 127.0.0.1"),
        ("v1.2.3.4 and 1.2.3.4.5 and 8.8.8.8.", "v1.2.3.4 and 1.2.3.4.5 and <ip>."),
        ("2001:4860:4860::8888 at 12:30:45, std::dead::beef", "<ip> at 12:30:45, std::dead::beef"),
        ("call (212) 555-0123 or +49 30 901820", "call <phone> or <phone>"),
        ("in 1999-2003, id 2125550123, 3.14159265", "in 1999-2003, id 2125550123, 3.14159265"),
        ("DE89 3704 0044 0532 0130 00 AND MORE", "<iban> AND MORE"),
        ("DE88 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        ("4111 1111 1111 1111, 4111-1111-1111-1112", "<card>, 4111-1111-1111-1112"),
    ],
)
def test_personal_data_is_masked_and_nothing_else(text, masked):
    assert MASKED.format(text) == masked


@given(st.text(), st.text())
def test_address_is_masked_in_any_text(before, after):
    assert "jane.doe" not in MASKED.format(f"{before} jane.doe@example.org {after}")


@given(st.text(alphabet=st.characters(exclude_categories=("Nd", "Cs"), exclude_characters="@:")))
def test_text_without_digits_and_addresses_stays(text):
    assert MASKED.format(text) == text


@pytest.mark.parametrize("part", ["abc+/", "A1", "ab:", "a.b-", "@", "@a"])
def test_time_is_linear_in_long_texts_without_spaces(part):
    start = time.monotonic()
    MASKED.format(part * 50_000)
    assert time.monotonic() - start < 5


def test_words_of_scripts_with_and_without_spaces():
    words = UnicodeWords()
    found = words.word_tokenize("Don't stop: café 中文")
    assert found == ["Don't", "stop", ":", "café", "中", "文"]
    assert pickle.loads(pickle.dumps(words)) == words


@given(st.text())
def test_words_are_the_text_without_spaces(text):
    joined = "".join(UnicodeWords().word_tokenize(text))
    assert joined == "".join(c for c in text if not c.isspace() or c in "\x1c\x1d\x1e\x1f")


def test_language_is_noted_and_the_reason():
    block = Language(("en", "zh"))
    chinese = "我们今天下午在图书馆里学习中文，明天去北京看朋友。"
    texts = {"en": "This is plainly English text.", "zh": chinese}
    for language, text in texts.items():
        document = Document(text, "id")
        assert block.filter(document) is True
        assert document.metadata["language"] == language
    assert block.filter(Document("Das ist ein deutscher Satz über Hunde.", "id")) == (False, "de")


@pytest.mark.parametrize(
    ("text", "likely"),
    [
        ("睿澤先寰海，功成展武韶。戈鋋清外壘，文物盛中朝。", {"zh", "wuu", "yue", "lzh"}),
        ("The garden of my teacher is near the sea.", {"en"}),
        ("Home Log in Cart (0)\n" * 5, set()),
        (" ".join(f"{i / 151:.4f}" for i in range(150)), {"zxx"}),
    ],
)
def test_close_languages_share_their_probability(text, likely):
    found = set(likely_languages(Document(text, "x")))
    assert found <= likely
    assert bool(found) == bool(likely)


@pytest.mark.parametrize("score", ["0.9", None, True, 98.7, float("nan"), 0.9])
def test_language_label_of_the_source_is_overwritten(score):
    """Columns of data sets have other names of languages, and scores of other kinds."""
    noted = {"language": "eng_Latn" if score == 0.9 else "de", "language_score": score}
    assert likely_languages(Document("The garden of my teacher is near.", "x", [], noted)) == ["en"]
    noted = {"language": "de", "language_score": 0.9}
    assert likely_languages(Document("The garden of my teacher is near.", "x", [], noted)) == ["de"]
