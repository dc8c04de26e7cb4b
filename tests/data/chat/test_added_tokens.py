"""Tokens added to a vocabulary: a run starts from one without them, and exports them."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.chat.added_tokens import extended
from lm.data.chat.chat_template import ChatTemplate
from lm.data.tokenizer import load_saved_tokenizer, make_tokenizer
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.errors import UserError
from lm.experiment import build
from lm.interop.import_export import export_run, import_run
from lm.models.variables import flat, nested
from lm.runs.checkpoints import Checkpoints
from lm.training.warm_start import initial_state

TEXTS = ["system\nuser\nassistant\nbe brief, the cat sat. <|im_end|> <|im_start|>\n"] * 50
CHAT = [
    {"role": "system", "content": "be brief <|im_end|>"},
    {"role": "user", "content": "<|im_start|>user"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
]


def settings(tokens="template", template="", markers=False):
    return SimpleNamespace(
        added_tokens=tokens, chat_template=template, chat_markers=markers, directory=""
    )


def tokenizer_of(kind):
    match kind:
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer.fit(TEXTS)
        case "words":
            return WordTokenizer.fit(TEXTS)
        case "sentencepiece":
            return SentencePieceTokenizer.fit(TEXTS, vocab_size=300)
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["byte", "char", "words", "sentencepiece"])
def test_any_tokenizer_gets_the_tokens_of_the_shipped_template(kind, tmp_path):
    base = tokenizer_of(kind)
    tokenizer = extended(base, settings())
    tokenizer.save(tmp_path)
    assert load_saved_tokenizer(tmp_path) == tokenizer
    assert tokenizer.vocab_size == base.vocab_size + 2
    assert np.array_equal(tokenizer.encode("the <|im_end|> cat"), base.encode("the <|im_end|> cat"))
    template = ChatTemplate.of(tokenizer)
    start, end = map(tokenizer.token_id, ("<|im_start|>", "<|im_end|>"))
    assert template.stop_ids[0] == end
    assert template.has_role_tokens
    found = template.encode(CHAT)
    turns = [found.ids[found.message == i].tolist() for i in range(5)]
    assert all(turn[0] == start and turn.count(end) == 1 for turn in turns)
    assert found.ids.tolist().count(start) == 5
    said = [found.ids[found.assistant & (found.message == i)].tolist() for i in range(5)]
    assert said == [[], [], [end], [], [*base.encode("sat"), end]]
    assert extended(tokenizer, settings()) is tokenizer
    marked = extended(tokenizer, settings(markers=True))
    marked.save(tmp_path / "marked")
    template = ChatTemplate.of(load_saved_tokenizer(tmp_path / "marked"))
    assert template.encode(CHAT).ids.tolist().count(start) == 6


def test_template_file_is_kept_and_invalid_ones_are_one_line_errors(tmp_path, capsys):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<|im_end|>{{ m.content }}{% endfor %}")
    tokenizer = extended(ByteTokenizer(), settings(template=str(file)))
    assert tokenizer.names == ("<|im_end|>",)
    assert ChatTemplate.of(tokenizer).render(CHAT[3:]) == "<|im_end|>the cat<|im_end|>sat"
    again = extended(tokenizer, settings("<|x|>", ""))
    assert (again.names, again.jinja) == (("<|im_end|>", "<|x|>"), tokenizer.jinja)
    assert not capsys.readouterr().err
    file.write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}### {{ m.role + m.content }}{% endfor %}"
    )
    extended(ByteTokenizer(), settings(template=str(file)))
    said = capsys.readouterr().err
    assert "marks turns by words" in said
    assert "contains the current date" in said
    for content, problem in (
        (b"{% for %}", "TemplateSyntaxError"),
        (b"\xff", "mine.jinja"),
        (b" \n", "empty"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            extended(ByteTokenizer(), settings(template=str(file)))
    with pytest.raises(UserError, match="nowhere"):
        extended(ByteTokenizer(), settings(template=str(tmp_path / "nowhere")))


def write_run(config, tokenizer, workdir, n_devices=1):
    """Write a run of random or given parameters, and return what its start said."""
    experiment = build(config, jax.devices()[:n_devices], tokenizer)
    lines = []
    state = initial_state(experiment, tokenizer, lines.append)
    metadata = {
        "config": json.loads(experiment.config.to_json()),
        "fingerprint": {"tokenizer": tokenizer.digest},
    }
    workdir.mkdir()
    tokenizer.save(workdir / "tokenizer")
    (workdir / "run.json").write_text(json.dumps(metadata))
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.config.checkpoint, metadata)
    checkpoints.save(0, state)
    checkpoints.close()
    return experiment, flat(state.params), "\n".join(lines)


@pytest.fixture
def make_config(tiny_config):
    architecture = {
        "model__n_layers": 1,
        "model__tie_embeddings": False,
        "model__activation": "swiglu",
        "model__norm": "rmsnorm",
        "model__positions": "rotary",
    }
    return lambda **changes: tiny_config(**architecture | changes)


def check_rows(experiment, old, new, n):
    """Check that parameters are the old ones, with the mean row for ids from `n` on."""
    infos, n_tables = experiment.param_infos, 0
    for path in old:
        before, after = np.asarray(old[path]), np.asarray(new[path])
        if "vocab" in infos[path].axes:
            axis = infos[path].axes.index("vocab")
            before, after = np.moveaxis(before, axis, 0), np.moveaxis(after, axis, 0)
            added = np.broadcast_to(before[:n].mean(0), after[n:].shape)
            np.testing.assert_allclose(after[n:], added, rtol=1e-5, atol=1e-7)
            before, after, n_tables = before[:n], after[:n], n_tables + 1
        np.testing.assert_array_equal(after, before, err_msg=path)
    assert n_tables == 2


def test_rows_of_added_tokens_are_the_mean_on_a_mesh_that_divides_them(make_config, tmp_path):
    """257 rows, which two devices cannot share, become 260, which they do."""
    base = ByteTokenizer()
    _, old, _ = write_run(make_config(), base, tmp_path / "base")
    start = {"init__from": str(tmp_path / "base")}
    more = extended(base, settings("<|a|>,<|b|>"))
    _, between, _ = write_run(make_config(**start, model__vocab_size=260), more, tmp_path / "more")
    start = {"init__from": str(tmp_path / "more")}
    most = extended(more, settings("<|a|>,<|b|>,<|c|>"))
    mesh = {"parallel__mesh__tensor": 2, "parallel__mesh__fsdp": 2}
    experiment, new, said = write_run(make_config(**start, **mesh), most, tmp_path / "new", 4)
    assert "rows of ids from 259 on (tokens added" in said
    check_rows(experiment, old, between, 257)
    check_rows(experiment, between, new, 259)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(s)), new,
                 flat(experiment.state_sharding.params))  # fmt: skip
    other = extended(base, settings("<|b|>"))
    assert [other.shared_ids(x) for x in (base, more, CharTokenizer("ab"))] == [257, 0, 0]


def test_transformers_generates_the_reply_of_an_exported_run_and_it_comes_back(
    make_config, tmp_path, one_device
):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizer = extended(ByteTokenizer(), settings())
    experiment, params, _ = write_run(make_config(), tokenizer, tmp_path / "chat")
    lines = []
    export_run(tmp_path / "chat", tmp_path / "hf", 1, False, "float32", lines.append)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": "thé cat 👍"}]
    ids = ChatTemplate.of(tokenizer).encode(chat, add_generation_prompt=True).ids
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids.tolist() == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [258, 256]
    out = model.generate(torch.tensor([expected]), max_new_tokens=4, do_sample=False)
    logits = experiment.model.apply({"params": nested(params)}, jnp.asarray(out[:, :-1].numpy()))
    assert np.asarray(logits).argmax(-1)[0, len(ids) - 1 :].tolist() == out[0, len(ids) :].tolist()

    import_run(tmp_path / "hf", tmp_path / "back", {}, lines.append)
    back = load_saved_tokenizer(tmp_path / "back" / "tokenizer")
    assert np.array_equal(ChatTemplate.of(back).encode(chat, add_generation_prompt=True).ids, ids)
    assert ChatTemplate.of(back).stop_ids == (258, 256)
    again = SimpleNamespace(**vars(settings()), tokenizer=f"run:{tmp_path / 'back'}")
    assert make_tokenizer(again, []) == back

    # A base model's folder has the template too, but ends texts by its own token alone.
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": 256}')
    import_run(tmp_path / "hf", tmp_path / "base", {}, lines.append)
    base = load_saved_tokenizer(tmp_path / "base" / "tokenizer")
    write_run(make_config(objective__name="chat"), base, tmp_path / "tuned")
    export_run(tmp_path / "tuned", tmp_path / "out", 1, False, "float32", lines.append)
    stated = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stated["eos_token_id"] == [258, 256]
