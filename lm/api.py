"""Python API: load a run, compute its logits and what is inside, evaluate and generate.

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
from lm.decoding.prompts import check_ids
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
        step: number of updates behind the parameters.
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
        """Variables of the module: `run.model.apply(run.variables, …)`."""
        return as_variables(self.params)

    @cached_property
    def decoding(self) -> tuple[Experiment, Params]:
        """Experiment and parameters as decoding takes them (`lm/decoding/weights.py`)."""
        return prepare(self.experiment, without_frozen(self.params))

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids [L] of a text, without special tokens."""
        return np.asarray(self.tokenizer.encode(text))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids [L]."""
        return self.tokenizer.decode([int(i) for i in ids])

    def logits(self, *inputs: Any) -> jax.Array:
        """Compute logits.

        Args:
            *inputs: token ids [B, L]; of an encoder–decoder source ids [B, S] and target ids
                [B, L], whose first column starts the target.

        Returns:
            Logits [B, L, V], float32: of the next token, or of an encoder of each token.
        """
        return jax.jit(self.model.apply)(self.variables, *map(np.asarray, inputs))

    def hidden_states(self, tokens_BL: Any) -> jax.Array:
        """Return the last hidden states [B, L, D] of token ids [B, L], after the final norm."""
        hidden = jax.jit(partial(self.model.apply, method="hidden"))
        return hidden(self.variables, np.asarray(tokens_BL))

    def activations(self, *inputs: Any, capture: Sequence[str] = ("attention",)) -> dict[str, Any]:
        """Compute logits, and capture what is inside the model on the way.

        Args:
            *inputs: as for `logits`.
            capture: what to capture: "attention", "cross_attention", "residual", "updates" or
                "neurons"; `lm.insight.capture.CAPTURES` has their shapes.

        Returns:
            Arrays by name, float32: "logits", and what was captured; of an encoder–decoder under
            "encoder/NAME" and "decoder/NAME".

        Raises:
            UserError: a name or a token id is unknown, or the model is no Transformer.
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
        """Return the self-attention weights [N, B, H, L, L] of token ids [B, L], float32.

        Of a decoder or an encoder with `--config.model.mixer=attention`.
        """
        return self.activations(tokens_BL, capture=("attention",))["attention"]

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Answer a conversation.

        Args:
            messages: "role" and "content" of each, as transformers takes them, or one question;
                if an assistant said the last one, it is continued.
            tools: JSON schemas of functions that may be called.
            **options: as `generate` takes them.

        Returns:
            The content of the assistant's next message.

        Raises:
            UserError: the model is no decoder, or the chat template refuses the messages.
        """
        template = chat_template(self.tokenizer, self.model)
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
        average: number of newest checkpoints whose parameters are averaged.
        best: load the checkpoint that `--config.eval.best` kept.

    Raises:
        UserError: there is no readable run.
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
        max_batches: batches that are evaluated; 0: the whole split.

    Returns:
        Loss (nats a target), perplexity, accuracy, targets and what else the objective reports.
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
    """Continue prompts, or write the targets of sources with an encoder–decoder.

    Args:
        run: the run.
        prompts: one text or several.
        max_new_tokens: most tokens of a continuation; 0: `--config.decode.max_length`.
        temperature: 0 is greedy; encoder–decoders always search, by `--config.decode.*`.
        top_k: sample among the k likeliest tokens; 0: all.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of the sampling.
        best_of: samples of each prompt, of which `reward_model` chooses one.
        reward_model: workdir of a run of `objective.name=reward`.

    Returns:
        The generated text of each prompt, without the prompt.

    Raises:
        UserError: the model cannot generate, or a prompt does not fit.
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
    """Return the texts that are generated for inputs, which are conversations of a template."""
    experiment, params = run.decoding
    if max_new_tokens:
        config = run.config.copy_and_resolve_references()
        config.decode.max_length = max_new_tokens
        experiment = replace(experiment, config=config)
    sampling = None if hasattr(run.model, "start") else Sampling(temperature, top_k, top_p)
    chosen = open_best_of(best_of, str(reward_model)) if best_of > 1 else None
    if chosen and not temperature:
        raise UserError("best_of chooses among samples: temperature must be above 0")
    arguments = experiment, params, run.tokenizer, inputs, sampling, seed
    found = generate_texts(*arguments, best_of=chosen, template=template)
    return [hypotheses[0].text if hypotheses else "" for hypotheses in found]
