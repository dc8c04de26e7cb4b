"""Models of `transformers` imported from their folders: equal numbers, and the round trip."""

from functools import partial

import jax
import numpy as np
import pytest
from hf_models import (
    BY_LENGTH,
    DEBERTA,
    DECODERS,
    DEEPSEEK,
    ENCODER_DECODERS,
    ENCODERS,
    GPT2,
    GRANITE,
    KINDS,
    LLAMA,
    build,
    safetensors,
    torch,
)

from lm.decoding.controls import Controls
from lm.decoding.sampling import Sampling, sample_steps
from lm.interop import huggingface
from lm.models.variables import as_variables

LENGTHS = np.array([17, 9, 1])
SEGMENTS = (np.arange(17) < LENGTHS[:, None]).astype(np.int32)  # padded on the right


def tokens(seed=0, length=17):
    return np.random.default_rng(seed).integers(4, 96, (3, length))


def forget_lengths(model):
    """Let "dynamic" RoPE forget the longest text: it keeps that one's angles until a short one."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        with torch.no_grad():
            model(torch.tensor([[4]]))


def their_logits(model, ids, **inputs):
    forget_lengths(model)
    with torch.no_grad():
        out = model(torch.tensor(ids), **{k: torch.tensor(v) for k, v in inputs.items()})
    return (out.prediction_logits if "prediction_logits" in out else out.logits).numpy()


def our_logits(folder, *inputs):
    model, params = huggingface.load(folder)
    return np.asarray(jax.jit(model.apply)(as_variables(params), *inputs))


def assert_equal_where(ours, theirs, seen):
    np.testing.assert_allclose(ours[seen], theirs[seen], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours[seen].argmax(-1), theirs[seen].argmax(-1))


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_logits_match_transformers(make_theirs, name):
    theirs, folder = make_theirs(name)
    ids = tokens()
    ours = our_logits(folder, ids, None, SEGMENTS)
    if name in BY_LENGTH:
        for row, n in enumerate(LENGTHS):
            expected = their_logits(theirs, ids[row : row + 1, :n])
            assert_equal_where(ours[row : row + 1, :n], expected, np.ones((1, n), bool))
    else:
        expected = their_logits(theirs, ids, attention_mask=SEGMENTS)
        assert_equal_where(ours, expected, SEGMENTS == 1)


ODD = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.4}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("GPT2LMHeadModel", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
        ("Phi3ForCausalLM", LLAMA | {"rope_parameters": ODD, "pad_token_id": None}),  # 3 of 8
        ("DebertaV2ForMaskedLM", DEBERTA | {"legacy": False}),
        ("GraniteMoeForCausalLM", GRANITE | {"attention_multiplier": None}),
        (  # the default number of key heads is that of the largest model
            "DeepseekV3ForCausalLM",
            DEEPSEEK | {"num_key_value_heads": 128, "n_group": 2, "topk_group": 1},
        ),
    ],
)
def test_setting_that_other_values_express_is_read_as_them(tmp_path, name, values):
    theirs = build(name, values)
    theirs.save_pretrained(tmp_path)
    ids = tokens()
    np.testing.assert_allclose(our_logits(tmp_path, ids), their_logits(theirs, ids), atol=1e-4)


GROWING = [
    "llama-yarn",
    "qwen2-yarn",
    "olmo3",
    "qwen2-moe",
    "deepseek-v2",
    "deepseek-v3",
    "mamba2",
    "bamba",
    "qwen3-next",
]
GROWING += ["gpt-oss", "llama4", "smollm3", "granite", "phi3-window", "stablelm"]


# Phi-3's class there reads the text again once it is longer than its context.
KEPT = sorted(BY_LENGTH - {"phi3-partial-longrope"})


@pytest.mark.parametrize("length", [5, 15])
@pytest.mark.parametrize("name", [*GROWING, *KEPT])
def test_text_beyond_the_original_context_continues_as_in_transformers(make_theirs, name, length):
    """Its original context is 12 or 16; each step of both reads keys from a cache."""
    theirs, folder = make_theirs(name)
    prompt, n_new = tokens(length=length)[:1], 12
    forget_lengths(theirs)
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones((1, length)),
            max_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
    model, params = huggingface.load(folder)
    steps = sample_steps(model, params, prompt, n_new, Sampling(temperature=0), 0, Controls())
    new = [int(np.asarray(ids)[0]) for ids in steps]
    assert new == found[0, length:].tolist()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_logits_match_transformers(make_theirs, name):
    theirs, folder = make_theirs(name)
    n_types = getattr(theirs.config, "type_vocab_size", 0)
    pad = theirs.config.pad_token_id
    ids = np.where(SEGMENTS, tokens(), pad)
    types = (np.arange(17) >= 6)[None].repeat(3, 0).astype(np.int32) % max(n_types, 1)
    theirs_types = {"token_type_ids": types} if n_types else {}
    expected = their_logits(theirs, ids, attention_mask=SEGMENTS, **theirs_types)
    ours = our_logits(folder, ids, None, SEGMENTS, types)
    assert_equal_where(ours, expected, SEGMENTS == 1)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_logits_match_transformers(make_theirs, name):
    theirs, folder = make_theirs(name)
    source, target = tokens(), tokens(1, 11)
    expected = their_logits(theirs, source, attention_mask=SEGMENTS, decoder_input_ids=target)
    ours = our_logits(folder, source, target, SEGMENTS)
    assert_equal_where(ours, expected, np.ones_like(target, bool))
    model, params = huggingface.load(folder)
    without = model.apply({"params": params}, source[:1], target[:1])  # one text, no padding
    np.testing.assert_allclose(without, expected[:1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_continues_as_in_transformers(make_theirs, name):
    """Greedily, each step of both with a cache."""
    theirs, folder = make_theirs(name)
    source, n_new = tokens()[:2], 10
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor(source),
            attention_mask=torch.tensor(SEGMENTS[:2]),
            max_new_tokens=n_new,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            forced_eos_token_id=None,
        ).numpy()
    model, params = huggingface.load(folder)
    variables = {"params": params}
    cache = model.apply(variables, source, SEGMENTS[:2], n_new + 1, method="start")
    step = jax.jit(partial(model.apply, method="decode"))
    new, ones = found[:, :1], np.ones((2, 1), np.int32)
    for i in range(n_new):
        logits, cache = step(variables, new[:, -1:], i * ones, ones, cache)
        new = np.append(new, logits[:, -1].argmax(-1)[:, None], axis=1)
    np.testing.assert_array_equal(new, found)


@pytest.mark.parametrize("name", KINDS)
def test_export_of_an_import_is_what_was_imported(make_theirs, name, tmp_path):
    theirs, folder = make_theirs(name)
    model, params = huggingface.load(folder)
    huggingface.save(model, params, tmp_path, model_type=theirs.config.model_type)
    before, after = (
        safetensors.load_file(where / "model.safetensors") for where in (folder, tmp_path)
    )
    assert sorted(before) == sorted(after)
    for tensor in before:
        assert before[tensor].tobytes() == after[tensor].tobytes(), tensor
        assert before[tensor].shape == after[tensor].shape
    again, loading = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys"))
    inputs = {"decoder_input_ids": tokens(1)} if name in ENCODER_DECODERS else {}
    np.testing.assert_allclose(
        their_logits(again.eval(), tokens(), **inputs),
        their_logits(theirs, tokens(), **inputs),
        rtol=0,
        atol=1e-5 if name.startswith("qwen3-next") else 0,  # torch's triangular solver
    )


PACKED = [
    "mamba2-groups",
    "bamba",
    "qwen3-next",
    "gpt2",
    "llama-3.1",
    "mixtral",
    "gemma3",
    "olmo3",
    "gpt-oss",
    "llama4",
    "bert",
    "roberta",
]


@pytest.mark.parametrize("name", [*PACKED, "llama-dynamic", "llama-longrope"])
def test_packed_texts_give_the_logits_of_each_alone(make_theirs, name):
    theirs, folder = make_theirs(name)
    ids, cut = tokens()[:1], 3  # the second is longer than the original context of some
    segments = np.where(np.arange(17) < cut, 1, 2)[None]
    positions = np.concatenate([np.arange(cut), np.arange(17 - cut)])[None]
    ours = our_logits(folder, ids, positions, segments)
    for part in (slice(0, cut), slice(cut, 17)):
        expected = their_logits(theirs, ids[:, part])
        assert_equal_where(ours[:, part], expected, np.ones(expected.shape[:2], bool))
