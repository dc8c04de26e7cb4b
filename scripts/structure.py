"""Measure the structure of lm/: imports, trainer path, calls between files, start-up time.

    python scripts/structure.py imports|trainer-path|call-paths|startup [--checkout DIR] [--json]

imports [--check]: files, lines, lines of code (not blank, comment or docstring), imports, import
cycles, and imports upward by `FLOORS`. Lazy imports are those inside functions; imports for type
checkers and module names in strings do not count. A folder is a dotted package, or a module at the
top of lm/. "folders" counts pairs of the importing file's top-level folder and the imported file's
folder, including pairs of the same folder; the columns after it count only pairs of two folders.
Siblings are files and folders in the same folder, with their contents.

trainer-path [--check]: files of which a function runs from the call of get_config until Orbax
returns from the first save, in a tiny run; and loaded modules that training does not need.

call-paths: calls in order, as seen by `sys.setprofile`, where a call from one place in the code
counts once. An entry is a call into another file than the previous call; a re-entry is an entry
into a file that was entered before. Both are counted over all calls, and over the calls with the
object among their arguments or the arguments' attributes: a ConfigDict, a path in the workdir, an
argparse.Namespace. Training is recorded as for trainer-path; a batch is the calls of the thread
that prepares batches. --json lists the files in the order of entry.

startup [--vs DIR]: median seconds of `lm --help`, `lm config`, and `lm train` to its first loss.

At commit a5d4a05:

    imports        228 files, 23,467 lines, 16,573 of code; no cycle; edges with lazy ones: files
                   760, folders 152, different folders 136, top-level folders 134
    trainer-path   66 files, 7,879 lines, 5,500 of code
    call-paths     re-entries (entries, files)    object           all calls
                   config through training        40 (66, 26)      229 (293, 64)
                   a batch                                         3 (6, 3)
                   workdir through export         6 (14, 8)        142 (187, 45)
                   args through generate          0 (3, 3)         127 (181, 54)

At commit 5d1e5b7, with roles, model state, layer types, registries, validation, changes of runs,
signals and trackers added (call-paths: c840d9d):

    imports        206 files, 34,496 lines, 22,448 of code; no cycle; edges with lazy ones: files
                   847, folders 151, different folders 150, top-level folders 123
    trainer-path   32 files, 7,577 lines, 4,599 of code
    call-paths     config through training        42 (62, 20)      277 (308, 31)
                   a batch                                         3 (6, 3)
                   workdir through export         10 (19, 9)       180 (219, 39)
                   args through generate          1 (4, 3)         164 (199, 35)

At commit 63ee040, with sources by URL, stores in shards, lm corpus, mixtures and lm-eval added:

    imports        242 files, 42,162 lines, 27,789 of code; two lazy cycles of two files; edges with
                   lazy ones: files 1,039, folders 160, different folders 164, top-level
                   folders 129
    trainer-path   32 files, 7,629 lines, 4,588 of code
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

# Folders and top-level modules of lm/, from the top floor to the ground; "" is lm/__init__.py.
FLOORS = (
    ("cli", "__main__"),
    ("tools", "serving"),
    ("", "api"),
    ("training",),
    ("evaluation", "insight"),
    ("decoding", "interop"),
    ("runs",),
    ("experiment", "quantized_training", "qk_clip", "train_step", "accounting"),
    ("objectives", "optim"),
    ("models", "data"),
    ("kernels", "parallel"),
    ("config", "sweeps", "recipes"),
    ("storage", "progress", "hardware", "errors"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
RECORDER = Path(__file__).with_name("record_calls.py")
NOT_FOR_TRAINING = ("lm.tools.", "lm.interop.", "lm.serving.", "lm.insight.")
TINY = {
    "model.n_layers": 2,
    "model.d_model": 48,
    "model.activation": "swiglu",  # Llama's, so that the run can be exported
    "data.sequence_length": 32,
    "data.batch_size": 2,
    "data.workers": 1,
    "train.steps": 2,
    "checkpoint.every_steps": 2,
}


# --- imports


class Module(NamedTuple):
    """One file of the package: its folder, size and imports (name; True if inside a function)."""

    folder: str
    lines: int
    code_lines: int
    imports: set[tuple[str, bool]]


def code_lines(source: str) -> int:
    """Count the lines that are not blank, comment or docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(value=str())) as first, *_]:
                    docstrings.update(range(first.lineno, first.end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    layout |= {tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def read_package(root: Path) -> dict[str, Module]:
    """Parse every file of the package at `root`; keys are dotted module names."""
    paths = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join([root.name, *path.relative_to(root).with_suffix("").parts])
        paths[name.removesuffix(".__init__")] = path

    def module_of(name: str) -> str:
        """Return the module that `name` is, or is a member of; "" outside the package."""
        return name if name in paths else module_of(name.rpartition(".")[0]) if name else ""

    modules = {}
    for name, path in paths.items():
        source, parent = path.read_text(), name.rpartition(".")[0]
        package = name if path.name == "__init__.py" else parent
        imported = _imports(ast.parse(source), package, lazy=False)
        targets = {(module_of(target), lazy) for target, lazy in imported}
        targets = {(target, lazy) for target, lazy in targets if target not in ("", name)}
        folder = name if parent == root.name else package
        modules[name] = Module(folder, len(source.splitlines()), code_lines(source), targets)
    return modules


def _imports(node: ast.AST, package: str, lazy: bool) -> Iterator[tuple[str, bool]]:
    """Yield the dotted names that the code imports, those for type checkers left out."""
    children = list(ast.iter_child_nodes(node))
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            children = list(node.orelse)
        case ast.Import():
            yield from ((alias.name, lazy) for alias in node.names)
        case ast.ImportFrom():
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = [*(above if node.level else ()), *([node.module] if node.module else ())]
            yield from ((".".join([*base, alias.name]), lazy) for alias in node.names)
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            lazy = True
    for child in children:
        yield from _imports(child, package, lazy)


def cycles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (strongly connected components)."""
    graph: dict[str, set[str]] = defaultdict(set)
    for start, end in edges:
        if start != end:
            graph[start].add(end)
    reached: dict[str, set[str]] = {}
    for start in list(graph):
        seen, waiting = reached.setdefault(start, set()), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting.extend(new)
    groups = {
        frozenset(end for end in ends if start in reached.get(end, ()))
        for start, ends in reached.items()
    }
    return sorted(sorted(group) for group in groups if group)


def _siblings(start: str, end: str) -> tuple[str, str]:
    """Cut two dotted names after the first part in which they differ."""
    parts = start.split("."), end.split(".")
    n = 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*parts, strict=False)))
    return ".".join(parts[0][:n]), ".".join(parts[1][:n])


def measure_imports(checkout: Path) -> dict[str, Any]:
    """Count files, lines and imports of lm/, and list violations of their order."""
    modules = read_package(checkout / "lm")
    room = {name: ".".join(name.split(".")[:2]) for name in modules}
    floor = {name: FLOOR_OF.get(room[name].partition(".")[2]) for name in modules}
    result: dict[str, Any] = {
        "files": len(modules),
        "lines": sum(module.lines for module in modules.values()),
        "lines of code": sum(module.code_lines for module in modules.values()),
        "edges": {},
    }
    imports = [(a, b, lazy) for a, module in modules.items() for b, lazy in module.imports]
    for kind in ("module-level", "with lazy"):
        pairs = {(a, b) for a, b, lazy in imports if kind == "with lazy" or not lazy}
        folders = {(modules[a].folder, modules[b].folder) for a, b in pairs}
        result["edges"][kind] = {
            "files": len(pairs),
            "folders": len({(room[a], modules[b].folder) for a, b in pairs}),
            "different folders": sum(a != b for a, b in folders),
            "top-level folders": len({(room[a], room[b]) for a, b in pairs if room[a] != room[b]}),
        }
        siblings = {_siblings(a, b) for a, b in pairs}
        for nodes, edges in (("file", pairs), ("folder", folders), ("sibling", siblings)):
            result[f"{nodes} cycles, {kind}"] = [" ".join(group) for group in cycles(edges)]
    result["upward"] = [
        f"{a} -> {b}{' (lazy)' if lazy else ''}"
        for a, b, lazy in sorted(imports)
        if (low := floor[a]) is not None and (high := floor[b]) is not None and high < low
    ]
    result["on no floor"] = sorted({room[name] for name in modules if floor[name] is None})
    return result


# --- calls


def entries(calls: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the calls, as (calling file, called file), into another file than the call before."""
    return [next(same) for _, same in groupby(calls, key=itemgetter(1))]


def count_entries(entered: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Count entries, files and re-entries: entries into a file that was entered, and left, before.

    A re-entry is "from outside" if the caller is in another file.
    """
    files = [file for _, file in entered]
    again = [caller != file for i, (caller, file) in enumerate(entered) if file in files[:i]]
    counts = {"entries": len(files), "files": len(set(files))}
    return counts | {"re-entries": len(again), "from outside": sum(again)}


def record(verb: str, checkout: Path, folder: str, *options: str) -> dict[str, Any]:
    """Run `lm VERB` of a checkout in a separate process; return the results of a `Recorder`."""
    words = [sys.executable, "-P", RECORDER, verb, folder, *options]
    own = {"PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, env=_environment(folder) | own, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"lm {verb} of {checkout} failed:\n{done.stderr[-4000:]}")
    return json.loads(Path(folder, f"{verb}.json").read_text())


def _environment(folder: str) -> dict[str, str]:
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LM_CACHE_DIR": f"{folder}/cache"}
    own["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/xla"
    return {**os.environ, **own, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def _tiny(checkout: Path) -> list[str]:
    """Return options for the tiny run: two steps of a decoder on the standard library."""
    values = (f"--config.{path}={value}" for path, value in TINY.items())
    return [f"--config={checkout}/experiments/stdlib.py", *values]


def measure_trainer_path(checkout: Path) -> dict[str, Any]:
    """List the files of which a function runs between the config and the first checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        found = record("train", checkout, folder, *_tiny(checkout))
    each = {}
    for file in found["files"]:
        source = (checkout / "lm" / file).read_text()
        each[file] = {"lines": len(source.splitlines()), "lines of code": code_lines(source)}
    totals = {
        name: sum(size[name] for size in each.values()) for name in ("lines", "lines of code")
    }
    strangers = [name for name in found["modules"] if f"{name}.".startswith(NOT_FOR_TRAINING)]
    return {"each": each, "files": len(each), **totals, "must not be loaded": strangers}


def measure_call_paths(checkout: Path) -> dict[str, Any]:
    """Count re-entries of four scenarios, over calls that carry the object and over all."""
    with tempfile.TemporaryDirectory() as folder:
        main, *others = record("train", checkout, folder, *_tiny(checkout))["threads"]
        export = record("export", checkout, folder, f"--to={folder}/exported")["threads"][0]
        words = "--prompt=def", "--max_new_tokens=4", "--greedy"
        generate = record("generate", checkout, folder, *words)["threads"][0]
    producer = max(others, key=lambda calls: len({file for _, file, _ in calls}))
    scenarios = {"config through training": main, "a batch": producer}
    scenarios |= {"workdir through export": export, "args through generate": generate}
    result: dict[str, Any] = {"calls that carry the object": {}, "all calls": {}, "orders": {}}
    for name, calls in scenarios.items():
        paths = {"all calls": [(caller, file) for caller, file, _ in calls]}
        if name != "a batch":
            carrying = [(caller, file) for caller, file, carries in calls if carries]
            paths["calls that carry the object"] = carrying
        for kind, path in paths.items():
            entered = entries(path)
            result[kind][name] = count_entries(entered)
            result["orders"][f"{name}, {kind}"] = [file for _, file in entered]
    return result


# --- start-up


def measure_startup(checkouts: Sequence[Path], n: int) -> dict[str, Any]:
    """Return the median seconds of three commands after a first round that fills the caches."""
    seconds: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in checkouts])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copies = [Path(folder, str(i)) for i in range(len(checkouts))]  # Python's caches lie there
        for checkout, copy in zip(checkouts, copies, strict=True):
            shutil.copytree(checkout / "lm", copy / "lm")
            shutil.copytree(checkout / "experiments", copy / "experiments")
        for turn in range(n + 1):
            for i, copy in enumerate(copies):
                config = "config", "--config=experiments/gpt2.py:124m"
                run = f"{copy}/run{turn}"
                train = "train", f"--workdir={run}", *_tiny(copy)
                seconds["lm --help"][i].append(_seconds(copy, "--help"))
                seconds["lm config"][i].append(_seconds(copy, *config))
                seconds["lm train"][i].append(_seconds(copy, *train, until=f"{run}/metrics.jsonl"))
    rows: dict[str, Any] = {}
    for command, times in seconds.items():
        medians = [statistics.median(each[1:]) for each in times]
        rows[command] = {str(c): m for c, m in zip(checkouts, medians, strict=True)}
        if len(medians) == 2:
            rows[command]["ratio"] = medians[0] / medians[1]
    return {"seconds": rows}


def _seconds(copy: Path, *words: str, until: str = "") -> float:
    """Return the wall time of `lm WORDS`, or the time until a loss is in the file `until`."""
    start, null = time.perf_counter(), subprocess.DEVNULL
    command = [sys.executable, "-m", "lm", *words]
    environment = _environment(str(copy))
    with subprocess.Popen(command, cwd=copy, env=environment, stdout=null, stderr=null) as process:
        while until and process.poll() is None:
            if os.path.exists(until) and '"loss"' in Path(until).read_text():
                process.kill()
                return time.perf_counter() - start
            time.sleep(0.005)
    if process.returncode or until:
        sys.exit(f"lm {' '.join(words)} of {copy} failed")
    return time.perf_counter() - start


# --- command line


def show(result: dict[str, Any]) -> None:
    """Print numbers, lists and tables (dicts of rows) as text."""
    for name, value in result.items():
        if name == "orders":  # too long for a table
            continue
        if isinstance(value, dict):
            columns = list(next(iter(value.values()), {}))
            print(f"{name:44}" + "".join(f"{column[-18:]:>19}" for column in columns))
            for row, cells in value.items():
                shown = (f"{x:.3f}" if isinstance(x, float) else f"{x:,}" for x in cells.values())
                print(f"  {row:42}" + "".join(f"{cell:>19}" for cell in shown))
        elif isinstance(value, list):
            print(f"{name:44}{len(value):>19,}", *value, sep="\n  ")
        else:
            print(f"{name:44}{value:>19,}")


def faults(result: dict[str, Any], max_files: int, max_lines: int) -> list[str]:
    """Return the violations for `--check`."""
    if "upward" in result:
        keys = (
            "file cycles, module-level",
            "sibling cycles, module-level",
            "upward",
            "on no floor",
        )
        return [f"{key}: {fault}" for key in keys for fault in result[key]]
    found = [f"must not be loaded: {name}" for name in result["must not be loaded"]]
    for name, limit in (("files", max_files), ("lines of code", max_lines)):
        if result[name] > limit:
            found.append(f"{result[name]:,} {name}, more than {limit:,}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    verbs = parser.add_subparsers(dest="what", required=True)
    imports, path, _, startup = (
        verbs.add_parser(name, parents=[shared])
        for name in ("imports", "trainer-path", "call-paths", "startup")
    )
    for verb in (imports, path):
        verb.add_argument("--check", action="store_true", help="exit 1 on a fault")
    path.add_argument("--max-files", type=int, default=32)
    path.add_argument("--max-lines", type=int, default=4600, help="lines of code")
    startup.add_argument("--vs", type=Path, help="another checkout, to compare with")
    startup.add_argument("-n", type=int, default=5, help="turns")
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    if args.what == "startup":
        others = [args.vs.resolve()] if args.vs else []
        result = measure_startup([checkout, *others], args.n)
    else:
        measures = {"imports": measure_imports, "trainer-path": measure_trainer_path}
        result = (measures | {"call-paths": measure_call_paths})[args.what](checkout)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    limits = getattr(args, "max_files", 0), getattr(args, "max_lines", 0)
    found = faults(result, *limits) if getattr(args, "check", False) else []
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
