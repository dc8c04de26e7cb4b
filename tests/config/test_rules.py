import pytest

from lm.config import default, parse_value, set_value, validate
from lm.config.registries import MODELS, OBJECTIVES
from lm.config.rules import families_of
from lm.errors import UserError

SMALL = {"model.n_layers": "2", "model.n_heads": "2", "model.d_model": "16"}


def small(overrides):
    """The configuration of a small model with overrides, not yet validated."""
    config = default()
    for path, text in {**SMALL, "data.sequence_length": "8", **overrides}.items():
        set_value(config, path, parse_value(path, text))
    return config


def error_of(config):
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_objective_trains_the_families_that_it_names_and_no_other():
    assert {family for objective in OBJECTIVES for family in families_of(objective)} == set(MODELS)
    for objective in OBJECTIVES:
        families = families_of(objective)
        for family in MODELS:
            config = default()
            config.objective.name, config.model.family = objective, family
            if family in families:
                validate(config)
            else:
                message = error_of(config)
                assert f"objective.name={objective} needs --config.model.family" in message
                assert all(other in message for other in families)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"schedule.name": "inverse", "schedule.final_ratio": "0"},
            "--config.schedule.name=inverse never reaches 0",
        ),
        (
            {"model.d_model": "17"},
            "--config.model.d_model=17 is not divisible by --config.model.n_he",
        ),
        (
            {"model.n_heads": "4", "model.n_kv_heads": "3"},
            "not divisible by --config.model.n_kv_hea",
        ),
        ({"model.positions": "rotary", "model.head_dim": "3"}, "needs an even head dimension"),
        ({"model.positions": "rotary", "model.d_model": "6"}, "needs an even head dimension"),
        (
            {"model.positions": "sinusoidal", "model.d_model": "15", "model.n_heads": "5"},
            "needs an even --config.model.d_model",
        ),
        (
            {"model.max_length": "7"},
            "--config.data.sequence_length=8 is longer than --config.model.ma",
        ),
        (
            {
                "model.family": "encoder_decoder",
                "objective.name": "seq2seq",
                "model.n_mels": "8",
            },
            "--config.model.n_mels is not supported with --config.objective.name=seq2seq",
        ),
        (
            {"model.max_length": "8", "data.target_length": "9"},
            "--config.data.target_length=9 is longer than --config.model.max_length=8",
        ),
        (
            {"model.residual": "concat", "model.norm_placement": "post"},
            "concat is not supported with --config.model.norm",
        ),
        (
            {"model.residual": "parallel", "model.norm_placement": "output"},
            "parallel needs a norm of each block's input: not --config.model.norm_placement=output",
        ),
        (
            {"model.value_residual": "fixed", "model.mixer": "mla"},
            "value_residual=fixed is not supported with --config.model.mixer=mla",
        ),
        (
            {"model.residual": "concat", "model.family": "lstm"},
            "concat is not supported with --config.model.fam",
        ),
        (
            {"model.positions": "rotary", "model.head_dim": "8", "model.rope_fraction": "0.4"},
            "rope_fraction=0.4 rotates 3 dimensions per head, which must be even",
        ),
        (
            {"model.window_chunks": "true"},
            "--config.model.window_chunks=True needs --config.model.window",
        ),
        (
            {"model.mixer": "mla", "model.attention_sinks": "true"},
            "attention_sinks=True is not supported with --config.model.mixer=mla",
        ),
        (
            {"model.family": "lstm", "model.residual_multiplier": "2.0"},
            "residual_multiplier is not supported with --config.model.family=lstm",
        ),
        (
            {"model.dense_layers": "1"},
            "--config.model.dense_layers=1 needs --config.model.n_experts",
        ),
        (
            {"model.dense_layers": "4", "model.n_layers": "4", "model.n_experts": "4"},
            "--config.model.dense_layers=4 leaves no MoE layer: --config.model.n_layers=4",
        ),
        (
            {
                "model.n_layers": "4",
                "model.dense_layers": "1",
                "model.n_experts": "4",
                "model.experts_every": "2",
            },
            "--config.model.n_layers=4 less --config.model.dense_layers is not divisible by",
        ),
        ({"model.family": "encoder"}, "--config.objective.name=causal needs --config.model.family"),
        (
            {"model.init": "uniform"},
            "--config.model.init=uniform is not supported with --config.model.family=dec",
        ),
        (
            {"model.family": "lstm", "model.init": "uniform", "model.init_truncated": "true"},
            "--config.model.init=uniform cannot be truncated: unset --config.model.init_truncated",
        ),
        (
            {"model.family": "lstm", "model.pooling": "mean"},
            "--config.model.pooling=mean is not supported with --config.model.family=lstm",
        ),
        (
            {"model.positions": "relative", "model.relative_max_distance": "16"},
            "relative_max_distance=16 must be above 16 with --config.model.relative_buckets=32",
        ),
        ({"model.carry": "true"}, "--config.model.carry needs --config.data.order=contiguous and"),
        (
            {"model.carry": "true", "data.order": "contiguous"},
            "--config.model.carry needs --config.data.order=contiguous",
        ),
        (
            {"model.carry": "true", "model.family": "lstm"},
            "--config.model.carry needs --config.data.order=contiguous",
        ),
        (
            {"data.order": "contiguous", "data.source": "stdlib,text:x"},
            "--config.data.order=contiguous reads a single source",
        ),
        (
            {"data.order": "contiguous", "objective.name": "prefix"},
            "--config.data.order=contiguous needs --config.objective.name=causal",
        ),
        (
            {"model.bidirectional": "true", "model.family": "lstm"},
            "--config.model.bidirectional would let a causal model see its targets",
        ),
        (
            {
                "model.bidirectional": "true",
                "model.family": "lstm_encoder_decoder",
                "objective.name": "seq2seq",
                "model.d_hidden": "5",
            },
            "--config.model.bidirectional needs an even --config.model.d_hidden",
        ),
        (
            {"model.attention": "tiled", "objective.name": "prefix"},
            "--config.model.attention=tiled cannot be used with --config.model.family=decoder and ",
        ),
        (
            {"model.attention": "tiled", "objective.name": "masked", "model.family": "encoder"},
            "--config.model.attention=tiled cannot be used with --config.model.family=encoder",
        ),
        (
            {"model.attention": "tiled", "model.attention_dropout": "0.1"},
            "tiled cannot be used with --config.model.attention_dropout=0.1: use auto or xla",
        ),
        (
            {"model.attention": "tiled", "model.positions": "relative"},
            "tiled cannot be used with --config.model.positions=relative",
        ),
        (
            {"model.attention": "tiled", "model.positions": "alibi"},
            "tiled cannot be used with --config.model.positions=alibi",
        ),
        (
            {"model.attention": "tiled", "model.attention_scale": "1"},
            "tiled cannot be used with --config.model.attention_scale=1.0",
        ),
        (
            {
                "model.window": "8",
                "model.family": "encoder_decoder",
                "objective.name": "span_corruption",
            },
            "--config.model.window=8 is not supported with --config.model.family=encoder_decoder",
        ),
        ({"model.global_every": "2"}, "--config.model.global_every=2 needs --config.model.window"),
        (
            {"model.rope_scaling": "yarn", "model.rope_high_frequency": "1"},
            "--config.model.rope_high_frequency=1.0 must be above --config.model.rope_low",
        ),
        (
            {"model.rope_scaling": "longrope", "model.rope_long_factor": "1,2"},
            "rope_short_factor: expected 4 positive numbers, half of head_dim, not 0",
        ),
        (
            {"model.rope_scaling": "dynamic", "model.n_heads": "8"},
            "--config.model.rope_scaling=dynamic needs heads of 4 or more, not 2",
        ),
        (
            {"init.from": "run", "init.vectors": "glove.txt"},
            "--config.init.from and --config.init.vectors are mutually exclusive",
        ),
        (
            {"model.n_experts": "1"},
            "--config.model.experts_per_token=2 is above --config.model.n_experts=1",
        ),
        (
            {"model.n_experts": "4", "model.experts_every": "3"},
            "--config.model.n_layers=2 is not divisible by --config.model.experts_every=3",
        ),
        (
            {"model.n_experts": "4", "model.activation_dropout": "0.1"},
            "--config.model.activation_dropout is not supported with --config.model.n_experts",
        ),
        (
            {"model.n_experts": "4", "model.family": "lstm"},
            "--config.model.n_experts is not supported with --config.model.family=lstm",
        ),
        (
            {"train.microbatches": "3"},
            "--config.data.batch_size=8 is not divisible by --config.train.",
        ),
        ({"data.weights": "1,2"}, "--config.data.weights has 2 numbers for 1 corpora"),
        ({"data.weights": "0"}, "every weight must be above 0"),
        ({"data.weights": "nan"}, "every weight must be above 0"),
        ({"parallel.mesh.fsdp": "-1"}, "at most one may be -1"),
        ({"parallel.mesh.tensor": "0"}, "sizes must be 1 or more"),
    ],
)
def test_broken_rule_is_one_message(overrides, expected):
    assert expected in error_of(small(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.d_model": "17", "model.head_dim": "8"},
        {"model.n_heads": "4", "model.n_kv_heads": "1"},
        {"model.max_length": "8"},
        {"data.source": "stdlib,text:x", "data.weights": "1,2"},
        {"parallel.mesh.fsdp": "-1", "parallel.mesh.data": "1"},
        {"model.carry": "true", "data.order": "contiguous", "model.family": "lstm"},
        {"data.order": "contiguous"},
        {"model.init": "uniform", "model.family": "nplm"},
        {"model.family": "lstm", "model.d_model": "17"},
        {
            "model.bidirectional": "true",
            "model.family": "lstm",
            "objective.name": "classification",
        },
        {"model.max_length": "8", "data.target_length": "8"},
        {"model.attention": "tiled"},
        {"model.rope_scaling": "yarn", "model.rope_high_frequency": "32"},
        {
            "model.rope_scaling": "longrope",
            "model.rope_short_factor": "1,1,1,1",
            "model.rope_long_factor": "1,2,4,8",
        },
        {"model.n_experts": "4", "model.experts_every": "2"},
    ],
)
def test_valid_combinations(overrides):
    validate(small(overrides))
