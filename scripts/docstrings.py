"""Check the form of the docstrings of lm/: imperative verb or noun first, Google sections.

    python scripts/docstrings.py [--statistics]

Beside ruff's pydocstyle rules (pyproject.toml), which check presence and layout, this checks what
they cannot:

- no docstring opens with a question word or an article ("What …", "Whether …", "The …", "A …");
- a function's docstring opens with a verb in the imperative ("Return", "Build"): not with its third
  person ("Returns"), not with a participle;
- a function with more than `MAX_UNDOCUMENTED` arguments has an `Args:` section that names each of
  them, and no other;
- a public name is defined in one file, and no two modules share a file name;
- a file of lm/ that a docstring or comment names is there.

It prints each violation as FILE:LINE and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_UNDOCUMENTED = 4  # arguments, self aside, that a function may have without an Args section

OPENINGS = re.compile(
    r"^(what|which|whether|where|how|why|when|who|whose|of|if|the|a|an|those|that|this|these|"
    r"everything|all|some|it|its|their|theirs|ours|from|to|for|by|in|with|as|at|on)\b",
    re.IGNORECASE,
)
# Function docstrings must not open with these forms of a verb.
NOT_IMPERATIVE = re.compile(r"^(\w+ed|\w+ing)\b|^\w+[^s\W]s\b", re.IGNORECASE)
IMPERATIVES_IN_S = {"process", "pass", "discuss", "focus", "access", "compress", "express", "bias"}
IMPERATIVES_IN_ED_OR_ING = {"embed", "feed", "seed", "shed", "need", "string", "bring", "ring"}
# Names that several modules may define: protocol methods are not module-level names anyway.
SHARED_NAMES = {"run", "add_arguments", "used_keys", "get_config"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def violations(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and message of every violation in one file."""
    source = file.read_text()
    for number, text in enumerate(source.splitlines(), 1):
        for path in re.findall(r"(?<![\w/])lm/[a-z_0-9/]+\.py", text):
            if not (ROOT / path).is_file():
                yield number, f"{path} does not exist"
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | Function):
            continue
        text = ast.get_docstring(node)
        line = getattr(node, "lineno", 1)
        if not text:
            continue
        if OPENINGS.match(text):
            yield line, f"opens with {text.split()[0]!r}: {text.splitlines()[0]}"
        if isinstance(node, Function):
            yield from _function_violations(node, text)


def _function_violations(node: Function, text: str) -> Iterator[tuple[int, str]]:
    first = text.split()[0].strip(",.:;").lower()
    is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
    allowed = IMPERATIVES_IN_S | IMPERATIVES_IN_ED_OR_ING
    if not is_property and first not in allowed and NOT_IMPERATIVE.match(first):
        yield node.lineno, f"{first!r} is not an imperative: {text.splitlines()[0]}"
    arguments = _arguments(node)
    documented = _documented(text)
    if documented and set(documented) != set(arguments):
        unlike = sorted(set(documented) ^ set(arguments))
        yield node.lineno, f"Args: of {node.name} differ from its arguments: {', '.join(unlike)}"
    if not documented and len(arguments) > MAX_UNDOCUMENTED and not node.name.startswith("_"):
        yield node.lineno, f"{node.name} has {len(arguments)} arguments and no Args section"


def _arguments(node: Function) -> list[str]:
    spec = node.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    names += [a.arg for a in (spec.vararg, spec.kwarg) if a is not None]
    return [name for name in names if name not in ("self", "cls")]


def _documented(text: str) -> list[str]:
    """Return the names in an Args section."""
    section = re.search(r"^Args:\n((?:(?:[ \t]+.*)?\n?)*)", text, re.MULTILINE)
    if not section:
        return []
    names = []
    for found in re.finditer(r"^    (\S[^:\n]*):", section.group(1), re.MULTILINE):
        names += [name.strip().lstrip("*") for name in found.group(1).split(",")]
    return names


def shared_names(files: list[Path]) -> Iterator[str]:
    """Yield a message for every public name or file name that is defined several times."""
    places: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for file in files:
        place = str(file.relative_to(ROOT))
        if file.name not in ("__init__.py", "__main__.py"):
            places[file.name].append(place)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                names[node.name].append(f"{place}:{node.lineno}")
    for name, found in {**places, **names}.items():
        if len(found) > 1 and name not in SHARED_NAMES:
            yield f"{name} is defined in {', '.join(found)}"


def main() -> int:
    """Print all violations; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--statistics", action="store_true", help="violations by file only")
    args = parser.parse_args()
    files = sorted((ROOT / "lm").rglob("*.py"))
    counts: dict[str, int] = {}
    for file in files:
        found = list(violations(file))
        counts[str(file.relative_to(ROOT))] = len(found)
        if not args.statistics:
            for line, message in found:
                print(f"{file.relative_to(ROOT)}:{line}: {message}")
    shared = list(shared_names(files))
    if args.statistics:
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            print(f"{count:4} {name}") if count else None
    for message in shared:
        print(message)
    total = sum(counts.values()) + len(shared)
    if total:
        print(f"{total} violations", file=sys.stderr)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
