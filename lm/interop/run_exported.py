"""Run the output of `lm export --format stablehlo` with jax, numpy and safetensors, without lm.

    python run.py --prompt "Once upon a time" [--max_new_tokens 50]     # needs tokenizers too
    python run.py --tokens 1 17 42                                      # ids in, ids out
    python run.py --tokens 1 17 42 --program predict                    # a classifier, an encoder

    from run import Exported
    model = Exported("folder")
    model.generate([[1, 17, 42], [1, 5]], max_new_tokens=50)            # greedy, one list a row
    model.call("encode", tokens=…, segments=…, types=…)                 # int32 [batch, length] each

`segments` is 1 for tokens and 0 for padding, which comes before prompts (so that the last column
has the last token of each row) and after sources and texts; `types` is 0, or 1 for a second text.
The weights are in model.safetensors; manifest.json has the inputs and outputs of each program, the
ids to add before and after a text, and those that end one. It runs on one device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

FORMAT = "lm stablehlo 1"
MANIFEST, WEIGHTS, SUFFIX = "manifest.json", "model.safetensors", ".jax_export"


class Exported:
    """Exported programs and their weights, on the first device.

    Attributes:
        about: manifest.json.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.about: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if self.about["format"] != FORMAT:
            raise ValueError(f"{folder}: its format is {self.about['format']}, not {FORMAT}")
        self._weights = jax.device_put(load_file(folder / WEIGHTS), jax.devices()[0])
        self._programs = {}
        for name in self.about["programs"]:
            exported = jax.export.deserialize(bytearray((folder / f"{name}{SUFFIX}").read_bytes()))
            donated = (2,) if name == "decode" else ()  # the cache
            self._programs[name] = jax.jit(exported.call, donate_argnums=donated)

    def call(self, name: str, **arrays: Any) -> dict[str, Any]:
        """Run a program; the manifest lists its outputs."""
        rows = self.about["programs"][name]["inputs"]
        order = dict.fromkeys(row[0].partition("/")[0] for row in rows)
        return self._programs[name](self._weights, *(arrays[name] for name in order))

    @property
    def pads_left(self) -> bool:
        """True if rows are prompts, which are padded before their tokens."""
        return "decode" in self._programs and "encoder_decoder" not in self.about["family"]

    def batch(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Return rows of ids as the arrays that a program takes."""
        first = next(iter(self.about["programs"].values()))["inputs"][0]
        _, _, fixed_batch, fixed_length = first
        longest = max(map(len, rows))
        n, length = len(rows), longest
        if isinstance(fixed_length, int):
            length = fixed_length
        if isinstance(fixed_batch, int):
            n = fixed_batch
        if len(rows) > n or longest > length or not min(map(len, rows)):
            raise ValueError(f"rows must have 1 to {length} tokens, and there must be at most {n}")
        tokens, segments = np.zeros((2, n, length), np.int32)
        for i, row in enumerate([*rows, *[rows[-1]] * (n - len(rows))]):
            place = slice(length - len(row), length) if self.pads_left else slice(0, len(row))
            tokens[i, place], segments[i, place] = row, 1
        return {"tokens": tokens, "segments": segments, "types": np.zeros_like(tokens)}

    def generate(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Return greedily generated tokens for each prompt or source, up to an end token."""
        batch = self.batch(rows)
        used = batch["tokens"].shape[1] if self.pads_left else 0
        most = min(max_new_tokens, self.about["context"] - used)
        if most < 1:
            raise ValueError(f"nothing fits into the context of {self.about['context']} tokens")
        ends = self.about.get("end_ids", [])
        written: list[list[int]] = [[] for _ in rows]
        ended = np.zeros(len(rows), bool)
        state = self.call("prefill", **batch)
        for n in range(most):
            token = jnp.argmax(state["logits"], -1).astype(jnp.int32)
            chosen = np.asarray(token)[: len(rows)]
            ended |= np.isin(chosen, ends)
            for i in np.flatnonzero(~ended):
                written[i].append(int(chosen[i]))
            if ended.all() or n + 1 == most:
                break
            state = self.call("decode", token=token, cache=state["cache"])
        return written


def _main() -> None:
    """Run a program on one text, and print its output."""
    parser = argparse.ArgumentParser(description="Run an exported model.")
    parser.add_argument("--folder", default=Path(__file__).parent, type=Path)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="needs the package tokenizers")
    text.add_argument("--tokens", type=int, nargs="+", metavar="ID")
    parser.add_argument("--max_new_tokens", type=int, default=50)
    parser.add_argument("--program", help="program to run on the text instead of generating")
    args = parser.parse_args()
    model, ids = Exported(args.folder), args.tokens
    if args.prompt is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        inner = tokenizer.encode(args.prompt, add_special_tokens=False).ids
        ids = [*model.about["before"], *inner, *model.about["after"]]
    if args.program or "decode" not in model.about["programs"]:
        name = args.program or list(model.about["programs"])[-1]
        found = model.call(name, **model.batch([ids]))
        print(json.dumps({key: np.asarray(x).tolist() for key, x in found.items()}))
        return
    (new,) = model.generate([ids], args.max_new_tokens)
    print(json.dumps(new) if args.prompt is None else tokenizer.decode(new))


if __name__ == "__main__":
    _main()
