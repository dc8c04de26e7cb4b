"""Documents: shells and `lm` accept the commands, and the links lead to a file and heading."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lm.cli import VERBS
from lm.cli.arguments import parse
from lm.config import load_config
from lm.tools.corpus.corpus_config import load_corpus_config

ROOT = Path(__file__).parents[1]
PAGES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "lm").rglob("README.md"))]
PAGES += ["README.md", "experiments/README.md", "tpu/README.md", ".github/CONTRIBUTING.md"]
PLACEHOLDER = re.compile(r"…|\[[-A-Z]| \| |<")
PROGRAMS = ("lm", ".venv/bin/lm")
LAUNCHERS = ("scripts/train.sbatch", "tpu/train.sh", "tpu/jobset.py", "launch")


def commands(document: str) -> list[str]:
    """The commands of the blocks that begin with a program, continued lines joined."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"(?:^ {4,}\S.*\n)+", text, re.M)
    lines = (line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines())
    programs = ("lm ", ".venv/bin/", "scripts/", "tpu/", "sbatch ", "pip ", "bash ", "python ")
    return [line.strip() for line in lines if line.strip().startswith(programs)]


def lm_words(line: str) -> list[str]:
    """The arguments of `lm` in a command, of what a launcher starts too; [] if there is none."""
    words = shlex.split(line, comments=True)
    if words[0] in PROGRAMS and words[1] != "launch":
        return words[1:]
    if any(launcher in words for launcher in LAUNCHERS) and "train" in words:
        return words[words.index("train") :]
    return []


ALL = [(document, line) for document in PAGES for line in commands(document)]
COMPLETE = [line for _, line in ALL if lm_words(line) and not PLACEHOLDER.search(line)]


def test_there_are_commands_to_check():
    assert len(ALL) > 40
    assert len(COMPLETE) > 20
    assert any(line.startswith("sbatch") for line in COMPLETE)
    assert any(line.startswith("tpu/train.sh") for line in COMPLETE)


def test_shell_parses_every_command():
    script = "\n".join(line for _, line in ALL if not PLACEHOLDER.search(line))
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("document", [*PAGES, "experiments/RESULTS.md"])
def test_links_lead_to_a_file_and_heading(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_scripts_that_are_named_exist():
    for document, line in ALL:
        for name in re.findall(r"\b(?:scripts|tpu|experiments)/[\w/.]+\.(?:sh|py|sbatch)\b", line):
            if not name.startswith("scripts/") or "NAME" not in name:
                assert (ROOT / name).exists(), (document, name)


@pytest.mark.parametrize("line", COMPLETE)
def test_lm_knows_the_options_and_keys(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    args, overrides = parse(lm_words(line), VERBS)
    config = getattr(args, "config", None) or "experiments/stdlib.py"
    if args.verb == "corpus":
        load_corpus_config(config, overrides)
    elif "sweeps/" not in config and config.startswith("experiments/"):
        load_config(config, overrides)
