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
# describe, counted with Hugging Face transformers 5.23.0 (GPT2LMHeadModel, LlamaForCausalLM,
# BertForPreTraining, RobertaForMaskedLM, T5ForConditionalGeneration, MixtralForCausalLM,
# SwitchTransformersForConditionalGeneration), and by hand where no released model is. Papers print
# rounded numbers, and GPT-2's are wrong by its authors' own word.
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
    # Devlin et al. 2018, §3, with the heads of both objectives
    "bert-base-uncased": (110_106_428, 86_270_780),
    "bert-base-cased": (108_932_934, 86_269_254),
    "bert-large-uncased": (336_226_108, 304_445_244),
    "bert-large-cased": (334_661_958, 304_443_718),
    # Liu et al. 2019, Table 9
    "roberta-base": (124_697_433, 85_698_393),
    "roberta-large": (355_412_057, 303_413_337),
    # Vaswani et al. 2017, Table 3, by hand
    "transformer-base-en-de": (63_045_632, 44_101_632),
    "transformer-base-en-fr": (60_485_632, 44_101_632),
    "transformer-big-en-de": (214_171_648, 176_283_648),
    "transformer-big-en-fr": (209_051_648, 176_283_648),
    # Raffel et al. 2020, §3.7; 1.1 from the released configurations
    "t5-v1.0-small": (60_506_624, 44_057_088),
    "t5-v1.0-base": (222_903_552, 198_229_248),
    "t5-v1.0-large": (737_668_096, 704_769_024),
    "t5-v1.1-small": (76_961_152, 44_062_080),
    "t5-v1.1-base": (247_577_856, 198_229_248),
    "t5-v1.1-large": (783_150_080, 717_351_936),
    # Jiang et al. 2024, Table 1; 8×22B from the released configuration
    "mixtral-8x7b": (46_702_792_704, 46_440_648_704),
    "mixtral-8x22b": (140_620_634_112, 140_227_418_112),
    # Fedus et al. 2021, Fig. 4 and Table 9
    "switch-base-8": (619_339_008, 594_664_704),
    "switch-base-128": (7_415_217_408, 7_390_543_104),
    "switch-base-256": (14_664_154_368, 14_639_480_064),
    # Zaremba et al. 2014, §4.1: 8 units (2 units + 2) a layer, two tables, a bias
    "zaremba-small": (4_653_200, 643_200),
    "zaremba-medium": (19_780_400, 6_770_400),
    "zaremba-large": (66_034_000, 36_024_000),
    # Bengio et al. 2003, §2: |V| (1 + nm + h) + h (1 + (n - 1) m); the output layer stays in
    "nplm-brown-mlp9/10": (2_158_273, 1_666_783),
    "nplm-brown-mlp1/2": (5_762_483, 4_779_503),
    "nplm-apnews-mlp10": (11_904_264, 10_107_864),
}
# Those that a token uses, where not all of them are.
ACTIVE = {"mixtral-8x7b": 12_879_925_248, "mixtral-8x22b": 39_152_031_744}
# Its BertModel: encoder and pooler.
BERT_MODELS = {
    "base": (109_482_240, 85_646_592),
    "large": (335_141_888, 303_361_024),
    "base-cased": (108_310_272, 85_646_592),
    "large-cased": (333_579_264, 303_361_024),
}


def module_of(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants_of(file):
    return getattr(module_of(file), "VARIANTS", ("",))


FILES = sorted(FOLDER.glob("*.py"))
VARIANTS = [(file, variant) for file in FILES for variant in variants_of(file)]


@pytest.mark.parametrize(
    ("file", "variant"), VARIANTS, ids=[f"{file.stem}:{variant}" for file, variant in VARIANTS]
)
def test_every_variant_builds_and_has_the_size_of_its_paper(file, variant):
    config = configs.load(f"{file}:{variant}")
    if config.data.tokenizer != "byte" and not config.model.vocab_size:
        config.model.vocab_size = config.data.tokenizer_vocab_size  # nothing to fit it to here
    experiment = build(config, jax.devices()[:1])
    if config.paper:
        counts = count_parameters(experiment)
        assert (counts["total"], counts["non_embedding"]) == PARAMETERS[config.paper]
        if config.paper in ACTIVE or not config.model.n_experts:
            assert counts["active"] == ACTIVE.get(config.paper, counts["total"])


@pytest.mark.parametrize("variant", BERT_MODELS)
def test_bert_without_what_only_pretraining_needs(variant):
    """A classifier on top of Hugging Face's BertModel."""
    config = configs.load(f"{FOLDER}/bert.py:{variant}")
    config.objective.name, config.data.labels = "classification", "a,b"
    counts = count_parameters(build(config, jax.devices()[:1]))
    classifier = 2 * config.model.d_model + 2
    found = counts["total"] - classifier, counts["non_embedding"] - classifier
    assert found == BERT_MODELS[variant]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_file_is_a_record(file):
    module = module_of(file)
    assert f"lm train --config experiments/{file.name}" in module.__doc__
    assert module.get_config().to_dict() in [
        configs.load(f"{file}:{variant}").to_dict() for variant in variants_of(file)
    ]


def test_every_published_size_is_that_of_a_variant():
    papers = {configs.load(f"{file}:{variant}").paper for file, variant in VARIANTS}
    assert papers - {""} == set(PARAMETERS)
