import re

import jax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kinds import KINDS
from ml_collections import ConfigDict

from lm import config as configs
from lm.config.registries import OBJECTIVES, REGISTRIES, SCHEMA
from lm.config.rules import families_of
from lm.config.synonyms import NAMES
from lm.errors import UserError
from lm.experiment import build
from lm.kernels.elementwise import ACTIVATIONS
from lm.runs.workdir import differences

SMALL = """
from lm.config import default

def get_config(variant="a"):
    config = default()
    config.model.n_layers = config.model.n_heads = 2
    config.model.d_model = 16
    config.data.sequence_length = 8
    return config
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Return an experiment file with a small model."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def write(tmp_path):
    """Write an experiment file and return its path."""

    def write(source):
        path = tmp_path / "experiment.py"
        path.write_text(source)
        return str(path)

    return write


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- the schema


def test_every_key_is_explained():
    for path, key in SCHEMA.items():
        assert re.fullmatch(r".{8,}\.", key.help), path


def test_defaults_are_valid():
    config = configs.default()
    configs.validate(config)
    assert dict(configs.flatten(config)) == {path: key.default for path, key in SCHEMA.items()}


def test_activations_are_the_choices():
    assert set(SCHEMA["model.activation"].choices) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("registry", "name"),
    [(registry, name) for registry in REGISTRIES for name in registry],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_registered_name_leads_to_its_code(registry, name):
    assert callable(registry[name])
    for key in registry.keys_of_names if registry.is_choice else ():
        assert name in SCHEMA[key].choices


# Further keys that some choices need.
FACTORS = (1.0,) * 16  # half of the default head dimension
DISENTANGLED = {
    "model.mixer": "disentangled",
    "model.positions": "disentangled",
    "model.family": "encoder",
    "objective.name": "masked",
}
COMPANIONS = {
    ("model.init", "uniform"): {"model.family": "lstm"},
    ("model.rope_scaling", "longrope"): {
        "model.rope_short_factor": FACTORS,
        "model.rope_long_factor": FACTORS,
    },
    ("optimizer.name", "schedule_free"): {"schedule.name": "constant"},
    ("model.mixer", "disentangled"): DISENTANGLED,
    ("model.positions", "disentangled"): DISENTANGLED,
    ("model.pooling", "shifted"): {"model.family": "encoder_decoder", "objective.name": "span_qa"},
    ("train.precision", "qat"): {"decode.weights": "int4"},
}
for objective in OBJECTIVES:
    COMPANIONS["objective.name", objective] = {"model.family": families_of(objective)[0]}
    for family in families_of(objective):
        COMPANIONS["model.family", family] = {"objective.name": objective}


@pytest.mark.parametrize("path", [path for path, key in SCHEMA.items() if key.choices])
def test_every_choice_is_accepted(path):
    for choice in SCHEMA[path].choices:
        config = configs.default()
        for name, value in {path: choice, **COMPANIONS.get((path, choice), {})}.items():
            configs.set_value(config, name, value)
        configs.validate(config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_builds(make_kind, kind):
    """Resolving fills in defaults, and is idempotent."""
    config = make_kind(kind)
    experiment = build(config, jax.devices()[:1])
    assert experiment.config == build(experiment.config, jax.devices()[:1]).config
    assert experiment.steps.objective.shapes.keys() == experiment.batch_shapes.keys()


# --- overrides


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.steps", "1_000", 1000),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("model.bias", "False", False),
        ("model.bias", "1", True),
        ("data.weights", "(1, 2.5)", (1.0, 2.5)),
        ("data.weights", "", ()),
        ("paper", "gpt2-small", "gpt2-small"),
    ],
)
def test_text_is_read_by_the_type_of_its_key(path, text, value):
    found = configs.parse_value(path, text)
    assert found == value
    assert type(found) is type(value)


def test_overrides_win_over_the_file(experiment):
    config = configs.load_config(experiment, {"model.d_model": "32", "optimizer.adamw.b1": "0.5"})
    assert (config.model.d_model, config.optimizer.adamw.b1) == (32, 0.5)
    assert config.model.n_layers == 2


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.n_layer", "model.n_layers"),
        ("model.layers", "model.n_layers"),
        ("learning_rate", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("data.batchsize", "data.batch_size"),
        ("qwertyuiop", None),
    ],
)
def test_unknown_key_names_the_nearest(experiment, wrong, right):
    message = error_of(configs.load_config, experiment, {wrong: "1"})
    assert f"unknown key --config.{wrong}" in message
    if right is None:
        assert "did you mean" not in message
    else:
        assert f"did you mean --config.{right}?" in message


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model", "gpt", "--config.model is a section, not a key"),
        ("parallel.mesh", "2", "--config.parallel.mesh is a section, not a key"),
        ("train.steps", "2.5", "--config.train.steps=2.5: expected an integer"),
        ("train.steps", "", "--config.train.steps=: expected an integer"),
        ("optimizer.learning_rate", "fast", "expected a number"),
        ("optimizer.learning_rate", "nan", "expected a finite number"),
        ("optimizer.learning_rate", "inf", "expected a finite number"),
        ("optimizer.learning_rate", "-1", "--config.optimizer.learning_rate=-1.0 is below 0"),
        ("model.bias", "maybe", "--config.model.bias=maybe: expected true or false"),
        ("data.weights", "1,x", "--config.data.weights=1,x: expected numbers separated by commas"),
        ("model.norm", "rms", "expected one of layernorm, rmsnorm"),
        ("model.norm", "rmsnrom", "did you mean rmsnorm?"),
        ("seed", "-1", "--config.seed=-1 is below 0"),
        ("seed", "4294967296", "--config.seed=4294967296 is above 2147483647"),
        ("model.dropout", "1", "--config.model.dropout=1.0 is above 0.99"),
        ("parallel.pipeline.repeats", "0", "--config.parallel.pipeline.repeats=0 is below 1"),
        ("objective.mask_rate", "0", "--config.objective.mask_rate=0.0 is below 0.001"),
        ("objective.noise_density", "1", "--config.objective.noise_density=1.0 is above 0.9"),
        ("objective.name", "mlm", "expected one of causal, multi_token, prefix, masked"),
        ("model.family", "encoder-decoder", "did you mean encoder_decoder?"),
        ("optimizer.layer_decay", "1.5", "--config.optimizer.layer_decay=1.5 is above 1"),
        ("lora.rank", "-1", "--config.lora.rank=-1 is below 0"),
        ("decode.beam_size", "0", "--config.decode.beam_size=0 is below 1"),
        ("decode.repetition_penalty", "0", "--config.decode.repetition_penalty=0.0 is below 0.01"),
        ("init.average", "0", "--config.init.average=0 is below 1"),
        ("init", "run", "--config.init is a section, not a key"),
    ],
)
def test_wrong_value_is_one_message(experiment, path, text, expected):
    assert expected in error_of(configs.load_config, experiment, {path: text})


# --- experiment files


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import lm.nothing\n", r"experiment\.py:1: ModuleNotFoundError: .*lm\.nothing"),
        ("def get_config():\n    return 1 / 0\n", r"experiment\.py:2: ZeroDivisionError"),
        ("def get_config(:\n", r"experiment\.py.*SyntaxError"),
        ("x = 1\n", r"experiment\.py has no get_config"),
        ("import sys\nsys.exit(0)\n", r"experiment\.py:2: SystemExit"),
        (
            "class Odd(BaseException): pass\ndef get_config():\n    raise Odd('x')\n",
            r"experiment\.py:3: Odd: x",
        ),
        ("def get_config():\n    return {}\n", r"get_config returned dict, not a ConfigDict"),
        (
            "from lm.config import default\ndef get_config():\n    c = default()\n"
            "    c.model.n_layers = 'two'\n    return c\n",
            r"experiment\.py:4: TypeError",
        ),
        (
            "from lm.config import default\ndef get_config():\n    c = default()\n"
            "    c.model.n_layer = 2\n    return c\n",
            r"unknown key --config\.model\.n_layer; did you mean --config\.model\.n_layers\?",
        ),
        (
            "from lm.config import default\ndef get_config():\n    c = default()\n"
            "    del c.model.n_layers\n    return c\n",
            r"--config\.model\.n_layers is missing",
        ),
        (
            "from lm.config import choose\ndef get_config():\n"
            "    return choose({'a': 1, 'b': 2}, 'c')\n",
            r"experiment\.py: unknown variant 'c' \(known: a, b\)",
        ),
    ],
)
def test_broken_experiment_file_says_where(write, source, expected):
    assert re.search(expected, error_of(configs.load_config, write(source)))


def test_missing_experiment_file_is_named(tmp_path):
    assert "no experiment file" in error_of(configs.load_config, str(tmp_path / "none.py:a"))


def test_variant_reaches_the_file(write):
    path = write(
        SMALL.replace("config = default()", "config = default()\n    config.paper = variant")
    )
    assert configs.load_config(path).paper == "a"
    assert configs.load_config(f"{path}:b").paper == "b"


# --- comparing two configurations


def test_differences_name_what_changes_the_run():
    old, new = configs.default(), configs.default()
    assert differences(old, new) == []
    new.optimizer.learning_rate = 0.5
    new.model.norm = "rmsnorm"
    found = differences(old, new)
    assert found == [
        "--config.model.norm: layernorm → rmsnorm",
        "--config.optimizer.learning_rate: 0.001 → 0.5",
    ]


def test_differences_leave_out_free_keys():
    free = {path for path, key in SCHEMA.items() if key.free}
    assert {"train.remat", "parallel.mesh.data", "checkpoint.every_steps"} <= free
    assert not {"seed", "model.dtype", "data.batch_size", "train.microbatches"} & free
    old, new = configs.default(), configs.default()
    for path in free:
        key = SCHEMA[path]
        other = {
            bool: lambda key: not key.default,
            int: lambda key: key.default + 1,
            float: lambda key: key.default + 1,
            str: lambda key: key.choices[-1] if key.choices else "other",
        }[key.type](key)
        configs.set_value(new, path, other)
    assert differences(old, new) == []


def test_differences_of_a_saved_configuration():
    """JSON turns tuples into lists, and another version of the code has other keys."""
    saved = {"data": {"weights": [1.0, 2.0]}, "gone": 3}
    now = ConfigDict({"data": {"weights": (1.0, 2.0)}, "fresh": 4})
    assert differences(saved, now) == [
        "--config.fresh: (none) → 4",
        "--config.gone: 3 → (none)",
    ]


def test_key_that_is_newer_than_a_saved_configuration_had_its_default():
    saved, now = configs.default().to_dict(), configs.default()
    del saved["model"]["norm"], saved["model"]["d_model"]
    now.model.d_model = 8
    assert differences(saved, now) == ["--config.model.d_model: 128 → 8"]


# --- nothing but UserError


ANY_TEXT = st.one_of(
    st.sampled_from(["", "0", "-1", "-0.0", "nan", "inf", "1e400", "2.5", "(,)", ":", "\x00"]),
    st.text(max_size=8),
)
TEXTS = {
    int: st.one_of(st.integers(-2, 70), st.integers(-(2**31), 2**31 - 1)).map(str),
    float: st.one_of(st.floats(0, 2), st.floats()).map(str),
    bool: st.sampled_from(["true", "false", "0", "1"]),
    tuple: st.lists(st.floats(), max_size=3).map(lambda items: ",".join(map(str, items))),
    str: st.sampled_from(["stdlib", "stdlib,text:x", "byte", "gpt2:", "tokenizers:x.json", "x:y"]),
}


def override(path):
    """Draw (path, text), where the text is often valid for the key."""
    key = SCHEMA[path]
    fitting = st.sampled_from(key.choices) if key.choices else TEXTS[key.type]
    return st.tuples(st.just(path), st.one_of(fitting, fitting, ANY_TEXT))


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(sorted(SCHEMA)).flatmap(override), min_size=1, max_size=3).map(dict)
)
@example({"model.relative_per_layer": "true"})
def test_random_override_builds_or_is_a_user_error(experiment, overrides):
    try:
        built = build(configs.load_config(experiment, overrides), jax.devices()[:1])
        built.steps.schedule(3)
    except UserError as error:
        message = str(error)
    else:
        message = "none"
    assert message
    assert "\n" not in message


@pytest.mark.parametrize(
    "path", ["model.d_model", "model.vocab_size", "data.sequence_length", "schedule.warmup_steps"]
)
@pytest.mark.parametrize("value", [2**40, 10**30])
def test_huge_integer_is_a_user_error(experiment, path, value):
    with pytest.raises(UserError, match=re.escape(path)):
        build(configs.load_config(experiment, {path: str(value)}), jax.devices()[:1])


def test_value_of_another_type_is_a_one_line_error():
    """As in the run.json of a version where the key had another type."""
    with pytest.raises(UserError, match=r"model.attention_bias=True: expected one of same, all"):
        configs.set_value(configs.default(), "model.attention_bias", True)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("batch_size", "data.batch_size"),
        ("train.max_steps", "train.steps"),
        ("model.seq_len", "data.sequence_length"),
        ("block_size", "data.sequence_length"),
        ("train.warmup_steps", "schedule.warmup_steps"),
        ("optimizer.warmup_ratio", "schedule.warmup_steps"),
        ("weight_decay", "optimizer.weight_decay"),
        ("train.grad_clip", "optimizer.clip_norm"),
        ("max_grad_norm", "optimizer.clip_norm"),
        ("d_model", "model.d_model"),
        ("model.hidden_size", "model.d_model"),
        ("model.n_embd", "model.d_model"),
        ("model.n_layer", "model.n_layers"),
        ("model.num_layers", "model.n_layers"),
        ("base_num_decoder_layers", "model.n_layers"),
        ("model.num_hidden_layers", "model.n_layers"),
        ("train.dropout", "model.dropout"),
        ("model.residDropout", "model.dropout"),
        ("model.intermediate_size", "model.d_ff"),
        ("model.num_key_value_heads", "model.n_kv_heads"),
        ("optimizer.beta2", "optimizer.adamw.b2"),
        ("optimizer.eps", "optimizer.adamw.eps"),
        ("gradient_accumulation_steps", "train.microbatches"),
        ("trainer.num_train_steps", "train.steps"),
        ("ici_fsdp_parallelism", "parallel.mesh.fsdp"),
        ("train.learningRate", "optimizer.learning_rate"),
        ("data.Batch-Size", "data.batch_size"),
        ("model.numLayer", "model.n_layers"),
        ("optimizer.learing_rate", "optimizer.learning_rate"),
    ],
)
def test_names_of_other_codebases_lead_to_ours(wrong, right):
    with pytest.raises(UserError, match=rf"did you mean --config\.{re.escape(right)}\b"):
        configs.require_key(wrong)


def test_synonyms_are_of_our_keys_and_of_one_each():
    assert NAMES.keys() <= SCHEMA.keys()
    names = [name for value in NAMES.values() for name in value.split()]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z0-9]+", name), name
