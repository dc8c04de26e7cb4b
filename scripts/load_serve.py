"""Load-test a running `lm serve` with many clients, some of which misbehave.

    lm serve --workdir runs/stdlib --port 8000 &
    python scripts/load_serve.py --url http://localhost:8000 --pid $! --clients 200 --seconds 60

Clients send requests with seeds, abort them, send bad JSON and prompts that are too long, read
slowly, or are processes that get killed. The test fails if the server answers with a status of 500
or above, if a seeded reply differs from that of the idle server, or if the memory of process --pid
grows after the first third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

PROMPTS = ["def ", "the model reads every token ", "import os\n\nclass ", "a" * 40]


def seeded(i: int) -> dict:
    """A request whose reply is known."""
    return {
        "prompt": PROMPTS[i % len(PROMPTS)],
        "seed": i,
        "max_tokens": 8 + 8 * (i % 4),
        "temperature": 1.0,
        "logprobs": 0,
    }


async def ask(client: httpx.AsyncClient, body: dict, seconds: float = 300) -> httpx.Response:
    return await client.post("/v1/completions", json=body, timeout=seconds)


async def check_seed(client: httpx.AsyncClient, i: int, idle: list, counts: Counter) -> None:
    response = await ask(client, seeded(i))
    counts[f"seeded {response.status_code}"] += 1
    if response.status_code == 200 and response.json()["choices"] != idle[i]:
        counts["seeded DIFFERENT"] += 1


async def check_stream(client: httpx.AsyncClient, i: int, idle: list, counts: Counter) -> None:
    """A reader that takes its time."""
    text, body = "", seeded(i) | {"stream": True}
    async with client.stream("POST", "/v1/completions", json=body, timeout=300) as response:
        counts[f"slow {response.status_code}"] += 1
        if response.status_code != 200:
            return
        async for line in response.aiter_lines():
            await asyncio.sleep(0.02)
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text += "".join(choice["text"] for choice in event.get("choices", ()))
                counts["slow ERROR"] += "error" in event
    if text != idle[i][0]["text"]:
        counts["slow DIFFERENT"] += 1


async def abort(client: httpx.AsyncClient, i: int, idle: list, counts: Counter) -> None:
    body = {"prompt": "the", "max_tokens": 200, "n": 2, "stream": bool(i % 2)}
    try:
        await ask(client, body, seconds=random.uniform(0.01, 0.5))
        counts["not aborted"] += 1
    except httpx.TimeoutException:
        counts["aborted"] += 1


async def send_nonsense(client: httpx.AsyncClient, i: int, idle: list, counts: Counter) -> None:
    bodies = [b'{"prompt": ', b"\xff\x00", b'{"prompt": 3}', b'{"temperature": "hot"}', b"[]"]
    body = bodies[i % len(bodies)]
    response = await client.post("/v1/chat/completions", content=body, timeout=300)
    counts[f"nonsense {response.status_code}"] += 1
    response.json()["error"]["message"]


async def send_too_much(client: httpx.AsyncClient, i: int, idle: list, counts: Counter) -> None:
    prompt = "many words " * (400_000 if i % 8 == 0 else 20_000)
    try:
        response = await ask(client, {"prompt": prompt})
        counts[f"too long {response.status_code}"] += 1
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        counts["too long, closed"] += 1  # refused before all was sent


async def kill_client(client: httpx.AsyncClient, i: int, idle: list, counts: Counter) -> None:
    body = json.dumps({"prompt": "the", "max_tokens": 300, "stream": bool(i % 2)})
    url = str(client.base_url.join("/v1/completions"))
    process = await asyncio.create_subprocess_exec(
        "curl", "-s", "-N", url, "-d", body, stdout=subprocess.DEVNULL
    )
    await asyncio.sleep(random.uniform(0.02, 0.3))
    if process.returncode is None:
        process.kill()
    await process.wait()
    counts["killed -9"] += 1


KINDS = [check_seed, check_seed, check_seed, check_stream, abort, send_nonsense, send_too_much]


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def work(
    client: httpx.AsyncClient, number: int, until: float, idle: list, counts: Counter
) -> None:
    while time.monotonic() < until:
        i = random.randrange(len(idle))
        kind = kill_client if number % 25 == 0 else KINDS[(number + i) % len(KINDS)]
        try:
            await kind(client, i, idle, counts)
        except httpx.HTTPError as error:
            counts[f"{kind.__name__}: {type(error).__name__}"] += 1
        await asyncio.sleep(random.uniform(0, 0.1))


async def measure(args: argparse.Namespace) -> int:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=args.url, limits=limits) as client:
        idle = [(await ask(client, seeded(i))).json()["choices"] for i in range(24)]
        counts: Counter = Counter()
        memory: list[float] = []
        start = time.monotonic()
        until = start + args.seconds
        workers = [
            asyncio.create_task(work(client, number, until, idle, counts))
            for number in range(args.clients)
        ]
        while not all(worker.done() for worker in workers):
            memory += [resident_mib(args.pid)] if args.pid else []
            await asyncio.sleep(args.seconds / 30)
        await asyncio.gather(*workers)
        again = (await ask(client, seeded(0))).json()["choices"] == idle[0]
        active = "lm_active_requests 0.0" in (await client.get("/metrics")).text
    for name, count in sorted(counts.items()):
        print(f"{name:36} {count}")
    third = len(memory) // 3
    before, after = max(memory[: third + 1], default=0), max(memory[-third:], default=0)
    print(f"memory: {before:.0f} MiB in the first third, {after:.0f} MiB in the last")
    failures = [name for name in counts if "DIFFERENT" in name or "ERROR" in name or " 50" in name]
    failures = [name for name in failures if counts[name]]
    failures += [] if after <= 1.1 * before + 20 else ["memory grows"]
    failures += [] if again else ["the server is not as before"]
    failures += [] if active else ["requests are left over"]
    print("failed: " + ", ".join(failures) if failures else "passed")
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--pid", type=int, help="process of the server, whose memory is read")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    sys.exit(asyncio.run(measure(parser.parse_args())))
