"""Quantized model folders of `compressed-tensors`: written, described, read back, refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.errors import UserError
from lm.interop.huggingface import load, save
from lm.interop.tensor_files import SINGLE
from lm.models.decoder import Decoder
from lm.models.quantized_kernel import QuantizedKernel
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import flat, nested, param_infos

LLAMA = {
    "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 48,
    "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "d_ff": 86,
    "norm_bias": False, "tie_embeddings": False, "init_std": 0.3, "max_length": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Decoder(TransformerConfig(**LLAMA))


@pytest.fixture(scope="module")
def boxed(model):
    return jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), int))["params"]


@pytest.mark.parametrize("bits", [8, 4])
def test_exported_weights_equal_those_used_in_decoding(bits, model, boxed, tmp_path):
    """Groups of 32 and, of 86 inputs, of 86; the embeddings and the output stay whole."""
    leaves = {path: box.value for path, box in flat(boxed).items()}
    save(model, nested(leaves), tmp_path, quantize=f"int{bits}")
    _, found = load(tmp_path)
    for path, info in param_infos(boxed).items():
        expected = leaves[path]
        if path.endswith("kernel") and path.startswith("stack"):
            expected = QuantizedKernel.quantize(expected, info, "float32", bits).unbox()
        np.testing.assert_allclose(flat(found)[path], expected, rtol=1e-6, atol=1e-7)
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.1.mlp.down_proj.weight"
    assert name not in tensors
    assert tensors[f"{name}_packed"].shape == (32, -(-86 * bits // 32))
    assert tensors[f"{name}_packed"].dtype == np.int32
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert about["format"] == "pack-quantized"
    groups = [group["weights"].get("group_size") for group in about["config_groups"].values()]
    assert groups == ([None] if bits == 8 else [32, 86])


def test_invalid_folder_is_rejected(model, boxed, tmp_path):
    leaves = {path: box.value for path, box in flat(boxed).items()}
    save(model, nested(leaves), tmp_path, quantize="int4")
    config, file = tmp_path / "config.json", tmp_path / SINGLE
    about, tensors = json.loads(config.read_text()), load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for change in (
        {f"{name}_scale": None},
        {f"{name}_shape": None},
        {f"{name}_shape": np.array([86, 31])},
        {f"{name}_shape": np.array([0, 32])},
        {f"{name}_packed": np.zeros((86, 3), np.int32)},
        {f"{name}_scale": np.ones((86, 3), np.float32)},
        {f"{name}_zero_point": np.zeros((86, 1), np.int32)},
    ):
        changed = {key: x for key, x in (tensors | change).items() if x is not None}
        save_file(changed, file)
        with pytest.raises(UserError, match="up_proj"):
            load(tmp_path)
    for other in ({"quant_method": "gptq", "bits": 4}, ["awq"]):
        config.write_text(json.dumps(about | {"quantization_config": other}))
        with pytest.raises(UserError, match="quanti"):
            load(tmp_path)
    sizes = {name: LLAMA[name] for name in ("d_model", "n_heads", "head_dim", "vocab_size")}
    gpt2 = Decoder(TransformerConfig(n_layers=1, n_kv_heads=4, d_ff=64, max_length=8, **sizes))
    params = gpt2.init(jax.random.key(0), np.zeros((1, 4), int))["params"]
    with pytest.raises(UserError, match="gpt2"):
        save(gpt2, params, tmp_path / "gpt2", quantize="int8")
