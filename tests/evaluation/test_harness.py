"""lm-eval on a run equals lm-eval with its own Hugging Face model; `lm score` likewise."""

import json
import random

import numpy as np
import pytest

from lm.api import load_run
from lm.cli import main
from lm.data.chat.extended_tokenizer import ExtendedTokenizer
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError
from lm.evaluation.harness import Answers, HarnessModel, chat_tokenizer, evaluate_tasks
from lm.evaluation.likelihood import Request, score, split_request
from lm.evaluation.score_file import Question, score_questions
from lm.training.trainer import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

TEXT = "the cat sat on the mat and the dog ate a small red apple near the old house, twice. "
WORDS = TEXT.split()
CONTEXT = 24


def _vocabulary(special, template):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    if template:
        places = [(token, made.token_to_id(token)) for token in special]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, pair=f"{template} $B:1", special_tokens=places
        )
    return made


def _models():
    plain = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gpt2 = plain | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 24}
    llama |= wide | {"max_position_embeddings": CONTEXT}
    t5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    t5 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return {
        "gpt2": ("GPT2", gpt2, ["<|endoftext|>"], "", {"bos_token": "<|endoftext|>"}),
        "llama": ("Llama", llama, ["<s>", "</s>"], "<s> $A", {"bos_token": "<s>"}),
        "t5": ("T5", t5, ["<pad>", "</s>"], "$A </s>", {"pad_token": "<pad>"}),
    }


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Make (their model for lm-eval, the workdir of ours) of a kind."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            cls, values, special, template, names = _models()[kind]
            names |= {"eos_token": special[-1]}
            names.setdefault("pad_token", special[-1])
            fast = transformers.PreTrainedTokenizerFast(
                tokenizer_object=_vocabulary(special, template), **names
            )
            fast.save_pretrained(folder / "theirs")
            head = "ForConditionalGeneration" if cls == "T5" else "ForCausalLM"
            head = "LMHeadModel" if cls == "GPT2" else head
            torch.manual_seed(0)
            config = getattr(transformers, f"{cls}Config")(**values)
            model = getattr(transformers, f"{cls}{head}")(config).eval()
            with torch.no_grad():  # confident enough that no two tokens are equally likely
                for parameter in model.parameters():
                    parameter.mul_(4 if parameter.ndim > 1 else 1)
            model.save_pretrained(folder / "theirs")
            run = folder / "run"
            words = ["import", "--from", str(folder / "theirs"), "--workdir", str(run)]
            assert main([*words, f"--config.data.sequence_length={CONTEXT}"]) == 0
            theirs = HFLM(
                pretrained=model,
                tokenizer=fast,
                backend="seq2seq" if cls == "T5" else "causal",
                batch_size=3,
                max_length=load_run(run).config.model.max_length,
                device="cpu",
            )
            made[kind] = theirs, run
        return made[kind]

    return make


def ours(workdir, folder, **overrides):
    run = load_run(workdir, {path.replace("__", "."): text for path, text in overrides.items()})
    answers = Answers(folder / "answers.jsonl", {"step": run.step})
    return HarnessModel(run.experiment, run.params, run.tokenizer, answers)


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


def pairs(empty=True):
    draw = random.Random(0)
    found = [
        (" ".join(draw.choices(WORDS, k=draw.randint(1, 8))), " " + draw.choice(WORDS))
        for _ in range(12)
    ]
    found += [("the cat ", "sat on"), ("é 猫\n", "the\tmat"), (TEXT * 2, " twice"), ("a", "b c d")]
    return [*found, ("", "the cat"), ("", " a")] if empty else found


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_log_likelihoods_match_lm_evals_own_model(make, kind, tmp_path):
    theirs, workdir = make(kind)
    requests = instances("loglikelihood", pairs(empty=kind != "t5"))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    model = ours(workdir, tmp_path)
    found = model.loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found == ours(workdir, tmp_path).loglikelihood(requests)  # from the file


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_rolling_log_likelihoods_of_texts_longer_than_the_context(make, kind, tmp_path):
    theirs, workdir = make(kind)
    requests = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 3,), ("cat",)])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours(workdir, tmp_path).loglikelihood_rolling(requests)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_generated_texts_match_lm_evals_own_model(make, kind, tmp_path):
    theirs, workdir = make(kind)
    options = {"until": ["q", "\n\n"], "max_gen_toks": 6, "do_sample": False}
    other = options | {"until": [], "max_gen_toks": 3}
    arguments = [(context, options) for context, _ in pairs(empty=False)]
    arguments[::3] = [(context, other) for context, _ in arguments[::3]]
    requests = instances("generate_until", arguments)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    found = ours(workdir, tmp_path).generate_until(requests)
    if kind == "t5":  # transformers adds the number of source tokens to the limit
        expected = [text[: len(mine)] for text, mine in zip(expected, found, strict=True)]
    # lm drops an incomplete character at the end.
    assert found == [text.rstrip("\ufffd") for text in expected]
    assert any(found)


def test_scores_do_not_depend_on_the_mesh(make, tmp_path):
    _, workdir = make("llama")
    requests = instances("loglikelihood", pairs())
    one = ours(workdir, tmp_path / "a").loglikelihood(requests)
    mesh = {"parallel__mesh__data": "2", "parallel__mesh__fsdp": "2", "parallel__mesh__tensor": "2"}
    other = ours(workdir, tmp_path / "b", **mesh).loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in one], [x for x, _ in other], rtol=1e-5)


def test_choices_are_scored_token_by_token(make):
    run = load_run(make("gpt2")[1])
    question = Question("the cat", (" sat on", " zzz", ""))
    record = next(score_questions(run.experiment, run.params, run.tokenizer, [question]))
    ids = run.encode("the cat sat on")
    logits = np.asarray(run.logits(np.tile(ids[None], (8, 1))))[0]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n = len(run.encode("the cat"))
    expected = log_probs[np.arange(n - 1, len(ids) - 1), ids[n:]]
    first, second, empty = record["continuations"]
    np.testing.assert_allclose(first["log_likelihoods"], expected, atol=2e-5)
    assert "".join(first["tokens"]) == " sat on"
    assert empty["log_likelihood"] == 0
    assert empty["tokens"] == []
    assert record["best"] == 2
    assert second["log_likelihood"] < 0


def test_encoder_scores_each_token_masked_in_turn(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(WORDS))]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "theirs")
    words = ["import", "--from", str(tmp_path / "theirs"), "--workdir", str(tmp_path / "run")]
    assert main([*words, "--config.data.sequence_length=16"]) == 0
    run = load_run(tmp_path / "run")
    request = split_request(run.experiment, run.tokenizer, "the cat", " sat on the mat")
    (found,) = score(run.experiment, run.params, run.tokenizer, [request])
    ids = torch.tensor([theirs("the cat sat on the mat")["input_ids"]])
    expected = []
    for at in range(3, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, at] = theirs.mask_token_id
        with torch.no_grad():
            logits = model(masked).logits[0, at].log_softmax(-1)
        expected.append(float(logits[ids[0, at]]))
    np.testing.assert_allclose(found.log_likelihoods, expected, rtol=1e-4)


def test_continuation_must_fit_and_needs_a_context(make):
    run = load_run(make("gpt2")[1])
    parts = run.experiment, run.params, run.tokenizer
    with pytest.raises(UserError, match="text 1 has 25 tokens to score; the context holds 24"):
        score(*parts, [Request([0], [5] * (CONTEXT + 1))])
    with pytest.raises(UserError, match="first token has no context"):
        score(*parts, [Request([], [5])])


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
num_fewshot: 0
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{a} {b}", "choices": [c, "the mat", d], "label": 1}
        for a, b, c, d in zip(*[iter(WORDS)] * 4, strict=False)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TASK.format(name="words_choice", data=folder / "data.jsonl")
    (folder / "words.yaml").write_text(text)
    lost = TASK.format(name="words_lost", data=folder / "nowhere.jsonl")
    (folder / "lost.yaml").write_text(lost)
    return folder


def test_lm_eval_harness_writes_what_lm_eval_writes(make, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    # Reading the thousands of tasks of the package, for a name that is near, takes 10 s.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    workdir = make("gpt2")[1]
    words = ["eval", "--workdir", str(workdir), "--include_path", str(task), "--json"]
    output = ["--output", str(tmp_path / "out")]
    assert main([*words, *output, "--harness", "words_choice"]) == 0
    figures = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    accuracy = results["results"]["words_choice"]["acc,none"]
    assert figures["words_choice/acc"] == accuracy
    lines = (tmp_path / "out" / "samples_words_choice.jsonl").read_text().splitlines()
    assert np.mean([json.loads(line)["acc"] for line in lines]) == accuracy
    assert main([*words, *output, "--harness", "words_chioce"]) == 2
    assert "has no task 'words_chioce'; similar names: words_choice" in capsys.readouterr().err
    other = ["--include_path", str(tmp_path / "none")]
    assert main([*words, *other, *output, "--harness", "words_choice"]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert main([*words, *output, "--harness", "words_lost"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert "words_lost" in line


def test_answers_of_other_parameters_are_not_used(tmp_path):
    file = tmp_path / "answers.jsonl"
    calls = []

    def compute(numbers):
        calls.append(list(numbers))
        return [float(i) for i in numbers]

    requests = [("a",), ("b",), ("c",)]
    assert Answers(file, {"step": 1}).answer(requests[:2], compute) == [0, 1]
    with file.open("a") as stream:
        stream.write('{"request": "cut')
    assert Answers(file, {"step": 1}).answer(requests, compute) == [0, 1, 2]
    assert Answers(file, {"step": 2}).answer(requests, compute) == [0, 1, 2]
    assert calls == [[0, 1], [2], [0, 1, 2]]


def test_lm_score_continues_its_output(make, tmp_path, capsys):
    lines = [{"prompt": "the", "continuations": [" cat", " dog"]}, {"continuations": "a mat"}]
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["score", "--workdir", str(make("gpt2")[1]), "--input", str(file)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert main([*words, "--output", str(output)]) == 0
    assert output.read_text() == printed
    output.write_text(printed[:-9])
    assert main([*words, "--output", str(output)]) == 0
    assert output.read_text() == printed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "no list of texts in a field 'continuations'"),
        ('{"continuations": [1]}', "must be texts"),
        ('{"continuations": []}', "no list of texts"),
        ("{", "not valid JSON"),
        ('{"continuations": ["\\ud800"]}', "lone surrogate"),
    ],
)
def test_bad_line_of_lm_score_is_named(make, line, message, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(f'{{"continuations": ["a"]}}\n{line}\n')
    words = ["score", "--workdir", str(make("gpt2")[1]), "--input", str(tmp_path / "in.jsonl")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'in.jsonl'}:2: " in error
    assert message in error


def test_tasks_while_training_match_the_verb(task, tiny_config, tmp_path, one_device, capsys):
    file = str(task / "words.yaml")
    options = {"eval__every_steps": 2, "eval__harness_every": 4, "eval__harness_limit": 2}
    plain = tiny_config(eval__every_steps=2)
    train(plain, tmp_path / "plain", progress=False)
    train(tiny_config(eval__harness=file, **options), tmp_path / "run", progress=False)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in rows if "eval/harness/words_choice/acc" in row}
    assert list(found) == [4, 6]
    assert not any(name.endswith("_stderr") for name in found[6])
    before = (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x).get("loss") for x in before] == [row.get("loss") for row in rows]
    assert (tmp_path / "run" / "eval" / "harness-4" / "samples_words_choice.jsonl").exists()
    words = ["eval", "--workdir", str(tmp_path / "run"), "--harness", file, "--json"]
    assert main([*words, "--limit", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (row,) = [x for x in map(json.loads, rows) if "eval/harness/words_choice/acc_stderr" in x]
    for name in ("words_choice/acc", "words_choice/acc_norm"):
        assert found[6][f"eval/harness/{name}"] == figures[name] == row[f"eval/harness/{name}"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval__harness": "nowhere.yaml"}, "lm-eval has no task 'nowhere.yaml'"),
        ({"eval__harness": "{folder}/lost.yaml"}, "--config.eval.harness=.*lost.yaml: "),
        ({"data__validation_fraction": 0.0, "eval__harness": "a"}, "needs validation data"),
    ],
)
def test_impossible_evaluations_are_reported_before_the_first_step(
    task, values, message, tiny_config, tmp_path, one_device, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    values = {k: v.format(folder=task) if isinstance(v, str) else v for k, v in values.items()}
    with pytest.raises(UserError, match=message):
        train(tiny_config(**values), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


CHAT = (
    "{{ bos_token }}{% for m in messages %}\n{% if m.role == 'system' %}"
    "{{ raise_exception('no') }}{% endif %}{{ '<' + m.role + '>' + m.content | trim }}"
    "{{ eos_token }}{% generation %}{% endgeneration %}{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_run_with_added_tokens_reads_them_in_prompts():
    tokenizer = ExtendedTokenizer(ByteTokenizer(), ("<|a|>",), CHAT)
    ids = [257, *b"b", 257]
    assert chat_tokenizer(tokenizer).encode("<|a|>b<|a|>").tolist() == ids
    assert chat_tokenizer(tokenizer).encode_batch(["<|a|>"])[0].tolist() == [257]
    with pytest.raises(UserError, match="no chat template"):
        chat_tokenizer(ByteTokenizer())


def test_chat_templates_make_the_prompts_of_lm_evals_own_model(make, task, tmp_path, capsys):
    theirs, workdir = make("llama")
    model = ours(workdir, tmp_path)
    tokenizer = model._tokenizer
    files = tokenizer.files() | {"chat_template.jinja": CHAT.encode()}
    model._tokenizer = chat_tokenizer(type(tokenizer).from_files(files))
    theirs.tokenizer.chat_template = CHAT
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " the cat "}]
    begun = [*history[1:], {"role": "assistant", "content": "sat "}]
    try:
        for messages, ends in ((history, True), (history[1:], True), (begun, False)):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=ends)
            assert expected.startswith("<s>")
            prompt = model.apply_chat_template(messages, add_generation_prompt=ends)
            assert prompt == expected.removeprefix("<s>")
            request = instances("loglikelihood", [(expected, " on")])
            ((likelihood, _),) = theirs.loglikelihood(request, disable_tqdm=True)
            ((found, _),) = model.loglikelihood(instances("loglikelihood", [(prompt, " on")]))
            assert found == pytest.approx(likelihood, rel=1e-4)
    finally:
        theirs.tokenizer.chat_template = None
    run, tokenizer, tasks = model._experiment, model._tokenizer, [str(task / "words.yaml")]
    evaluate_tasks(run, model._params, tokenizer, tasks, tmp_path, {}, limit=1, chat=True)
    (line,) = (tmp_path / "samples_words_choice.jsonl").read_text().splitlines()
    prompt = json.loads(line)["arguments"][0][0]
    assert prompt == "<user>the cat</s><assistant>"
    words = ["eval", "--workdir", str(workdir), "--apply_chat_template"]
    assert main([*words, "--harness", "words_choice"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(words) == 2
    assert "needs --harness" in capsys.readouterr().err
