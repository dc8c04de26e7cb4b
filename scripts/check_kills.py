"""Interrupt training runs at random moments; the results must not change.

    python scripts/check_kills.py sweep [--kills 6]     # SIGKILL to a sweep and some of its runs
    python scripts/check_kills.py launch [--kills 10]   # SIGKILL to one of a run's four processes
    python scripts/check_kills.py run [--kills 10]      # SIGKILL, SIGTERM and SIGUSR1 to a run
    python scripts/check_kills.py bucket [--kills 5]    # the same, of a run in an emulated bucket
    python scripts/check_kills.py disk [--kills 10]     # files that cannot grow, as on a full disk
    python scripts/check_kills.py data [--kills 10]     # SIGKILL to two builds of one token store

All but `data` train a model of a few thousand parameters that spends half of the time in
evaluation, first undisturbed and then disturbed. They compare the losses and evaluations of every
step, and the results table of a sweep. After a signal, the run must end within --seconds with exit
code 75; on a full disk, with exit code 2 and one line. `data` compares the bytes of shards and
checks that none is built twice. Options: --workdir (in which a new folder is created), --seed of
the random moments, --steps of a run. The exit code is 1 if anything differs.
"""

import argparse
import json
import logging
import os
import random
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from lm.storage import resolve_path

EXPERIMENT = """
from lm.config import default

def get_config():
    config = default()
    config.data.source = "text:{text}"
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 16, 2
    config.data.tokenizer, config.data.sequence_length, config.data.batch_size = "byte", 16, 4
    config.train.steps, config.checkpoint.every_steps = {steps}, 5
    config.data.validation_fraction, config.eval.every_steps = 0.1, 20
    config.log.tensorboard = False
    return config
"""
UNLIMITED = "import sys; from lm.cli import main; sys.exit(main(sys.argv[1:]))"
LIMITED = """
import resource, sys
from lm.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""
SHARDED = """
import sys
from lm.cli import main
from lm.data import dataset, file_parts, sharded_store
dataset.ONE_STORE, file_parts.RANGE, sharded_store.SHARD = 0, 20_000, 20_000
sys.exit(main(sys.argv[1:]))
"""
SWEEP = """
from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Sweep

def get_sweep():
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    return Sweep("{experiment}", named(grid({{"optimizer.learning_rate": rates, "seed": [0, 1]}})))
"""


def losses(run):
    """Return losses and evaluations by step and name; assert that none is written twice."""
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    names = ("loss", "eval/validation/loss")
    pairs = [((row["step"], name), row[name]) for row in rows for name in names if name in row]
    assert len(dict(pairs)) == len(pairs), f"{run}: a step is repeated"
    return dict(pairs)


def last_step(run):
    """Return the last step in a run's metrics, 0 without any."""
    file = run / "metrics.jsonl"
    return max(losses(run), default=(0, ""))[0] if file.exists() else 0


def training_processes(folder):
    """Return the ids of processes that train in a folder, found by command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if (
            b"train" in words
            and b"launch" not in words
            and str(folder).encode() in b" ".join(words)
        ):
            found.append(int(entry.name))
    return found


def start(*words):
    """Start `lm WORDS…` without its output."""
    log = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "lm", *map(str, words)], stdout=log, stderr=log)


def finish(process):
    """Wait for a process; assert that it succeeds."""
    code = process.wait()
    assert code == 0, f"exit code {code}"


def check_sweep(folder, experiment, args, chance):
    """Kill the sweep, and some of its runs with or before it, and start it again."""
    file = folder / "sweep.py"
    file.write_text(SWEEP.format(experiment=experiment))
    words = ["sweep", "--config", file, "--parallel", args.parallel, "--workdir"]
    began = time.monotonic()
    finish(start(*words, folder / "calm"))
    whole = time.monotonic() - began
    killed = {"sweep": 0, "runs": 0}
    for _ in range(args.kills):
        process = start(*words, folder / "shaken")
        until = time.monotonic() + chance.uniform(0.1, 0.4) * whole
        while time.monotonic() < until and process.poll() is None:
            time.sleep(chance.uniform(0.02, 0.1) * whole)
            for pid in training_processes(folder / "shaken"):
                if chance.random() < 0.3:
                    os.kill(pid, signal.SIGKILL)
                    killed["runs"] += 1
        if process.poll() is None:
            process.kill()
            killed["sweep"] += 1
        process.wait()
    finish(start(*words, folder / "shaken", "--retries", "9"))
    calm, shaken = folder / "calm", folder / "shaken"
    same = (calm / "results.csv").read_text() == (shaken / "results.csv").read_text()
    runs = sorted((calm / "runs").iterdir())
    equal = [losses(run) == losses(shaken / "runs" / run.name) for run in runs]
    print(f"killed: {killed}; tables equal: {same}; runs with equal losses: {sum(equal)}")
    return same and all(equal)


def check_launch(folder, experiment, args, chance):
    """Kill one process of the run several times, each time after a few more steps."""
    train = ["train", "--config", experiment, "--cpu_devices", "1", "--workdir"]
    words = ["launch", "--processes", args.processes, "--backoff", "0.1", "--", *train]
    finish(start(*words, folder / "calm"))
    process, kills, seen = start(*words, folder / "shaken"), 0, 0
    steps = [(i + chance.random()) * args.steps / args.kills for i in range(args.kills)]
    while process.poll() is None:
        time.sleep(0.05)
        step = last_step(folder / "shaken")
        victims = training_processes(folder / "shaken")
        if kills < args.kills and step >= steps[kills] and len(victims) == args.processes:
            os.kill(chance.choice(victims), signal.SIGKILL)
            kills, seen = kills + 1, step
            print(f"killed one of {len(victims)} processes after step {seen}", flush=True)
            time.sleep(1.0)  # the others end first
    finish(process)
    equal = losses(folder / "calm") == losses(folder / "shaken")
    print(f"{kills} kills; {len(losses(folder / 'calm'))} losses equal: {equal}")
    return equal and kills == args.kills


def check_run(folder, experiment, args, chance, place=None):
    """Signal a run at random moments and restart it, until there were enough signals."""
    place = place or folder
    words = ["train", "--config", experiment, "--workdir"]
    began = time.monotonic()
    finish(start(*words, f"{place}/calm"))
    whole = time.monotonic() - began
    calm = losses(resolve_path(f"{place}/calm"))
    sent, equal, slowest, turn = Counter(), [], 0.0, 0
    while sum(sent.values()) < args.kills:
        process = start(*words, f"{place}/shaken{turn}")
        time.sleep(chance.uniform(0.1, 1.0) * whole)
        if process.poll() is None:
            number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
            began = time.monotonic()
            process.send_signal(number)
            code = process.wait()
            if number != signal.SIGKILL:
                slowest = max(slowest, time.monotonic() - began)
                # 0: it was finished already; negative: it had not yet begun to watch.
                assert code in (75, 0, -number), f"{number.name}: exit code {code}"
            sent[number.name] += 1
            continue
        finish(process)
        equal.append(losses(resolve_path(f"{place}/shaken{turn}")) == calm)
        turn += 1
    finish(start(*words, f"{place}/shaken{turn}"))
    equal.append(losses(resolve_path(f"{place}/shaken{turn}")) == calm)
    print(
        f"signals: {dict(sent)}; slowest exit {slowest:.1f} s; runs with {len(calm)} equal losses: "
        f"{sum(equal)} of {len(equal)}"
    )
    return all(equal) and slowest <= args.seconds


def check_bucket(folder, experiment, args, chance):
    """Do the same in a bucket, served by this process."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
    from emulated_bucket import emulated_bucket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Clients that are killed in mid-request, and every request, are a line of it.
    socketserver.BaseServer.handle_error = lambda *_: None
    BaseHTTPRequestHandler.log_message = lambda *_: None
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with emulated_bucket("runs", port) as place:
        return check_run(folder, experiment, args, chance, place)


def check_disk(folder, experiment, args, chance):
    """Limit the size of a run's files at random, then continue without the limit."""
    words = ["train", "--config", experiment, "--workdir"]
    finish(start(*words, folder / "calm"))
    calm, full = losses(folder / "calm"), 0
    for turn in range(args.kills):
        run, limit = folder / f"shaken{turn}", int(10 ** chance.uniform(3.6, 5.3))
        for limited in (True, False):
            shown = [LIMITED, str(limit)] if limited else [UNLIMITED]
            done = subprocess.run(
                [sys.executable, "-c", *shown, *map(str, words), str(run)],
                capture_output=True,
                text=True,
            )
            errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
            assert "Traceback" not in done.stderr, done.stderr
            assert done.returncode == (2 if errors else 0), done.stderr
            assert len(errors) <= limited, errors
            full += len(errors)
        assert losses(run) == calm, f"{run}: other losses"
    print(f"full {full} of {args.kills} times; all losses equal")
    return True


def shard_states(cache):
    """Return content and identity of the shards in a cache, by name."""
    paths = cache.glob("stores/*.shards/*.shard")
    return {path.relative_to(cache): (path.read_bytes(), path.stat().st_ino) for path in paths}


def check_data(folder, experiment, args, chance):
    """Kill one of two builds, or a worker process of one, and start it again, several times."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"{i} times 7 is {7 * i}\n" for i in range(200_000)))
    words = [sys.executable, "-c", SHARDED, "data", "build", "--config", experiment]
    words += [f"--config.data.source=text:{corpus}", "--config.data.documents=line"]
    words += ["--json", "--config.data.workers"]

    def build(cache, workers):
        options = [str(workers), f"--config.data.cache_directory={cache}"]
        log = subprocess.DEVNULL
        return subprocess.Popen([*map(str, words), *options], stdout=log, stderr=log)

    began = time.monotonic()
    finish(build(folder / "calm", 1))
    whole = time.monotonic() - began
    kills, again, before = Counter(), 0, {}
    while sum(kills.values()) < args.kills:
        pair = [build(folder / "shaken", 4) for _ in range(2)]
        time.sleep(chance.uniform(0.3, 1.0) * whole)
        victim = chance.choice(pair)
        children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children")
        pids = children.read_text().split() if children.exists() else []
        if pids and chance.random() < 0.5:
            os.kill(int(chance.choice(pids)), signal.SIGKILL)
            kills["workers"] += 1
        else:
            victim.kill()
            kills["builds"] += 1
        time.sleep(chance.uniform(0, 0.3) * whole)
        for process in pair:
            process.kill()
            process.wait()
        now = shard_states(folder / "shaken")
        again += sum(now.get(name) != state for name, state in before.items())
        before = now
    finish(build(folder / "shaken", 1))
    calm, shaken = (
        {name: content for name, (content, _) in shard_states(folder / each).items()}
        for each in ("calm", "shaken")
    )
    print(
        f"killed: {dict(kills)}; {len(calm)} shards equal: {calm == shaken}; finished shards that "
        f"were made again: {again}"
    )
    return calm == shaken and not again


CHECKS = {
    "sweep": (check_sweep, 6),
    "launch": (check_launch, 10),
    "run": (check_run, 10),
    "bucket": (check_bucket, 5),
    "disk": (check_disk, 10),
    "data": (check_data, 10),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=CHECKS)
    parser.add_argument("--kills", type=int, default=0, help="disturbances; 0: as listed above")
    parser.add_argument("--seconds", type=float, default=10.0, help="from a signal to the exit")
    parser.add_argument("--steps", type=int, default=400, help="of a run")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", default=tempfile.gettempdir())
    args = parser.parse_args()
    check, kills = CHECKS[args.what]
    args.kills = args.kills or kills
    folder = Path(tempfile.mkdtemp(prefix=f"check_{args.what}_", dir=args.workdir))
    (folder / "sums.txt").write_text("".join(f"{i} + 7 = {i + 7}\n" for i in range(1500)))
    experiment = folder / "sums.py"
    experiment.write_text(EXPERIMENT.format(text=folder / "sums.txt", steps=args.steps))
    sys.exit(0 if check(folder, experiment, args, random.Random(args.seed)) else 1)


if __name__ == "__main__":
    main()
