"""Safetensors files: partial reads, files in several parts, and messages about damage."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from lm.errors import UserError
from lm.interop.tensor_files import INDEX, SINGLE, PendingTensor, read_tensors, write_tensors

ARRAYS = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name, shape in {"b.weight": (5, 3), "a": (7,), "c": (2, 3, 4), "scalar": ()}.items()
}


def write(folder, dtype="float32", **options):
    made = [PendingTensor(name, x.shape, lambda x=x: x) for name, x in ARRAYS.items()]
    write_tensors(folder, made, dtype, **options)
    return folder


def test_arrays_of_any_layout_are_written_unchanged(tmp_path):
    turned = np.asfortranarray(ARRAYS["b.weight"])
    write_tensors(tmp_path, [PendingTensor("x", turned.shape, lambda: turned)], "bfloat16")
    found = safetensors.load_file(tmp_path / SINGLE)["x"]
    np.testing.assert_array_equal(found, ARRAYS["b.weight"].astype(ml_dtypes.bfloat16))


def test_rows_of_every_kind_of_number_are_read_as_float32(tmp_path):
    kinds = {"f4": np.float32, "f2": np.float16, "bf": ml_dtypes.bfloat16}
    arrays = {name: ARRAYS["c"].astype(kind) for name, kind in kinds.items()}
    safetensors.save_file(arrays, tmp_path / SINGLE)
    stored = read_tensors(tmp_path)
    for name, x in arrays.items():
        assert stored[name].shape == x.shape
        np.testing.assert_array_equal(stored[name].rows(1, 2), x[1:2].astype(np.float32))


def test_parts_are_no_larger_than_asked_and_are_read_as_one(tmp_path):
    write(tmp_path, largest=64)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert parts[0].name == "model-00001-of-00004.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in ARRAYS.values())
    for part in parts:
        assert sorted(safetensors.load_file(part)) == sorted(
            name for name, file in index["weight_map"].items() if file == part.name
        )
    stored = read_tensors(tmp_path)
    for name, x in ARRAYS.items():
        if x.ndim:
            np.testing.assert_array_equal(stored[name].rows(0, len(x)), x)


def change_header(file, change):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


DAMAGES = {
    "cut in the arrays": (lambda f: f.write_bytes(f.read_bytes()[:-5]), "is truncated"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:40]), "is truncated"),
    "empty": (lambda f: f.write_bytes(b""), "is truncated"),
    "other content": (lambda f: f.write_bytes(b"x" * 100), "not a safetensors file"),
    "wrong size": (
        lambda f: change_header(f, lambda h: h["a"].update(shape=[8])),
        "invalid shape, data type, or offset for tensor",
    ),
    "unknown type": (
        lambda f: change_header(f, lambda h: h["a"].update(dtype="F8_E5M2", shape=[28])),
        "a has the type F8_E5M2; known are F32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_a_one_line_error_that_names_the_file(tmp_path, damage):
    spoil, expected = DAMAGES[damage]
    spoil(write(tmp_path) / SINGLE)
    with pytest.raises(UserError, match=expected) as caught:
        read_tensors(tmp_path)
    assert str(tmp_path / SINGLE) in str(caught.value)


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"no model.safetensors: pytorch_model.bin is a pickle"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model-00009.safetensors", "../model.safetensors"])
def test_index_names_only_files_beside_it(tmp_path, name):
    write(tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=f"lacks the file {name}"):
        read_tensors(tmp_path / "part")


def test_single_file_is_read_rather_than_an_old_index_beside_it(tmp_path):
    write_tensors(
        tmp_path, [PendingTensor(n, (2,), lambda: np.zeros(2)) for n in "ab"], "float32", largest=1
    )
    write_tensors(tmp_path, [PendingTensor(n, (2,), lambda: np.ones(2)) for n in "ab"], "float32")
    assert (tmp_path / INDEX).is_file()
    assert read_tensors(tmp_path)["a"].rows(0, 2).tolist() == [1, 1]


def test_tensor_in_two_files_is_an_error(tmp_path):
    """It is ambiguous which one counts; transformers takes the last."""
    write(tmp_path, largest=64)
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    safetensors.save_file(safetensors.load_file(last) | {"a": np.ones(7, np.float32)}, last)
    assert "a" in safetensors.load_file(first)
    with pytest.raises(UserError, match=f"tensor a is in two files, {first.name} and {last.name}"):
        read_tensors(tmp_path)
