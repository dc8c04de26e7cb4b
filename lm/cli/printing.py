"""What verbs print on stdout: figures, records, continuations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence


def print_result(values: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        print(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")


def print_records(records: list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps(records))
        return
    for made in records:
        print(made.get("prompt", "") + made["text"])


def print_continuations(prompts: Sequence[str], steps: Iterable[list[str]], as_json: bool) -> None:
    """One prompt streams as it grows; several are printed whole, one after the other."""
    streams = len(prompts) == 1 and not as_json
    texts = [""] * len(prompts)
    for number, parts in enumerate(steps):
        texts = [text + part for text, part in zip(texts, parts, strict=True)]
        if streams:
            print(parts[0] if number else prompts[0] + parts[0], end="", flush=True)
    if streams:
        print()
    elif as_json:
        print(json.dumps([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]))
    else:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            print(f"--- {number}\n{prompt}{text}")
