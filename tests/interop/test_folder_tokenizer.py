"""Special tokens of model folders: kept, obeyed and written back, for every kind of vocabulary.

The folders are written as the families release them; `transformers` reads the original and the
exported one.
"""

import itertools
import json

import numpy as np
import pytest
from hf_models import BERT, LLAMA, ROBERTA, T5, build, torch, transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.cli import main
from lm.data.special_tokens import special_tokens
from lm.data.tokenizer import load_saved_tokenizer
from lm.data.tokenizers.folder import FolderTokenizer
from lm.errors import UserError
from lm.interop.tokenizer_files import read_tokenizer

tokenizers = pytest.importorskip("tokenizers")
models, pre, post = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.processors
decoders, normalizers = tokenizers.decoders, tokenizers.normalizers

HOSTILE = [
    *("", " ", "\n", "a", " a", "a ", "\na\n", "the cat", "the  cat\t\n", "\u2028", "a\u0085b"),
    *("<s>", "</s>a", "<|im_end|>", "[SEP] a [MASK]", "<extra_id_0>", "café e\u0301", "東京🙂"),
    *("\ufeffa", "\u2581a", "a\u200db", "ß İ ǅ", "1234567", "don't", "a" * 99, "\r\n", "\0"),
]


def byte_level(special, template=None, normalizer=None):
    made = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer, made.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    return finish(made, special, template)


def metaspace(special, template=None):
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecaon"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(
        models.BPE(ids, [], unk_token=special[0], fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return finish(made, special, template)


def unigram(special, template=None):
    pieces = [*((name, 0.0) for name in special), *((c, -3.0) for c in "▁thecaon12 ")]
    made = tokenizers.Tokenizer(models.Unigram(pieces, special.index("<unk>")))
    made.pre_tokenizer, made.decoder = pre.Metaspace(), decoders.Metaspace()
    return finish(made, special, template)


def word_piece(special, template=None):
    pieces = [*special, *"thecaon1", *(f"##{c}" for c in "thecaon1"), "the", "##at", "'"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    return finish(made, special, template)


def finish(made, special, template):
    made.add_special_tokens(list(special))
    if template:
        ids = [(name, made.token_to_id(name)) for name in special]
        made.post_processor = post.TemplateProcessing(*template, ids)
    return made


BERT_TEMPLATE = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
GROUPED = LLAMA | {"num_key_value_heads": 2}
CHAT = {"chat_template": "{{ messages[0]['content'] }}", "model_max_length": 32768}


# family: vocabulary, tokenizer_config.json, special_tokens_map.json, generation_config.json,
# class of the model, its configuration, and the names of what must come of them: bos, all ends,
# pad, and what stands before a prompt.
FAMILIES = {
    "qwen2, two ends and no bos": (
        byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, normalizers.NFC()),
        FAST | CHAT | {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        None,
        {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "do_sample": True, "top_p": 0.8},
        ("Qwen2ForCausalLM", GROUPED),
        (None, ["<|im_end|>", "<|endoftext|>"], "<|endoftext|>", []),
    ),
    "llama 3, a list of ends": (
        byte_level(
            ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
            ("<|begin_of_text|> $A", "<|begin_of_text|> $A <|begin_of_text|>:1 $B:1"),
        ),
        FAST | CHAT | {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        None,
        {"eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]},
        ("LlamaForCausalLM", GROUPED),
        (
            "<|begin_of_text|>",
            ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
            None,
            ["<|begin_of_text|>"],
        ),
    ),
    "gpt2, nothing is added": (
        byte_level(["<|endoftext|>"]),
        FAST | {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        None,
        None,
        ("GPT2LMHeadModel", {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 160}),
        ("<|endoftext|>", ["<|endoftext|>"], None, []),
    ),
    "mistral, add_bos_token and objects for tokens": (
        metaspace(["<unk>", "<s>", "</s>"], ("<s> $A", "<s> $A <s>:1 $B:1")),
        {
            **(FAST | CHAT | {"add_bos_token": True, "add_eos_token": False}),
            **{"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>"},
            "unk_token": "<unk>",
        },
        None,
        None,
        ("MistralForCausalLM", GROUPED | {"sliding_window": None}),
        ("<s>", ["</s>"], None, ["<s>"]),
    ),
    "tokens in special_tokens_map.json": (
        metaspace(["<unk>", "<bos>", "<eos>", "<pad>"], ("<bos> $A", "<bos> $A $B:1")),
        FAST,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": {"content": "<pad>"}},
        {"eos_token_id": ["<eos>", "<pad>"]},
        ("GemmaForCausalLM", GROUPED | {"head_dim": 8}),
        ("<bos>", ["<eos>", "<pad>"], "<pad>", ["<bos>"]),
    ),
    "bert, pairs of two types": (
        word_piece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], BERT_TEMPLATE),
        FAST
        | {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")},
        None,
        None,
        ("BertForMaskedLM", BERT),
        ("[CLS]", None, "[PAD]", ["[CLS]"]),
    ),
    "roberta": (
        byte_level(
            ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        ),
        FAST
        | {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        | {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
        None,
        None,
        ("RobertaForMaskedLM", ROBERTA | {"max_position_embeddings": 514}),
        ("<s>", None, "<pad>", ["<s>"]),
    ),
    "t5, which starts with pad": (
        unigram(["<pad>", "</s>", "<unk>", "<extra_id_0>"], ("$A </s>", "$A </s> $B </s>")),
        FAST | {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        None,
        None,
        ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}),
        (None, ["</s>"], "<pad>", []),
    ),
    "codet5, with an <s> that starts no target": (
        byte_level(["<pad>", "<s>", "</s>"], ("<s> $A </s>", "<s> $A </s> </s> $B </s>")),
        FAST | {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        None,
        {"eos_token_id": ["</s>", "<s>"], "decoder_start_token_id": "<pad>"},
        ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 256}),
        ("<s>", ["</s>", "<s>"], "<pad>", ["<s>"]),
    ),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Make (folder, model) of a family, and exports its import to `folder.out`."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = _release(tmp_path_factory.mktemp("family"), *FAMILIES[name][:5])
        return made[name]

    return make


def _release(place, vocabulary, config, special_map, generation, model):
    folder = place / "theirs"
    id_of = vocabulary.token_to_id
    eos = config.get("eos_token") or (special_map or {}).get("eos_token")
    class_name, values = model
    values = values | {"vocab_size": vocabulary.get_vocab_size(), "bos_token_id": None}
    values |= {"eos_token_id": None if eos is None else id_of(eos)}
    pad = config.get("pad_token")
    values |= {"pad_token_id": None if pad is None else id_of(pad)}
    built = build(class_name, values)
    built.generation_config = transformers.GenerationConfig.from_model_config(built.config)
    built.save_pretrained(folder)
    vocabulary.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config": config, "special_tokens_map": special_map}
    if generation:
        ids = {
            key: [id_of(t) for t in value] if key == "eos_token_id" else value
            for key, value in generation.items()
        }
        if "decoder_start_token_id" in ids:
            ids["decoder_start_token_id"] = id_of(ids["decoder_start_token_id"])
        files["generation_config"] = ids
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ 'b' }}")
    run, out = place / "run", place / "out"
    assert main(["import", "--from", str(folder), "--workdir", str(run)]) == 0
    assert main(["export", "--workdir", str(run), "--to", str(out)]) == 0
    return folder, run, out, built


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_of_a_folder_are_kept(released, name):
    bos, ends, pad, before = FAMILIES[name][5]
    folder, run, out, _ = released(name)
    tokenizer = load_saved_tokenizer(run / "tokenizer")
    id_of = tokenizer.token_id
    assert tokenizer.bos_id == (None if bos is None else id_of(bos))
    if ends is not None:
        assert tokenizer.stop_ids == tuple(map(id_of, ends))
    assert tokenizer.role_id("pad") == (None if pad is None else id_of(pad))
    assert tokenizer.template.before == tuple(map(id_of, before))
    start = json.loads((folder / "config.json").read_text()).get("decoder_start_token_id")
    if start is not None:
        assert special_tokens(tokenizer).bos == start
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    config, exported = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    for key, value in config.items():
        if key.endswith("_token_id") or key in ("model_type", "transformers_version"):
            assert exported[key] == value, key


@pytest.mark.parametrize("name", FAMILIES)
def test_adversarial_texts_have_the_same_ids_in_all_three(released, name):
    require_same_ids(released(name), [(text, other) for text in HOSTILE for other in ("", "the")])


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(st.text(max_size=20), st.text(max_size=20), st.sampled_from(HOSTILE))
def test_texts_and_pairs_have_the_same_ids_in_all_three(released, name, first, second, hostile):
    texts = (first, second, first + hostile)
    require_same_ids(released(name), [(text, second) for text in texts])


def require_same_ids(family, pairs):
    folder, run, out, _ = family
    original, exported = map(tokenizer_of, (str(folder), str(out)))
    tokenizer = load(run)
    around = tokenizer.template
    for text, second in pairs:
        assert exported(text)["input_ids"] == original(text)["input_ids"]
        ids = [*around.before, *tokenizer.encode(text).tolist(), *around.after]
        assert ids == original(text, split_special_tokens=True)["input_ids"]
        assert dict(exported(text, second)) == dict(original(text, second))


_OPENED = {}


def tokenizer_of(folder):
    if folder not in _OPENED:
        _OPENED[folder] = transformers.AutoTokenizer.from_pretrained(folder)
    return _OPENED[folder]


def load(run):
    return _OPENED.setdefault(run, load_saved_tokenizer(run / "tokenizer"))


GENERATING = [name for name in FAMILIES if "bert" not in name]


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_text_matches_transformers_before_and_after(released, name, tmp_path, one_device):
    folder, run, out, _ = released(name)
    prompts, n = ["the cat", "a", "then one"], 12
    (tmp_path / "in.txt").write_text("\n".join(prompts))
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")]
    options = ["--greedy", "--max_new_tokens", str(n)]
    assert main(["generate", "--workdir", str(run), *files, *options]) == 0
    ours = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").open()]
    for path in (folder, out):
        theirs = tokenizer_of(str(path))
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if "t5" in name
            else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(path).eval()
        for prompt, text in zip(prompts, ours, strict=True):
            inputs = theirs(prompt, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            with torch.no_grad():
                row = model.generate(**inputs, max_new_tokens=n, do_sample=False)[0].tolist()
            start = 1 if "t5" in name else inputs["input_ids"].shape[1]
            new = row[start:]
            ends = load(run).stop_ids
            new = new[: next((at for at, i in enumerate(new) if i in ends), len(new))]
            tokenizer = load(run)
            before = [] if "t5" in name else inputs["input_ids"][0].tolist()
            whole, shown = tokenizer.decode([*before, *new]), tokenizer.decode(before)
            assert text == whole.rstrip("\ufffd")[len(shown) :]


@pytest.mark.parametrize("end", range(3))
def test_each_end_of_a_list_ends_greedy_beams_and_batches(released, end, tmp_path, capsys):
    """The output layer is moved so that one of three ends is the fourth token."""
    name = "llama 3, a list of ends"
    folder, _, _, model = released(name)
    theirs = tokenizer_of(str(folder))
    ids = theirs("the cat", return_tensors="pt").input_ids
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    with torch.no_grad():
        row = model.generate(ids, eos_token_id=None, **options)
        states = model(row, output_hidden_states=True)
    vector = states.hidden_states[-1][0, ids.shape[1] + 2]
    height = states.logits[0, ids.shape[1] + 2].max() + 0.5
    stop = load_saved_tokenizer(released(name)[1] / "tokenizer").stop_ids[end]
    weight = model.lm_head.weight.data
    kept = weight[stop].clone()
    place = tmp_path / "ends"
    try:
        weight[stop] = vector / (vector @ vector) * height
        with torch.no_grad():
            expected = model.generate(ids, eos_token_id=list(range(256, 260)), **options)
        model.save_pretrained(place)
    finally:
        weight[stop] = kept
    for file in folder.glob("*"):
        if file.name not in ("config.json", "model.safetensors"):
            (place / file.name).write_bytes(file.read_bytes())
    run = tmp_path / "run"
    assert main(["import", "--from", str(place), "--workdir", str(run)]) == 0
    new = [i for i in expected[0, ids.shape[1] :].tolist() if i < 256]
    assert len(new) < 8
    text = load_saved_tokenizer(run / "tokenizer").decode(new).rstrip("\ufffd")
    generate = ["generate", "--workdir", str(run), "--max_new_tokens", "8"]
    capsys.readouterr()
    assert main([*generate, "--prompt", "the cat", "--greedy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"].rstrip("\ufffd") == text
    lines, made = tmp_path / "in.txt", tmp_path / "out.jsonl"
    lines.write_text("the cat\nthe\nthe cat\n")
    assert main([*generate, "--input", str(lines), "--output", str(made), "--greedy"]) == 0
    found = [json.loads(line)["text"].rstrip("\ufffd") for line in made.open()]
    assert [found[0], found[2]] == [text, text]


# --- vocabularies without a tokenizer.json

SEPARATORS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\xa0\u3000\r"


@given(st.lists(st.text(st.sampled_from("ab#" + SEPARATORS), min_size=1), unique=True))
@settings(deadline=None)
def test_entry_of_vocab_txt_may_hold_any_line_separator_but_newline(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *(p for p in pieces if not p.endswith("\r")), "cat", "##s"]
    (folder / "vocab.txt").write_bytes("".join(f"{piece}\n" for piece in pieces).encode())
    tokenizer = read_tokenizer(folder)
    assert tokenizer.pieces() == pieces
    assert tokenizer.encode("cats").tolist() == [len(pieces) - 2, len(pieces) - 1]
    assert tokenizer.template.before == (2,)


@given(st.lists(st.sampled_from("ab" + SEPARATORS.replace("\r", "")), unique=True, min_size=2))
@settings(deadline=None)
def test_merge_may_hold_any_line_separator_but_newline(tmp_path_factory, letters):
    folder = tmp_path_factory.mktemp("gpt2")
    pairs = list(itertools.pairwise(letters))
    pieces = [*letters, *dict.fromkeys(a + b for a, b in pairs)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs)
    (folder / "merges.txt").write_bytes(merges.encode())
    made = json.loads(read_tokenizer(folder).base.definition)
    assert [tuple(pair) for pair in made["model"]["merges"]] == pairs


@pytest.mark.parametrize("stated", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_beside_a_sentencepiece_model_have_their_ids(tmp_path, stated):
    from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

    base = SentencePieceTokenizer(train_sentencepiece(["the cat sat on the mat\n"] * 50, 290))
    (tmp_path / "tokenizer.model").write_bytes(base.model)
    names = {"<|im_end|>": 290, "NEW": 291}
    if stated == "added_tokens.json":
        (tmp_path / stated).write_text(json.dumps(names))
    else:
        about = {str(i): {"content": n, "special": n != "NEW"} for n, i in names.items()}
        (tmp_path / stated).write_text(json.dumps({"added_tokens_decoder": about}))
    config = {"model_type": "mistral", "eos_token_id": 290}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = FolderTokenizer.read(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.stop_ids, tokenizer.bos_id) == (292, (290,), 1)
    assert tokenizer.eos_id == 290  # of config.json; Llama's default is another
    ids = tokenizer.encode("the NEW cat")
    assert 291 in ids
    assert tokenizer.decode(ids) == "the NEW cat"
    tokenizer.save(tmp_path / "saved")
    again = load_saved_tokenizer(tmp_path / "saved")
    assert np.array_equal(again.encode("the NEW cat"), ids)
    assert again.digest == tokenizer.digest


def test_piece_of_the_vocabulary_may_be_an_added_token(tmp_path):
    """A text is cut at it, as in transformers; another id than the vocabulary's is an error."""
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3}, [("a", "b")]))
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    stated = FAST | {"added_tokens_decoder": {"1": {"content": "b", "normalized": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    assert ours.encode("abcab").tolist() == theirs("abcab")["input_ids"] == [0, 1, 3, 0, 1]
    for number, message in (("2", "has the id 2, but .* has 1"), ("99999999", "is not an id")):
        stated["added_tokens_decoder"] = {number: {"content": "b"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
        with pytest.raises(UserError, match=message):
            read_tokenizer(tmp_path)


def test_ids_that_texts_can_have_need_a_row(tmp_path, capsys, make_theirs):
    folder = make_theirs("gpt2")[1]
    place = tmp_path / "gpt2"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    made = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    made.pre_tokenizer = pre.WhitespaceSplit()
    made.add_special_tokens(["<image>"])  # as in Gemma 3: no text has it
    made.save(str(place / "tokenizer.json"))
    assert main(["import", "--from", str(place), "--workdir", str(tmp_path / "a")]) == 0
    assert "ids 96 and up" in capsys.readouterr().err
    made.add_tokens(["NEW"])
    made.save(str(place / "tokenizer.json"))
    assert main(["import", "--from", str(place), "--workdir", str(tmp_path / "b")]) == 2
    assert "vocab_size=96 is smaller than the tokenizer's 98" in capsys.readouterr().err


def test_ids_that_an_objective_or_a_search_puts_in_need_a_row_too(
    tmp_path, capsys, make_theirs, text_file
):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(92))]  # no [MASK]
    bert, t5 = tmp_path / "bert", tmp_path / "t5"
    for name, place in (("bert", bert), ("t5", t5)):
        place.mkdir()
        for file in make_theirs(name)[1].iterdir():
            (place / file.name).write_bytes(file.read_bytes())
    (bert / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    words = {name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", "a"])}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.add_special_tokens([f"<extra_id_{i}>" for i in range(150)])
    made.save(str(t5 / "tokenizer.json"))
    config = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": 100}))
    (t5 / "generation_config.json").unlink()
    for place in (bert, t5):
        words = ["import", "--from", str(place), "--workdir", str(place / "run")]
        assert main(words) == 0
    data = [f"--config.data.{key}source=text:{text_file}" for key in ("", "validation_")]
    data += ["--config.data.sequence_length=16", "--config.data.workers=1"]
    capsys.readouterr()
    assert main(["eval", "--workdir", str(bert / "run"), *data]) == 2
    assert "vocab_size=96 is smaller than the tokenizer's 96 and 1 of" in capsys.readouterr().err
    assert (
        main(["generate", "--workdir", str(t5 / "run"), "--prompt", "a", "--max_new_tokens", "2"])
        == 2
    )
    assert "the token id 100 exceeds the model's 96 embeddings" in capsys.readouterr().err


def test_runs_of_bytes_that_are_no_utf8_are_decoded_as_theirs(tmp_path):
    """ByteFallback of `tokenizers` replaces every byte of such a run."""
    from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

    base = SentencePieceTokenizer(train_sentencepiece(["the cat sat on the mat\n"] * 50, 290))
    (tmp_path / "tokenizer.model").write_bytes(base.model)
    tokenizer = FolderTokenizer.read(tmp_path)
    theirs = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([*range(3, 259), 262, 263, 264], 6).tolist()
        expected = theirs.decode([tokenizer.pieces()[i] for i in ids])
        assert tokenizer.decode(ids) == expected
