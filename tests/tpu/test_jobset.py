"""The manifests of tpu/jobset.py: their contents, and that Kubernetes' schemas accept them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "tpu" / "jobset.py"
TRAIN = ["--", "train", "--config", "experiments/gpt2.py:124m", "--workdir", "/runs/a b"]
TPU = ["--tpu", "v5p:4x4x4", "--slices", "2"]
GPU = ["--gpu", "h100:8", "--hosts", "4"]


def jobset(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--name", "run", "--image", "images/lm:1", *words, *TRAIN]
    return subprocess.run(command, capture_output=True, text=True, **options)


def manifest(*words: str) -> dict:
    done = jobset(*words, "--dry_run")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def parts(found: dict) -> tuple[dict, dict, dict]:
    """The replicated job, its job specification and its container."""
    (workers,) = found["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return workers, spec, container


@pytest.mark.parametrize(
    ("words", "hosts", "chips"),
    [
        (["--tpu", "v5p:4x4x4"], 16, 4),
        (["--tpu", "v6e:16x16"], 64, 4),
        (["--tpu", "v5e:2x2"], 1, 4),
        (["--tpu", "v6e:1x1"], 1, 1),
    ],
)
def test_slice_has_a_process_a_host(words, hosts, chips):
    _, spec, container = parts(manifest(*words))
    assert spec["parallelism"] == spec["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_workdir_is_on_a_volume_claim_or_in_a_bucket():
    for words, volume in (
        ([], {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}),
        (["--claim", ""], {"name": "runs", "emptyDir": {}}),
    ):
        _, spec, _ = parts(manifest(*TPU, *words, "--service_account", "writer"))
        pod = spec["template"]["spec"]
        assert pod["volumes"][0] == volume
        assert pod["serviceAccountName"] == "writer"


def test_tpu_slices():
    workers, spec, container = parts(manifest(*TPU))
    assert workers["replicas"] == 2
    assert spec["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    bash, flag, command = container["command"]
    assert (bash, flag) == ("bash", "-c")
    assert shlex.split(command) == ["exec", "lm", *TRAIN[1:]]


def test_gpu_hosts_are_told_their_coordinator():
    workers, spec, container = parts(manifest(*GPU))
    assert (workers["replicas"], spec["parallelism"]) == (1, 4)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    expected = "--coordinator run-workers-0-0.run:1234 --num_processes 4 --process_id"
    assert expected in container["command"][2]
    assert '"$JOB_COMPLETION_INDEX"' in container["command"][2]
    assert "--coordinator" not in parts(manifest("--gpu", "a100:1"))[2]["command"][2]


@pytest.mark.parametrize("words", [TPU, GPU, [*TPU, "--claim", ""]], ids=["tpu", "gpu", "bucket"])
def test_kubernetes_accepts_it(words):
    validate = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    found = manifest(*words)
    workers, _, _ = parts(found)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    validate.validate(job | workers["template"], validate.latest_version(), strict=True)
    schema = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
    jsonschema.validate(found, schema)
    found["spec"]["failurePolicy"]["rules"][0].pop("name")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tpu", "v9:2x2"], "expected one of v4"),
        (["--tpu", "v5p"], "and a size"),
        (["--tpu", "v5p:4x4"], "and a size of 3 dimensions"),
        (["--gpu", "h100:8x8"], "expected one of a100"),
        ([*TPU, "--gpu", "h100:8"], "not allowed with"),
        ([*TPU, "--name", "Run_1"], "lower-case letters"),
    ],
)
def test_wrong_words_are_one_line_errors(words, expected):
    done = jobset(*words)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]


def test_without_dry_run_kubectl_gets_it(tmp_path):
    fake = tmp_path / "kubectl"
    fake.write_text(f'#!/bin/sh\n[ "$*" = "apply --filename -" ] && cat >{tmp_path}/got\n')
    fake.chmod(0o755)
    done = jobset(*TPU, env={"PATH": f"{tmp_path}:/bin:/usr/bin"})
    assert done.returncode == 0
    assert yaml.safe_load((tmp_path / "got").read_text()) == manifest(*TPU)
    fake.write_text("#!/bin/sh\necho 'Error from server (NotFound)' >&2; exit 1\n")
    assert jobset(*TPU, env={"PATH": f"{tmp_path}:/bin:/usr/bin"}).returncode == 1
