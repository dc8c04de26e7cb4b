"""Top-K next tokens of a run at every position of its data, for distillation without the run.

A folder holds them for each store of the training and validation data, in the windows of a run with
the same `data.sequence_length` and `data.isolate_documents`.

Shape letters: B batch, L length, K most likely tokens.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.data.batches import prefetch
from lm.data.dataset import Store, open_dataset
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.objectives.causal import Causal
from lm.objectives.objective import Batch
from lm.objectives.stored_teacher import FILES, MANIFEST, stored_key
from lm.parallel.mesh import is_primary_host
from lm.progress import track
from lm.storage import write_atomically


@dataclass(frozen=True)
class TopTokens(Causal):
    """Prediction of the K most likely next tokens at every position.

    Attributes:
        k: number of tokens.
    """

    k: int = 1

    def predict(self, model: Any, batch: Batch) -> Any:
        """Return log-probabilities and ids of the K most likely tokens, [B, L, K] each."""
        x_BLD = model.hidden(batch["inputs"], batch.get("positions"), batch.get("segment_ids"))
        log_probs_BLV = jax.nn.log_softmax(model.logits(x_BLD))
        return jax.lax.top_k(log_probs_BLV, self.k)


def write_top_logits(
    experiment: Experiment, params: Params, k: int, folder: Path, made_by: dict[str, Any]
) -> list[str]:
    """Write the most likely tokens for all windows of a configuration's data.

    Args:
        experiment: experiment of a decoder, built with its tokenizer.
        params: parameters.
        k: number of tokens per position.
        folder: new or empty folder.
        made_by: description of the parameters for the manifest.

    Returns:
        A line for each store.

    Raises:
        UserError: the run is not a decoder, or the folder is not empty.
    """
    config, tokenizer = experiment.config, experiment.tokenizer
    assert tokenizer is not None
    if config.model.family != "decoder":
        raise UserError(f"--top_logits needs a decoder, not family {config.model.family}")
    if k > config.model.vocab_size:
        raise UserError(f"--top_logits {k}: the vocabulary has {config.model.vocab_size} tokens")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} is not an empty folder")
    objective = replace(TopTokens.from_config(config, tokenizer), stride=0)
    assert isinstance(objective, TopTokens)
    steps = replace(experiment.steps, objective=replace(objective, k=k))
    experiment = replace(experiment, steps=steps)
    dataset = open_dataset(config.data, (), tokenizer=tokenizer, progress=is_primary_host())
    if is_primary_host():
        folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for store in (*dataset.train, *dataset.validation):
        n = _write_store(experiment, params, store, folder, k)
        lines.append(f"{store.manifest.source}: {n} windows of {objective.length} tokens")
    manifest = {
        "top_k": k,
        "sequence_length": objective.length,
        "isolate_documents": objective.isolate_documents,
        "tokenizer": tokenizer.digest,
        **made_by,
    }
    if is_primary_host():
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return lines


def _write_store(experiment: Experiment, params: Params, store: Store, folder: Path, k: int) -> int:
    """Write the files of a store; return its number of windows."""
    batches = experiment.evaluation_batches([store])
    n, length = len(batches.examples), experiment.config.data.sequence_length
    dispatches = [range(i, i + 1) for i in range(len(batches))]
    shown = is_primary_host()
    outputs = [
        np.lib.format.open_memmap(
            folder / name.format(stored_key(store)), mode="w+", dtype=dtype, shape=(n, length, k)
        )
        for name, dtype in FILES.items()
        if shown
    ]
    with closing(prefetch(batches, dispatches, experiment.batch_sharding)) as arrays:
        bar = track(arrays, len(dispatches), description="reading", shown=shown)
        for number, batch in enumerate(bar):
            found = jax.device_get(experiment.predict_steps(params, batch))
            rows = slice(number * batches.batch_size, (number + 1) * batches.batch_size)
            for output, values in zip(outputs, found, strict=False):
                output[rows] = values[0][: len(output[rows])]
    for output in outputs:
        output.flush()
    return n
