"""Measure the regret of `lm plan --search`: the time of its choice relative to the best plan.

    python scripts/search_regret.py [CASE …] [--minutes 10] [--limits 4 8 24] [--workers 1]

A case is a small model on a small TPU slice. Its candidates (meshes, remat, microbatches) are
compiled, the most promising by the cost model first, until the minutes of the case are over. The
search then runs over the compiled candidates with each limit; plans that it needs and that are
missing are compiled. The script prints the best bound on the step time, and how much slower the
choice is at each limit.

Compilation stops once the program is optimized and its memory assigned: plans need no more, and
generating machine code takes ten times as long. Plans are kept in .cache/search_regret.jsonl by
candidate and compiler versions, so an interrupted script continues.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import connection, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.config import default, flatten, load_config
from lm.experiment import build
from lm.tools.planning.mesh_search import (
    Candidate,
    CandidateQueue,
    candidates,
    order,
    overridden,
)
from lm.tools.planning.plan import plan_of, state_memory
from lm.tools.planning.program import Program, lower
from lm.tools.planning.topologies import Topology, topology

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".cache" / "search_regret.jsonl"
PATIENCE = 240  # seconds that a compilation may take

# Experiment, topology, overrides. Few layers: a plan of more is the same loop, run more often.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2.py:124m", "v5e:2x4", {}),
    "gpt2-small": (
        "gpt2.py:124m",
        "v5e:2x2",
        {"model.n_layers": 4, "data.batch_size": 32, "data.sequence_length": 512},
    ),
    "llama": (
        "llama.py:3.2-1b",
        "v5p:2x2x2",
        {"model.n_layers": 8, "data.batch_size": 64, "data.sequence_length": 2048},
    ),
    "mixtral": (
        "mixtral.py:8x7b",
        "v5p:2x2x2",
        {"model.n_layers": 2, "data.batch_size": 32, "data.sequence_length": 2048},
    ),
    "mixtral-64": (
        "mixtral.py:8x7b",
        "v5p:4x4x4",
        {"data.batch_size": 64, "data.sequence_length": 2048},
    ),
    "t5": ("t5.py:1.1-base", "v5e:2x2", {"data.batch_size": 64}),
    "switch": ("switch.py:base-8", "v5e:2x2", {"data.batch_size": 64}),
    "bert": ("bert.py:base", "v5e:2x2", {"data.batch_size": 64}),
    "long": (
        "llama.py:3.2-1b",
        "v5p:2x2x1",
        {"model.n_layers": 4, "data.batch_size": 2, "data.sequence_length": 32_768},
    ),
    "wide": ("llama.py:2-7b", "v5e:4x4", {"model.n_layers": 8, "data.batch_size": 64}),
}

Plan = dict[str, Any]


# --- compiling up to the optimized program


def send_plan(sender: connection.Connection, values: dict[str, Any], name: str) -> None:
    """Compile a candidate up to the optimized program, send its plan, and end the process."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        plan = _optimized_plan(overridden(default(), values), topology(name))
    except Exception as error:
        plan = {"error": " ".join(str(error).split())[:200]}
    with contextlib.suppress(BrokenPipeError):  # the script was interrupted
        sender.send(plan)
    os._exit(0)  # the compiler still runs


def _optimized_plan(config: ConfigDict, target: Topology) -> Plan:
    start = time.monotonic()
    experiment = build(config, target.devices)
    lowered = lower(experiment)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        failed: list[Exception] = []
        finished = threading.Event()

        def compile_dumping() -> None:
            try:
                lowered.compile(options)
            except Exception as error:
                failed.append(error)
            finished.set()

        threading.Thread(target=compile_dumping, daemon=True).start()
        while not (reports := list(Path(folder).glob("*after_optimizations-memory-usage-*"))):
            if finished.wait(0.1) or time.monotonic() - start > PATIENCE:
                break
        finished.wait(0.3)  # the report is written whole
        reports = reports or list(Path(folder).glob("*after_optimizations-memory-usage-*"))
        programs = list(Path(folder).glob("*.after_optimizations.txt"))
        if not reports or not programs:
            raise failed[0] if failed else TimeoutError(f"no program after {PATIENCE} s")
        text = programs[0].read_text()
        total = sum(map(int, re.findall(r"color=0\)\s+Total bytes: (\d+)", reports[0].read_text())))
    arguments = state_memory(experiment)[3]
    program = Program(
        text, arguments, 0, max(total - arguments, 0), 0, None, 0, time.monotonic() - start
    )
    return plan_of(experiment, program, target).as_json()


# --- cases


@dataclass
class Case:
    """Candidates of a case and their plans, kept on disk."""

    name: str
    config: ConfigDict
    topology: str
    candidates: list[Candidate]
    capacity: int
    plans: dict[str, Plan] = field(default_factory=dict)

    def key(self, candidate: Candidate) -> str:
        """Return the digest of a candidate: configuration, topology and compilers."""
        values = {**dict(flatten(self.config)), **candidate.overrides}
        parts = (values, self.topology, version("jax"), version("libtpu"))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def plan(self, candidate: Candidate) -> Plan:
        """Return the plan of a candidate, computing it if necessary."""
        key = self.key(candidate)
        if key not in self.plans:
            self.plans[key] = self._make(candidate)
            entry = {"case": self.name, "key": key, "overrides": candidate.overrides}
            KEPT.parent.mkdir(exist_ok=True)
            with KEPT.open("a") as file:
                file.write(json.dumps({**entry, "plan": self.plans[key]}) + "\n")
        return self.plans[key]

    def _make(self, candidate: Candidate) -> Plan:
        server = get_context("forkserver")
        receiver, sender = server.Pipe(duplex=False)
        values = {**dict(flatten(self.config)), **candidate.overrides}
        arguments = (sender, values, self.topology)
        process = server.Process(target=send_plan, args=arguments)
        process.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(2 * PATIENCE) else {"error": "no answer"}
        except EOFError:
            return {"error": "the compiler ended the process"}
        finally:
            process.kill()
            process.join()

    def known(self) -> Iterator[tuple[Candidate, Plan]]:
        """Yield the candidates that were compiled and fit, with their plans."""
        for candidate in self.candidates:
            plan = self.plans.get(self.key(candidate), {})
            if plan.get("fits"):
                yield candidate, plan


def load_case(name: str) -> Case:
    """Return a case with its saved plans."""
    experiment, place, overrides = CASES[name]
    config = load_config(str(ROOT / "experiments" / experiment), overrides)
    target = topology(place)
    capacity = target.chip.memory or 0
    found = [c for c in candidates(config, target, 1) if c.estimate.least <= capacity]
    case = Case(name, config, place, found, capacity)
    for line in KEPT.read_text().splitlines() if KEPT.exists() else ():
        entry = json.loads(line)
        case.plans[entry["key"]] = entry["plan"]
    return case


def _likely_and_fast(capacity: int) -> Callable[[Candidate], tuple[bool, float]]:
    return lambda c: (c.estimate.likely > 1.5 * capacity, c.estimate.seconds)


def compile_all(case: Case, minutes: float) -> int:
    """Compile promising and random candidates in turn until the minutes are over.

    Returns:
        Number of remaining candidates.
    """
    end = time.monotonic() + 60 * minutes
    promising = sorted(case.candidates, key=_likely_and_fast(case.capacity))
    anything = random.Random(0).sample(case.candidates, len(case.candidates))
    pairs = itertools.chain.from_iterable(zip(promising, anything, strict=True))
    in_turn = {case.key(c): c for c in pairs}
    waiting = [c for key, c in in_turn.items() if key not in case.plans]
    for number, candidate in enumerate(waiting):
        if time.monotonic() > end:
            return len(waiting) - number
        case.plan(candidate)
    return 0


def choice(case: Case, limit: int, workers: int) -> tuple[Candidate, Plan] | None:
    """Return the choice of the search after `limit` compilations."""
    queue = CandidateQueue(case.candidates, case.capacity)
    running: list[Candidate] = []
    fitting = []
    for left in range(min(limit, len(case.candidates)), 0, -1):
        while len(running) < min(workers, left):
            running.append(queue.take())
        candidate = running.pop(0)
        plan = case.plan(candidate)
        if "error" in plan:
            continue
        seen = _as_object(plan)
        queue.learn(candidate, seen)
        if plan["fits"]:
            fitting.append((order(seen), candidate, plan))
    return min(fitting, key=lambda found: found[0])[1:] if fitting else None


def _as_object(plan: Plan) -> Any:
    """Return the parts of a plan that a search reads."""
    parts = {name: SimpleNamespace(**plan[name]) for name in ("time", "memory")}
    return SimpleNamespace(fits=plan["fits"], **parts)


def bound(plan: Plan) -> float:
    """Return the bound on the time of a step, seconds."""
    return plan["time"]["bound"]


def shown(candidate: Candidate, plan: Plan) -> str:
    """Format mesh, remat, microbatches and times of a plan."""
    overrides, terms = candidate.overrides, plan["time"]
    words = [f"{axis}={size}" for axis, size in plan["mesh"].items()]
    words += [f"remat={candidate.remat}", f"microbatches={overrides['train.microbatches']}"]
    words += ["sequence"] if overrides["parallel.sequence"] else []
    times = ", ".join(
        f"{term} {1e3 * terms[term]:.2f}" for term in ("compute", "memory", "network")
    )
    return f"{1e3 * bound(plan):.2f} ms ({times}): {' '.join(words)}"


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--limits", type=int, nargs="+", default=[4, 8, 24])
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    for name in args.cases:
        case = load_case(name)
        choices = [(limit, choice(case, limit, args.workers)) for limit in args.limits]
        left = compile_all(case, args.minutes)
        fitting = list(case.known())
        print(
            f"{name} on {case.topology}: {len(case.candidates)} candidates, {left} not compiled, "
            f"{len(fitting)} fit",
            flush=True,
        )
        if not fitting:
            continue
        best = min(fitting, key=lambda found: bound(found[1]))
        print(f"  best      {shown(*best)}")
        for limit, chosen in choices:
            if chosen:
                regret = bound(chosen[1]) / bound(best[1]) - 1
                print(f"  limit {limit:3d} {shown(*chosen)}: regret {regret:.1%}", flush=True)
            else:
                print(f"  limit {limit:3d} nothing that fits", flush=True)


if __name__ == "__main__":
    main()
