"""Stand-in for `lm train` that writes metrics and checkpoints without training.

Honours train.steps, train.stop_at, SIGTERM and checkpoints. `seed` 13 always crashes, 14 crashes
at its first start, 15 is a user's error. Each start is noted in WORKDIR/starts.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

words = [word.removeprefix("--").removeprefix("config.").partition("=") for word in sys.argv[2:]]
options = {name: value for name, _, value in words}
workdir = Path(options["workdir"])
steps, rate = int(options["train.steps"]), float(options.get("optimizer.learning_rate", 1))
stop_at = int(options.get("train.stop_at", 0)) or steps
seed = int(options.get("seed", 0))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))

(workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
with (workdir / "starts").open("a") as stream:
    stream.write(f"{os.getpid()}\n")
first = max((int(f.name) for f in (workdir / "checkpoints").iterdir()), default=0)
metrics = workdir / "metrics.jsonl"
kept = [s for s in metrics.read_text().splitlines(True) if s.endswith("\n")] if first else []
kept = [line for line in kept if json.loads(line)["step"] <= first]
metrics.write_text("".join(kept))
if seed == 15:
    print("error: --config.seed=15: an unlucky number", file=sys.stderr)
    sys.exit(2)


def save(step):
    (workdir / "checkpoints" / str(step)).mkdir(exist_ok=True)


with metrics.open("a") as stream:
    for step in range(first + 1, steps + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0.01")))
        row = {"step": step, "loss": 5 / rate / step + seed, "seconds_per_step": 0.01}
        stream.write(json.dumps(row) + "\n")
        if step % 5 == 0:
            stream.write(json.dumps({"step": step, "eval/validation/loss": 6 / rate / step}) + "\n")
        stream.flush()
        if step % 5 == 0 or step == stop_at:
            save(step)
        if seed == 13 or (seed == 14 and not first and step == 7):
            raise ValueError("it broke")
        if asked or (step >= stop_at and step < steps):
            save(step)
            sys.exit(75)
