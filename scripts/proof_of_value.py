"""Prove that a change leaves training bitwise unchanged.

    python scripts/proof_of_value.py record --checkout OLD --output before.json
    python scripts/proof_of_value.py record --checkout NEW --output after.json
    python scripts/proof_of_value.py compare before.json after.json

`record` trains every objective with every model family, and the options that change the training
step, for 20 steps on one CPU device and on 8 simulated ones, and writes the losses. It uses only
the command line of the checkout (`python -m lm train`), so the same script runs on both sides.
`compare` exits with 1 and names the first step at which the losses of a run differ. Bits depend on
the machine and on the versions of JAX and Python: record both sides in one environment. A recording
takes about ten minutes of one core; with --cache, which keeps compiled programs, the next takes
half of that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import struct
import sys
import tempfile
import time
import wave
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path

STEPS = 20
LIBRARIES = ("jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "tensorboardX")
ENVIRONMENT = {  # read by JAX when it is imported or finds its devices
    "JAX_PLATFORMS": "cpu",
    # Programs this small run as fast without LLVM's optimizations, and compile faster.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
EXPERIMENT = """
from lm.config import default

def get_config():
    config = default()
    model, data = config.model, config.data
    model.n_layers, model.d_model, model.n_heads, model.vocab_size = 2, 16, 4, 128
    model.dropout = model.attention_dropout = 0.1
    data.source, data.documents, data.tokenizer = "text:{data}/text.txt", "line", "words"
    data.sequence_length, data.batch_size, data.workers = 16, 8, 1
    config.optimizer.learning_rate = 1e-2
    config.train.steps, config.checkpoint.every_steps = {steps}, 0
    config.log.tensorboard = False
    return config
"""

DROPOUT_OFF = "model.dropout=0 model.attention_dropout=0"
LLAMA = "model.positions=rotary model.norm=rmsnorm model.activation=swiglu model.n_kv_heads=2"
MIXTRAL = f"{LLAMA} model.n_experts=4 model.experts_per_token=2"
SWITCH = (
    "model.n_experts=4 model.experts_per_token=1 model.experts_every=2 model.expert_capacity=1 "
    "model.router_jitter=0.01 model.router_z_loss=1e-3 model.activation=relu"
)
T5 = "objective.name=span_corruption model.family=encoder_decoder model.positions=relative"
LABELS = "objective.name=classification data.source=tsv:{data}/labels.tsv data.labels=good,bad"
SEQ2SEQ = "objective.name=seq2seq data.source=parallel:{data}/numbers.en|{data}/numbers.de"
MASKED = "objective.name=masked model.family=encoder"
WORDS = (
    "objective.name=token_classification data.source=conll:{data}/names.conll "
    "data.labels=O,B-PER,B-LOC"
)
SPANS = "objective.name=span_qa data.source=squad:{data}/squad.json data.doc_stride=4"

# The configuration keys that each run changes, by name: OBJECTIVE FAMILY and what else is special.
VARIANTS = {
    "causal decoder": LLAMA,
    "causal decoder, GPT-2": "model.activation_dropout=0.1",
    "causal decoder, tiled": f"{DROPOUT_OFF} model.attention=tiled",
    "causal decoder, blockwise": f"{DROPOUT_OFF} {LLAMA} model.attention=blockwise",
    "causal decoder, Gemma 2 and 3": "model.window=4 model.global_every=2 model.qk_norm=true "
    "model.norm_placement=both model.norm=rmsnorm model.norm_unit_offset=true model.bias=false "
    "model.attention_softcap=5 model.logit_softcap=3 model.activation=geglu model.n_kv_heads=2 "
    "model.positions=rotary model.rope_theta_local=100 model.rope_scaling=linear "
    "model.rope_factor=8 model.head_dim=6 model.scale_embeddings=true",
    "causal decoder, Llama 3.1 and Qwen 2": f"{LLAMA} model.rope_scaling=llama3 "
    "model.rope_factor=8 model.rope_original_length=8 model.bias=false model.attention_bias=qkv "
    "model.tie_embeddings=false",
    "causal decoder, dropless experts": MIXTRAL,
    "causal decoder, experts with capacity": SWITCH,
    "causal decoder, clipped": "model.mixer=clipped model.qkv_clip=0.1",
    "causal decoder, muP": "model.mup_base_width=8 model.mup_base_head_dim=2",
    "causal decoder, LoRA": f"{LLAMA} lora.rank=2 lora.train=norm",
    "causal decoder, frozen": "optimizer.freeze=embed,layers/0/ optimizer.layer_decay=0.8",
    "causal decoder, muon": "optimizer.name=muon schedule.name=wsd",
    "causal decoder, adafactor": "optimizer.name=adafactor optimizer.adafactor.min_dim=8 "
    "schedule.name=inverse_sqrt schedule.warmup_steps=5",
    "causal decoder, lion": "optimizer.name=lion schedule.name=linear optimizer.decay=all",
    "causal decoder, sgd": "optimizer.name=sgd optimizer.sgd.nesterov=true schedule.name=step "
    "schedule.step_every=5",
    "causal decoder, bfloat16": "model.dtype=bfloat16",
    "causal decoder, remat": f"{LLAMA} train.remat=full train.loss_chunk=4 train.microbatches=2",
    "causal decoder, dispatch": "train.remat=dots train.scan_unroll=0 train.steps_per_dispatch=5",
    "causal decoder, mixture": "data.source=text:{data}/text.txt,text:{data}/numbers.en "
    "data.weights=1,3 data.tokenizer=byte model.vocab_size=0 data.isolate_documents=false "
    "data.stride=8 model.positions=sinusoidal objective.label_smoothing=0.1 objective.z_loss=1e-3",
    "causal lstm": "model.family=lstm model.init=uniform model.init_std=0.1",
    "causal lstm, carry": "model.family=lstm model.carry=true data.order=contiguous "
    "data.isolate_documents=false train.microbatches=2",
    "causal nplm": "model.family=nplm model.direct=true",
    "causal decoder, LoRA in 8 bits": f"{LLAMA} lora.rank=2 lora.base=int8",
    "chat decoder": f"{LLAMA} objective.name=chat data.source=jsonl:{{data}}/chat.jsonl "
    "data.tokenizer=byte model.vocab_size=0 data.sequence_length=128 objective.neftune=5",
    "prefix decoder": "objective.name=prefix",
    "multi_token decoder": f"{LLAMA} objective.name=multi_token objective.mtp_depth=2",
    "replaced_tokens encoder": "objective.name=replaced_tokens model.family=encoder "
    "model.embedding_size=8 model.generator_width=8 model.generator_layers=1 model.token_types=2 "
    "model.embedding_norm=true model.norm_placement=post",
    "denoising encoder_decoder": "objective.name=denoising model.family=encoder_decoder "
    "model.separate_embeddings=true model.embedding_norm=true model.norm_placement=post "
    "model.position_offset=2 model.activation=gelu_erf",
    "denoising encoder_decoder, tokens apart": "objective.name=denoising "
    "model.family=encoder_decoder model.separate_tokens=true model.tie_embeddings=false",
    "masked encoder, convolution": f"{MASKED} model.first_conv=3 model.norm_placement=post",
    "masked encoder": f"{MASKED} objective.whole_word=true model.init_truncated=true",
    "masked encoder, next sentence": f"{MASKED} objective.next_sentence=true model.token_types=2 "
    "model.embedding_norm=true model.norm_placement=post model.activation=gelu_erf",
    "span_corruption encoder_decoder": f"{T5} objective.z_loss=1e-4 model.norm=rmsnorm "
    "model.activation=geglu model.bias=false model.attention_scale=1 model.tie_embeddings=false "
    "model.init=fan_in model.final_dropout=true",
    "span_corruption encoder_decoder, experts": f"{T5} {SWITCH} model.scale_logits=true",
    "seq2seq encoder_decoder": f"{SEQ2SEQ} model.family=encoder_decoder model.init=xavier "
    "model.positions=sinusoidal model.norm_placement=post model.activation=relu "
    "model.scale_embeddings=true objective.label_smoothing=0.1",
    "seq2seq lstm_encoder_decoder": f"{SEQ2SEQ} model.family=lstm_encoder_decoder "
    "model.bidirectional=true data.pack=false",
    "transcription encoder_decoder": "objective.name=transcription model.family=encoder_decoder "
    "data.source=audio:{data}/tones.jsonl data.n_mels=16 model.n_mels=16 model.max_length=16 "
    "model.attention_bias=no_key model.activation=gelu_erf objective.masks=1",
    "classification decoder": f"{LABELS} model.pooling=mean",
    "classification encoder": f"{LABELS} model.family=encoder model.token_types=2",
    "classification encoder, labels": f"{LABELS} model.family=encoder data.multi_label=true",
    "classification encoder, regression": "objective.name=classification model.family=encoder "
    "data.source=tsv:{data}/scores.tsv",
    "classification encoder_decoder": f"{LABELS} model.family=encoder_decoder",
    "classification lstm": f"{LABELS} model.family=lstm model.bidirectional=true",
    "token_classification encoder": f"{WORDS} model.family=encoder",
    "token_classification decoder": WORDS,
    "span_qa encoder": f"{SPANS} model.family=encoder model.token_types=2",
    "span_qa decoder": SPANS,
    "span_qa encoder_decoder": f"{SPANS} model.family=encoder_decoder model.pooling=shifted",
    "dpo decoder": "objective.name=dpo data.source=jsonl:{data}/pairs.jsonl",
    "dpo decoder, LoRA": f"objective.name=dpo data.source=jsonl:{{data}}/pairs.jsonl {LLAMA} "
    "lora.rank=2",
    "kto decoder": "objective.name=kto data.source=jsonl:{data}/pairs.jsonl",
    "skip_gram skip_gram": "objective.name=skip_gram model.family=skip_gram objective.subsample=0",
}
# Meshes of 8 devices: of all variants, of those with experts, and further ones of some.
MESH = "data=2 fsdp=2 tensor=2"
EXPERT_MESH = "fsdp=2 expert=2 tensor=2"
MESHES = {
    ("causal decoder", "data=8"): "",
    ("causal decoder", "fsdp=8"): "",
    ("causal decoder", "slice=2 fsdp=4"): "",
    ("causal decoder", "data=2 tensor=4"): "parallel.sequence=true",
    ("causal decoder", "data=2 context=4"): "model.attention_dropout=0 "
    "parallel.context_attention=ring",
    ("causal decoder", "fsdp=2 context=2 tensor=2"): "parallel.context_attention=gather",
    ("causal decoder", "stage=2 data=2 tensor=2"): "parallel.pipeline.microbatches=2",
    ("causal decoder", "stage=2 context=2 fsdp=2"): "model.n_layers=4 parallel.pipeline.repeats=2",
    ("causal decoder, dropless experts", "data=2 expert=4"): "",
    ("causal decoder, experts with capacity", "stage=2 data=2 expert=2"): "model.n_layers=4",
    ("span_corruption encoder_decoder", "stage=2 fsdp=2 tensor=2"): "",
    ("seq2seq encoder_decoder", "data=2 context=2 tensor=2"): "",
}


def runs() -> Iterator[tuple[str, str, str]]:
    """Yield name, changed keys and mesh of every run; no mesh means one device."""
    for name, keys in VARIANTS.items():
        yield f"{name} [1 device]", keys, ""
        mesh = EXPERT_MESH if "n_experts" in keys else MESH
        yield f"{name} [{mesh}]", keys, mesh
    for (name, mesh), keys in MESHES.items():
        yield f"{name} [{mesh}]", f"{VARIANTS[name]} {keys}", mesh


def write_data(folder: Path) -> None:
    """Write small corpora with regularities that a model learns in a few steps."""
    words = ["the", "a", "small", "big", "model", "reads", "every", "token", "of", "text", "now"]
    english = ["one", "two", "three", "four", "five"]
    german = ["eins", "zwei", "drei", "vier", "fünf"]
    files = {name: ["text\tlabel"] for name in ("labels.tsv", "scores.tsv")}
    files["names.conll"], files["chat.jsonl"] = [], []
    files["text.txt"] = [
        " ".join(words[(i * i + 3 * j * j + i * j) % 11] for j in range(20 + 3 * (i % 9)))
        for i in range(40)
    ]
    files["numbers.en"], files["numbers.de"] = (
        [" ".join(language[i * k % 5] for k in range(1, 3 + i % 4)) for i in range(48)]
        for language in (english, german)
    )
    pairs = [
        {
            "prompt": " ".join(words[: 2 + i % 5]),
            "chosen": f" is {english[i % 5]} very good",
            "rejected": f" is quite {english[i * i % 5]}",
        }
        for i in range(48)
    ]
    files["pairs.jsonl"] = list(map(json.dumps, pairs))
    paragraphs = []
    for i in range(48):
        text = " ".join(words[: 2 + i % 4])
        files["labels.tsv"].append(f"{text} awful\tbad" if i % 3 else f"{text} lovely\tgood")
        files["scores.tsv"].append(f"{text} {english[i % 5]}\t{i % 5 / 2}")
        said = [{"role": role, "content": english[i % 5]} for role in ("user", "assistant")]
        files["chat.jsonl"].append(json.dumps({"messages": said * (1 + i % 2)}))
        name, city = ["Ann", "Bob", "Cid"][i % 3], ["Rome", "Oslo", "Bonn", "Graz"][i % 4]
        context = f"{'in the long winter ' * (i % 2)}{name} came to {city} and stayed there"
        answer = {"text": city, "answer_start": context.index(city)}
        files["names.conll"] += [f"{name} B-PER", "came O", "to O", f"{city} B-LOC", ""]
        question = {"id": str(i), "question": f"where did {name} stay", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    files["squad.json"] = [json.dumps({"data": [{"paragraphs": paragraphs}]})]
    folder.mkdir()
    for i in range(48):
        tone = [round(9000 * math.sin(t * (1 + i % 5) / 8)) for t in range(4000)]
        with wave.open(str(folder / f"{i}.wav"), "wb") as recording:
            recording.setparams((1, 2, 16_000, 0, "NONE", ""))
            recording.writeframes(struct.pack("<4000h", *tone))
    files["tones.jsonl"] = [
        json.dumps({"audio": f"{i}.wav", "target": english[i % 5]}) for i in range(48)
    ]
    for file, lines in files.items():
        (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def train_command(folder: Path, workdir: Path, keys: str, mesh: str) -> list[str]:
    """Return the arguments of `lm` that train a run."""
    values = keys.format(data=folder / "data").split()
    values += [f"parallel.mesh.{size}" for size in mesh.split()]
    words = ["train", "--config", str(folder / "experiment.py"), "--workdir", str(workdir)]
    words += ["--cpu_devices", "8" if mesh else "1"]
    return words + [f"--config.{value}" for value in values]


def run_lm(checkout: Path, words: list[str], log: Path) -> None:
    """Run `python -m lm WORDS` in this process, which is a fork, with output to a file."""
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    spec = importlib.util.find_spec("lm")
    assert spec is not None, checkout
    assert Path(str(spec.origin)).is_relative_to(checkout), spec
    sys.argv = ["lm", *words]
    runpy.run_module("lm", run_name="__main__", alter_sys=True)


def read_losses(workdir: Path) -> list[float]:
    """Return the loss of every step of a finished run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in pairs] == [*range(1, STEPS + 1)], f"steps of {workdir}: {pairs}"
    return [loss for _, loss in pairs]


def train_all(
    chosen: list[tuple[str, str, str]], folder: Path, checkout: Path, jobs: int
) -> dict[str, list[float]]:
    """Train runs and return the losses of those that succeed, by name.

    Each run is a process of its own, forked from this one after the libraries are imported, because
    importing them takes longer than training.

    Args:
        chosen: what `runs` yields, or a part of it.
        folder: holds the data and the experiment file; workdirs are made in it.
        checkout: repository whose code trains.
        jobs: processes at a time.
    """
    for library in LIBRARIES:
        importlib.import_module(library)
    fork = multiprocessing.get_context("fork")
    losses: dict[str, list[float]] = {}
    waiting, running = list(enumerate(chosen)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, (name, keys, mesh) = waiting.pop(0)
            workdir, log = folder / f"run{number}", folder / f"run{number}.log"
            words = train_command(folder, workdir, keys, mesh)
            process = fork.Process(target=run_lm, args=(checkout, words, log))
            process.start()
            running[process.sentinel] = process, name, workdir, log, time.monotonic()
        for sentinel in wait(list(running)):
            process, name, workdir, log, start = running.pop(sentinel)
            process.join()
            if process.exitcode == 0:
                losses[name] = read_losses(workdir)
                result = f"loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}"
            else:
                result = f"FAILED with exit code {process.exitcode}\n{log.read_text()[-2000:]}"
            done = len(chosen) - len(waiting) - len(running)
            seconds = time.monotonic() - start
            print(f"{done}/{len(chosen)} {name}: {result}, {seconds:.1f} s", flush=True)
    return losses


def record(checkout: Path, output: Path, only: str, cache: Path | None, jobs: int) -> int:
    """Write the losses of runs to a JSON file.

    Args:
        checkout: repository whose code trains.
        output: file to write: versions, and the losses of every run by its name.
        only: regular expression; runs whose name it does not match are left out.
        cache: folder of compiled programs, which is kept; None: a temporary one.
        jobs: processes at a time.

    Returns:
        The exit code: 1 if a run failed.
    """
    chosen = [run for run in runs() if re.search(only, run[0])]
    with tempfile.TemporaryDirectory(prefix="proof_of_value_") as name:
        folder = Path(name)
        write_data(folder / "data")
        experiment = EXPERIMENT.format(data=folder / "data", steps=STEPS)
        (folder / "experiment.py").write_text(experiment)
        os.environ |= ENVIRONMENT
        os.environ["LM_CACHE_DIR"] = str(folder / "stores")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str((cache or folder / "xla").absolute())
        losses = train_all(chosen, folder, checkout, jobs)
    versions = {"python": platform.python_version(), "jaxlib": version("jaxlib")}
    ordered = {name: losses[name] for name, *_ in chosen if name in losses}
    output.write_text(json.dumps({"versions": versions, "losses": ordered}, indent=1) + "\n")
    print(f"{output}: {len(losses)} of {len(chosen)} runs")
    return int(len(losses) < len(chosen))


def compare(before: Path, after: Path) -> int:
    """Print the runs of `before` whose losses differ in `after`; return 1 if there are any."""
    old, new = (json.loads(file.read_text()) for file in (before, after))
    if old["versions"] != new["versions"]:
        print(f"different versions: {old['versions']}, {new['versions']}")
    rows = []
    for name, expected in old["losses"].items():
        found = new["losses"].get(name)
        if found is None:
            rows.append((name, "all", "recorded", "missing"))
        elif found != expected:
            pairs = zip(expected, found, strict=False)
            step = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
            rows.append((name, str(step + 1), repr(expected[step]), repr(found[step])))
    added = new["losses"].keys() - old["losses"].keys()
    if rows:
        rows.insert(0, ("run", "first step", "before", "after"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
    n_equal = len(old["losses"]) - max(0, len(rows) - 1)
    print(f"{n_equal} of {len(old['losses'])} runs bitwise equal, {len(added)} only after")
    return int(bool(rows))


def main() -> int:
    """Parse the command line and run `record` or `compare`; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="train every run and write its losses")
    own = Path(__file__).absolute().parents[1]
    recording.add_argument("--checkout", type=Path, default=own, help="default: this repository")
    recording.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    recording.add_argument("--only", default="", metavar="REGEX", help="runs whose name matches")
    recording.add_argument("--cache", type=Path, metavar="DIR", help="keep compiled programs here")
    recording.add_argument("--jobs", type=int, default=1, help="runs at a time")
    comparing = actions.add_parser("compare", help="compare two recordings bit for bit")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.action == "compare":
        return compare(args.before, args.after)
    return record(args.checkout.absolute(), args.output, args.only, args.cache, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
