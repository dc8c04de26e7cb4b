"""Compare llama.cpp on GGUF exports with this library: logits, greedy tokens, token ids.

    python scripts/check_gguf.py write FOLDER [NAME …]     # with lm's environment
    python scripts/check_gguf.py run FOLDER                # where llama-cpp-python is; without lm

`write` creates small random models of each architecture, exports them, and saves this library's
outputs. With $LM_DATA_DIR it also exports stories260K, a trained Llama with a SentencePiece
tokenizer, and GPT-2's byte-level BPE. `run` reads the files with llama.cpp (pip install
llama-cpp-python builds it with cmake) and exits with 1 if greedy tokens, token ids or logits
differ.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(os.environ.get("LM_DATA_DIR", "."))
DTYPES = ("float32", "float16", "bfloat16", "q8_0")
TOLERANCES = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.2, "q8_0": 0.2}
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "Füße, Öl und 12345 Äpfel – „schön“!",
    "Быстрая лиса\n\n  прыгает 2024 раза.",
    "素早い茶色の狐は怠け者の犬を飛び越える。",
    "สวัสดีชาวโลก مرحبا بالعالم שלום",
    "def f(x):\n    return x  # 🙂🚀 it's  we'll\t\tend ",
]


def models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return class and configuration by name."""
    import hf_models as hf

    wide = {"hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-5}
    wide |= {"vocab_size": 96, "max_position_embeddings": 64, "num_attention_heads": 4}
    llama, gemma = hf.LLAMA | wide, hf.GEMMA | wide | {"head_dim": 32}
    windows = {"query_pre_attn_scalar": 32, "num_key_value_heads": 2}
    windowless = {"sliding_window": None, "head_dim": 20, "num_key_value_heads": 2}
    return {
        "gpt2": ("GPT2LMHeadModel", hf.GPT2 | {"n_embd": 64, "n_head": 4}),
        "llama": ("LlamaForCausalLM", llama | {"num_key_value_heads": 2}),
        "llama-biases": (
            "LlamaForCausalLM",
            llama | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        ),
        "llama-3.1": ("LlamaForCausalLM", llama | {"rope_parameters": hf.LLAMA3_ROPE}),
        "llama-linear": ("LlamaForCausalLM", llama | {"rope_parameters": hf.LINEAR_ROPE}),
        "llama-yarn": ("LlamaForCausalLM", llama | {"rope_parameters": hf.YARN_ROPE}),
        "mistral": ("MistralForCausalLM", llama | windowless),
        "mixtral": ("MixtralForCausalLM", hf.MIXTRAL | wide),
        "qwen2": ("Qwen2ForCausalLM", llama | {"num_key_value_heads": 2}),
        "qwen3": ("Qwen3ForCausalLM", llama | {"num_key_value_heads": 2, "head_dim": 20}),
        "gemma": ("GemmaForCausalLM", gemma),
        "gemma2": ("Gemma2ForCausalLM", hf.GEMMA2 | gemma | windows),
        "gemma3": ("Gemma3ForCausalLM", hf.GEMMA3 | gemma | windows | {"num_hidden_layers": 5}),
    }


def expectations(workdir: Path, prompts: list[list[int]], n_new: int) -> list[dict[str, Any]]:
    """Compute logits after each prompt, and the greedy tokens that follow."""
    import jax

    from lm.decoding.controls import Controls
    from lm.decoding.sampling import Sampling, sample_steps
    from lm.runs.saved_params import restore_run

    experiment, params, _ = restore_run(workdir, {}, print, any_batch=True)
    apply = jax.jit(experiment.model.apply)
    found = []
    for ids in prompts:
        steps = sample_steps(experiment.model, params, [ids], n_new, Sampling(0.0), 0, Controls())
        greedy = [int(step[0]) for step in steps]
        logits = np.asarray(apply({"params": params}, np.array([ids]))[0, -1]).tolist()
        found.append({"prompt": ids, "greedy": greedy, "logits": logits})
    return found


def write(folder: Path, chosen: list[str]) -> None:
    """Export each model, and write the results of this library."""
    import hf_models

    from lm.cli import main
    from lm.data.tokenizer import load_saved_tokenizer

    def export(name: str, workdir: Path, tokens: list[list[int]], texts: list[str]) -> None:
        for dtype in DTYPES if name in ("llama", "gpt2") else DTYPES[:1]:
            to = folder / f"{name}-{dtype}"
            words = ["export", "--workdir", workdir, "--to", to, "--format", "gguf"]
            assert main([str(word) for word in [*words, "--dtype", dtype]]) == 0
            about: dict[str, Any] = {"dtype": dtype, "cases": expectations(workdir, tokens, 20)}
            if texts:
                tokenizer = load_saved_tokenizer(workdir / "tokenizer")
                about["texts"] = [[text, tokenizer.encode(text).tolist()] for text in texts]
            (to / "expected.json").write_text(json.dumps(about))

    prompts = np.random.default_rng(0).integers(3, 96, (3, 9)).tolist()
    for name, (class_name, values) in models().items():
        if chosen and name not in chosen:
            continue
        theirs, workdir = folder / f"{name}-hf", folder / f"{name}-run"
        hf_models.build(class_name, values).save_pretrained(theirs)
        assert main(["import", "--from", str(theirs), "--workdir", str(workdir)]) == 0
        export(name, workdir, prompts, [])
    if (DATA / "stories260K").is_dir():
        source, workdir = DATA / "stories260K" / "stories260K.bin", folder / "stories-run"
        assert main(["import", "--from", str(source), "--workdir", str(workdir)]) == 0
        texts = [re.sub(" +", " ", text).strip(" ") for text in TEXTS]
        export("stories", workdir, [[1], [1, 403, 407, 261]], texts)
    if (DATA / "gpt2_bpe").is_dir():
        values = models()["gpt2"][1] | {"vocab_size": 50257}
        theirs, workdir = folder / "gpt2-bpe-hf", folder / "gpt2-bpe-run"
        hf_models.build("GPT2LMHeadModel", values).save_pretrained(theirs)
        for name, of in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
            (theirs / name).write_bytes((DATA / "gpt2_bpe" / of).read_bytes())
        assert main(["import", "--from", str(theirs), "--workdir", str(workdir)]) == 0
        export("gpt2-bpe", workdir, prompts, TEXTS)


def run(folder: Path) -> bool:
    """Read the files with llama.cpp, and compare the results."""
    import llama_cpp

    right = True
    for place in sorted(folder.glob("*/expected.json")):
        about = json.loads(place.read_text())
        file = str(place.with_name("model.gguf"))
        n_ctx = 32
        options = {"n_ctx": n_ctx, "logits_all": True, "n_threads": 1, "verbose": False}
        float32 = {"type_k": 0, "type_v": 0}  # of the cache, by default float16
        model = llama_cpp.Llama(file, **options, **float32)
        equal, off = 0, 0.0
        for case in about["cases"]:
            model.reset()
            model.eval(case["prompt"])
            logits = np.array(model.scores[len(case["prompt"]) - 1])
            off = max(off, np.abs(logits - np.array(case["logits"])).max())
            found = []
            for _ in case["greedy"][: n_ctx - len(case["prompt"])]:
                found.append(int(logits.argmax()))
                model.eval(found[-1:])
                logits = np.array(model.scores[model.n_tokens - 1])
            equal += found == case["greedy"][: len(found)]
        texts = about.get("texts", [])
        same = sum(model.tokenize(t.encode(), add_bos=False) == ids for t, ids in texts)
        spread = max(np.std(case["logits"]) for case in about["cases"])
        print(
            f"{place.parent.name:24} greedy equal {equal}/{len(about['cases'])}, logits off by "
            f"{off:.1e} (deviation {spread:.2f}), texts equal {same}/{len(texts)}"
        )
        is_exact = about["dtype"] == "float32"
        right &= off < TOLERANCES[about["dtype"]] * max(spread, 1) and same == len(texts)
        right &= not is_exact or equal == len(about["cases"])
    return right


if __name__ == "__main__":
    verb, where = sys.argv[1], Path(sys.argv[2])
    if verb == "write":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "interop"))
        write(where, sys.argv[3:])
    else:
        sys.exit(0 if run(where) else 1)
