"""Folders in 8-bit floats with a scale for each block, and layers that predict further tokens."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.errors import UserError
from lm.interop.huggingface import load
from lm.interop.model_folder import open_model_folder
from lm.interop.tensor_files import SINGLE
from lm.models.variables import flat

BLOCK = 16, 24  # the last ones of a row or column are smaller


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE)


@pytest.fixture(scope="module")
def released(make_theirs, tmp_path_factory):
    """A folder of DeepSeek-V3 as released: its config, tensors, and these as they are meant."""
    source = make_theirs("deepseek-v3")[1]
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [*BLOCK]}}
    config["num_nextn_predict_layers"] = 1
    tensors, meant = {}, {}
    for name, x in load_file(source / SINGLE).items():
        meant[name] = tensors[name] = x
        if x.ndim == 2 and "_proj" in name:
            shape = [-(-n // size) for n, size in zip(x.shape, BLOCK, strict=True)]
            scales = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
            of_each = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
            of_each = of_each[: x.shape[0], : x.shape[1]]
            tensors[name] = (x / of_each).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
            meant[name] = tensors[name].float() * of_each
    last = config["num_hidden_layers"]
    tensors[f"model.layers.{last}.eh_proj.weight"] = torch.ones(4, 8)
    tensors[f"model.layers.{last}.enorm.weight"] = torch.ones(4)
    return config, tensors, meant


def test_weights_are_the_products_of_floats_and_scales(released, tmp_path):
    config, tensors, meant = released
    write(tmp_path / "fp8", config, tensors)
    plain = {key: x for key, x in config.items() if key != "quantization_config"}
    write(tmp_path / "plain", plain, meant)
    found, wanted = (flat(load(tmp_path / name)[1]) for name in ("fp8", "plain"))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_module_for_further_tokens_is_left_out(make_theirs, tmp_path):
    """Qwen3-Next's is beside the layers; here it is the second of two shards."""
    theirs, source = make_theirs("qwen3-next")
    theirs.mtp = torch.nn.Linear(4, 3, bias=False)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    del theirs.mtp
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert open_model_folder(tmp_path).unused == ("mtp.weight",)
    found, wanted = (flat(load(folder)[1]) for folder in (tmp_path, source))
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_rows_are_read_alone(released, tmp_path):
    config, tensors, meant = released
    config = {key: x for key, x in config.items() if key != "num_nextn_predict_layers"}
    write(tmp_path / "fp8", config, tensors)
    folder = open_model_folder(tmp_path / "fp8")
    stored, last = folder.stored, config["num_hidden_layers"]
    assert folder.unused == tuple(f"model.layers.{last}.{x}.weight" for x in ("eh_proj", "enorm"))
    for name in (name for name in tensors if tensors[name].dtype == torch.float8_e4m3fn):
        for start, stop in ((0, 1), (7, 30), (16, 32)):
            stop = min(stop, len(meant[name]))
            start = min(start, stop - 1)
            np.testing.assert_array_equal(stored[name].rows(start, stop), meant[name][start:stop])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t, n: c["quantization_config"].pop("weight_block_size"), "weight_block_size"),
        (lambda c, t, n: c["quantization_config"].update(weight_block_size=[0, 4]), "two sizes"),
        (lambda c, t, n: t.update({f"{n}_scale_inv": torch.ones(1, 1)}), "has the shape"),
        (lambda c, t, n: t.pop(f"{n}_scale_inv"), "weights are floats"),
        (lambda c, t, n: t.pop(n), "no matrix in 8-bit floats"),
        (lambda c, t, n: t[f"{n}_scale_inv"].fill_(float("nan")), "NaN"),
        (lambda c, t, n: c.update(num_nextn_predict_layers=0), "eh_proj"),
        (lambda c, t, n: c.update(quantization_config={"quant_method": "awq"}), "awq"),
    ],
)
def test_mismatch_is_rejected(released, tmp_path, change, message):
    config, tensors, _ = released
    config, tensors = json.loads(json.dumps(config)), {k: x.clone() for k, x in tensors.items()}
    name = next(name for name in tensors if tensors[name].dtype == torch.float8_e4m3fn)
    change(config, tensors, name)
    write(tmp_path / "folder", config, tensors)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder")
