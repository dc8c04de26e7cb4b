"""Throughput of `lm serve` and `transformers serve` with equal weights, prompts and client.

    python scripts/bench_serve.py --workdir RUN [--concurrency 1 8 32] [--rounds 3] [--json]

RUN is a run of GPT-2; random weights suffice, for example from one step of `experiments/gpt2.py`.
It is exported to a Hugging Face folder, and three servers start: lm's, that of transformers (`pip
install "transformers[serving]"`), and the latter with `--continuous_batching`. In each round they
are tested in turn, while the others idle. lm's server is also tested with a seed in each request,
which makes replies bit-identical whatever else is served. All run in float32 and decode greedily,
on all cores of this script (`taskset` is inherited). The client shares the cores, and its share of
the time is reported. A first round compiles everything.

Prompts have 16 to 384 tokens and replies 16 to 96. Lengths are the same in each round but texts
differ, so that no round finds cached pages of an earlier one. A request that ends early is an
error. Figures are medians over the rounds: reply tokens per second, milliseconds to the first text
and between texts (p50, p99), and the ratio of lm's tokens per second to the other servers'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import httpx
import numpy as np

from lm.runs.saved_params import load_tokenizer

OURS, SEEDED = "lm", "lm, replies with seeds"
DEFAULT, BATCHING = "transformers", "transformers, continuous batching"


@dataclass(frozen=True)
class Server:
    """Running server: its name, process, address and the name of its model."""

    name: str
    process: subprocess.Popen[bytes]
    address: str
    model: str


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="lm serve beside transformers serve")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="for each concurrent one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        words = [sys.executable, "-m", "lm", "export", "--workdir", str(args.workdir)]
        subprocess.run([*words, "--to", str(folder)], check=True, stdout=sys.stderr)
        servers: list[Server] = []
        try:
            for kind in (OURS, DEFAULT, BATCHING):
                servers.append(start(kind, args.workdir, folder, Path(name)))
            servers.insert(1, replace(servers[0], name=SEEDED))
            found = asyncio.run(measure(servers, args))
        finally:
            for server in servers:
                server.process.send_signal(signal.SIGTERM)
            for server in servers:
                try:
                    server.process.wait(20)
                except subprocess.TimeoutExpired:
                    server.process.kill()
    print(json.dumps(found) if args.json else table(found))
    return 0


def start(kind: str, workdir: Path, folder: Path, logs: Path) -> Server:
    """Start a server and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if kind == OURS:
        words = [sys.executable, "-m", "lm", "serve", "--workdir", f"gpt2={workdir}"]
        words += ["--config.decode.weights=float32"]
        model, path = "gpt2", "/readyz"
    else:
        words = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
        words += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
        words += ["--continuous-batching"] * (kind == BATCHING)
        model, path = str(folder), "/health"
    log = (logs / f"{port}.log").open("wb")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*words, "--port", str(port)], stdout=log, stderr=log, env=environment
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(address + path).status_code == 200:
                return Server(kind, process, address, model)
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.5)
    process.kill()
    raise SystemExit(f"{kind} does not start:\n{(logs / f'{port}.log').read_text()[-2000:]}")


def requests(workdir: Path, n: int, texts: str) -> list[tuple[str, int]]:
    """Return prompts of 16 to 384 tokens, seeded by `texts`, and the lengths of their replies."""
    tokenizer, lengths, places = load_tokenizer(workdir), random.Random(0), random.Random(texts)
    ids = tokenizer.encode("\n".join(topics.values())[:400_000])
    drawn = []
    for _ in range(n):
        length, new = round(16 * 24 ** lengths.random()), round(16 * 6 ** lengths.random())
        first = places.randrange(len(ids) - length)
        drawn.append((tokenizer.decode(ids[first : first + length]), new))
    return drawn


async def measure(servers: Sequence[Server], args: argparse.Namespace) -> list[dict]:
    """Send requests to each server in turn; return medians for each concurrency and server."""
    rows = []
    for n in args.concurrency:
        n_requests = max(4, args.requests * n)
        rounds: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for number in range(args.rounds + 1):
            for server in servers:
                texts = f"{n} {number} {server.name == SEEDED}"  # ours is asked twice
                figures = await one_round(server, requests(args.workdir, n_requests, texts), n)
                print(f"{n} at once, round {number}: {server.name} {figures}", file=sys.stderr)
                if number:  # round 0 warms up
                    rounds[server.name].append(figures)
        for name, done in rounds.items():
            row = {key: statistics.median(figures[key] for figures in done) for key in done[0]}
            ratios = [
                ours["tokens_per_second"] / theirs["tokens_per_second"]
                for ours, theirs in zip(rounds[OURS], done, strict=True)
            ]
            rows.append({"at_once": n, "server": name, **row, "ours": statistics.median(ratios)})
    return rows


async def one_round(server: Server, asked: list[tuple[str, int]], n: int) -> dict[str, float]:
    """Send all requests, `n` at a time, and return rates and percentiles."""
    first: list[float] = []
    between: list[float] = []
    waiting = iter(asked)

    async def client(http: httpx.AsyncClient) -> None:
        for prompt, new in waiting:
            times = await reply(http, server, prompt, new)
            first.append(times[1] - times[0])
            between.extend(np.diff(times[1:]))

    start, used = time.perf_counter(), time.process_time()
    limits = httpx.Limits(max_connections=n)
    async with httpx.AsyncClient(timeout=None, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(n)))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    figures = {"tokens_per_second": sum(new for _, new in asked) / seconds}
    for name, times in (("first", first), ("between", between)):
        figures |= {f"{name}_ms_p{p}": 1e3 * float(np.percentile(times, p)) for p in (50, 99)}
    return figures | {"client_cores": used / seconds}


async def reply(http: httpx.AsyncClient, server: Server, prompt: str, new: int) -> list[float]:
    """Return the time of a request, and the times at which texts of its reply arrived."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": new, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= {"seed": 1} if server.name == SEEDED else {}
    times, usage = [time.perf_counter()], {}
    async with http.stream("POST", server.address + "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{server.name}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(f"{server.name}: {chunk['error']}")
            usage = chunk.get("usage") or usage
            if any(choice.get("text") for choice in chunk.get("choices", [])):
                times.append(time.perf_counter())
    if usage.get("completion_tokens") != new or len(times) < 2:
        raise SystemExit(f"{server.name}: {usage} where {new} new tokens were asked for")
    return times


def table(rows: list[dict]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| at once | server | tokens/s | first text, ms (p50, p99) | between texts, ms (p50, p99) "
        "| ours/this | client, cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, between = (
            f"{row[f'{name}_ms_p50']:.0f}, {row[f'{name}_ms_p99']:.0f}"
            for name in ("first", "between")
        )
        lines.append(
            f"| {row['at_once']} | {row['server']} | {row['tokens_per_second']:.1f} | {first} "
            f"| {between} | {row['ours']:.2f} | {row['client_cores']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
