#!/usr/bin/env python3
"""Train on GKE: a JobSet of TPU slices or GPU hosts, from the template tpu/jobset.yaml.

    tpu/jobset.py --name NAME --image IMAGE --tpu v5p:4x4x4 [--slices 2] -- train --config …
    tpu/jobset.py --name NAME --image IMAGE --gpu h100:8 --hosts 4 -- train --config …

The workdir lies on the volume claim --claim, mounted at /runs, or in a bucket (--workdir gs://…,
with --claim '' and the --service_account that may write it). All processes start again from the
last checkpoint when one ends with anything but 0 or 2. --dry_run prints the manifest; without it
`kubectl apply` gets it. Needs JobSet in the cluster (kubernetes-sigs/jobset) and nothing here.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from math import prod
from pathlib import Path
from string import Template

# GKE's name of the accelerator, and the dimensions of its torus. Names as in Google's own launcher
# (AI-Hypercomputer/xpk, core/system_characteristics.py), where a host has 4 chips too.
TPUS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
    "tpu7x": ("tpu7x", 3),
}
CHIPS_OF_HOST = 4
GPUS = {
    "a100": "nvidia-tesla-a100",  # of 40 GB
    "a100-80gb": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
PORT = 1234  # of process 0 on GPU hosts; TPU hosts find each other


def parse(words):
    """The options and the words of the lm command."""
    own, command = words, []
    if "--" in words:
        own, command = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--image", required=True, help="built from tpu/Dockerfile")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tpu", metavar="CHIP:TOPOLOGY", help=f"{', '.join(TPUS)}; as v5p:4x4x4")
    kind.add_argument("--gpu", metavar="CHIP:COUNT", help=f"{', '.join(GPUS)}; GPUs of a host")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices")
    parser.add_argument("--hosts", type=int, default=1, help="GPU hosts")
    parser.add_argument("--claim", default="runs", help="volume claim with the workdir, or none")
    parser.add_argument("--service_account", default="default", help="of the cluster's namespace")
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args(own)
    if not command:
        parser.error("after -- comes the lm command, such as train")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        parser.error(f"--name {args.name}: lower-case letters, digits and -, at most 40")
    chip, _, size = (args.tpu or args.gpu).partition(":")
    known = TPUS if args.tpu else GPUS
    dimensions = TPUS[chip][1] if chip in TPUS else 1
    if chip not in known or not re.fullmatch("x".join([r"\d+"] * dimensions), size):
        parser.error(
            f"{args.tpu or args.gpu}: expected one of {', '.join(known)}, and a size"
            + (f" of {dimensions} dimensions" if args.tpu and chip in known else "")
        )
    return args, command


def manifest(args, command):
    """The filled template."""
    lm = shlex.join(["lm", *command])
    if args.tpu:
        chip, _, topology = args.tpu.partition(":")
        accelerator, _ = TPUS[chip]
        chips = prod(map(int, topology.split("x")))
        hosts = max(1, chips // CHIPS_OF_HOST)
        resources = {"google.com/tpu": min(chips, CHIPS_OF_HOST)}
        label = "cloud.google.com/gke-tpu-"
        selector = {f"{label}accelerator": accelerator, f"{label}topology": topology}
        ports = [8471, 8080, 8431]  # libtpu: between hosts, between slices, metrics
    else:
        chip, _, count = args.gpu.partition(":")
        hosts, resources = args.hosts, {"nvidia.com/gpu": int(count)}
        selector = {"cloud.google.com/gke-accelerator": GPUS[chip]}
        ports = [PORT]
        if hosts > 1:
            lead = f"{args.name}-workers-0-0.{args.name}"
            lm += f" --coordinator {lead}:{PORT} --num_processes {hosts}"
            lm += ' --process_id "$JOB_COMPLETION_INDEX"'
    volume = {"emptyDir": {}}
    if args.claim:
        volume = {"persistentVolumeClaim": {"claimName": args.claim}}
    values = {
        "name": args.name,
        "image": args.image,
        "runs": {"name": "runs", **volume},
        "service_account": args.service_account,
        "restarts": args.restarts,
        "slices": args.slices if args.tpu else 1,
        "hosts": hosts,
        "selector": selector,
        "command": f"exec {lm}",
        "ports": [{"containerPort": port} for port in ports],
        "resources": resources,
    }
    template = Template(Path(__file__).with_name("jobset.yaml").read_text().partition("\n")[2])
    return template.substitute({name: json.dumps(value) for name, value in values.items()})


def main(words):
    """Print or apply; the exit code."""
    args, command = parse(words)
    text = manifest(args, command)
    if args.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "--filename", "-"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
