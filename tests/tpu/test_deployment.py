"""The manifests of tpu/deployment.py: their contents, and that Kubernetes accepts them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lm.cli import serve_command

SCRIPT = Path(__file__).parents[2] / "tpu" / "deployment.py"
TPU, GPU, CPU = ["--tpu", "v6e:2x2"], ["--gpu", "h100:2"], ["--cpu", "4"]
SCALED = [*CPU, "--replicas", "2", "--most_replicas", "8"]
BY_METRIC = [*TPU, "--most_replicas", "3", "--scale_on", "lm_requests_waiting=4"]


def deployment(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--name", "chat", "--image", "images/lm:1"]
    command += ["--workdir", "/runs/a b", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


def manifests(*words: str) -> dict[str, dict]:
    done = deployment("--dry_run", *words)
    assert done.returncode == 0, done.stderr
    return {found["kind"]: found for found in yaml.safe_load_all(done.stdout)}


def pod(found: dict[str, dict]) -> tuple[dict, dict]:
    """The specification of the pods, and their container."""
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


@pytest.mark.parametrize(
    "words",
    [TPU, GPU, SCALED, BY_METRIC, [*CPU, "--claim", ""]],
    ids=["tpu", "gpu", "scaled", "by metric", "bucket"],
)
def test_kubernetes_accepts_it(words):
    validate = pytest.importorskip("kubernetes_validate")
    found = manifests(*words)
    for manifest in found.values():
        validate.validate(manifest, validate.latest_version(), strict=True)
    assert ("HorizontalPodAutoscaler" in found) == ("--most_replicas" in words)
    broken = found["Deployment"]
    broken["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, validate.latest_version(), strict=True)


def test_replica_is_a_host_with_its_chips():
    spec, container = pod(manifests(*TPU))
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2"
    spec, container = pod(manifests(*GPU))
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert spec["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


def test_pod_drains_before_it_is_killed():
    """SIGTERM comes after the pause; the time to drain and the pause fit in the grace period."""
    found = manifests(*CPU, "--", "--rows", "8")
    spec, container = pod(found)
    words = container["command"]
    assert words[:2] == ["lm", "serve"]
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    args = parser.parse_args(words[2:])
    assert (args.workdir, args.rows, args.port, args.host) == (["/runs/a b"], 8, 8000, "0.0.0.0")
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert args.drain_seconds + pause < spec["terminationGracePeriodSeconds"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--tpu", "v6e:4x4"], "at most 4 chips"),
        (["--tpu", "v9:2x2"], "expected one of"),
        ([*TPU, "--most_replicas", "4"], "needs --scale_on"),
        ([*CPU, "--replicas", "3", "--most_replicas", "2"], "at least --replicas"),
        ([*CPU, "--name", "a.b"], "lower-case letters"),
    ],
)
def test_invalid_input_is_rejected(words, problem):
    done = deployment("--dry_run", *words)
    assert done.returncode == 2
    assert problem in done.stderr
