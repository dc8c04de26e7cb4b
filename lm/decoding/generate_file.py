"""`lm generate --input FILE --output FILE`: what a model writes for every line of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm.data.tokenizers.tokenizer import Tokenizer
from lm.decoding.generation import record, write
from lm.decoding.output_file import continue_file, one_line, read_inputs
from lm.decoding.prompts import is_encoder_decoder
from lm.decoding.sampling import Sampling
from lm.experiment import Experiment
from lm.parallel.hosts import is_primary_host
from lm.train_step import Params


def write_file(
    experiment: Experiment,
    params: Params,
    tokenizer: Tokenizer,
    input: Path,
    output: Path,
    sampling: Sampling | None,
    seed: int,
    n_best: int,
    weights: Mapping[str, Any],
) -> None:
    """Write a line for each input, a JSON object if `output` is .jsonl, or the lines that lack.

    By search or, with `sampling`, one sample an input. `weights` says which parameters these are:
    an output is only continued with the same. The progress bar goes to stderr.
    """
    role = "source" if is_encoder_decoder(experiment.model) else "prompt"
    inputs = read_inputs(input, role, experiment.config.data.columns)
    as_json = output.suffix == ".jsonl"

    def lines_from(start: int) -> Iterable[str]:
        bar = tqdm(
            total=len(inputs),
            initial=start,
            desc="generating",
            file=sys.stderr,
            disable=not is_primary_host(),
        )
        with bar:
            found = write(experiment, params, tokenizer, inputs, sampling, seed, start, bar.update)
            for text, written in zip(inputs[start:], found, strict=True):
                made = record(role, text, written, n_best)
                yield json.dumps(made, ensure_ascii=False) if as_json else one_line(made["text"])

    # The batch size changes nothing that is written.
    how = {name: value for name, value in experiment.config.decode.items() if name != "batch_size"}
    drawn = {} if sampling is None else {**vars(sampling), "seed": seed}
    continue_file(output, inputs, {**weights, **how, **drawn, "n_best": n_best}, lines_from)
