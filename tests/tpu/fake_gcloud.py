"""A stand-in for `gcloud compute tpus`: checks arguments, keeps a state, runs workers' commands.

$FAKE holds `state` (of the queued resource), `calls` (one JSON list a line), `workers/NODE-I` (the
home of each of two workers a node) and, from the test, `fail-VERB` files: a verb fails once a line.
Flags are those that `gcloud compute tpus … --help` documents.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

COMMON = {"--zone": 1, "--project": 1}
DOCUMENTED = {  # flag: number of values
    ("queued-resources", "create"): COMMON
    | {"--node-id": 1, "--node-prefix": 1, "--node-count": 1, "--accelerator-type": 1}
    | {"--runtime-version": 1, "--spot": 0, "--reserved": 0},
    ("queued-resources", "describe"): COMMON | {"--format": 1},
    ("queued-resources", "delete"): COMMON | {"--force": 0, "--quiet": 0, "--async": 0},
    ("tpu-vm", "ssh"): COMMON | {"--worker": 1, "--command": 1},
    ("tpu-vm", "scp"): COMMON | {"--worker": 1, "--recurse": 0},
}
REQUIRED = {"create": {"--zone", "--accelerator-type", "--runtime-version"}}

folder = Path(os.environ["FAKE"])
assert sys.argv[1:3] == ["compute", "tpus"], sys.argv
kind, verb, *rest = sys.argv[3:]
with (folder / "calls").open("a") as stream:
    stream.write(json.dumps([kind, verb, *rest]) + "\n")

flags, positional, words = {}, [], iter(rest)
for word in words:
    if not word.startswith("--"):
        positional.append(word)
        continue
    name, equals, value = word.partition("=")
    n = DOCUMENTED[kind, verb][name]  # KeyError: gcloud knows no such flag
    flags[name] = (value if equals else next(words)) if n else True
assert flags.keys() >= REQUIRED.get(verb, {"--zone"}), flags
assert len(positional) == (2 if verb == "scp" else 1), positional

failures = folder / f"fail-{verb}"
if failures.exists() and (lines := failures.read_text().splitlines()):
    failures.write_text("\n".join(lines[1:]))
    sys.exit(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) {lines[0]}")

state = folder / "state"
now = state.read_text() if state.exists() else ""
workers = folder / "workers"
if verb == "create":
    assert not now, "it already exists"
    assert ("--node-id" in flags) != ("--node-prefix" in flags and "--node-count" in flags)
    shutil.rmtree(workers, ignore_errors=True)
    prefix, count = flags.get("--node-prefix"), int(flags.get("--node-count", 1))
    for node in [f"{prefix}-{i}" for i in range(count)] if prefix else [flags["--node-id"]]:
        for i in range(2):
            (workers / f"{node}-{i}").mkdir(parents=True)
    state.write_text("WAITING_FOR_RESOURCES")
elif verb == "describe":
    assert flags["--format"] == "value(state.state)"
    if not now:
        sys.exit("ERROR: NOT_FOUND")
    print(now)
    if now == "WAITING_FOR_RESOURCES":
        state.write_text("ACTIVE")
elif verb == "delete":
    if not now:
        sys.exit("ERROR: NOT_FOUND")
    state.unlink()
    shutil.rmtree(workers)
else:
    if now != "ACTIVE":
        sys.exit("ERROR: the TPU VM is not there")
    node = positional[-1].partition(":")[0]
    homes = sorted(workers.glob(f"{node}-*"))
    assert homes, node
    for home in homes if flags["--worker"] == "all" else homes[: int(flags["--worker"]) + 1]:
        if verb == "scp":
            shutil.copy(positional[0], home / positional[1].partition(":")[2])
            continue
        command = flags["--command"].replace("lm/scripts/setup.sh tpu,gcs", "touch installed")
        done = subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {"HOME": home})
        if done.returncode:
            sys.exit(done.returncode)
