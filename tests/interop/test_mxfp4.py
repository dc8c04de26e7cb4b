"""gpt-oss with experts in MXFP4, against `transformers` on the same files."""

import json
import shutil

import numpy as np
import pytest
from hf_models import GPT_OSS, build, safetensors, torch, transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lm.errors import UserError
from lm.interop import huggingface
from lm.models.variables import flat

NAMES = ("gate_up_proj", "down_proj")
EXPERTS = "model.layers.{}.mlp.experts.{}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder whose experts are random blocks and scales, and these by name."""
    values = GPT_OSS | {"num_hidden_layers": 2, "intermediate_size": 64}
    folder = tmp_path_factory.mktemp("mxfp4")
    build("GptOssForCausalLM", values).save_pretrained(folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    rng, parts = np.random.default_rng(0), {}
    for i in range(2):
        for name in NAMES:
            n_experts, n_in, n_out = tensors.pop(weight := EXPERTS.format(i, name)).shape
            shape = (n_experts, n_out, n_in // 32)
            parts[f"{weight}_blocks"] = rng.integers(0, 256, (*shape, 16)).astype(np.uint8)
            parts[f"{weight}_scales"] = rng.integers(118, 130, shape).astype(np.uint8)
    safetensors.save_file(tensors | parts, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, parts


def test_experts_are_read_as_transformers_reads_them(made):
    folder, parts = made
    _, params = huggingface.load(folder)
    experts = {path: np.asarray(x) for path, x in flat(params).items() if "/experts/" in path}
    for i in range(2):
        gate_in, out = (
            convert_moe_packed_tensors(
                *(
                    torch.tensor(parts[f"{EXPERTS.format(i, name)}_{what}"])
                    for what in ("blocks", "scales")
                ),
                dtype=torch.float32,
            ).numpy()
            for name in NAMES
        )
        own = "stack/layers/feed_forward/experts"
        np.testing.assert_array_equal(experts[f"{own}/gate/kernel"][i], gate_in[..., ::2])
        np.testing.assert_array_equal(experts[f"{own}/in/kernel"][i], gate_in[..., 1::2])
        np.testing.assert_array_equal(experts[f"{own}/out/kernel"][i], out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(f"{name}_scales"), "blocks and scales of .* do not match"),
        (lambda t, name: t.pop(f"{name}_blocks"), "down_proj_scales has no blocks"),
        (
            lambda t, name: t.update({f"{name}_scales": t[f"{name}_scales"][:, :1].copy()}),
            "blocks and scales of .* do not match",
        ),
        (lambda t, name: t[f"{name}_scales"].fill(255), "down_proj_scales holds NaN"),
        (lambda t, name: t[f"{name}_scales"].fill(254), "down_proj contains NaN or infinite"),
        (
            lambda t, name: t.update({f"{name}_scales": np.float32(t[f"{name}_scales"])}),
            "are not bytes",
        ),
    ],
)
def test_parts_that_do_not_match_are_one_line_errors(made, tmp_path, change, message):
    folder = shutil.copytree(made[0], tmp_path / "spoilt")
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors, EXPERTS.format(1, "down_proj"))
    safetensors.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)


def test_values_match_transformers():
    from lm.interop.mxfp4 import VALUES

    np.testing.assert_array_equal(VALUES, transformers.integrations.mxfp4.FP4_VALUES)
