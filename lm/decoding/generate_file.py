"""Generation for every line of a file (`lm generate --input FILE --output FILE`).

Repeating the command resumes the output. OUTPUT.json next to OUTPUT records the command and inputs
it was made from. Lines are written in order and whole, so the number of lines is the progress.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lm.data.files import read_lines
from lm.data.records import BadRow, Row, read_jsonl_rows
from lm.data.tokenizer import Tokenizer
from lm.decoding.best_of import BestOf
from lm.decoding.chats import Chat, chat_of
from lm.decoding.controls import Controls
from lm.decoding.generated import generation_record
from lm.decoding.generation import generate_texts
from lm.decoding.guard import open_guard
from lm.decoding.prompts import input_role
from lm.decoding.sampling import Sampling
from lm.decoding.text_limits import KEYS
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.parallel.mesh import is_primary_host
from lm.progress import progress_bar
from lm.runs.checkpoints import checksums
from lm.storage import read_json

if TYPE_CHECKING:
    from lm.data.chat.chat_template import ChatTemplate

LIMIT_KEYS = (*KEYS, "guard", "guard_labels", "guard_threshold")


def generate_file(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    input: Path,
    output: Path,
    sampling: Sampling | None,
    seed: int,
    n_best: int,
    weights: Mapping[str, Any],
    stop: Sequence[str] = (),
    best_of: BestOf | None = None,
    template: ChatTemplate | None = None,
    system: str | None = None,
) -> None:
    """Write one line per input, or the missing ones, with a progress bar on stderr.

    Args:
        experiment: experiment on a mesh.
        params: parameters.
        tokenizer: tokenizer of the data.
        input: text file, or .jsonl with a field "source" or "prompt"; both may be .gz. For a speech
            model, PATH as in the source `audio`.
        output: file to write: JSON objects if it is .jsonl, else text.
        sampling: options for one sample per input; None: beam search.
        seed: seed of the samples.
        n_best: hypotheses per JSON object.
        weights: identity of the parameters; an output is resumed only with the same.
        stop: texts at which an output is cut off.
        best_of: take several samples per input, and rank them.
        template: chat template; the inputs are conversations, in a text file one message per line.
        system: system prompt for conversations without one.
    """
    inputs: Sequence[Any]
    role = "messages" if template else input_role(experiment.model)
    if experiment.config.model.n_mels:
        from lm.data.audio.audio_inputs import find_recordings

        inputs = lines = find_recordings(str(input), experiment.config.data)
    elif template is None:
        inputs = lines = read_inputs(input, role, experiment.config.data.columns)
    else:
        inputs = read_chats(input, system)
        lines = [json.dumps(vars(chat)) for chat in inputs]
    as_json = output.suffix == ".jsonl"

    def lines_from(start: int) -> Iterable[str]:
        shown = is_primary_host()
        bar = progress_bar("generating", len(inputs), initial=start, shown=shown)
        with bar:
            arguments = inputs, sampling, seed, start, bar.update, stop, best_of, template
            found = generate_texts(experiment, params, tokenizer, *arguments)
            for text, generations in zip(inputs[start:], found, strict=True):
                given = text.messages if isinstance(text, Chat) else text
                made = generation_record(role, given, generations, n_best)
                yield json.dumps(made, ensure_ascii=False) if as_json else join_lines(made["text"])

    # The batch size does not affect the output.
    options = dict(experiment.config.decode)
    del options["batch_size"]
    limits = _limits(experiment.config, tokenizer)
    for name in LIMIT_KEYS:
        del options[name]
    dtypes = {f"decode.{name}": options.pop(name) for name in ("weights", "cache")}
    decode = options | {name: dtype for name, dtype in dtypes.items() if dtype != "auto"}
    sampled = {} if sampling is None else {**vars(sampling), "seed": seed}
    chosen: dict[str, Any] = {"stop": list(stop)} if stop else {}
    if best_of:
        chosen |= {"best_of": best_of.n, "reward_model": best_of.reward.digest}
    if template:
        chosen["chat_template"] = _digest(template.source)
    made_by = {**weights, **decode, **limits, **sampled, **chosen, "n_best": n_best}
    continue_file(output, lines, made_by, lines_from)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _limits(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the constraints and the guard that an output depends on, or {}."""
    found: dict[str, Any] = {}
    if limits := Controls.from_config(config, tokenizer).limits:
        found["limits"] = _digest(json.dumps(limits.grammars))
    if guard := open_guard(config.decode):
        found |= {name: config.decode[name] for name in ("guard_labels", "guard_threshold")}
        found["guard"] = guard.digest
    return found


def read_inputs(file: Path, role: str, columns: str) -> list[str]:
    """Read the lines of a text file, or a field of each object in a .jsonl file.

    Args:
        file: file, may be .gz.
        role: "source" or "prompt".
        columns: value of `data.columns`, which may name the field of the role; by default the field
            has the name of the role.

    Raises:
        UserError: the file cannot be read, or an object lacks the text.
    """
    if not file.is_file():
        raise UserError(f"no file {file}")
    if not file.name.removesuffix(".gz").endswith(".jsonl"):
        return list(read_lines(file))
    pairs = (column.partition("=") for column in columns.split(","))
    field = {of.strip(): name.strip() for of, _, name in pairs}.get(role, role)
    return [_text(row, field) for row in read_jsonl_rows(file)]


def read_chats(file: Path, system: str | None = None) -> list[Chat]:
    """Read conversations: objects of a .jsonl file, or one message per line of a text file.

    Args:
        file: file, may be .gz.
        system: system prompt for conversations without one.

    Raises:
        UserError: the file cannot be read, or an object has no conversation.
    """
    if not file.is_file():
        raise UserError(f"no file {file}")
    if not file.name.removesuffix(".gz").endswith(".jsonl"):
        return [chat_of({"prompt": line}, system) for line in read_lines(file)]
    found = []
    for row in read_jsonl_rows(file):
        try:
            if row.problem:
                raise BadRow(row.problem)
            found.append(chat_of(row.values, system))
        except BadRow as error:
            raise UserError(f"{row.where}: {error}") from error
    return found


def _text(row: Row, field: str) -> str:
    text = row.values.get(field)
    if row.problem or not isinstance(text, str):
        raise UserError(f"{row.where}: {row.problem or f'no text in a field {field!r}'}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{row.where}: {field!r} is not UTF-8") from error
    return text


def weights_identity(params: Params, step: int) -> dict[str, Any]:
    """Return step and digest of parameters, which identify the weights of an output."""
    sums = json.dumps(checksums(params), sort_keys=True)
    return {"step": step, "weights": hashlib.sha256(sums.encode()).hexdigest()}


def join_lines(text: str) -> str:
    """Replace newlines by spaces."""
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")


def continue_file(
    output: Path,
    inputs: Sequence[str],
    made_by: Mapping[str, Any],
    lines_from: Callable[[int], Iterable[str]],
) -> None:
    """Append the missing lines to a file, after dropping an incomplete last line.

    Args:
        output: file to write.
        inputs: all inputs, one per line.
        made_by: settings that the lines depend on, JSON values.
        lines_from: returns the lines from an index on.

    Raises:
        UserError: the file was made from other inputs or with other settings.
    """
    n_done = _prepare(output, inputs, made_by) if is_primary_host() else 0
    n_done = int(multihost_utils.broadcast_one_to_all(np.int32(n_done)))
    lines = lines_from(n_done)
    if not is_primary_host():
        for _ in lines:  # only the primary process writes; the others compute
            pass
        return
    with output.open("a", encoding="utf-8", newline="\n") as stream:
        for line in lines:
            stream.write(line + "\n")
            stream.flush()


def _prepare(output: Path, inputs: Sequence[str], made_by: Mapping[str, Any]) -> int:
    """Truncate the output after its last whole line, and return the number of lines."""
    about_file = output.with_name(f"{output.name}.json")
    try:
        written = output.read_bytes() if output.exists() else b""
        if written:
            _check_same(output, about_file, inputs, made_by)
        output.parent.mkdir(parents=True, exist_ok=True)
        about = {"inputs": _about(inputs), "made_by": made_by}
        temporary = about_file.with_name(f".{about_file.name}.tmp")
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False))
        temporary.replace(about_file)
        whole = written[: written.rfind(b"\n") + 1]
        with output.open("ab") as stream:
            stream.truncate(len(whole))
    except (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError) as error:
        raise UserError(f"cannot write to --output {output}: {error.strerror}") from None
    return whole.count(b"\n")


def _check_same(
    output: Path, about_file: Path, inputs: Sequence[str], made_by: Mapping[str, Any]
) -> None:
    elsewhere = f"delete {output} and {about_file.name}, or choose another --output"
    if not about_file.exists():
        raise UserError(f"{output} exists, but {about_file.name} does not: {elsewhere}")
    try:
        before = read_json(about_file)
        changed = "; ".join(_differences(before["made_by"], made_by))
        # Inputs appended since then do not change earlier lines.
        same_inputs = before["inputs"] == _about(inputs[: before["inputs"]["lines"]])
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{about_file} is damaged: {elsewhere}") from error
    if changed:
        raise UserError(f"{output} was made with different settings ({changed}): {elsewhere}")
    if not same_inputs:
        raise UserError(f"{output} was made from different inputs: {elsewhere}")


def _about(inputs: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(list(inputs)).encode()).hexdigest()
    return {"lines": len(inputs), "digest": digest}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"{name}: {before.get(name)} → {now.get(name)}"
