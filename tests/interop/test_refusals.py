"""Files that cannot be read or written give one line that names them, before any computation."""

import json
import shutil

import jax
import numpy as np
import pytest
from hf_models import KINDS, config_of, safetensors, torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import validate
from lm.errors import UserError
from lm.interop import huggingface
from lm.interop.import_export import run_config
from lm.interop.model_folder import FAMILIES, open_model_folder
from lm.models.classic.lstm import RecurrentConfig
from lm.models.classic.recurrent import Lstm
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.transformer_config import TransformerConfig

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def folder(make_theirs, tmp_path):
    """A copy of a small Llama's folder, to spoil."""
    return shutil.copytree(make_theirs("llama")[1], tmp_path / "llama")


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def set_tensors(folder, change):
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors")


LOCAL = "sliding_attention"
NORM = "model.layers.1.post_attention_layernorm.weight"
SPOILT = {
    "architecture": (lambda f: set_config(f, model_type="mamba"), "model_type=mamba; known: gp"),
    "missing": (lambda f: set_tensors(f, lambda t: t.pop(NORM)), f"lacks the tensor {NORM}"),
    "surplus": (
        lambda f: set_tensors(f, lambda t: t.update(score=np.zeros(3, np.float32))),
        "has the tensor score, which",
    ),
    "integers": (
        lambda f: set_tensors(f, lambda t: t.update({NORM: t[NORM].view(np.int32)})),
        f"{NORM} has the type I32, but weights are floats",
    ),
    "not a number": (
        lambda f: set_tensors(f, lambda t: t[NORM].__setitem__(3, np.nan)),
        f"{NORM} contains NaN",
    ),
    "infinite": (
        lambda f: set_tensors(f, lambda t: t[NORM].__setitem__(0, -np.inf)),
        f"{NORM} contains NaN or inf",
    ),
    "layers left": (lambda f: set_config(f, num_hidden_layers=2), "layers.2.*and 8 more"),
    "shape": (
        lambda f: set_tensors(f, lambda t: t.update({NORM: t[NORM][:-1].copy()})),
        rf"{NORM} has the shape \(31,\), not \(32,\)",
    ),
    "wrong size": (lambda f: set_config(f, hidden_size=36), r"has the shape \(96, 32\), not"),
    "activation": (lambda f: set_config(f, hidden_act="mish"), "hidden_act=mish is not supported"),
    "rope": (lambda f: set_config(f, rope_parameters={"rope_type": "axial"}), "rope_type=axial"),
    "odd heads": (lambda f: set_config(f, head_dim=7), "RoPE has no head_dim=7: odd"),
    "scale of scores": (
        lambda f: set_config(f, model_type="gemma2", query_pre_attn_scalar=-8),
        "query_pre_attn_scalar=-8 is not a positive number",
    ),
    "cap": (
        lambda f: set_config(f, model_type="gemma2", final_logit_softcapping="30"),
        "final_logit_softcapping='30' is not a positive number",
    ),
    "list of experts": (
        lambda f: set_config(f, model_type="mixtral", num_experts_per_tok=[2]),
        "num_experts_per_tok is not a number",
    ),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "contains an adapter of a model",
    ),
    "yarn": (
        lambda f: set_config(f, rope_parameters={"rope_type": "yarn", "factor": 4, "beta_fast": 1}),
        "rope_high_frequency=1.0 must be above rope_low_frequency=1.0",
    ),
    "yarn scale": (
        lambda f: set_config(
            f, rope_parameters={"rope_type": "yarn", "factor": 4, "attention_factor": -1}
        ),
        "attention_factor=-1 is not a positive number",
    ),
    "longrope": (
        lambda f: set_config(
            f, rope_parameters={"type": "longrope", "short_factor": [1] * 4, "long_factor": [2] * 3}
        ),
        "rope_long_factor: expected 4 positive numbers, half of head_dim, not 3",
    ),
    "longrope text": (
        lambda f: set_config(
            f, rope_parameters={"type": "longrope", "short_factor": ["1"], "long_factor": "2"}
        ),
        "short_factor='1' is not a positive number",
    ),
    "dynamic": (
        lambda f: set_config(f, rope_parameters={"rope_type": "dynamic", "factor": "4"}),
        "factor='4' is not a positive number",
    ),
    "layer types": (
        lambda f: set_config(
            f, model_type="qwen3", sliding_window=8, layer_types=["full_attention", LOCAL]
        ),
        "layer_types are not .* for each of 3 layers",
    ),
    "no expert": (
        lambda f: set_config(f, model_type="mixtral", num_experts_per_tok=0),
        "experts_per_token is less than 1",
    ),
    "clipped": (lambda f: set_config(f, model_type="olmoe", clip_qkv="8"), "clip_qkv='8' is not"),
    "both ways": (
        lambda f: (
            set_config(f, model_type="gemma", use_bidirectional_attention=True)
            or set_config(f, hidden_act="gelu")
        ),
        "use_bidirectional_attention=True is not",
    ),
    "activation of gpt-oss": (
        lambda f: set_config(f, model_type="gpt_oss", swiglu_limit=5.0),
        "swiglu_limit=5.0 is not",
    ),
    "layers without positions": (
        lambda f: set_config(f, model_type="smollm3", no_rope_layers=[1, 0]),
        "no_rope_layers has not 3 layers",
    ),
    "chunks and windows": (
        lambda f: set_config(f, model_type="llama4_text", layer_types=[LOCAL] * 3),
        f"layer_types has {LOCAL}",
    ),
    "heads without a name in the file": (
        lambda f: set_config(f, model_type="stablelm", qk_layernorm=True),
        "lacks the tensor model.layers.0.self_attn.q_layernorm.norms.0.weight",
    ),
    "part of a head": (
        lambda f: set_config(f, model_type="stablelm", partial_rotary_factor=1.5),
        "rope_fraction=1.5 rotates",
    ),
    "multiplier": (
        lambda f: set_config(f, model_type="granite", residual_multiplier="0.2"),
        "residual_multiplier='0.2' is not a positive number",
    ),
    "fused": (
        lambda f: set_config(f, model_type="phi3", partial_rotary_factor=1.0),
        "lacks the tensor model.layers.0.self_attn.qkv_proj.weight",
    ),
    "no hang": (lambda f: set_config(f, num_hidden_layers=10**9), "1000000000 layers are more"),
    "few tensors": (
        lambda f: set_config(f, num_hidden_layers=99_999),
        "has 99999 layers, but there are only",
    ),
    "experts": (
        lambda f: set_config(
            f, model_type="mixtral", num_experts_per_tok=2, num_local_experts=10**9
        ),
        "has 3000000000 experts, but",
    ),
    "list": (
        lambda f: set_config(f, hidden_act=["gelu"]),
        r"config.json: hidden_act=\['gelu'\] is",
    ),
    "list of rope": (
        lambda f: set_config(f, rope_parameters=[1]),
        "RoPE settings .* not an object",
    ),
    "kind of rope": (lambda f: set_config(f, rope_parameters={"type": [1]}), r"rope_type=\[1\] is"),
    "no size": (lambda f: set_config(f, hidden_size=None), "config.json has no hidden_size"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "config.json: damaged JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "quantised": (lambda f: set_config(f, quantization_config={"bits": 4}), "quantized"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_folder_is_refused(folder, what):
    spoil, expected = SPOILT[what]
    spoil(folder)
    with pytest.raises(UserError, match=expected) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.int64, "number"], ids=str)
@pytest.mark.parametrize("kind", ["umt5", "bert", "llama-grouped-tied"])
def test_matrices_that_are_compared_or_counted_before_all_are_checked(
    make_theirs, tmp_path, kind, to
):
    """Table, output matrix and a classifier's are of another type, or no matrices at all."""
    folder = shutil.copytree(make_theirs(kind)[1], tmp_path / "spoilt")
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    further = {"classifier.weight": tensors[family.table]} if kind == "bert" else {}
    tensors |= further | {family.output: tensors[family.table].clone()}
    for name in (family.table, family.output, *further):
        tensors[name] = torch.tensor(1.0) if to == "number" else tensors[name].to(to)
    safetensors_torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"are floats|has the shape|lacks") as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)


def test_an_output_matrix_that_repeats_the_table_is_no_surplus(make_theirs, folder):
    set_config(folder, tie_word_embeddings=True)
    set_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    model, params = huggingface.load(folder)
    assert model.config.tie_embeddings
    assert "head" not in params


@pytest.mark.parametrize("key", ["num_layers", "num_decoder_layers"])
def test_layers_that_no_file_holds_are_refused_at_once(make_theirs, tmp_path, key):
    folder = shutil.copytree(make_theirs("t5")[1], tmp_path / "t5")
    set_config(folder, **{key: 10**9})
    with pytest.raises(UserError, match=r"10000000\d\d layers"):
        huggingface.load(folder)


@pytest.mark.parametrize(
    ("values", "bias", "expected"),
    [
        ({"encoder_attention_heads": 5}, 0, "d_model=24 is not divisible by encoder_.*_heads=5"),
        ({"decoder_attention_heads": 5}, 0, "decoder_attention_heads=5 does not divide d_model=24"),
        ({"decoder_ffn_dim": 48}, 0, r"fc1.weight has the shape \(28, 24\), not \(48, 24\)"),
        (
            {"activation_function": "mish"},
            0,
            "activation_function=mish is not supported, only gelu",
        ),
        ({"max_position_embeddings": 40}, 0, r"has the shape \(34, 24\), not \(42, 24\)"),
        ({"decoder_layers": 2}, 0, r"decoder.layers.2.\S+ and 25 more, which a bart model"),
        ({}, 1, "final_logits_bias is not zero"),
    ],
)
def test_a_bart_of_another_kind_is_refused(make_theirs, tmp_path, values, bias, expected):
    folder = shutil.copytree(make_theirs("bart")[1], tmp_path / "bart")
    set_config(folder, **values)
    set_tensors(folder, lambda t: t["final_logits_bias"].fill(bias))
    with pytest.raises(UserError, match=expected):
        huggingface.load(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_activation": "mish"}, "hidden_activation=mish is not supported, only silu"),
        ({"decoder_bias": False}, "decoder_bias=False is not supported, only True"),
        ({"classifier_activation": "mish"}, "classifier_activation=mish is not supported"),
        (
            {"layer_types": ["full_attention"] * 2 + [LOCAL] * 2},
            "layer_types are not .* for each of 5 layers",
        ),
        ({"classifier_bias": True}, "lacks the tensor head.dense.bias of a modernbert model"),
        ({"num_hidden_layers": 4, "layer_types": None}, r"layers.4.\S+ and 5 more, which a modern"),
        ({"local_attention": "8"}, "local_attention is not a number from 0"),
        ({"rope_parameters": {"full_attention": 7}}, "config.json: rope_parameters=.*: TypeError"),
        (
            {"global_attn_every_n_layers": 0, "layer_types": None},
            "global_attn_every_n_layers=0 is not a positive number",
        ),
    ],
)
def test_a_modernbert_of_another_kind_is_refused(make_theirs, tmp_path, values, expected):
    folder = shutil.copytree(make_theirs("modernbert")[1], tmp_path / "modernbert")
    set_config(folder, **values)
    with pytest.raises(UserError, match=expected):
        huggingface.load(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"share_att_key": None},
            r"lacks the tensor deberta\S+.pos_key_proj.weight",
        ),
        ({"position_biased_input": True}, "lacks the tensor deberta.embeddings.position_embedd"),
        ({"norm_rel_ebd": "none"}, "has the tensor deberta.encoder.LayerNorm.bias and 1 more"),
        ({"pos_att_type": "p2c|c2p|p2p"}, "is not supported, only c2p"),
        ({"position_buckets": -1}, r"rel_embeddings.weight has the shape \(12, 32\), not \(40, 32"),
        ({"position_buckets": 1}, "too few buckets or distances"),
        ({"position_buckets": 4}, r"rel_embeddings.weight has the shape \(12, 32\), not \(8, 32\)"),
        ({"max_relative_positions": 4}, "too few buckets or distances"),
        ({"conv_kernel_size": 4}, "conv_kernel_size=4 is even"),
        ({"conv_kernel_size": 3, "conv_groups": 2}, "conv_groups=2 is not supported, only 1"),
        ({"embedding_size": 16}, "lacks the tensor deberta.embeddings.embed_proj.weight"),
        ({"type_vocab_size": 2}, "lacks the tensor deberta.embeddings.token_type_embeddings"),
    ],
)
def test_a_deberta_of_another_kind_is_refused(make_theirs, tmp_path, values, expected):
    folder = shutil.copytree(make_theirs("deberta")[1], tmp_path / "deberta")
    set_config(folder, **values)
    with pytest.raises(UserError, match=expected):
        huggingface.load(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"embedding_size": 24}, r"weight has the shape \(96, 20\), not \(96, 24\)"),
        ({"embedding_size": 32}, "embeddings_project"),
        ({"embedding_size": "20"}, "embedding_size is not a number from 0"),
        ({"hidden_act": "mish"}, "hidden_act=mish is not supported, only gelu"),
    ],
)
def test_an_electra_of_another_kind_is_refused(make_theirs, tmp_path, values, expected):
    folder = shutil.copytree(make_theirs("electra-generator")[1], tmp_path / "electra")
    set_config(folder, **values)
    with pytest.raises(UserError, match=expected):
        huggingface.load(folder)


@pytest.mark.parametrize("pad", [-1, None, 96, "1", True])
def test_a_roberta_without_a_padding_id_is_refused(make_theirs, tmp_path, pad):
    folder = shutil.copytree(make_theirs("roberta")[1], tmp_path / "roberta")
    set_config(folder, pad_token_id=pad)
    with pytest.raises(UserError, match=f"config.json: pad_token_id={pad} is not an id of its 96"):
        huggingface.load(folder)


SIZES = {
    "n_layers": 1,
    "d_model": 8,
    "n_heads": 2,
    "n_kv_heads": 2,
    "head_dim": 4,
    "d_ff": 16,
    "vocab_size": 12,
    "max_length": 8,
}
LLAMA = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}


def zeros(model):
    """Parameters of a model, without compiling what would draw them."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"embedding_norm": True}, "closest, gpt2, does not have model.embedding_norm=True"),
        ({"positions": "sinusoidal"}, "model.positions=sinusoidal"),
        ({"activation": "swiglu"}, "model.activation=swiglu"),
        ({"head_dim": 6}, "model.head_dim=6"),
        ({"pooling": "mean"}, "model.pooling=mean"),
        ({"residual": "concat"}, "model.residual=concat"),
        ({**LLAMA, "residual": "hyper"}, "closest, llama, does not have model.residual=hyper"),
    ],
)
def test_a_model_that_they_have_not_is_refused(values, expected, tmp_path):
    model = Decoder(TransformerConfig(**SIZES | values))
    params = zeros(model)
    with pytest.raises(UserError, match=expected):
        huggingface.save(model, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_generator_is_no_module_of_bert(tmp_path):
    replaced = {"embedding_norm": True, "norm_placement": "post", "token_types": 2}
    model = Encoder(TransformerConfig(**SIZES | replaced))
    names = ("generator", "pooler", "sentence_head")  # DeBERTa lacks the last
    params = {name: {"logit_bias": {"bias": np.zeros(12)}} for name in names}
    with pytest.raises(UserError, match="closest, bert, does not have a generator"):
        huggingface.save(model, params, tmp_path / "out")


def test_a_recurrent_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no Hugging Face architecture corresponds to Lstm"):
        huggingface.save(Lstm(RecurrentConfig(1, 4, 4, 12)), {}, tmp_path / "out")


@pytest.mark.parametrize("kind", ["SmolLM3", "Llama4"])
def test_layers_without_positions_need_no_window(tmp_path, kind):
    """SmolLM3 is chosen among those that fit; a Llama 4 without chunks can be imported."""
    llama = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
    model = Decoder(TransformerConfig(**SIZES | llama | {"n_layers": 4, "nope_every": 4}))
    params = zeros(model)
    stated = "llama4_text" if kind == "Llama4" else None
    found = huggingface.save(model, params, tmp_path / "out", model_type=stated)
    assert found == f"{kind}ForCausalLM"
    config = run_config(open_model_folder(tmp_path / "out"))
    validate(config)
    assert config.model.nope_every == 4


def test_how_a_model_began_does_not_matter(tmp_path):
    config = TransformerConfig(**SIZES, init="xavier", init_truncated=True, init_std=0.3)
    model = Decoder(config)
    params = zeros(model)
    huggingface.save(model, params, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_parameters_that_have_no_place_are_refused(tmp_path):
    model = Decoder(TransformerConfig(**SIZES))
    params = zeros(model)
    with pytest.raises(UserError, match="extra/kernel does not exist"):
        huggingface.save(model, params | {"extra": {"kernel": np.zeros((8, 2))}}, tmp_path)


HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**9,
    2**31,
    10**30,
    1e308,
    -0.5,
    "",
    "a",
    [],
    [1],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "mixtral", "bert", "roberta", "t5"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_value_of_config_json_is_used_or_refused(make_theirs, kind, data, tmp_path_factory):
    source = make_theirs(kind)[1]
    place = tmp_path_factory.mktemp("hostile")
    (place / "model.safetensors").symlink_to(source / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=2)):
        values[name] = data.draw(st.sampled_from(HOSTILE))
    (place / "config.json").write_text(json.dumps(values))
    try:
        open_model_folder(place)
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_a_convolution_over_more_than_any_model_has_is_refused_at_once():
    written = config_of(*KINDS["mamba2"]).to_dict() | {"conv_kernel": 10**9}
    with pytest.raises(UserError, match="ssm_conv is above 256"):
        FAMILIES["mamba2"].read_config(written)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flag_that_matters_is_true_or_false(kind):
    class_name, values = KINDS[kind]
    written = config_of(class_name, values).to_dict()
    family = FAMILIES[written["model_type"]]

    def read(**changes):
        try:
            return family.read_config(written | changes)
        except UserError as error:
            return str(error)

    assert not isinstance(read(), str)
    for name in [name for name, value in written.items() if isinstance(value, bool)]:
        if read(**{name: True}) != read(**{name: False}):
            assert name in read(**{name: "false"})
    for name in [name for name, value in written.items() if isinstance(value, list)]:
        if isinstance(read(**{name: [1, 1, 1, 1, 1, 1, 1, 1]}), str):
            for other in (7, "a", [[1]], [{}]):
                assert name in read(**{name: other})


def test_a_config_of_llama_1_is_read(make_theirs, folder):
    """It has neither a longest position nor grouped heads; some say "swish" (transformers 4.27)."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for name in ("max_position_embeddings", "num_key_value_heads", "rope_parameters", "head_dim"):
        values.pop(name, None)
    file.write_text(json.dumps(values | {"hidden_act": "swish", "max_sequence_length": 2048}))
    model, _ = huggingface.load(folder)
    assert (model.config.max_length, model.config.n_kv_heads) == (2048, model.config.n_heads)
    assert model.config.activation == "swiglu"
