"""What a variant of an experiment file is in numbers, without building or reading anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from lm import config as configs
from lm.accounting.flops import tokens_per_row, training_cost
from lm.accounting.parameter_counts import count_parameters
from lm.data.tokenizers.tokenizer import is_fitted
from lm.experiment import build_untraced


def variant_size(spec: str, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Parameters (`count_parameters`) and cost (`training_cost`) of `FILE.py:VARIANT`.

    Where the size of the vocabulary is that of a tokenizer fitted to the corpus, which is not read
    here, the numbers are None and `note` says so. UserError as `config.load`.
    """
    config = configs.load(spec, overrides)
    counts = dict.fromkeys(("total", "active", "non_embedding", "heads"))
    cost = dict.fromkeys(("batch_tokens", "tokens", "flops"))
    note = ""
    if config.model.vocab_size or not is_fitted(config.data.tokenizer):
        experiment = build_untraced(config, jax.devices()[:1])
        counts |= count_parameters(experiment)
        del counts["tensors"]
        cost["tokens"], cost["flops"] = training_cost(experiment)
        cost["batch_tokens"] = config.data.batch_size * tokens_per_row(experiment)
    else:
        note = (
            "the vocabulary is fitted to the corpus "
            f"(--config.data.tokenizer={config.data.tokenizer})"
        )
    return {"config": spec, "paper": config.paper, **counts, **cost, "note": note}
