"""Forced and suppressed tokens of a model folder are those of `transformers`' `generate`."""

import json
from types import SimpleNamespace

import pytest
import tokenizers
from hf_models import transformers

from lm.data.tokenizers.folder import FolderTokenizer
from lm.data.tokenizers.hf import BYTE_CHARACTERS
from lm.interop.generation_settings import LANGUAGES, banned_tokens, forced_tokens

NAMES = "<|start|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"
START, EN, ZH, TRANSLATE, TRANSCRIBE, PLAIN = range(256, 262)
TABLES = {
    "lang_to_id": {"<|en|>": EN, "<|zh|>": ZH},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "no_timestamps_token_id": PLAIN,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({BYTE_CHARACTERS[i]: i for i in range(256)}, [])
    )
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in NAMES])
    made.save(str(folder / "tokenizer.json"))
    return FolderTokenizer.read(folder).files()


def tokenizer(files, generation=None, about=None):
    """The tokenizer of a folder with these values in generation_config.json and config.json."""
    stated = {"generation_config.json": generation, "config.json": about}
    return FolderTokenizer.from_files(
        files | {name: json.dumps(x).encode() for name, x in stated.items() if x is not None}
    )


@pytest.mark.parametrize(
    "generation",
    [
        TABLES | {"language": "en", "task": "translate"},
        TABLES | {"language": "<|ZH|>", "forced_decoder_ids": [[1, EN], [2, TRANSLATE]]},
        TABLES | {"language": "Mandarin", "task": "transcribe", "is_multilingual": True},
        {"language": "en", "lang_to_id": TABLES["lang_to_id"]},
        TABLES | {"forced_decoder_ids": [[1, ZH], [2, TRANSLATE]]},
        TABLES | {"forced_decoder_ids": [[1, ZH], [2, TRANSCRIBE], [3, PLAIN]]},
        {"forced_decoder_ids": [[1, PLAIN]]},
        {"no_timestamps_token_id": PLAIN},
    ],
)
def test_forced_tokens_match_generate(files, generation):
    config = transformers.GenerationConfig(decoder_start_token_id=START, **generation)
    if not hasattr(config, "return_timestamps"):
        config.return_timestamps = False
    model = SimpleNamespace(device="cpu")
    arguments = model, None, 1, config, SimpleNamespace(), None, {}
    find = transformers.WhisperForConditionalGeneration._retrieve_init_tokens
    ids = find(*arguments)[0].tolist()
    assert ids[0] == START
    found = forced_tokens(tokenizer(files, generation))
    assert found == [NAMES[i - START] for i in ids[1:]]
    assert len(found) == len(ids) - 1 >= 1


@pytest.mark.parametrize(
    "generation",
    [
        TABLES,
        TABLES | {"task": "transcribe"},
        TABLES | {"forced_decoder_ids": [[1, None], [2, TRANSCRIBE]]},
        TABLES | {"forced_decoder_ids": [[2, EN]]},
        TABLES | {"forced_decoder_ids": [1, 2]},
        TABLES | {"language": "klingon"},
        TABLES | {"language": ["en", "zh"]},
        TABLES | {"lang_to_id": [], "language": "en"},
        TABLES | {"language": "en", "task": "sing"},
        {"no_timestamps_token_id": 999},
    ],
)
def test_language_to_be_detected_and_unknown_ones_force_nothing(files, generation):
    assert forced_tokens(tokenizer(files, generation)) == []


def test_suppressed_tokens_are_banned(files):
    both = {"suppress_tokens": [1, 220, 300, -1, True], "begin_suppress_tokens": [7, 256]}
    assert banned_tokens(tokenizer(files, both), 262) == "1,220,^7,^256"
    assert banned_tokens(tokenizer(files, {}, both), 262) == ""
    assert banned_tokens(tokenizer(files, None, both | {"suppress_tokens": None}), 9) == "^7"
    # Of the class.
    assert banned_tokens(tokenizer(files, None, {"model_type": "whisper"}), 51865) == "^220,^50256"
    assert banned_tokens(None, 9) == ""


def test_all_languages_are_known():
    from transformers.models.whisper import tokenization_whisper

    assert tokenization_whisper.TO_LANGUAGE_CODE == LANGUAGES
