"""Every experiment builds, and its variants have the published sizes, as documented."""

import csv
import importlib.util
import json
from pathlib import Path

import jax
import pytest

from lm import config as configs
from lm.cli import main
from lm.config.experiment_file import variants_in
from lm.experiment import build

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").glob("*.py"))
# Those that a token uses, where not all of them are: Jiang et al. 2024, §2.2, and 8×22B; by hand.
ACTIVE = {
    "mixtral-8x7b": 12_879_925_248,
    "mixtral-8x22b": 39_152_031_744,
    "olmoe-1b-7b": 6_919_161_856 - 16 * 56 * 3 * 2048 * 1024,
    "qwen2-57b-a14b": 57_408_658_944 - 28 * 56 * 3 * 3584 * 2560,
    "qwen3-30b-a3b": 30_532_122_624 - 48 * 120 * 3 * 2048 * 768,
    "qwen3-235b-a22b": 235_093_634_560 - 94 * 120 * 3 * 4096 * 1536,
    "qwen3-next-80b-a3b": 79_674_391_296 - 48 * 502 * 3 * 2048 * 512,
    "deepseek-v2-lite": 15_706_484_224 - 26 * 58 * 3 * 2048 * 1408,
    "deepseek-v2": 235_741_434_880 - 59 * 154 * 3 * 5120 * 1536,
    "deepseek-v3": 671_026_404_352 - 58 * 248 * 3 * 7168 * 2048,
    "gpt-oss-20b": 20_914_757_184 - 24 * 28 * 3 * (2880 * 2880 + 2880),
    "gpt-oss-120b": 116_829_156_672 - 36 * 124 * 3 * (2880 * 2880 + 2880),
    "llama-4-scout": 107_769_861_120 - 48 * 15 * 3 * 5120 * 8192,
    "llama-4-maverick": 400_711_848_960 - 24 * 127 * 3 * 5120 * 8192,
    "kimi-k2": 1_026_408_209_408 - 60 * 376 * 3 * 7168 * 2048,
}
# What Hugging Face's BertForPreTraining has beside its BertModel; its ElectraForPreTraining and
# ElectraForMaskedLM beside ElectraModel, common embeddings once; for DeBERTa the like of its
# DebertaV2ForMaskedLM, and two layers by hand.
HEADS = {
    "bert-base-uncased": 624_188,
    "bert-large-uncased": 1_084_220,
    "electra-base": 10_494_779,
    "electra-large": 20_563_003,
    "deberta-v3-base": 44_233_573,
    "deberta-v3-large": 153_911_397,
}


def published():
    with open(ROOT / "tests" / "published_sizes.csv") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {row["paper"]: (int(row["total"]), int(row["non_embedding"])) for row in rows}


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


papers = load(ROOT / "scripts" / "papers.py")


@pytest.fixture(scope="module")
def sizes():
    """What `lm params --all --json` prints of the experiments."""
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        patch.chdir(ROOT)
        assert main(["params", "--all", "--json"]) == 0
    return json.loads(printed[0])


def test_every_variant_is_listed(sizes):
    assert [size["config"] for size in sizes] == [
        str(Path(spec).relative_to(ROOT)) for spec in variants_in(ROOT / "experiments")
    ]
    for size in sizes:
        assert bool(size["note"]) == (size["total"] is None)
        assert not (size["note"] and size["paper"])


def test_every_published_model_is_a_variant_of_its_size(sizes):
    found = {
        size["paper"]: (size["total"], size["non_embedding"]) for size in sizes if size["paper"]
    }
    assert found == published()
    assert len(found) == sum(bool(size["paper"]) for size in sizes)


def test_what_is_counted_apart(sizes):
    for size in sizes:
        if size["paper"] and not size["paper"].startswith("switch"):
            assert size["active"] == ACTIVE.get(size["paper"], size["total"])
        if size["paper"] in HEADS:
            assert size["heads"] == HEADS[size["paper"]]


def test_the_table_of_each_file_agrees_with_its_configurations(sizes):
    for size in sizes:
        file, _, variant = size["config"].rpartition(":")
        if size["paper"]:
            said = papers.record(ROOT / file)[variant]
            assert said["parameters"] == f"{size['total']:,}", size["config"]
            assert said["tokens"].removesuffix(" *") == papers.short(size["tokens"])
            assert said["FLOPs"] == papers.scientific(size["flops"])
            assert {"paper's", "expected"} <= said.keys()


def test_the_page_of_published_models_is_current(sizes, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert papers.page(sizes) == (ROOT / "experiments" / "PAPERS.md").read_text()


def test_cost_is_six_n_d_and_what_the_papers_say(sizes):
    by_paper = {size["paper"]: size for size in sizes}
    small = by_paper["gpt2-small"]
    assert small["flops"] == 6 * 85_056_000 * 19_560 * 524_288 == 6 * 85_056_000 * small["tokens"]
    # Grattafiori et al. 2024, §3.2.1: 3.8e25 FLOPs; Brown et al. 2020, Table D.1: 3.14e23.
    assert by_paper["llama-3.1-405b"]["flops"] == pytest.approx(3.8e25, rel=0.02)
    assert by_paper["gpt3-175b"]["flops"] == pytest.approx(3.14e23, rel=0.01)
    # Each token of the 2017 Transformer passes through one of the two stacks.
    base = by_paper["transformer-base-en-de"]
    assert base["flops"] == pytest.approx(6 * 44_101_632 * base["tokens"] / 2)
    # Of Mixtral's experts two work for a token.
    sparse = by_paper["mixtral-8x7b"]
    active = 12_879_925_248 - 2 * 32_000 * 4096
    assert sparse["flops"] == pytest.approx(6 * active * sparse["tokens"])


def test_a_folder_without_experiments_is_one_line(capsys, tmp_path):
    assert main(["params", "--all", str(tmp_path)]) == 2
    assert "no experiment files" in capsys.readouterr().err
    assert main(["params"]) == 2
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_file_is_a_record_that_builds(file):
    module = load(file)
    assert f"lm train --config experiments/{file.name}" in module.__doc__
    config = module.get_config()
    variants = getattr(module, "VARIANTS", ("",))
    assert config.to_dict() in [
        configs.load_config(f"{file}:{variant}").to_dict() for variant in variants
    ]
    if not config.model.vocab_size:
        config.model.vocab_size = config.data.tokenizer_vocab_size  # nothing to fit it to here
    build(config, jax.devices()[:1])
