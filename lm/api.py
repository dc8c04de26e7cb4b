"""Python API: load a run, compute logits and activations, evaluate and generate.

Shape letters: B batch, L length, S source length, D model, N layers, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from lm.data.records import BadRow
from lm.data.splits import open_split
from lm.data.tokenizer import Tokenizer
from lm.decoding.best_of import open_best_of
from lm.decoding.chats import chat_of, chat_template
from lm.decoding.generation import generate_texts
from lm.decoding.prompts import check_ids, require_text_output
from lm.decoding.sampling import Sampling
from lm.decoding.weights import prepare
from lm.errors import UserError
from lm.evaluation.loss import evaluate_loss
from lm.experiment import Experiment, record_columns
from lm.insight.capture import run_and_capture
from lm.models.frozen import without_frozen
from lm.models.variables import Params, as_variables
from lm.runs.checkpoints import ignore_line
from lm.runs.saved_params import load_tokenizer, restore_run
from lm.storage import open_run_folder


@dataclass(frozen=True)
class Run:
    """Trained or imported model with its tokenizer.

    Attributes:
        experiment: resolved configuration on a mesh, with its compiled functions.
        params: parameters, LoRA updates merged.
        step: number of updates.
        tokenizer: tokenizer that the run was trained with.
    """

    experiment: Experiment
    params: Params
    step: int
    tokenizer: Tokenizer

    @property
    def config(self) -> ConfigDict:
        """Resolved configuration."""
        return self.experiment.config

    @property
    def model(self) -> nn.Module:
        """Flax module."""
        return self.experiment.model

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the module, for `run.model.apply(run.variables, …)`."""
        return as_variables(self.params)

    @cached_property
    def decoding(self) -> tuple[Experiment, Params]:
        """Experiment and parameters prepared for decoding (`lm/decoding/weights.py`)."""
        return prepare(self.experiment, without_frozen(self.params))

    def encode(self, text: str) -> np.ndarray:
        """Tokenize a text to ids [L], without special tokens."""
        return np.asarray(self.tokenizer.encode(text))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode token ids [L] to text."""
        return self.tokenizer.decode([int(i) for i in ids])

    def logits(self, *inputs: Any) -> jax.Array:
        """Compute logits.

        Args:
            *inputs: token ids [B, L]; for an encoder–decoder source ids [B, S] and target ids
                [B, L], whose first column starts the target.

        Returns:
            Float32 logits [B, L, V]: of the next token, or of each token for an encoder.
        """
        return jax.jit(self.model.apply)(self.variables, *map(np.asarray, inputs))

    def hidden_states(self, tokens_BL: Any) -> jax.Array:
        """Return the last hidden states [B, L, D] of token ids [B, L], after the final norm."""
        hidden = jax.jit(partial(self.model.apply, method="hidden"))
        return hidden(self.variables, np.asarray(tokens_BL))

    def activations(self, *inputs: Any, capture: Sequence[str] = ("attention",)) -> dict[str, Any]:
        """Compute logits and capture intermediate activations.

        Args:
            *inputs: see `logits`.
            capture: what to capture: "attention", "cross_attention", "residual", "updates" or
                "neurons"; shapes are in `lm.insight.capture.CAPTURES`.

        Returns:
            Float32 arrays by name: "logits" and the captured ones; for an encoder–decoder under
            "encoder/NAME" and "decoder/NAME".

        Raises:
            UserError: a name or a token id is unknown, or the model is not a Transformer.
        """
        arrays = tuple(map(np.asarray, inputs))
        if any(ids.ndim != 2 for ids in arrays):
            raise UserError("token ids are [B, L]: run.encode(text)[None] is a batch of one text")
        check_ids([row for ids in arrays for row in ids], self.model)

        def run(variables: Any) -> tuple[jax.Array, dict[str, Any]]:
            return run_and_capture(self.model, variables, capture, lambda model: model(*arrays))

        logits_BLV, captured = jax.jit(run)(self.variables)
        return jax.tree.map(np.asarray, {"logits": logits_BLV, **captured})

    def attention_weights(self, tokens_BL: Any) -> np.ndarray:
        """Return float32 self-attention weights [N, B, H, L, L] for token ids [B, L].

        Requires a decoder or encoder with `--config.model.mixer=attention`.
        """
        return self.activations(tokens_BL, capture=("attention",))["attention"]

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Generate the assistant's next message in a conversation.

        Args:
            messages: dictionaries with "role" and "content", as in transformers, or one question; a
                final assistant message is continued.
            tools: JSON schemas of functions that may be called.
            **options: see `generate`.

        Returns:
            Content of the assistant's message.

        Raises:
            UserError: the model is not a decoder, or the chat template rejects the messages.
        """
        template = chat_template(self.experiment)
        try:
            chat = chat_of({"prompt": messages, "tools": tools})
        except BadRow as error:
            raise UserError(str(error)) from error
        return _generated(self, [chat], template, **options)[0]


def load_run(
    workdir: str | Path,
    overrides: Mapping[str, str] | None = None,
    *,
    average: int = 1,
    best: bool = False,
) -> Run:
    """Load a run on all devices.

    Args:
        workdir: folder of the run, local or in a bucket.
        overrides: configuration keys for this process, `{path: text}`, such as a mesh.
        average: number of newest checkpoints to average.
        best: load the checkpoint kept by `--config.eval.best`.

    Raises:
        UserError: the run does not exist or is not readable.
    """
    folder = open_run_folder(str(workdir))
    experiment, params, step = restore_run(
        folder,
        dict(overrides or {}),
        ignore_line,
        average=average,
        best=best,
        any_batch=True,
        frozen=True,
    )
    return Run(experiment, params, step, load_tokenizer(folder))


def evaluate(run: Run, split: str = "validation", max_batches: int = 0) -> dict[str, float]:
    """Evaluate the loss of a run.

    Args:
        run: the run.
        split: "validation" or "test" data of the run's configuration.
        max_batches: number of batches to evaluate; 0: all.

    Returns:
        Loss (nats per target), perplexity, accuracy, target count and other metrics.
    """
    experiment, data = run.experiment, run.config.data
    stores = open_split(data, split, run.tokenizer, record_columns(run.config))
    batches = experiment.evaluation_batches(stores)
    return evaluate_loss(experiment, run.params, batches, stores, max_batches)


def generate(
    run: Run,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    best_of: int = 1,
    reward_model: str | Path = "",
) -> list[str]:
    """Continue prompts, or generate targets from sources with an encoder–decoder.

    Args:
        run: the run.
        prompts: one text or several.
        max_new_tokens: maximum length of a continuation; 0: `--config.decode.max_length`.
        temperature: 0 is greedy; encoder–decoders always use beam search (`--config.decode.*`).
        top_k: sample among the k most likely tokens; 0: all.
        top_p: nucleus sampling: smallest set of tokens with this total probability.
        seed: random seed of sampling.
        best_of: samples per prompt, from which `reward_model` selects one.
        reward_model: workdir of a run of `objective.name=reward`.

    Returns:
        Generated text for each prompt, without the prompt.

    Raises:
        UserError: the model cannot generate, or a prompt is too long.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    options: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    options |= {"top_p": top_p, "seed": seed, "best_of": best_of, "reward_model": reward_model}
    return _generated(run, texts, None, **options)


def _generated(
    run: Run,
    inputs: Sequence[Any],
    template: Any,
    max_new_tokens: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    best_of: int = 1,
    reward_model: str | Path = "",
) -> list[str]:
    """Generate texts for inputs, which are conversations if a chat template is given."""
    require_text_output(run.experiment)
    experiment, params = run.decoding
    if max_new_tokens:
        config = run.config.copy_and_resolve_references()
        config.decode.max_length = max_new_tokens
        experiment = replace(experiment, config=config)
    sampling = None if hasattr(run.model, "start") else Sampling(temperature, top_k, top_p)
    chosen = open_best_of(best_of, str(reward_model)) if best_of > 1 else None
    if chosen and not temperature:
        raise UserError("best_of selects among samples: temperature must be above 0")
    arguments = experiment, params, run.tokenizer, inputs, sampling, seed
    found = generate_texts(*arguments, best_of=chosen, template=template)
    return [hypotheses[0].text if hypotheses else "" for hypotheses in found]
