#!/usr/bin/env python3
"""Serve on Kubernetes: a Deployment and a Service, from the template tpu/deployment.yaml.

    tpu/deployment.py --name NAME --image IMAGE --tpu v6e:2x2 --workdir /runs/first -- --rows 64
    tpu/deployment.py --name NAME --image IMAGE --gpu h100:1 --workdir gs://BUCKET/first --claim ''
    tpu/deployment.py --name NAME --image IMAGE --cpu 4 --replicas 2 --most_replicas 8 --workdir …

A replica is one pod of one host, with the whole model on its chips; any HTTP balancer in front of
the Service spreads requests, because a reply depends on nothing that another replica holds. The
workdir lies on the volume claim --claim, mounted at /runs, or in a bucket (--workdir gs://…, with
--claim '' and the --service_account that may read it). What follows -- are options of `lm serve`.
On CPUs replicas are added by their load up to --most_replicas; on accelerators by the metric
--scale_on of the pods, which an adapter of Prometheus must offer. --dry_run prints the manifest;
without it `kubectl apply` gets it.
"""

import argparse
import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from string import Template

from jobset import CHIPS_OF_HOST, GPUS, TPUS

DRAIN_SECONDS = 120


def parse(words):
    """The options and the words for `lm serve`."""
    own, options = words, []
    if "--" in words:
        own, options = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--image", required=True, help="built from tpu/Dockerfile")
    parser.add_argument("--workdir", required=True, help="of the run, in the container")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tpu", metavar="CHIP:TOPOLOGY", help=f"{', '.join(TPUS)}; one host, as 2x2")
    kind.add_argument("--gpu", metavar="CHIP:COUNT", help=f"{', '.join(GPUS)}; GPUs of a pod")
    kind.add_argument("--cpu", metavar="CORES", type=int)
    parser.add_argument("--memory", default="16Gi", help="of a pod on CPUs")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--most_replicas", type=int, help="default: --replicas")
    parser.add_argument("--scale_on", metavar="METRIC=VALUE", help="mean of the pods")
    parser.add_argument("--claim", default="runs", help="volume claim with the workdir, or none")
    parser.add_argument("--service_account", default="default", help="of the cluster's namespace")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args(own)
    args.most_replicas = args.most_replicas or args.replicas
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        parser.error(f"--name {args.name}: lower-case letters, digits and -, at most 40")
    if not 1 <= args.replicas <= args.most_replicas:
        parser.error(f"--most_replicas {args.most_replicas}: at least --replicas, 1 or more")
    if args.scale_on and not re.fullmatch(r"[a-z_:][\w:]*=[0-9.]+", args.scale_on):
        parser.error(f"--scale_on {args.scale_on}: METRIC=VALUE")
    if args.most_replicas > args.replicas and not (args.cpu or args.scale_on):
        parser.error("--most_replicas on accelerators needs --scale_on METRIC=VALUE")
    for place, known in ((args.tpu, TPUS), (args.gpu, GPUS)):
        chip, _, size = (place or "").partition(":")
        if place and (chip not in known or not re.fullmatch(r"\d+(x\d+)*", size)):
            parser.error(f"{place}: expected one of {', '.join(known)}, and a size")
    if args.tpu and chips(args.tpu) > CHIPS_OF_HOST:
        parser.error(f"{args.tpu}: a replica is one host of at most {CHIPS_OF_HOST} chips")
    return args, options


def chips(tpu):
    """The number of chips of CHIP:TOPOLOGY."""
    return prod(map(int, tpu.partition(":")[2].split("x")))


def manifest(args, options):
    """The filled template."""
    selector, limits = {}, {}
    if args.tpu:
        chip, _, topology = args.tpu.partition(":")
        label = "cloud.google.com/gke-tpu-"
        selector = {f"{label}accelerator": TPUS[chip][0], f"{label}topology": topology}
        limits = {"google.com/tpu": chips(args.tpu)}
    elif args.gpu:
        chip, _, count = args.gpu.partition(":")
        selector = {"cloud.google.com/gke-accelerator": GPUS[chip]}
        limits = {"nvidia.com/gpu": int(count)}
    else:
        limits = {"cpu": args.cpu, "memory": args.memory}
    metric = {"type": "Resource", "resource": {"name": "cpu"}}
    metric["resource"]["target"] = {"type": "Utilization", "averageUtilization": 70}
    if args.scale_on:
        name, _, value = args.scale_on.partition("=")
        target = {"type": "AverageValue", "averageValue": value}
        metric = {"type": "Pods", "pods": {"metric": {"name": name}, "target": target}}
    volume = {"emptyDir": {}}
    if args.claim:
        volume = {"persistentVolumeClaim": {"claimName": args.claim, "readOnly": True}}
    serve = ["lm", "serve", "--workdir", args.workdir, "--host", "0.0.0.0", "--port", "8000"]
    values = {
        "name": args.name,
        "image": args.image,
        "runs": {"name": "runs", **volume},
        "read_only": bool(args.claim),
        "service_account": args.service_account,
        "replicas": args.replicas,
        "most_replicas": args.most_replicas,
        # A new pod may find no free chip: on accelerators an old one goes first.
        "surge": 1 if args.cpu else 0,
        "unavailable": 0 if args.cpu else 1,
        "grace": DRAIN_SECONDS + 15,
        "selector": selector,
        "command": [*serve, "--drain_seconds", str(DRAIN_SECONDS), *options],
        "resources": {"limits": limits, "requests": limits},
        "metrics": [metric],
    }
    text = Path(__file__).with_name("deployment.yaml").read_text().partition("\n")[2]
    if args.most_replicas == args.replicas:
        text = text.rpartition("---\n")[0]
    return Template(text).substitute({name: json.dumps(value) for name, value in values.items()})


def main(words):
    """Print or apply; the exit code."""
    args, options = parse(words)
    text = manifest(args, options)
    if args.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "--filename", "-"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
