"""Decoding inputs: tokenization, context length and padding.

Shape letters: B batch, L length, P tokens before a target, S source length, F frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.positions import has_position_table

TokenIds = Sequence[int] | np.ndarray
_SHORTEST = 16


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize a prompt with the tokenizer's prefix, as at the start of a document.

    An empty result is replaced by bos.
    """
    ids = [*tokenizer.template.before, *map(int, tokenizer.encode(text))]
    return ids if ids or tokenizer.bos_id is None else [tokenizer.bos_id]


def source_ids(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """Tokenize a source to at most `length` ids, with the ids around it: an encoder input."""
    return special_tokens(tokenizer).source(tokenizer.encode(text), length).tolist()


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model encodes a source instead of continuing a prompt."""
    return hasattr(model, "start")


def generates_text(experiment: Experiment) -> bool:
    """Return whether the model generates text: false for encoders and classifiers."""
    parts = {info.role.part for info in experiment.param_infos.values()}
    return hasattr(experiment.model, "decode") and "task" not in parts


def require_text_output(experiment: Experiment) -> None:
    """Raise UserError if the model does not decode."""
    if not generates_text(experiment):
        config = experiment.config
        raise UserError(
            f"a model of family {config.model.family} trained by {config.objective.name} does not "
            "generate text"
        )


def input_role(model: nn.Module) -> str:
    """Return the kind of the model's input: "prompt", "source" or "audio"."""
    if getattr(model.config, "n_mels", 0):  # type: ignore[attr-defined]
        return "audio"
    return "source" if is_encoder_decoder(model) else "prompt"


def require_text_input(model: nn.Module, who: str) -> None:
    """Raise UserError if the model takes audio.

    Args:
        model: the model.
        who: the command, which starts the message.
    """
    if input_role(model) == "audio":
        raise UserError(
            f"{who} needs text, but this model takes recordings (--config.model.n_mels): "
            "transcribe them with lm generate or lm eval --task"
        )


def context_length(model: nn.Module) -> int | None:
    """Return the number of positions of the model; None: no limit."""
    config = model.config  # type: ignore[attr-defined]
    return config.max_length if has_position_table(config) else None


def check_ids(inputs: Sequence[TokenIds], model: nn.Module) -> None:
    """Raise UserError for an id beyond the model's token table."""
    rows = model.config.vocab_size  # type: ignore[attr-defined]
    wrong = next((int(i) for ids in inputs for i in ids if not 0 <= i < rows), None)
    if wrong is not None:
        raise UserError(
            f"the token id {wrong} exceeds the model's {rows} embeddings: this tokenizer "
            "does not belong to this model"
        )


def check_prompts(prompts: Sequence[TokenIds], context: int | None) -> None:
    """Raise UserError for a prompt that cannot be continued within this context."""
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(
                f"prompt {number} is empty, and the tokenizer has no token to start with"
            )
        if context is not None and len(prompt) >= context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens; the context holds {context}, "
                "one of them for the continuation"
            )


def padded_length(longest: int) -> int:
    """Return the next power of two, at least 16, to limit the number of compiled programs."""
    return max(_SHORTEST, 1 << (longest - 1).bit_length())


def pad_ids(rows: Sequence[TokenIds], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids; return token ids and segment ids, int32 [B, width].

    Args:
        rows: token ids of each row.
        width: padded length.
        left: pad on the left instead of the right; the padding id is 0.
    """
    tokens_BL = np.zeros((len(rows), width), np.int32)
    segments_BL = np.zeros_like(tokens_BL)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens_BL[i, columns] = row
        segments_BL[i, columns] = 1
    return tokens_BL, segments_BL


def pad_sources(rows: Sequence[TokenIds], model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Pad sources on the right; return them and their segment ids [B, S].

    Args:
        rows: token ids of each source, or log-mel features [F, M] of a speech model.
        model: encoder–decoder.
    """
    longest = max(map(len, rows))
    if n_mels := getattr(model.config, "n_mels", 0):  # type: ignore[attr-defined]
        source_BFM = np.zeros((len(rows), longest, n_mels), np.float32)
        for row, of_row_FM in zip(source_BFM, rows, strict=True):
            row[: len(of_row_FM)] = of_row_FM
        lengths_B = np.array([-(-len(row) // 2) for row in rows])
        return source_BFM, (np.arange(-(-longest // 2)) < lengths_B[:, None]).astype(np.int32)
    width = padded_length(longest)
    return pad_ids(rows, min(width, context_length(model) or width), left=False)


def first_inputs(start: Sequence[int], n_rows: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the tokens before a target (`target_start`), their positions and segments, [B, P]."""
    tokens_BP = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (n_rows, len(start)))
    positions_BP = jnp.broadcast_to(jnp.arange(len(start)), tokens_BP.shape)
    return tokens_BP, positions_BP, jnp.ones_like(tokens_BP)
