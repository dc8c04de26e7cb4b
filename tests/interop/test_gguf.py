"""`lm export --format gguf`: read back by the package `gguf`, tensor for tensor.

That llama.cpp computes the same is checked by scripts/check_gguf.py.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hf_models import LLAMA, build
from runs import random_run

from lm.cli import main
from lm.data.tokenizers.basic import ByteTokenizer

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

KINDS = ("gpt2", "llama-grouped-tied", "llama-3.1", "mixtral", "qwen2", "qwen3", "gemma")
REFUSED = {
    "mistral-window": "model.window=5",
    "llama-dynamic": "model.rope_scaling=dynamic",
    "gpt2-untied-wide": "model.activation=gelu_erf, only gelu_tanh",
    "gemma2": "model.attention_scale",
    "qwen3-biases": "model.attention_bias",
    "t5": "GGUF export does not support T5ForConditionalGeneration",
    "bert": "GGUF export does not support BertForMaskedLM",
}


def export(folder, tmp_path, *words):
    run, to = tmp_path / "run", tmp_path / "to"
    assert main(["import", "--from", str(folder), "--workdir", str(run)]) == 0
    code = main(["export", "--workdir", str(run), "--to", str(to), "--format", "gguf", *words])
    return code, to / "model.gguf"


def read(file) -> tuple[dict, dict]:
    """Values by key, and tensors as numpy arrays of float32 by name."""
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    found = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
        for t in reader.tensors
    }
    return values, found


def theirs_again(name: str, values: np.ndarray, architecture: str, values_of: dict) -> np.ndarray:
    """A tensor of llama.cpp in the layout of `transformers`."""
    if architecture == "gpt2" and re.search("attn_qkv.w|attn_output.w|ffn_(up|down).w", name):
        return values.T
    if architecture == "gemma" and "norm" in name:
        return values - 1
    key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
    if architecture == "llama" and key:
        n_heads = values_of[f"llama.attention.{key}"]
        pairs = values.reshape(n_heads, -1, 2, values.shape[-1])
        return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(values.shape)
    return values


@pytest.mark.parametrize("name", KINDS)
def test_tensors_match_transformers(name, make_theirs, tmp_path, one_device):
    model, folder = make_theirs(name)
    code, file = export(folder, tmp_path)
    assert code == 0
    values, tensors = read(file)
    architecture = values["general.architecture"]
    kinds = {of: kind for kind, of in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    left = set(tensors) - {"rope_freqs.weight"}
    for theirs, tensor in model.state_dict().items():
        found = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if theirs == "lm_head.weight" and found not in tensors:
            assert model.config.tie_word_embeddings
        elif not re.search(r"experts|\.attn\.(masked_)?bias$|mlp\.gate\.", theirs):
            got = theirs_again(found, tensors[found], architecture, values)
            np.testing.assert_allclose(got, tensor.numpy(), rtol=0, atol=1.2e-7, err_msg=theirs)
            left.discard(found)
    assert all("exps" in name or "gate_inp" in name for name in left)
    assert bool(left) == (name == "mixtral")
    assert ("rope_freqs.weight" in tensors) == (name == "llama-3.1")


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_settings_unsupported_by_llama_cpp(name, words, make_theirs, tmp_path, capsys, one_device):
    code, file = export(make_theirs(name)[1], tmp_path)
    assert code == 2
    assert words in capsys.readouterr().err
    assert not file.parent.exists()


@pytest.mark.parametrize(("dtype", "kind", "within"), [("bfloat16", 30, 2**-8), ("q8_0", 8, 0.01)])
def test_types_of_weights(dtype, kind, within, make_theirs, tmp_path, one_device):
    model, folder = make_theirs("llama")
    code, file = export(folder, tmp_path, "--dtype", dtype)
    assert code == 0
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert tensors["token_embd.weight"].tensor_type == kind
    assert tensors["output_norm.weight"].tensor_type == 0
    found = gguf.quants.dequantize(tensors["token_embd.weight"].data, kind)
    expected = model.model.embed_tokens.weight.detach().numpy()
    assert 0 < np.abs(found - expected).max() < within * np.abs(expected).max()


def test_byte_level_tokenizer(tmp_path, one_device):
    """Merges, the kind of words, special tokens, what starts a text, the chat template."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 280, "initial_alphabet": alphabet, "special_tokens": ["<s>", "</s>"]}
    trainer = tokenizers.trainers.BpeTrainer(show_progress=False, **options)
    made.train_from_iterator(["the cat sat on the mat, then the rat sat"] * 3, trainer)
    folder = tmp_path / "hf"
    build("LlamaForCausalLM", LLAMA | {"vocab_size": 285}).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    code, file = export(folder, tmp_path)
    assert code == 0
    values, _ = read(file)
    of = {name.removeprefix("tokenizer."): value for name, value in values.items()}
    vocabulary = made.get_vocab()
    n = len(vocabulary)
    assert of["ggml.tokens"][:n] == sorted(vocabulary, key=vocabulary.get)
    assert of["ggml.tokens"][n:] == [f"[PAD{i}]" for i in range(n, 285)]
    assert of["ggml.token_type"] == [3, 3] + [1] * (n - 2) + [5] * (285 - n)
    merges = json.loads(made.to_str())["model"]["merges"]
    assert of["ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (of["ggml.model"], of["ggml.pre"]) == ("gpt2", "gpt-2")
    assert (of["ggml.bos_token_id"], of["ggml.eos_token_id"]) == (0, 1)
    assert (of["ggml.add_bos_token"], of["chat_template"]) == (False, "{{ messages }}")


def test_tokenizer_of_bytes_is_rejected(tmp_path, capsys, one_device):
    values = {"model.vocab_size": 260, "model.activation": "gelu_tanh"}
    run = random_run(tmp_path / "run", values, ByteTokenizer())
    words = ["export", "--workdir", str(run), "--to", str(tmp_path / "to"), "--format", "gguf"]
    assert main(words) == 2
    assert "GGUF does not support a byte tokenizer" in capsys.readouterr().err
