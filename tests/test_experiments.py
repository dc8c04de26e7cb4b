"""Every variant of every experiment file, and the sizes of the published models among them."""

import importlib.util
from pathlib import Path

import jax
import pytest

from lm import config as configs
from lm.experiment import build
from lm.parameters import count_parameters

FOLDER = Path(__file__).parents[1] / "experiments"

# Parameters, all and without embeddings and untied heads, of the released models that the papers
# describe, counted with Hugging Face transformers 5.23.0 (GPT2LMHeadModel, LlamaForCausalLM).
# Papers print rounded numbers, and GPT-2's are wrong by its authors' own word.
PARAMETERS = {
    # Radford et al. 2019, Table 2
    "gpt2-small": (124_439_808, 85_056_000),
    "gpt2-medium": (354_823_168, 302_311_424),
    "gpt2-large": (774_030_080, 708_390_400),
    "gpt2-xl": (1_557_611_200, 1_475_561_600),
    # Touvron et al. 2023a, Table 2
    "llama-1-7b": (6_738_415_616, 6_476_271_616),
    "llama-1-13b": (13_015_864_320, 12_688_184_320),
    "llama-1-33b": (32_528_943_616, 32_102_959_616),
    "llama-1-65b": (65_285_660_672, 64_761_372_672),
    # Touvron et al. 2023b, Table 1
    "llama-2-7b": (6_738_415_616, 6_476_271_616),
    "llama-2-13b": (13_015_864_320, 12_688_184_320),
    "llama-2-70b": (68_976_648_192, 68_452_360_192),
    # Grattafiori et al. 2024, Table 3; 3.2 from the released configurations
    "llama-3-8b": (8_030_261_248, 6_979_588_096),
    "llama-3-70b": (70_553_706_496, 68_452_360_192),
    "llama-3.1-405b": (405_853_388_800, 401_650_696_192),
    "llama-3.2-1b": (1_235_814_400, 973_146_112),
    "llama-3.2-3b": (3_212_749_824, 2_818_747_392),
}


def module_of(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = sorted(FOLDER.glob("*.py"))
VARIANTS = [(file, variant) for file in FILES for variant in module_of(file).VARIANTS]


@pytest.mark.parametrize(
    ("file", "variant"), VARIANTS, ids=[f"{file.stem}:{variant}" for file, variant in VARIANTS]
)
def test_every_variant_builds_and_has_the_size_of_its_paper(file, variant):
    config = configs.load(f"{file}:{variant}")
    if config.data.tokenizer in ("char", "sentencepiece") and not config.model.vocab_size:
        assert file.stem == "stdlib", "a fresh machine has no data to fit this tokenizer to"
        config.model.vocab_size = config.data.tokenizer_vocab_size
    experiment = build(config, jax.devices()[:1])
    if config.paper:
        counts = count_parameters(experiment)
        assert (counts["total"], counts["non_embedding"]) == PARAMETERS[config.paper]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_file_is_a_record(file):
    module = module_of(file)
    assert f"lm train --config experiments/{file.name}" in module.__doc__
    assert module.get_config().to_dict() in [
        module.get_config(variant).to_dict() for variant in module.VARIANTS
    ]


def test_every_published_size_is_that_of_a_variant():
    papers = {module_of(file).get_config(variant).paper for file, variant in VARIANTS}
    assert papers - {""} == set(PARAMETERS)
