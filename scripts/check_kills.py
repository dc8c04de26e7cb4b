"""Send SIGKILL to training runs at random moments; their results must not change.

    python scripts/check_kills.py sweep [--kills 6]     # a sweep of twelve runs, and some runs
    python scripts/check_kills.py launch [--kills 10]   # one of the four processes of a run

Both train a model of a few thousand parameters, first undisturbed and then killed, and compare the
sweep's results table and every run's losses, or the losses of every step. Options: --workdir (in
which a new folder is made), --seed of the moments, --steps of a run. Exit code 1 if they differ.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPERIMENT = """
from lm.config import default

def get_config():
    config = default()
    config.data.source = "text:{text}"
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 16, 2
    config.data.tokenizer, config.data.sequence_length, config.data.batch_size = "byte", 16, 4
    config.train.steps, config.checkpoint.every_steps = {steps}, 5
    config.log.tensorboard = False
    return config
"""
SWEEP = """
from lm.sweeps.sets import grid, named
from lm.sweeps.sweep import Sweep

def get_sweep():
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    return Sweep("{experiment}", named(grid({{"optimizer.learning_rate": rates, "seed": [0, 1]}})))
"""


def losses(run):
    """Return {step: loss} of a run; assert that no step was written twice."""
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    pairs = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(dict(pairs)) == len(pairs), f"{run}: a step is there twice"
    return dict(pairs)


def training_processes(folder):
    """Return the ids of the processes that train in a folder, by their command lines."""
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
    """Kill the sweep, and some of its runs with it or before it, and start it again."""
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
    """Kill one process of the run several times, each time after some more steps."""
    train = ["train", "--config", experiment, "--cpu_devices", "1", "--workdir"]
    words = ["launch", "--processes", args.processes, "--backoff", "0.1", "--", *train]
    finish(start(*words, folder / "calm"))
    process, kills, seen = start(*words, folder / "shaken"), 0, 0
    steps = [(i + chance.random()) * args.steps / args.kills for i in range(args.kills)]
    while process.poll() is None:
        time.sleep(0.05)
        metrics = folder / "shaken" / "metrics.jsonl"
        step = max(losses(folder / "shaken"), default=0) if metrics.exists() else 0
        victims = training_processes(folder / "shaken")
        if kills < args.kills and step >= steps[kills] and len(victims) == args.processes:
            os.kill(chance.choice(victims), signal.SIGKILL)
            kills, seen = kills + 1, step
            print(f"killed one of {len(victims)} processes after step {seen}", flush=True)
            time.sleep(1.0)  # the others end first
    finish(process)
    equal = losses(folder / "calm") == losses(folder / "shaken")
    print(f"{kills} kills; losses of {len(losses(folder / 'calm'))} steps equal: {equal}")
    return equal and kills == args.kills


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sweep", "launch"))
    parser.add_argument("--kills", type=int, default=0, help="6 of the sweep, 10 of processes")
    parser.add_argument("--steps", type=int, default=400, help="of a run")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", default=tempfile.gettempdir())
    args = parser.parse_args()
    args.kills = args.kills or {"sweep": 6, "launch": 10}[args.what]
    folder = Path(tempfile.mkdtemp(prefix=f"check_{args.what}_", dir=args.workdir))
    (folder / "sums.txt").write_text("".join(f"{i} + 7 = {i + 7}\n" for i in range(1500)))
    experiment = folder / "sums.py"
    experiment.write_text(EXPERIMENT.format(text=folder / "sums.txt", steps=args.steps))
    check = check_sweep if args.what == "sweep" else check_launch
    sys.exit(0 if check(folder, experiment, args, random.Random(args.seed)) else 1)


if __name__ == "__main__":
    main()
