"""Whisper imported from folders of `transformers`: equal numbers, and the round trip."""

import copy
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers
from hf_models import config_of, safetensors, torch, transformers

from lm.data.tokenizer import load_saved_tokenizer
from lm.data.tokenizers.hf import BYTE_CHARACTERS
from lm.decoding.batch import decode_best
from lm.decoding.beam import BeamOptions
from lm.decoding.controls import Controls
from lm.decoding.prompts import first_inputs
from lm.errors import UserError
from lm.experiment import build
from lm.interop import huggingface
from lm.interop.import_export import export_run, import_run
from lm.runs.saved_params import restore_params
from lm.runs.workdir import load_run_config

WHISPER = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 3),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40),
    "vocab_size": 57,
    "num_mel_bins": 7,
    "max_source_positions": 13,
    "max_target_positions": 19,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "decoder_start_token_id": 2,
    "begin_suppress_tokens": None,
}
KINDS = {
    "deep-decoder": WHISPER,
    "untied-relu": WHISPER
    | {"tie_word_embeddings": False, "activation_function": "relu", "decoder_layers": 1}
    | {"encoder_attention_heads": 4, "encoder_ffn_dim": 17}
    | {"max_source_positions": 50, "num_mel_bins": 128, "scale_embedding": True},
}
POSITIONS = "model.encoder.embed_positions.weight"
PREFIX = (2, 5, 9)  # <|startoftranscript|> and two tokens that targets begin with


def random_model(values):
    """A model whose parameters have no special values."""
    torch.manual_seed(0)
    kind = transformers.WhisperForConditionalGeneration
    model = kind(config_of(kind.__name__, values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != POSITIONS:
                scale = "norm" in name and name.endswith("weight")
                parameter.copy_(torch.randn_like(parameter) * 0.2 + float(scale))
    return model


@pytest.fixture(scope="module", params=KINDS)
def theirs(request, tmp_path_factory):
    """A random model, and its folder."""
    model = random_model(KINDS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40KB" if "untied" in request.param else "1GB")
    return model, folder


def features(model):
    c, rng = model.config, np.random.default_rng(0)
    shape = 2, 2 * c.max_source_positions, c.num_mel_bins
    return rng.normal(size=shape).astype(np.float32)


def their_logits(model, source_BFM, tokens):
    with torch.no_grad():
        inputs = torch.tensor(source_BFM).mT, torch.tensor(tokens)
        return model(input_features=inputs[0], decoder_input_ids=inputs[1]).logits.numpy()


def test_logits_and_greedy_tokens_match_transformers(theirs):
    model, folder = theirs
    source = features(model)
    ours, params = huggingface.load(folder)
    tokens = np.random.default_rng(1).integers(3, 57, (2, 19))
    found = jax.jit(ours.apply)({"params": params}, source, tokens)
    np.testing.assert_allclose(found, their_logits(model, source, tokens), rtol=1e-4, atol=2e-4)

    with torch.no_grad():
        expected = transformers.GenerationMixin.generate(
            model,
            input_features=torch.tensor(source).mT,
            decoder_input_ids=torch.tensor([PREFIX] * 2),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        ).numpy()
    variables, ones = {"params": params}, np.ones((2, 1), np.int32)
    segments = np.ones((2, source.shape[1] // 2), np.int32)
    cache = ours.apply(variables, source, segments, 14, method="start")
    step = jax.jit(partial(ours.apply, method="decode"))
    logits, cache = step(variables, *first_inputs(PREFIX, 2), cache)
    new = np.array([PREFIX] * 2)
    for i in range(12):
        new = np.append(new, logits[:, -1].argmax(-1)[:, None], axis=1)
        logits, cache = step(variables, new[:, -1:], (3 + i) * ones, ones, cache)
    np.testing.assert_array_equal(new, expected)
    assert len(np.unique(new)) > 5


def test_export_of_an_import_is_what_was_imported(theirs, tmp_path):
    model, folder = theirs
    huggingface.save(*huggingface.load(folder), tmp_path)
    after = safetensors.load_file(tmp_path / "model.safetensors")
    before = {}
    for file in folder.glob("*.safetensors"):
        before |= safetensors.load_file(file)
    assert sorted(before) == sorted(after)
    np.testing.assert_allclose(before.pop(POSITIONS), after.pop(POSITIONS), atol=1e-5)
    assert {name: x.tobytes() for name, x in before.items()} == {
        name: x.tobytes() for name, x in after.items()
    }
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys"))
    # A recording as long as the encoder hears becomes as many frames as it reads.
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path)
    c, seconds = model.config, 0.02 * model.config.max_source_positions
    heard = extractor(np.zeros(round(16_000 * seconds)), sampling_rate=16_000)["input_features"][0]
    assert heard.shape == (c.num_mel_bins, 2 * c.max_source_positions)
    np.testing.assert_allclose(
        their_logits(again.eval(), heard.T[None], [[2, 3]]),
        their_logits(model, heard.T[None], [[2, 3]]),
        atol=1e-5,
    )


@pytest.mark.parametrize("theirs", ["deep-decoder"], indirect=True)
@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("config.json", {"encoder_attention_heads": 5}, "not divisible by encoder_attention_head"),
        ("config.json", {"decoder_ffn_dim": 48}, r"fc1.weight has the shape \(40, 24\), not "),
        ("config.json", {"activation_function": "mish"}, "activation_function=mish is not supp"),
        ("config.json", {"max_source_positions": 12}, r"embed_positions.weight has the shape \(13"),
        (
            "config.json",
            {"num_mel_bins": 8},
            r"conv1.weight has the shape \(24, 7, 3\), not \(24, 8",
        ),
        ("config.json", {"num_mel_bins": 0}, "num_mel_bins is less than 1"),
        ("config.json", {"num_mel_bins": "80"}, "num_mel_bins is not a number from 0"),
        ("preprocessor_config.json", {"sampling_rate": 8000}, "sampling_rate=8000 is not supp"),
        (
            "preprocessor_config.json",
            {"hop_length": 80},
            "hop_length=80 is not supported, only 160",
        ),
        ("preprocessor_config.json", {"feature_size": 80}, "feature_size=80 is not supported"),
        ("preprocessor_config.json", {"chunk_length": 30}, "chunk_length=30 is not supported"),
        ("preprocessor_config.json", {"feature_extractor_type": "X"}, "type='X' is not supported"),
        (
            "processor_config.json",
            {"feature_extractor": {"n_fft": 512}},
            "feature_extractor/n_fft=512 is not supported, only 400",
        ),
    ],
)
def test_another_kind_is_rejected(theirs, tmp_path, file, values, expected):
    folder = shutil.copytree(theirs[1], tmp_path / "model")
    about = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(about | values))
    with pytest.raises(UserError, match=expected):
        huggingface.load(folder)


@pytest.mark.parametrize("theirs", ["deep-decoder"], indirect=True)
def test_positions_may_be_rounded_and_not_others(theirs, tmp_path):
    model, folder = copy.deepcopy(theirs[0]), tmp_path / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    huggingface.load(folder)
    with torch.no_grad():
        model.model.encoder.embed_positions.weight[3, 2] += 0.1
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"embed_positions.weight has unusual values"):
        huggingface.load(folder)


TOKENS = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")


def test_imported_folder_transcribes_like_transformers(tmp_path, one_device):
    """Greedily, with the language, task and suppressed tokens of its generation_config.json."""
    tokenizer = transformers.WhisperTokenizer(
        vocab={BYTE_CHARACTERS[i]: i for i in range(256)}, merges=[]
    )
    added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in TOKENS]
    tokenizer.add_tokens(added)
    start, *prefix = tokenizer.convert_tokens_to_ids(list(TOKENS))
    extractor = transformers.WhisperFeatureExtractor(feature_size=7, chunk_length=1)
    there = tmp_path / "there"
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(there)
    values = (
        WHISPER
        | {"vocab_size": 261, "max_source_positions": 50}
        | {
            "decoder_start_token_id": start,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 256),
        }
    )
    model = random_model(values)
    source = features(model)
    settings = {
        "language": "English",
        "lang_to_id": {"<|en|>": prefix[0]},
        "task_to_id": {"transcribe": prefix[1]},
        "no_timestamps_token_id": prefix[2],
        "decoder_start_token_id": start,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 256),
    }

    def theirs():
        found = model.generate(torch.tensor(source).mT, max_new_tokens=12).tolist()
        return [[i for i in row if i < 256] for row in found]

    model.generation_config = transformers.GenerationConfig(**settings)
    (first, *_, last), (other, *_) = theirs()
    settings |= {"suppress_tokens": [last, other], "begin_suppress_tokens": [first, 256]}
    model.generation_config = transformers.GenerationConfig(**settings)
    model.save_pretrained(there)
    expected = theirs()

    run, lines = tmp_path / "run", []
    import_run(there, run, {}, lines.append)
    assert f"targets begin with {''.join(TOKENS[1:])}" in lines[0]
    config = load_run_config(run, {})
    assert config.data.target_prefix == ",".join(TOKENS[1:])
    data = config.data
    assert (data.sequence_length, data.target_length, data.n_mels) == (50, 19, 7)
    ours = load_saved_tokenizer(run / "tokenizer")
    experiment = build(config, jax.devices(), ours)
    params, _ = restore_params(experiment, run, pytest.fail)
    options = BeamOptions(1, 12, 0.0, Controls.from_config(config, ours))
    assert decode_best(experiment, params, ours, list(source), options) == expected
    assert expected[0] != expected[1]

    export_run(run, tmp_path / "back", 1, False, "float32", lines.append)
    processor = transformers.WhisperProcessor.from_pretrained(tmp_path / "back")
    assert processor.feature_extractor.nb_max_frames == 100
    tokenizer = transformers.WhisperTokenizer.from_pretrained(there)
    assert processor.tokenizer("hi").input_ids == tokenizer("hi").input_ids
    again = type(model).from_pretrained(tmp_path / "back").eval()
    targets = [[start, *prefix, *row[:4]] for row in expected]
    np.testing.assert_allclose(
        their_logits(again, source, targets), their_logits(model, source, targets), atol=1e-5
    )
