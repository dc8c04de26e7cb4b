"""`lm import` and `lm export`: imported runs are ordinary runs, exports are standard folders."""

import json

import jax
import numpy as np
import pytest
from hf_models import BERT, DECODERS, GEMMA3, GPT2, LLAMA, T5, build, torch, transformers

from lm.cli import main
from lm.data.batches import to_device
from lm.data.splits import open_split
from lm.data.tokenizer import load_saved_tokenizer
from lm.data.tokenizers.basic import CharTokenizer
from lm.experiment import build as build_experiment
from lm.interop import huggingface
from lm.interop.tokenizer_files import write_tokenizer
from lm.models.variables import flat
from lm.runs.saved_params import restore_params, saved_checkpoints
from lm.runs.workdir import load_run_config

ALPHABET = "".join(map(chr, range(32, 127)))
END = len(ALPHABET)  # the id after those of the tokenizer, which only the model knows
PROMPTS = ["def f(x):", "Once upon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gives the folder of a random model with characters for tokens, and the model."""

    def make(class_name, values):
        folder = tmp_path_factory.mktemp(class_name)
        model = build(class_name, values | {"vocab_size": END + 1})
        model.save_pretrained(folder)
        write_tokenizer(CharTokenizer(ALPHABET), folder, "decoder", None)
        return folder, model

    return make


def lm(capsys, *words):
    """What a command prints."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def import_run(capsys, folder, workdir, *words):
    lm(capsys, "import", "--from", folder, "--workdir", workdir, *words)
    return workdir


def written(model, ids, n, end=None, **inputs):
    """What their search writes after `ids`."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=end,
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            **inputs,
        )
    return [i for i in out[0].tolist() if i != END]


@pytest.mark.parametrize(
    ("class_name", "values", "beams"),
    [
        ("GPT2LMHeadModel", GPT2, 1),
        ("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 2}, 3),
        ("Gemma3ForCausalLM", GEMMA3, 1),  # longer than its windows
        (*DECODERS["deepseek-v3"], 1),  # whose router biases are model state
    ],
)
def test_an_imported_decoder_generates_what_theirs_does(
    folder, class_name, values, beams, tmp_path, capsys, one_device
):
    """Without an end token all hypotheses of a beam are equally long: no penalty makes a
    difference, and neither does what becomes of the places of those that have ended."""
    source, model = folder(class_name, values)
    workdir = import_run(capsys, source, tmp_path / "run")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    options = ["--max_new_tokens", 12, "--json"]
    options += [f"--config.decode.beam_size={beams}"] if beams > 1 else ["--greedy"]
    made = json.loads(lm(capsys, "generate", "--workdir", workdir, *prompts, *options))
    tokenizer = load_saved_tokenizer(workdir / "tokenizer")
    for prompt, ours in zip(PROMPTS, made, strict=True):
        ids = written(model, tokenizer.encode(prompt).tolist(), 12, num_beams=beams)
        assert prompt + ours["text"] == tokenizer.decode(ids)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_imported_encoder_decoder_generates_what_theirs_does(
    folder, beams, tmp_path, capsys, one_device
):
    special = {"eos_token_id": END, "decoder_start_token_id": 3}
    source, model = folder("T5ForConditionalGeneration", T5 | special)
    workdir = import_run(capsys, source, tmp_path / "run")
    options = ["--max_new_tokens", 8, "--json", f"--config.decode.beam_size={beams}"]
    options += ["--config.decode.length_penalty=0"]
    made = json.loads(
        lm(capsys, "generate", "--workdir", workdir, "--prompt", PROMPTS[0], *options)
    )
    tokenizer = load_saved_tokenizer(workdir / "tokenizer")
    ids = [*tokenizer.encode(PROMPTS[0]).tolist(), END]
    inputs = {"end": END, "decoder_start_token_id": 3, "num_beams": beams, "length_penalty": 0.0}
    assert made[0]["text"] == tokenizer.decode(written(model, ids, 8, **inputs)[1:])


def test_a_model_imported_trained_and_exported_on_a_mesh_has_the_same_loss_there(
    folder, text_file, tmp_path, capsys
):
    source, _ = folder("LlamaForCausalLM", LLAMA | {"num_key_value_heads": 2})
    mesh = ["--config.parallel.mesh.fsdp=4", "--config.parallel.mesh.tensor=2"]
    first = import_run(capsys, source, tmp_path / "first", *mesh)
    data = [
        f"--config.data.source=text:{text_file}",
        f"--config.data.validation_source=text:{text_file}",
        "--config.data.sequence_length=32",
        "--config.data.workers=1",
        "--config.log.tensorboard=False",
    ]
    trained = tmp_path / "trained"
    words = ["--config.train.steps=10", f"--config.init.from={first}"]
    lm(capsys, "train", "--config", first / "run.json", "--workdir", trained, *data, *mesh, *words)
    lm(capsys, "export", "--workdir", trained, "--to", tmp_path / "out")

    tokenizer = load_saved_tokenizer(trained / "tokenizer")
    experiment = build_experiment(load_run_config(trained, {}), jax.devices(), tokenizer)
    assert experiment.mesh.shape["fsdp"] * experiment.mesh.shape["tensor"] == 8
    config = experiment.config
    stores = open_split(config.data, "validation", tokenizer, ())
    arrays = to_device(experiment.evaluation_batches(stores), [0], experiment.batch_sharding)
    params, _ = restore_params(experiment, trained, pytest.fail)
    carry = experiment.init_carry(config.eval.batch_size)
    _, sums = experiment.eval_steps(params, carry, arrays)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = text_file.read_text().splitlines()[0]
    assert their_tokenizer(text).input_ids == tokenizer.encode(text).tolist()
    batch = {name: np.asarray(value[0]) for name, value in arrays.items()}
    assert (batch["segment_ids"] == 1).all()  # whole windows of the one document
    assert batch["weights"].all()
    with torch.no_grad():
        logits = theirs(torch.tensor(batch["inputs"])).logits
        targets = torch.tensor(batch["targets"]).long()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert float(sums.loss[0] / sums.weight[0]) == pytest.approx(float(expected), abs=1e-5)
    started = flat(huggingface.load(source)[1])
    assert all(
        np.abs(np.asarray(leaf) - np.asarray(started[path])).max() > 0
        for path, leaf in flat(params).items()
    )


def test_every_parameter_of_an_import_is_in_its_run(folder, tmp_path, capsys):
    source, _ = folder("BertForPreTraining", BERT)
    workdir = import_run(capsys, source, tmp_path / "run")
    (saved,) = saved_checkpoints(workdir, pytest.fail)
    params = flat(huggingface.load(source)[1])
    assert {path: leaf.shape for path, leaf in saved.shapes.items()} == {
        path: leaf.shape for path, leaf in params.items()
    }
    config = json.loads((workdir / "run.json").read_text())["config"]
    assert config["objective"]["name"] == "masked"
    assert config["objective"]["next_sentence"]
    assert saved.step == 0


def test_a_bare_encoder_is_fine_tuned_and_exported_as_a_classifier(
    folder, labeled_file, tmp_path, capsys, one_device
):
    source, _ = folder("BertModel", BERT)
    workdir = import_run(capsys, source, tmp_path / "run")
    tuned = tmp_path / "tuned"
    words = [
        "--config.objective.name=classification",
        f"--config.init.from={workdir}",
        "--config.init.fresh=classifier",
        f"--config.data.source=tsv:{labeled_file}",
        "--config.data.labels=good,bad",
        "--config.data.sequence_length=32",
        "--config.data.workers=1",
        "--config.train.steps=2",
        "--config.log.tensorboard=False",
    ]
    lm(capsys, "train", "--config", workdir / "run.json", "--workdir", tuned, *words)
    lm(capsys, "export", "--workdir", tuned, "--to", tmp_path / "out", "--dtype", "bfloat16")
    kind = transformers.AutoModelForSequenceClassification
    theirs, loading = kind.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert theirs.config.id2label == {0: "good", 1: "bad"}
    assert theirs.config.problem_type == "single_label_classification"
    ours, params = huggingface.load(tmp_path / "out")
    ids = np.random.default_rng(0).integers(1, 95, (2, 9))

    def classes(model, ids):
        return model.classify(model.pooled(model.hidden(ids), np.ones_like(ids)))

    scores = jax.jit(lambda p: ours.apply({"params": p}, ids, method=classes))(params)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("rows", "labels", "kind"),
    [
        ("a b\t0.5\nb c\t-1\n", "", "regression"),
        ("a b\tx,y\nb c\tz\n", "x,y,z", "multi_label_classification"),
    ],
)
def test_numbers_and_several_labels_go_out_and_come_back(
    rows, labels, kind, folder, tmp_path, capsys, one_device
):
    source, _ = folder("BertModel", BERT)
    workdir = import_run(capsys, source, tmp_path / "run")
    (tmp_path / "scores.tsv").write_text("text\tlabel\n" + rows * 8)
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    words = [
        "--config.objective.name=classification",
        f"--config.init.from={workdir}",
        "--config.init.fresh=classifier",
        f"--config.data.source=tsv:{tmp_path}/scores.tsv",
        f"--config.data.labels={labels}",
        f"--config.data.multi_label={bool(labels)}",
        "--config.data.sequence_length=32",
        "--config.data.workers=1",
        "--config.train.steps=1",
        "--config.log.tensorboard=False",
    ]
    lm(capsys, "train", "--config", workdir / "run.json", "--workdir", tuned, *words)
    lm(capsys, "export", "--workdir", tuned, "--to", out)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert (theirs.config.num_labels, theirs.config.problem_type) == (3 if labels else 1, kind)
    again = import_run(capsys, out, tmp_path / "again")
    config = json.loads((again / "run.json").read_text())["config"]
    assert (config["objective"]["name"], config["data"]["labels"]) == ("classification", labels)
    assert config["data"]["multi_label"] == bool(labels)


def test_without_a_tokenizer_a_model_is_imported_but_not_used_with_another(
    make_theirs, tmp_path, capsys
):
    workdir = tmp_path / "run"
    words = ["import", "--from", str(make_theirs("mistral")[1]), "--workdir", str(workdir)]
    assert main(words) == 0
    assert "no tokenizer came with it" in capsys.readouterr().err
    assert main(["generate", "--workdir", str(workdir), "--prompt", "a"]) == 2
    assert "no intact tokenizer" in capsys.readouterr().err
    assert main(words) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["export", "--workdir", str(workdir), "--to", str(tmp_path / "out")]) == 0
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (make_theirs("mistral")[1], tmp_path / "out")
    )
    kept = ("model_type", *(key for key in before if key.endswith("_token_id")))
    assert len(kept) > 1
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
