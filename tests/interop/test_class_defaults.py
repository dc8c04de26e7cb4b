"""Values of keys that config.json lacks, and words, beside those of `transformers`."""

import dataclasses

import pytest
from hf_models import transformers

from lm.interop.class_defaults import ALIASES, CLASS_DEFAULTS
from lm.interop.model_folder import FAMILIES


@pytest.mark.parametrize("kind", CLASS_DEFAULTS)
def test_missing_value_matches_the_class(kind):
    fields = dataclasses.fields(transformers.AutoConfig.for_model(kind))
    stated = {f.name: f.default for f in fields}
    for name, value in CLASS_DEFAULTS[kind].items():
        assert stated.get(name, value) == value, name


@pytest.mark.parametrize("kind", ALIASES)
def test_aliases_match_the_class_and_are_read(kind):
    config = transformers.AutoConfig.for_model(kind)
    assert ALIASES[kind].items() <= config.attribute_map.items()
    whole, named = config.to_dict(), {key: name for name, key in ALIASES[kind].items()}
    family = FAMILIES[kind]
    other = {named.get(key, key): value for key, value in whole.items()}
    assert other.keys() != whole.keys()
    sizes = {key: whole[key] // 2 for key in named if "heads" not in key}
    new = {"num_experts_per_tok": 2} if "experts" in str(named) else {}
    assert family.read_config(other | new | {named[key]: n for key, n in sizes.items()}) == (
        family.read_config(whole | new | sizes)
    )


def test_every_family_has_defaults():
    assert CLASS_DEFAULTS.keys() == {family.model_type for family in FAMILIES.values()}


def test_config_with_only_sizes_is_read_as_by_transformers(make_theirs):
    """Everything else is at the class's default, whose values a saved config.json would repeat."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 32}
    for kind in ("llama", "mistral", "qwen3_moe", "gemma2", "smollm3", "gpt_oss", "stablelm"):
        whole = transformers.AutoConfig.for_model(kind, **sizes).to_dict()
        family = FAMILIES[kind]
        assert family.read_config(sizes) == family.read_config(whole), kind
    types = ["full_attention", "full_attention"]
    assert not FAMILIES["llama4_text"].read_config(sizes | {"layer_types": types}).window_chunks
