"""Every rule is found by one call on a configuration alone, before data or devices are touched."""

from __future__ import annotations

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import config as configs
from lm.errors import UserError
from lm.experiment import build, check

SMALL = {
    "model.n_layers": 4,
    "model.n_heads": 4,
    "model.d_model": 32,
    "data.sequence_length": 16,
    "data.source": "text:no/such/file.txt",
    "data.tokenizer": "sentencepiece:no/such/file.model",
}
SEQ2SEQ = {
    "objective.name": "seq2seq",
    "model.family": "encoder_decoder",
    "data.source": "tsv:no/such/file.tsv",
}
MASKED = {"objective.name": "masked", "model.family": "encoder"}
LSTM = {"model.family": "lstm"}
FSDP4 = {"parallel.mesh.data": 1, "parallel.mesh.fsdp": 4}
STAGES = {"parallel.mesh.data": 1, "parallel.mesh.stage": 4}
CONTEXT = {"parallel.mesh.data": 1, "parallel.mesh.context": 4}
TENSOR = {"parallel.mesh.data": 1, "parallel.mesh.tensor": 8}

# What is set, the number of devices, and the message, by the kind of rule.
WRONG = {
    "range of a key": ({"model.dropout": 1.5}, 1, "--config.model.dropout=1.5 is above 0.99"),
    "choice of a key": ({"model.norm": "rms"}, 1, "--config.model.norm=rms: expected one of"),
    "keys of the model": ({"model.d_model": 33}, 1, "--config.model.d_model=33 is not divisible"),
    "window": ({**SEQ2SEQ, "model.window": 4}, 1, "--config.model.window=4 is not supported with"),
    "window of an encoder": (
        {**MASKED, "model.window": 4, "model.attention": "blockwise"},
        1,
        "blockwise cannot be used with --config.model.window=4 of an encoder",
    ),
    "positions of disentangled attention": (
        {**MASKED, "model.mixer": "disentangled"},
        1,
        "--config.model.mixer=disentangled and --config.model.positions=disentangled need each",
    ),
    "disentangled decoder": (
        {"model.mixer": "disentangled", "model.positions": "disentangled"},
        1,
        "--config.model.mixer=disentangled needs --config.model.family=encoder, not decoder",
    ),
    "disentangled parts in a ring": (
        MASKED
        | CONTEXT
        | {"model.mixer": "disentangled", "model.positions": "disentangled"}
        | {"parallel.context_attention": "ring"},
        4,
        "--config.parallel.context_attention=ring and --config.model.positions=disentangled",
    ),
    "projection of a decoder": (
        {"model.embedding_size": 12, "model.projection_first": True},
        1,
        "--config.model.projection_first needs --config.model.family=encoder",
    ),
    "generator": (
        MASKED | {"objective.name": "replaced_tokens", "model.generator_width": 12},
        1,
        "--config.model.generator_width=12: relative to --config.model.d_model=",
    ),
    "width of embeddings": (
        FSDP4 | {"model.embedding_size": 6, "data.batch_size": 4},
        4,
        "--config.model.embedding_size=6 is not divisible by 4 (--config.parallel.mesh.fsdp)",
    ),
    "first norm": (
        {"model.first_norm": False, "model.norm_placement": "post"},
        1,
        "--config.model.first_norm=false needs --config.model.norm_placement=pre or both",
    ),
    "experts": ({"model.n_experts": 1}, 1, "--config.model.experts_per_token=2 is above"),
    "muP": ({"model.mup_base_head_dim": 8}, 1, "needs --config.model.mup_base_width"),
    "family": (LSTM | {"objective.name": "prefix"}, 1, "needs --config.model.family decoder"),
    "best without whole evaluations": (
        {"eval.best": "loss", "eval.max_batches": 2},
        1,
        "--config.eval.max_batches=2 must be 0",
    ),
    "metric": ({"eval.metrics": "bleu,belu"}, 1, "unknown metric 'belu'; did you mean bleu?"),
    "schedule": (
        {"schedule.name": "inverse", "schedule.final_ratio": 0.0},
        1,
        "--config.schedule.name=inverse never reaches 0",
    ),
    "rates of parameters": (
        {"optimizer.rates": "head=>0.1,tokens"},
        1,
        "--config.optimizer.rates: 'tokens' is not PATTERN=>FACTOR",
    ),
    "rate below 0": (
        {"optimizer.rates": "head=>-1"},
        1,
        "'head=>-1': expected a factor of at least 0",
    ),
    "schedule-free learning": (
        {"optimizer.name": "schedule_free"},
        1,
        "set --config.schedule.name=constant, not cosine",
    ),
    "two averages": (
        {"optimizer.name": "schedule_free", "schedule.name": "constant", "optimizer.ema": 0.9},
        1,
        "--config.optimizer.name=schedule_free already averages",
    ),
    "start": ({"init.from": "run", "init.vectors": "glove"}, 1, "are mutually exclusive"),
    "pattern of freezing": (
        {"optimizer.freeze": "head,(tokens"},
        1,
        r"--config.optimizer.freeze: '(tokens' is not a valid regular expression",
    ),
    "pattern of LoRA": ({"lora.train": "*"}, 1, "--config.lora.train: '*' is not a valid regular"),
    "no targets of LoRA": (
        {"lora.rank": 2, "lora.targets": ""},
        1,
        "--config.lora.targets is empty",
    ),
    "pattern of renaming": ({"init.rename": "(=>x"}, 1, "--config.init.rename: '(=>x'"),
    "group of renaming": ({"init.rename": r"a=>\1"}, 1, r"--config.init.rename: 'a=>\\1'"),
    "form of renaming": ({"init.rename": "a"}, 1, "--config.init.rename: 'a' is not PATTERN=>NAME"),
    "decoding": (
        {"decode.min_length": 5, "decode.max_length": 4},
        1,
        "--config.decode.min_length=5 is above --config.decode.max_length=4",
    ),
    "decoding by default lengths": (
        {"decode.min_length": 17},
        1,
        "--config.decode.min_length=17 is above --config.decode.max_length=16",
    ),
    # --- data
    "no source": ({"data.source": " , "}, 1, "--config.data.source is empty"),
    "unknown source": ({"data.source": "web:x"}, 1, "--config.data.source: unknown data source"),
    "source without its path": ({"data.source": "text"}, 1, "unknown data source 'text'"),
    "unknown source of validation": (
        {"data.validation_source": "web:x"},
        1,
        "--config.data.validation_source: unknown data source 'web:x'",
    ),
    "documents from records": (
        {"data.source": "tsv:x.tsv"},
        1,
        "tsv:x.tsv has no documents (known: stdlib, text:PATH, jsonl:PATH, tfds:NAME, ",
    ),
    "records from documents": (
        SEQ2SEQ | {"data.source": "stdlib"},
        1,
        "stdlib has no records (known: jsonl:PATH, tsv:PATH",
    ),
    "tokenizer": ({"data.tokenizer": "morse"}, 1, "unknown tokenizer 'morse' (known: byte, char"),
    "tokenizer without its file": ({"data.tokenizer": "gpt2"}, 1, "unknown tokenizer 'gpt2'"),
    "weights": ({"data.weights": (1.0, 2.0)}, 1, "has 2 numbers for 1 corpora"),
    "weight": ({"data.weights": (0.0,)}, 1, "every weight must be above 0"),
    "microbatches": ({"train.microbatches": 3}, 1, "not divisible by --config.train.microbatches"),
    "order": (SEQ2SEQ | {"data.order": "contiguous"}, 1, "needs --config.objective.name=causal"),
    # --- objective
    "room of masked": (MASKED | {"data.sequence_length": 3}, 1, "leaves no room for text"),
    "room of span corruption": (
        {
            "objective.name": "span_corruption",
            "model.family": "encoder_decoder",
            "data.sequence_length": 2,
        },
        1,
        "is too short for span corruption",
    ),
    # --- mesh
    "mesh": ({"parallel.mesh.fsdp": 3}, 8, "does not divide 8 devices"),
    "two free axes": ({"parallel.mesh.fsdp": -1}, 8, "at most one may be -1"),
    "batch": ({"data.batch_size": 6}, 8, "--config.data.batch_size=6 is not divisible by 8"),
    "batch of validation": ({"eval.batch_size": 6}, 8, "--config.eval.batch_size=6 is not"),
    "batch of microbatches": (
        {"train.microbatches": 2},
        8,
        "not divisible by 16 (8 data-parallel devices × 2 --config.train.microbatches)",
    ),
    "width": (
        FSDP4 | {"model.d_model": 30, "model.n_heads": 2, "data.batch_size": 4},
        4,
        "--config.model.d_model=30 is not divisible by 4 (--config.parallel.mesh.fsdp)",
    ),
    "heads": (TENSOR, 8, "--config.model.n_heads=4 is not divisible by 8 (--config.parallel.mesh"),
    "feed-forward width": (
        TENSOR | {"model.n_heads": 8, "model.d_ff": 36},
        8,
        "--config.model.d_ff=36 is not divisible by 8",
    ),
    "experts of a dense model": (
        {"parallel.mesh.data": 1, "parallel.mesh.expert": 4},
        4,
        "--config.parallel.mesh.expert=4: the model has no experts",
    ),
    "number of experts": (
        {"parallel.mesh.data": 1, "parallel.mesh.expert": 4, "model.n_experts": 6},
        4,
        "--config.model.n_experts=6 is not divisible by 4",
    ),
    "stages": (STAGES | {"model.n_layers": 6}, 4, "--config.model.n_layers=6 is not divisible"),
    "stages of a recurrent model": (STAGES | LSTM, 4, "mesh.stage=4 needs --config.model.family"),
    "stages of unlike layers": (
        STAGES | {"model.residual": "concat"},
        4,
        "--config.parallel.mesh.stage=4 needs layers of one shape, not --config.model.residual=con",
    ),
    "microbatches of stages": (
        STAGES | {"parallel.pipeline.microbatches": 6, "data.batch_size": 24},
        4,
        "--config.parallel.pipeline.microbatches=6 is not a multiple of",
    ),
    "length": (
        CONTEXT | {"data.sequence_length": 20},
        4,
        "--config.data.sequence_length=20 is not divisible by 8 (2 × --config.parallel.mesh.cont",
    ),
    "length of targets": (
        CONTEXT | SEQ2SEQ | {"data.target_length": 12},
        4,
        "--config.data.target_length=12 is not divisible by 8",
    ),
    "parts of a recurrent model": (CONTEXT | LSTM, 4, "mesh.context=4 needs self-attention"),
    # --- attention
    "kernel": ({"model.attention": "splash"}, 1, "splash cannot be used with cpu devices"),
    "tiled kernel": (
        {"model.attention": "tiled", "model.positions": "relative"},
        1,
        "tiled cannot be used with --config.model.positions=relative",
    ),
    "ring": (
        CONTEXT | {"parallel.context_attention": "ring", "model.positions": "relative"},
        4,
        "--config.model.positions=relative",
    ),
}


def configured(changes):
    config = configs.default()
    for path, value in {**SMALL, **changes}.items():
        configs.set_value(config, path, value)
    return config


@pytest.mark.parametrize("case", WRONG)
def test_one_call_finds_it(case):
    changes, n_devices, expected = WRONG[case]
    with pytest.raises(UserError) as caught:
        check(configured(changes), "cpu", n_devices)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, SEQ2SEQ, MASKED, LSTM, FSDP4, STAGES, CONTEXT])
def test_what_is_right_passes(changes):
    n_devices = 4 if any(name.startswith("parallel") for name in changes) else 1
    check(configured(changes | {"data.batch_size": 16}), "cpu", n_devices)


# --- what the call accepts can be traced

VALUES = {
    "model.n_layers": (1, 2, 3, 4),
    "model.d_model": (16, 24, 32),
    "model.n_heads": (1, 2, 3, 4),
    "model.n_kv_heads": (0, 1, 2, 4),
    "model.head_dim": (0, 4, 6, 7),
    "model.d_ff": (0, 24, 30),
    "model.family": ("decoder", "encoder", "encoder_decoder", "lstm", "nplm"),
    "objective.name": (
        *("causal", "prefix", "masked", "span_corruption", "denoising", "replaced_tokens"),
    ),
    "model.mixer": ("attention", "disentangled"),
    "model.embedding_size": (0, 8, 12),
    "model.projection_first": (False, True),
    "model.relative_input": (False, True),
    "model.generator_width": (0, 8, 12),
    "model.generator_layers": (0, 1),
    "model.separate_embeddings": (False, True),
    "model.separate_tokens": (False, True),
    "model.first_conv": (0, 2, 3),
    "model.embedding_norm": (False, True),
    "model.positions": (
        *("none", "learned", "rotary", "sinusoidal", "relative", "alibi", "disentangled"),
    ),
    "model.activation": ("gelu_tanh", "swiglu", "relu", "geglu_erf", "swiglu_clipped"),
    "model.residual": ("sum", "parallel", "concat", "hyper"),
    "model.value_residual": ("none", "learned"),
    "model.window": (0, 4, 64),
    "model.global_every": (0, 2),
    "model.global_first": (False, True),
    "model.first_norm": (True, False),
    "model.n_experts": (0, 2, 4),
    "model.experts_every": (1, 2),
    "model.experts_per_token": (1, 2),
    "model.dense_layers": (0, 1, 3),
    "model.expert_d_ff": (0, 6, 24),
    "model.shared_expert_d_ff": (0, 10, 24),
    "model.norm_placement": ("pre", "post", "both", "output"),
    "model.qk_norm": (False, True),
    "model.qk_norm_over": ("head", "each_head", "all"),
    "model.attention": ("auto", "xla", "tiled", "blockwise", "splash", "flash"),
    "model.dropout": (0.0, 0.1),
    "model.attention_dropout": (0.0, 0.1),
    "model.attention_softcap": (0.0, 5.0),
    "model.attention_sinks": (False, True),
    "model.attention_gate": (False, True),
    "model.window_chunks": (False, True),
    "model.nope_every": (0, 1, 2),
    "model.nope_temperature": (0.0, 0.1),
    "model.rope_fraction": (0.25, 0.5, 1.0),
    "model.rope_norm": (False, True),
    "model.residual_multiplier": (1.0, 0.5),
    "model.router_bias": (False, True),
    "model.expert_weights_input": (False, True),
    "model.expert_capacity": (0.0, 1.0),
    "model.mup_base_width": (0, 8),
    "model.tie_embeddings": (True, False),
    "data.sequence_length": (8, 15, 16),
    "data.batch_size": (4, 8, 12),
    "data.order": ("shuffled", "contiguous"),
    "train.microbatches": (1, 2),
    "train.remat": ("none", "full", "dots"),
    "train.loss_chunk": (0, 4),
    "train.scan_unroll": (0, 1, 2),
    "optimizer.name": (
        *("adamw", "adafactor", "sgd", "lion", "muon"),
        *("ademamix", "schedule_free", "soap"),
    ),
    "lora.rank": (0, 2),
    "parallel.sequence": (False, True),
    "parallel.context_attention": ("auto", "ring", "gather"),
    "parallel.pipeline.repeats": (1, 2),
    "parallel.pipeline.microbatches": (0, 4),
    **{f"parallel.mesh.{axis}": (1, 2, 4) for axis in ("stage", "fsdp", "expert", "context")},
    "parallel.mesh.tensor": (1, 2, 3),
}


def refusal_of(config) -> str:
    try:
        check(config, "cpu", 8)
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(sorted(VALUES)), max_size=5, unique=True).flatmap(
        lambda paths: st.fixed_dictionaries({p: st.sampled_from(VALUES[p]) for p in paths})
    )
)
def test_what_the_call_accepts_can_be_traced(changes):
    """A random configuration is refused in one line, or its step is traced on the mesh."""
    config = configs.default()
    base = {"model.n_layers": 2, "model.d_model": 16, "data.sequence_length": 16}
    for path, value in (base | {"data.batch_size": 8, "model.vocab_size": 32} | changes).items():
        configs.set_value(config, path, value)
    refusal = refusal_of(config)
    if refusal:
        assert "\n" not in refusal
        assert "--config." in refusal
        return
    experiment = build(config, jax.devices())
    batches = {
        name: jax.ShapeDtypeStruct((1, *one.shape), one.dtype)
        for name, one in experiment.batch_shapes.items()
    }
    jax.eval_shape(experiment.train_steps, experiment.state_shapes, batches)
