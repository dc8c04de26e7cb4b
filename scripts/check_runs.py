"""Damage run files at random: each command gives the same result, or a one-line error.

    python scripts/check_runs.py [--n 300] [--seed 0]

A tiny run is trained in a temporary folder. In each copy of it, one file (of the run, its
checkpoints or its token store) is truncated, emptied, overwritten, removed, or replaced by a folder
or link. Then a command reads the copy: train, eval, generate, report or merge. The script prints
tracebacks, multi-line errors, and results that differ from those of the intact run; the exit code
is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from lm.cli import main as lm

EXPERIMENT = """
from lm.config import default

def get_config():
    config = default()
    config.data.source = "text:{folder}/sums.txt"
    config.data.tokenizer, config.data.validation_fraction = "char", 0.1
    config.data.sequence_length, config.data.batch_size, config.data.workers = 16, 4, 1
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 16, 2
    config.train.steps, config.checkpoint.every_steps, config.eval.every_steps = 8, 3, 3
    config.checkpoint.keep_last = 2
    config.log.tensorboard = False
    return config
"""


def run(*words: object) -> tuple[int, str, str]:
    """Run a command of lm in this process; return its code and output."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = lm([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


# --- damages


def _cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) + 1)])


def _flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes()) or bytearray(1)
    for _ in range(rng.choice((1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _zero(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) + 1)
    content[start : start + rng.choice((1, 64, 4096))] = bytes(len(content[start : start + 64]))
    file.write_bytes(content)


def _overwrite(file: Path, rng: random.Random) -> None:
    deep, long = b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"
    odd = (b"", b"\0" * 99, b"\xff\xfe", b"null", b"3", b"[]", b"{}", b'"x"', b"NaN", deep, long)
    file.write_bytes(rng.choice(odd))


def _retype(file: Path, rng: random.Random) -> None:
    """Change the type of a value in a JSON file."""
    try:
        root = json.loads(file.read_bytes())
    except ValueError:
        return _overwrite(file, rng)
    node, key = {"": root}, ""
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    node[key] = rng.choice((None, True, -1, 1e300, 10**400, "x", [], {}, [[]], {"a": 1}))
    with contextlib.suppress(ValueError):  # more digits than Python prints
        file.write_text(json.dumps(root if node is not root and key != "" else node[key]))


def _remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def _folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _link(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(rng.choice((file.name, "none", "/dev/null")))


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *(_cut, _flip, _zero, _overwrite, _retype, _retype),
    *(_remove, _folder, _link),
)


# --- results


def losses(workdir: Path) -> dict[int, float]:
    """Return the losses of the steps added by a continued run."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row and row["step"] > 6}


def words_of(verb: str, experiment: Path, folder: Path) -> list[object]:
    """Return the command line of a verb for the run in a folder."""
    given: dict[str, list[object]] = {
        "train": ["--config", experiment, f"--config.data.cache_directory={folder}/cache"],
        "eval": ["--json", f"--config.data.cache_directory={folder}/cache"],
        "generate": ["--prompt", "1 + ", "--greedy", "--max_new_tokens", "8"],
        "report": ["--output", folder / "report.html"],
        "merge": ["--to", folder / "merged"],
    }
    return [verb, "--workdir", folder / "run", *given[verb]]


def result_of(verb: str, folder: Path, out: str) -> object:
    """Return the results that must not differ."""
    if verb == "train":
        return losses(folder / "run")
    return {"eval": out, "generate": out}.get(verb, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "sums.txt").write_text("".join(f"{i} + 7 = {i + 7}\n" for i in range(1500)))
        experiment = folder / "sums.py"
        experiment.write_text(EXPERIMENT.format(folder=folder))
        whole = folder / "whole"
        stopped = "--config.train.stop_at=6"
        code, _, errors = run(*words_of("train", experiment, whole), stopped)
        assert code == 75, errors
        verbs = ["train", "train", "eval", "generate", "report", "merge"]
        expected: dict[str, list[object]] = {}
        for verb in dict.fromkeys(verbs):
            # A run whose newest checkpoint is damaged is read at the one before.
            for steps in (("3", "6"), ("3",)):
                copy = folder / "copy"
                shutil.copytree(whole, copy)
                if "6" not in steps:
                    shutil.rmtree(copy / "run" / "checkpoints" / "6")
                code, out, errors = run(*words_of(verb, experiment, copy))
                assert code == 0, errors
                expected.setdefault(verb, []).append(result_of(verb, copy, out))
                shutil.rmtree(copy)
        for number in range(args.n):
            verb, damage = rng.choice(verbs), rng.choice(DAMAGES)
            copy = folder / "copy"
            shutil.copytree(whole, copy)
            files = sorted(file for file in copy.rglob("*") if file.is_file())
            # As often one of the run's own files as one of the many of its checkpoints.
            own = [file for file in files if "checkpoints" not in file.parts]
            file = rng.choice(rng.choice((own, files)))
            damage(file, rng)
            code, out, errors = run(*words_of(verb, experiment, copy))
            lines = [line for line in errors.splitlines() if re.match("error:|Traceback", line)]
            problem = ""
            if code and (code != 2 or len(lines) != 1 or "Traceback" in errors):
                problem = errors
            elif not code:
                found = result_of(verb, copy, out)
                problem = "" if found in expected[verb] else f"wrong: {found}\n{errors}"
            counts["faults" if problem else "as before" if not code else "one line"] += 1
            if problem:
                what = f"{damage.__name__} {file.relative_to(copy)}"
                print(f"{number}: {verb}, {what}\n{problem}\n", file=sys.stderr, flush=True)
            shutil.rmtree(copy)
    print(dict(counts))
    return 1 if counts["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
