"""Import damaged Hugging Face folders: they work as in transformers, or give a one-line error.

    python scripts/check_folders.py [--cases 200] [--seed 0] [--workdir DIR] [--only NAME]

Small random models of every family, with every kind of vocabulary, are damaged in one place: a
value in a JSON file, a file's bytes, a header, an index. `lm import`, `lm generate` and `lm export`
then read the folder. Faults are tracebacks, crashes, commands that take over a minute, multi-line
errors, and ids or logits that differ from those of `transformers` if both accept the folder. If
there are any, the exit code is 1 and their folders are kept in --workdir.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SECONDS = 60
MEMORY = 16 << 30
MERGES = [("t", "h"), ("th", "e"), ("a", "t")]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TOKENIZER_CLASSES = ("GPT2", "Llama", "Qwen2", "Bert", "Roberta", "T5")
TEXT = "the cat sat on the mat, and 12 dogs ran\n"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 64}
HOSTILE = [
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), "", "a"),
    *(
        "x" * 100_000,
        "\ud800",
        "[UNK]",
        [],
        [1],
        [None],
        [[]],
        ["a"],
        {},
        {"a": 1},
        {"a": {"a": 1}},
    ),
    *({"content": 7}, {"content": "a"}, [2**40], ["../../x"], "../../x"),
]


# --- folders


def write_byte_level(folder, special):
    """Write the tokenizer.json of a byte-level BPE, whose texts start with special[0]."""
    import tokenizers
    from tokenizers import decoders, normalizers
    from tokenizers import pre_tokenizers as pre

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_ids(), MERGES))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    first = special[0]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        f"{first} $A", f"{first} $A {first}:1 $B:1", [(first, made.token_to_id(first))]
    )
    made.save(str(folder / "tokenizer.json"))


def write_merges(folder, special):
    """Write the vocab.json and merges.txt of a byte-level BPE."""
    ids = byte_ids()
    ids |= {name: len(ids) + i for i, name in enumerate(special)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    lines = ["#version: 0.2", *map(" ".join, MERGES)]
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines))


def byte_ids():
    """Return the ids of bytes and of merged pairs."""
    from tokenizers.pre_tokenizers import ByteLevel

    names = [*sorted(ByteLevel.alphabet()), *map("".join, MERGES)]
    return {name: i for i, name in enumerate(names)}


def write_sentencepiece(name, kind):
    """Return a function that writes a SentencePiece model and an additional token."""
    import sentencepiece

    def write(folder, special):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 50),
            model_writer=model,
            vocab_size=276,
            model_type=kind,
            byte_fallback=True,
            minloglevel=3,
        )
        (folder / name).write_bytes(model.getvalue())
        (folder / "added_tokens.json").write_text(json.dumps({"NEW": 276}))

    return write


def write_word_pieces(folder, special):
    """Write the vocab.txt of a BERT."""
    pieces = [*special, *"abcdefghijklmnoprstuvwxyz12,", *(f"##{c}" for c in "aehnst"), "the"]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))


class Kind(NamedTuple):
    """A family with one kind of vocabulary.

    Attributes:
        model: class in transformers.
        values: its configuration.
        write: writes the files of the vocabulary, from a folder and the special tokens.
        special: special tokens; the first is eos.
        tokenizer: keys of tokenizer_config.json.
    """

    model: str
    values: dict
    write: Callable
    special: list
    tokenizer: dict = FAST


def kinds():
    """Return {name: Kind}."""
    bert = [f"[{role}]" for role in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    roberta = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    end, llama = ["<|endoftext|>"], ["<s>", "</s>", "<unk>"]
    sizes = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    windows = sizes | {"sliding_window": 8, "query_pre_attn_scalar": 8}
    experts, grouped = sizes | {"num_local_experts": 2}, SIZES | {"num_key_value_heads": 1}
    bpe = write_sentencepiece("tokenizer.model", "bpe")
    unigram = write_sentencepiece("spiece.model", "unigram")
    of = {name: {"tokenizer_class": f"{name}Tokenizer"} for name in TOKENIZER_CLASSES}
    with_bos = of["Llama"] | {"add_bos_token": True}
    return {
        "gpt2": Kind("GPT2LMHeadModel", gpt2, write_byte_level, end, of["GPT2"]),
        "gpt2-files": Kind("GPT2LMHeadModel", gpt2, write_merges, end, of["GPT2"]),
        "llama": Kind("LlamaForCausalLM", sizes, write_byte_level, llama),
        "llama-model": Kind("LlamaForCausalLM", sizes, bpe, llama, with_bos),
        "mistral": Kind("MistralForCausalLM", sizes, write_byte_level, llama),
        "mixtral": Kind("MixtralForCausalLM", experts, write_byte_level, llama),
        "qwen2": Kind("Qwen2ForCausalLM", grouped, write_merges, end, of["Qwen2"]),
        "qwen3": Kind("Qwen3ForCausalLM", sizes, write_byte_level, end),
        "gemma": Kind("GemmaForCausalLM", sizes, write_byte_level, llama),
        "gemma2": Kind("Gemma2ForCausalLM", windows, write_byte_level, llama),
        "gemma3": Kind("Gemma3ForCausalLM", windows, write_byte_level, llama),
        "bert": Kind("BertForMaskedLM", SIZES, write_word_pieces, bert, of["Bert"]),
        "bert-classes": Kind(
            "BertForSequenceClassification", SIZES, write_word_pieces, bert, of["Bert"]
        ),
        "roberta": Kind("RobertaForMaskedLM", SIZES, write_merges, roberta, of["Roberta"]),
        "t5": Kind("T5ForConditionalGeneration", t5, unigram, llama, of["T5"]),
    }


def build_folders(place):
    """Return {name: folder} of intact models."""
    import torch
    import transformers

    torch.manual_seed(0)
    found = {}
    for name, kind in kinds().items():
        folder = found[name] = place / name
        folder.mkdir(parents=True)
        kind.write(folder, kind.special)
        model = getattr(transformers, kind.model)
        made = model(model.config_class(vocab_size=320, **kind.values))
        made.save_pretrained(folder, **({"max_shard_size": "20KB"} if name == "qwen3" else {}))
        settings = {"add_bos_token": False, "model_max_length": 64, "clean_up": False}
        roles = {"eos_token": kind.special[0]} if kind.write is not write_word_pieces else {}
        stated = {
            "tokenizer_config.json": settings | kind.tokenizer,
            "special_tokens_map.json": roles,
            "generation_config.json": {"eos_token_id": [1, 2], "do_sample": True},
        }
        for file, value in stated.items():
            (folder / file).write_text(json.dumps(value))
    return found


# --- damage


def json_places(value, path=()):
    """Return the paths of all values in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:50]) if isinstance(value, list) else items
    for key, inner in items:
        found += json_places(inner, (*path, key))
    return found


def damage_json(file, rng):
    """Change one value of a JSON file; return what was done."""
    value = json.loads(file.read_text())
    places = json_places(value)
    if file.name == "tokenizer.json":
        deep = [p for p in places if p[:2] == ("model", "vocab") or p[:2] == ("model", "merges")]
        places = [p for p in places if p not in set(deep)] + rng.sample(deep, min(5, len(deep)))
    path = rng.choice(places) if places else ()
    if not path:
        file.write_text(json.dumps(rng.choice(HOSTILE)))
        return "whole"
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if rng.random() < 0.2 and isinstance(holder, dict):
        del holder[path[-1]]
        done = "deleted"
    else:
        holder[path[-1]] = rng.choice(HOSTILE)
        done = repr(holder[path[-1]])[:40]
    file.write_text(json.dumps(value))
    return f"{'.'.join(map(str, path))} = {done}"


def damage_bytes(file, rng):
    """Damage a file of any kind; return what was done."""
    content = file.read_bytes()
    at = rng.randrange(1, max(2, len(content)))
    flipped = bytearray(content)
    for _ in range(8):
        flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    ways = {
        "empty": b"",
        "cut": content[:at],
        "zeros": bytes(len(content)),
        "zeros from": content[:at] + bytes(len(content) - at),
        "flipped": bytes(flipped),
        "twice": content + content,
        "not UTF-8": content[:at] + b"\xff\xfe" + content[at:],
        "BOM": b"\xef\xbb\xbf" + content,
        "deep": b"[" * 200_000,
        "digits": b'{"vocab_size": ' + b"1" * 5_000 + b"}",
        "NUL": content[:at] + b"\0" + content[at:],
        "CRLF": content.replace(b"\n", b"\r\n"),
        "line": content + b"x" * 1_000_000,
    }
    way = rng.choice(sorted(ways))
    file.write_bytes(ways[way])
    return way


def damage_place(file, rng):
    """Replace a file by something unreadable; return what."""
    content = file.read_bytes()
    file.unlink()
    way = rng.choice(["missing", "folder", "dangling", "loop", "link"])
    if way == "folder":
        file.mkdir()
    elif way == "dangling":
        file.symlink_to("nowhere")
    elif way == "loop":
        file.symlink_to(file.name)
    elif way == "link":
        other = file.with_name("other")
        other.write_bytes(content)
        file.symlink_to(other.name)
    return way


def damage_header(file, rng):
    """Change the header of a safetensors file; return what was done."""
    content = file.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + n]), content[8 + n :]
    way = rng.choice(["length", "dtype", "shape", "offsets", "drop", "rename", "nan", "value"])
    name = rng.choice([key for key in header if key != "__metadata__"])
    about = header[name]
    if way == "length":
        file.write_bytes(struct.pack("<Q", rng.choice([0, 1, n - 1, 2**62, 2**40])) + content[8:])
        return way
    if way == "dtype":
        about["dtype"] = rng.choice(["I32", "F8_E4M3", "U8", "X", 7, "BF16"])
    elif way == "shape":
        about["shape"] = rng.choice([[], [0], [-1, 4], [2**40, 2**40], about["shape"][::-1], "a"])
    elif way == "offsets":
        about["data_offsets"] = rng.choice([[0, 0], [8, 4], [0, 2**50], [-1, 3], [0]])
    elif way == "drop":
        del header[name]
    elif way == "rename":
        header[rng.choice(["a", "../x", "model.layers.9.x", ""])] = header.pop(name)
    elif way == "nan":
        start, stop = about["data_offsets"]
        rest = rest[:start] + struct.pack("<f", float("nan")) * ((stop - start) // 4) + rest[stop:]
    else:
        header[name] = rng.choice(HOSTILE[:20])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return f"{way} of {name}"


def damage(folder, rng):
    """Damage a folder in one place; return what was done."""
    files = sorted(f for f in folder.iterdir() if f.suffix != ".bin")
    readable = [f for f in files if f.suffix == ".json"]
    weights = [f for f in files if f.suffix == ".safetensors"]
    kind = rng.choices(["json", "bytes", "place", "header"], [10, 5, 2, 3])[0]
    if kind == "json":
        file = rng.choice(readable)
        done = damage_json(file, rng)
    elif kind == "header":
        file = rng.choice(weights)
        done = damage_header(file, rng)
    else:
        file = rng.choice(files)
        done = (damage_bytes if kind == "bytes" else damage_place)(file, rng)
    return f"{file.name}: {done}"


# --- one case, in a process that is started again when it dies


def run_lm(*words):
    """Return (exit code, stderr, stdout) of a command."""
    from lm.cli import main

    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main([str(word) for word in words])
    return code, err.getvalue(), out.getvalue()


def problem_of(code, err):
    """Return what is wrong with how a command ended, or None."""
    lines = [line for line in err.splitlines() if line.strip()]
    if code == 0:
        return None
    if code != 2 or "Traceback" in err or "panicked" in err:
        return f"exit code {code}: {lines[-1][:300] if lines else ''}"
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or len(errors[0]) > 1_100:
        return f"not one line: {lines[-1][:300] if lines else ''}"
    return None


def check_folder(folder):
    """Return (problem or None, outcome)."""
    run, out = folder.parent / "run", folder.parent / "out"
    code, err, _ = run_lm("import", "--from", folder, "--workdir", run)
    if problem := problem_of(code, err):
        return f"import: {problem}", ""
    if code:
        return None, "refused: " + err.strip().splitlines()[-1][:200]
    family = json.loads((run / "run.json").read_text())["config"]["model"]["family"]
    if (run / "tokenizer").is_dir() and family != "encoder":
        words = ("--prompt", "the cat", "--greedy", "--max_new_tokens", 4, "--json")
        code, err, text = run_lm("generate", "--workdir", run, *words)
        if problem := problem_of(code, err):
            return f"generate: {problem}", ""
        if code == 0 and "text" not in json.loads(text)[0]:
            return f"generate: {text[:200]}", ""
    code, err, _ = run_lm("export", "--workdir", run, "--to", out)
    if problem := problem_of(code, err):
        return f"export: {problem}", ""
    return compare(folder, run), "used"


def compare(folder, run):
    """Return how ids or logits differ from those of `transformers`, if it reads the folder."""
    import jax
    import numpy as np
    import torch
    import transformers

    from lm.data.tokenizer import load_saved_tokenizer
    from lm.interop import huggingface

    if (run / "tokenizer").is_dir():
        tokenizer = load_saved_tokenizer(run / "tokenizer")
        texts = [TEXT.strip(), "a NEW cat  é", "<s>x</s>[SEP]"]
        if any(folder.glob("*.model")):  # transformers cuts at names of control pieces
            texts = texts[:1]
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            expected = [theirs(text, **plain)["input_ids"] for text in texts]
            whole = [theirs(text, split_special_tokens=True)["input_ids"] for text in texts]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
        else:
            found = [tokenizer.encode(text).tolist() for text in texts]
            rows = json.loads((run / "run.json").read_text())["config"]["model"]["vocab_size"]
            if max(map(max, whole)) >= rows:
                return None  # a token that transformers adds, of which the model has no row
            if found != expected:
                return f"ids {found} instead of {expected} by {type(theirs).__name__}"
            around = tokenizer.template
            found = [[*around.before, *ids, *around.after] for ids in found]
            if found != whole:
                return f"ids {found} instead of {whole} by {type(theirs).__name__}"
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        model, loading = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return None
    if any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    ours, params = huggingface.load(folder)
    ids = np.random.default_rng(0).integers(4, 60, (1, 12))
    if ours.config.vocab_size < 60 or "classes" in folder.name:
        return None
    twice = hasattr(ours, "start")
    with torch.no_grad():
        words = {"decoder_input_ids": torch.tensor(ids)} if twice else {}
        expected = model.eval()(torch.tensor(ids), **words).logits.numpy()
    if expected.shape[-1] != ours.config.vocab_size or expected.ndim != 3:
        return None
    found = np.asarray(jax.jit(ours.apply)({"params": params}, *([ids] * (1 + twice))))
    off = np.abs(found - expected).max()
    return None if off < 2e-4 * max(1, np.abs(expected).max()) else f"logits differ by {off}"


def work():
    """Check the folders named on stdin, one per line; write the results as JSON lines."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    for line in sys.stdin:
        try:
            result = check_folder(Path(line.rstrip("\n")))
        except BaseException as error:  # also a panic of the tokenizers package
            result = f"{type(error).__name__}: {str(error)[:300]}", ""
        print(json.dumps(result), file=channel, flush=True)


class Worker:
    """Process that checks folders."""

    def __init__(self):
        self.process = None

    def check(self, folder):
        """Return the result for one folder."""
        if self.process is None or self.process.poll() is not None:
            words = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            wait = 3 * SECONDS
        else:
            wait = SECONDS
        self.process.stdin.write(f"{folder}\n".encode())
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], wait)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        self.process.kill()
        code = self.process.wait()
        return ("hangs" if not ready else f"dies with {code}"), ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return work()
    place = args.workdir or Path(tempfile.mkdtemp())
    shutil.rmtree(place / "intact", ignore_errors=True)
    folders = build_folders(place / "intact")
    names = [name for name in folders if args.only in name]
    worker, wrong = Worker(), 0
    cases = [(name, None) for name in names]
    cases += [(names[i % len(names)], args.seed + i) for i in range(args.cases)]
    for name, seed in cases:
        home = place / f"{name}.{seed}"
        shutil.rmtree(home, ignore_errors=True)
        folder = shutil.copytree(folders[name], home / name, symlinks=True)
        done = "intact" if seed is None else damage(folder, random.Random(f"{name} {seed}"))
        problem, outcome = worker.check(folder)
        if seed is None and outcome != "used":
            problem = problem or outcome
        print(f"{name}.{seed}: {done}: {'WRONG ' + problem if problem else outcome}", flush=True)
        wrong += problem is not None
        if problem is None:
            shutil.rmtree(home)
    print(f"{len(cases)} folders, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
