"""Benchmark the training step, the training loop and decoding on this machine.

    python scripts/bench.py [--json] [--sizes 10m 124m] [--dtypes float32 bfloat16]
                            [--nanodo CHECKOUT]
    OMP_NUM_THREADS=1 taskset -c 0 python scripts/bench.py --transformers [--rows 1 8 32] …

For each size and dtype: milliseconds and tokens per second of the compiled step, and the fraction
of the FLOP/s of a plain matrix product on this machine (model FLOPs, causal attention
counted once). Then a short training run at the 10M size: the fraction of time spent waiting for
data, and the pause for a checkpoint relative to one minute; and a decoding step with GPT-2 124M,
eight rows with 900 tokens in the cache.

With --nanodo, a checkout of google-deepmind/nanodo, its model with clipping and AdamW is timed at
the same shapes. Figures are medians; both steps alternate, so that their ratio holds on a noisy
machine.

With --transformers, only decoding is timed, against Hugging Face's GPT-2 in PyTorch: greedy, 64 new
tokens after 32, 124M parameters, for each dtype and number of rows. `times_transformers` is the
median ratio of adjacent runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lm.accounting.flops import model_flops_per_token
from lm.config import default
from lm.decoding.controls import Controls
from lm.decoding.sampling import Sampling, sample_steps
from lm.decoding.weights import prepare
from lm.experiment import Experiment, build

SIZES = {  # layers, d_model, heads, vocabulary, length, batch
    "10m": (6, 384, 6, 320, 256, 8),
    "124m": (12, 768, 12, 50257, 512, 2),
}


def bench_config(size: str, dtype: str):
    """Return the configuration of a GPT-2 style model."""
    n_layers, d_model, n_heads, vocab, length, batch = SIZES[size]
    config = default()
    model, data = config.model, config.data
    model.n_layers, model.d_model, model.n_heads = n_layers, d_model, n_heads
    model.vocab_size, model.dtype = vocab, dtype
    model.bias = model.norm_bias = False
    data.sequence_length, data.batch_size = length, batch
    data.isolate_documents = False
    config.train.scan_unroll = 0
    return config


def our_step(experiment: Experiment) -> Callable[[], None]:
    """Return a function that runs one training step and waits for it."""
    state = experiment.init_state()
    config = experiment.config
    shape = (1, config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
    batch = jax.device_put(batch, experiment.batch_sharding)
    program = experiment.train_steps.lower(state, batch).compile()
    box = [state]

    def run() -> None:
        box[0], metrics = program(box[0], batch)
        jax.block_until_ready(metrics)

    return run


def nanodo_step(checkout: str, size: str, dtype: str) -> Callable[[], None]:
    """Return a function that runs one step of nanodo's model with AdamW."""
    sys.path.insert(0, checkout)
    import optax
    from nanodo import model as nanodo

    n_layers, d_model, n_heads, vocab, length, batch = SIZES[size]
    shape = (batch, length)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocab, shape, np.int32))
    model = nanodo.TransformerDo(
        nanodo.DoConfig(
            D=d_model,
            H=n_heads,
            L=length,
            N=n_layers,
            V=vocab,
            F=4 * d_model,
            dtype=jnp.dtype(dtype),
            fsdp_enabled=False,
        )
    )
    params = model.init(jax.random.key(0), tokens)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1)
    )

    def loss(params):
        logits = model.apply(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    box = [params, optimizer.init(params)]

    def run() -> None:
        *box[:], value = step(*box)
        jax.block_until_ready(value)

    return run


def median_seconds(runs: list[Callable[[], None]], seconds: float = 15.0) -> list[float]:
    """Return the median time of each function, calling them in turn for `seconds` in total."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, spent in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def matmul_rate(dtype: str, n: int = 2048) -> float:
    """Return the FLOP/s of an n × n × n matrix product with float32 results."""
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return 2 * n**3 / median_seconds([lambda: jax.block_until_ready(product(x))], 2.0)[0]


def bench_step(size: str, dtype: str, rate: float, nanodo: str | None) -> dict:
    """Time the training step; `rate` is the FLOP/s of a matrix product of the dtype."""
    experiment = build(bench_config(size, dtype), jax.devices()[:1])
    runs = [our_step(experiment)]
    if nanodo:
        runs.append(nanodo_step(nanodo, size, dtype))
    seconds = median_seconds(runs)
    tokens = experiment.config.data.batch_size * experiment.config.data.sequence_length
    result = {
        "size": size,
        "dtype": dtype,
        "ms_per_step": 1e3 * seconds[0],
        "tokens_per_second": tokens / seconds[0],
        "fraction_of_matmul_rate": model_flops_per_token(experiment) * tokens / seconds[0] / rate,
    }
    if nanodo:
        result["nanodo_ms_per_step"] = 1e3 * seconds[1]
        result["times_nanodo"] = seconds[1] / seconds[0]
    print(shown(result), file=sys.stderr)
    return result


def shown(row: dict) -> str:
    """Format a row as one line."""
    return ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else str(v) for k, v in row.items())


def bench_loop(steps: int = 60) -> dict:
    """Measure data wait and checkpoint pause of a run of the 10M size in float32."""
    from lm.training.trainer import train

    config = bench_config("10m", "float32")
    config.train.steps = steps
    config.checkpoint.every_steps = steps // 3
    config.data.validation_fraction = 0.0
    with tempfile.TemporaryDirectory() as folder:
        workdir, text = Path(folder) / "run", Path(folder) / "text.py"
        text.write_text(Path(argparse.__file__).read_text() * 20)
        config.data.source = f"text:{text}"
        train(config, workdir)
        seconds = json.loads((workdir / "clock.json").read_text())["seconds"]
    pause = seconds["checkpoint"] / 3
    return {
        "data_wait_fraction": seconds["data"] / (seconds["data"] + seconds["step"]),
        "checkpoint_pause_seconds": pause,
        "checkpoint_stall_at_one_a_minute": pause / 60,
    }


def bench_decode(rows: int = 8, cached: int = 900, steps: int = 20) -> dict:
    """Measure greedy decoding with GPT-2 124M in float32: milliseconds per token of all rows."""
    config = bench_config("124m", "float32")
    config.data.sequence_length = 1024
    experiment = build(config, jax.devices()[:1])
    experiment, params = prepare(experiment, experiment.init_state().params)
    prompts = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, cached)).tolist()
    options = Sampling(0.0), 0, Controls()
    found = sample_steps(experiment.model, params, prompts, steps, *options, per_dispatch=1)
    times = [time.perf_counter() for _ in found]
    return {"decoded_rows": rows, "decode_ms": 1e3 * float(np.median(np.diff(times[1:])))}


def our_decoding(rows: int, dtype: str, prompt: int, new: int) -> Callable[[], None]:
    """Return a function that continues random prompts greedily with GPT-2 124M."""
    config = default()
    config.model.update(n_layers=12, d_model=768, n_heads=12, vocab_size=50257, dtype=dtype)
    config.data.sequence_length = 1024
    config.train.scan_unroll = 0
    experiment = build(config, jax.devices()[:1])
    experiment, params = prepare(experiment, experiment.init_state().params)
    prompts = np.random.default_rng(0).integers(0, 50257, (rows, prompt)).tolist()

    def run() -> None:
        options = new, Sampling(0.0), 0, Controls()
        assert len(list(sample_steps(experiment.model, params, prompts, *options))) == new

    return run


def their_decoding(rows: int, dtype: str, prompt: int, new: int) -> Callable[[], None]:
    """Return a function that does the same with transformers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(getattr(torch, dtype))
    ids = torch.randint(0, 50257, (rows, prompt))
    lengths = {"max_new_tokens": new, "min_new_tokens": new}

    def run() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)

    return run


def bench_transformers(
    rows: int, dtype: str, seconds: float, prompt: int = 32, new: int = 64
) -> dict:
    """Time our and transformers' decoding in turn, at least three times each."""
    runs = [make(rows, dtype, prompt, new) for make in (our_decoding, their_decoding)]
    for run in runs:
        run()
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        times.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - start)
    ours, theirs = (rows * new / statistics.median(spent) for spent in zip(*times, strict=True))
    result = {
        "decoded_rows": rows,
        "dtype": dtype,
        "tokens_per_second": ours,
        "transformers_tokens_per_second": theirs,
        "times_transformers": statistics.median(b / a for a, b in times),
    }
    print(shown(result), file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--nanodo", metavar="CHECKOUT")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    args = parser.parse_args()
    if args.transformers:
        pairs = [(rows, dtype) for dtype in args.dtypes for rows in args.rows]
        found = [bench_transformers(*pair, seconds=20.0) for pair in pairs]
        print(json.dumps(found) if args.json else "\n".join(map(shown, found)))
        return
    rates = {dtype: matmul_rate(dtype) for dtype in args.dtypes}
    steps = [
        bench_step(size, dtype, rates[dtype], args.nanodo)
        for size in args.sizes
        for dtype in args.dtypes
    ]
    report = {
        "matmul_flops": rates,
        "steps": steps,
        "loop": bench_loop(),
        "decode": bench_decode(),
    }
    if args.json:
        print(json.dumps(report))
        return
    for dtype, rate in rates.items():
        print(f"matrix product {dtype}: {rate / 1e9:,.0f} GFLOP/s")
    for row in [*steps, report["loop"], report["decode"]]:
        print(shown(row))


if __name__ == "__main__":
    main()
