"""Check this machine's GPU: kernels against plain attention, and speed against the plan.

    python scripts/check_gpu.py [--output check_gpu.json] [--minutes 8] [--dry-run]

On the first GPU, within `--minutes`, it checks values, gradients and times of each attention kernel
that the GPU supports; training steps of GPT-2 1558m, of Llama 3.2 1B with packed documents and of a
mixture of experts, compared with the bound that `lm plan` computes for the same program; and
decoding. It prints one line per check. The output file has all figures and names the parts that
were skipped for lack of time. The exit code is 1 if a kernel is wrong or a part fails, and 2
without a GPU.

With --dry-run the same code runs on the CPU with tiny shapes, and with the kernels that can be
interpreted there; the times are then meaningless.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import load_config, set_value
from lm.decoding.controls import Controls
from lm.decoding.sampling import Sampling, sample_steps
from lm.decoding.weights import prepare
from lm.experiment import Experiment, build
from lm.hardware import CHIPS, Chip, chip_name
from lm.kernels.dot_product_attention import AttentionMask, attention
from lm.kernels.gpu_attention import (
    cudnn_attention,
    cudnn_takes_arrays,
    gpu_library_problems,
    tokamax_attention,
)
from lm.kernels.mask_ranges import most_pairs
from lm.kernels.triton_attention import triton_attention
from lm.tools.planning.plan import bytes_of, plan_of
from lm.tools.planning.program import batch_shapes, lower, program_of
from lm.tools.planning.topologies import Topology

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
# Of values and gradients, relative to the largest number of the plain kernel in float32.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-5}


class Size(NamedTuple):
    """Shapes of the checks: attention rows, length, heads, key heads; then the trained models."""

    attention: tuple[int, int, int, int]
    head_dims: tuple[int, ...]
    training: dict[str, tuple[str, dict[str, Any]]]
    decoding: tuple[str, dict[str, Any], int, int, int]


MIXTURE = {"model.n_layers": 4, "data.sequence_length": 4096, "data.batch_size": 2}
FULL = Size(
    (2, 2048, 16, 4),
    (64, 128, 256),
    {
        "GPT-2 1558m": ("gpt2.py:1558m", {"data.batch_size": 8, "train.microbatches": 1}),
        "Llama 3.2 1B, packed documents": (
            "llama.py:3.2-1b",
            {"data.batch_size": 4, "data.sequence_length": 4096, "train.microbatches": 1},
        ),
        "Mixtral's experts, 4 layers of 1024": (
            "mixtral.py:8x7b",
            MIXTURE
            | {"model.d_model": 1024, "model.n_heads": 8, "model.n_kv_heads": 2}
            | {"model.d_ff": 3584, "train.microbatches": 1},
        ),
    },
    ("gpt2.py:124m", {"data.sequence_length": 1024}, 8, 512, 64),
)
SMALL = {"data.sequence_length": 128, "data.batch_size": 2, "model.vocab_size": 256}
TINY = Size(
    (1, 32, 2, 1),
    (16,),
    {
        name: (config, SMALL)
        for name, config in {
            "Llama tiny": "llama.py:tiny",
            "Mixtral tiny": "mixtral.py:tiny",
        }.items()
    },
    ("llama.py:tiny", SMALL, 2, 16, 4),
)


def masks(rows: int, length: int) -> Iterator[tuple[str, AttentionMask, float]]:
    """Yield masks by name, with the soft-cap of their scores."""
    segments = np.sort(np.random.default_rng(0).integers(1, 9, (rows, length)), 1)
    documents = jnp.asarray(segments, jnp.int32)
    yield "causal", AttentionMask(True), 0.0
    yield "window", AttentionMask(True, window=length // 4), 0.0
    yield "packed", AttentionMask(True, documents), 0.0
    yield "packed, window, soft-cap", AttentionMask(True, documents, window=length // 4), 50.0
    yield "full, padded", AttentionMask(False, jnp.where(documents == 8, 0, documents)), 0.0


def check_kernels(size: Size, dry: bool, end: float) -> Iterator[dict[str, Any]]:
    """Yield the error and time of every kernel with every mask, forward and backward."""
    kernels: dict[str, Callable] = {"triton": partial(triton_attention, interpret=dry)}
    if not dry:
        kernels = {"cudnn": cudnn_attention, "tokamax": tokamax_attention} | kernels
    rows, length, heads, groups = size.attention
    dtype = "float32" if dry else "bfloat16"
    for head_dim in size.head_dims:
        shapes = [(rows, length, n, head_dim) for n in (heads, groups, groups, heads)]
        keys = jax.random.split(jax.random.key(0), 4)
        inputs = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
        wide = [x.astype(jnp.float32) for x in inputs]
        for of_mask, mask, softcap in masks(rows, length):
            if time.monotonic() > end:
                yield {"mask": of_mask, "head_dim": head_dim, "skipped": "no time left"}
                continue
            how = {"mask": mask, "scale": head_dim**-0.5}
            with jax.default_matmul_precision("highest"):
                expected, _ = _timed(partial(attention, softcap=softcap, **how), wide, True)
            for name, kernel in kernels.items():
                row = {"kernel": name, "mask": of_mask, "head_dim": head_dim}
                if problem := _problem(name, mask, softcap, head_dim):
                    yield row | {"skipped": f"not with {problem}"}
                    continue
                more = {} if name == "cudnn" else {"softcap": softcap}
                found, seconds = _timed(partial(kernel, **how, **more), inputs, dry)
                worst = max(map(_error, found, expected))
                # Two products forward, five backward, as cuDNN has.
                flops = 2 * 7 * rows * heads * head_dim * most_pairs(mask, length, length)
                yield row | {
                    "error": worst,
                    "ok": worst < TOLERANCE[dtype],
                    "ms": 1e3 * seconds,
                    "tflop/s": flops / seconds / 1e12,
                }


def _problem(kernel: str, mask: AttentionMask, softcap: float, head_dim: int) -> str:
    """Return why a kernel does not support an attention, or ""."""
    if kernel == "triton":
        return ""
    if kernel == "cudnn" and (softcap or cudnn_takes_arrays(mask)):
        return "this mask or soft-cap"
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return next(gpu_library_problems(kernel, head_dim, capability), "")


def _timed(attend: Callable, inputs: list[jax.Array], once: bool) -> tuple[list[jax.Array], float]:
    """Return the output and gradients, and the median time of both passes."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> list[jax.Array]:
        out, back = jax.vjp(attend, q, k, v)
        return [out, *back(g)]

    found = jax.block_until_ready(run(*inputs))
    return found, _median(lambda: jax.block_until_ready(run(*inputs)), 1 if once else 10)


def _median(run: Callable[[], Any], n: int) -> float:
    times = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _error(found: jax.Array, expected: jax.Array) -> float:
    difference = jnp.abs(found.astype(jnp.float32) - expected).max()
    return float(difference / jnp.abs(expected).max())


def built(file: str, values: dict[str, Any]) -> Experiment:
    """Return the experiment of a configuration file on the first device."""
    config = load_config(str(EXPERIMENTS / file), {})
    for path, value in values.items():
        set_value(config, path, value)
    return build(config, jax.devices()[:1])


def check_training(file: str, values: dict[str, Any], n: int) -> dict[str, Any]:
    """Return the measured time of a step and the plan for the same program."""
    experiment = built(file, values)
    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    start = time.monotonic()
    compiled = lower(experiment).compile()
    program = program_of(compiled, experiment, time.monotonic() - start)
    plan = plan_of(experiment, program, Topology(device.device_kind, _chip(), (1, 1), [device]))
    state, batch = experiment.init_state(), _batch(experiment)
    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    times = []
    for _ in range(n):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    used = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {
        "attention": experiment.attention.kernel,
        "why": experiment.attention.why,
        "ms": 1e3 * seconds,
        "tokens/s": plan.tokens / seconds,
        "mfu": plan.model_flops / seconds / plan.peak_flops if plan.peak_flops else None,
        "peak_bytes": used if used > before else None,  # of the process: an earlier part's
        "loss_is_finite": all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(metrics)),
        "planned": {
            "ms": 1e3 * plan.time.bound if plan.time else None,
            "mfu": plan.mfu,
            "bottleneck": plan.bottleneck,
            "bytes": plan.memory.needed,
            "compile_seconds": plan.compile_seconds,
        },
    }


def _batch(experiment: Experiment) -> dict[str, jax.Array]:
    """Return a batch of random tokens with eight documents per row."""
    rng = np.random.default_rng(0)
    made = {}
    for name, shape in batch_shapes(experiment).items():
        x = np.ones(shape.shape, shape.dtype)
        if name in ("inputs", "targets"):
            x = rng.integers(0, experiment.config.model.vocab_size, shape.shape)
        elif name == "segment_ids":
            x = np.sort(rng.integers(1, 9, shape.shape))
        elif name == "positions":
            x = np.broadcast_to(np.arange(shape.shape[-1]) % (shape.shape[-1] // 8), shape.shape)
        made[name] = x.astype(shape.dtype)
    return jax.device_put(made, experiment.batch_sharding)


def check_decoding(
    file: str, values: dict[str, Any], rows: int, cached: int, steps: int
) -> dict[str, Any]:
    """Return tokens per second of greedy decoding, and the limit set by reading the weights."""
    experiment = built(file, values)
    n_ids = experiment.config.model.vocab_size
    experiment, params = prepare(experiment, experiment.init_state().params)
    prompts = np.random.default_rng(0).integers(0, n_ids, (rows, cached)).tolist()
    arguments = (experiment.model, params, prompts, steps, Sampling(0.0), 0, Controls())
    for _ in sample_steps(*arguments):  # compiles
        pass
    start = time.perf_counter()
    n = sum(1 for _ in sample_steps(*arguments))
    seconds = (time.perf_counter() - start) / n
    bandwidth = _chip().memory_bandwidth
    return {
        "rows": rows,
        "prompt": cached,
        "tokens/s": rows / seconds,
        "planned": {"tokens/s": rows * bandwidth / bytes_of(params) if bandwidth else None},
    }


def _chip() -> Chip:
    return CHIPS.get(chip_name(jax.devices()[0].device_kind) or "", Chip(None))


def parts(size: Size, dry: bool, end: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the checks by name, most important first."""
    for name, (file, values) in size.training.items():
        yield f"training: {name}", partial(check_training, file, values, 2 if dry else 10)
    yield "decoding", partial(check_decoding, *size.decoding)
    yield "kernels", lambda: list(check_kernels(size, dry, end))


def text(result: Any) -> str:
    """Format a result as text, with nested ones in brackets."""
    if isinstance(result, dict):
        return ", ".join(
            f"{key} ({text(x)})" if isinstance(x, dict) else f"{key} {text(x)}"
            for key, x in result.items()
            if x is not None
        )
    return f"{result:,.4g}" if isinstance(result, float) else str(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="check_gpu.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu" if args.dry_run else "cuda")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
    try:
        device = jax.devices()[0]
    except (AssertionError, RuntimeError):  # the former where the plugin finds no driver
        hint = "JAX's CUDA plugin: pip install 'lm-jax[cuda12]'"
        print(f"error: no GPU in this machine, or not {hint}", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    failed, end = False, time.monotonic() + 60 * args.minutes
    for name, run in parts(TINY if args.dry_run else FULL, args.dry_run, end):
        if time.monotonic() > end:
            found[name] = {"skipped": "no time left"}
            continue
        try:
            found[name] = run()
        except Exception:  # the other parts' figures are wanted too
            found[name], failed = {"error": traceback.format_exc()}, True
        for row in found[name] if isinstance(found[name], list) else [found[name]]:
            failed |= not row.get("ok", True)
            print(f"{name}: {text(row)}", flush=True)
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
