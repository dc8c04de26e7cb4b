"""`lm corpus`: documents in, shards and a card out; resumable, independent of the workers."""

import gzip
import hashlib
import json
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.cli import main
from lm.config import default
from lm.data import file_parts
from lm.data.dataset import open_dataset
from lm.errors import UserError
from lm.tools.corpus import corpus_run
from lm.tools.corpus.corpus_config import load_corpus_config

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant=""):
    return ConfigDict({})
"""
NOUNS = [
    "river",
    "garden",
    "window",
    "teacher",
    "market",
    "winter",
    "letter",
    "station",
    "mountain",
    "kitchen",
]
VERBS = ["remembers", "watches", "follows", "describes", "forgets", "admires"]
PLACES = [
    "in the old town",
    "near the sea",
    "before the war",
    "after a long day",
    "without any doubt",
]
GERMAN = "Das ist ein deutscher Satz über die Häuser und Gärten der alten Stadt. " * 4


def prose(seed, sentences=12):
    """Return English sentences that depend on the seed."""
    pick = random.Random(seed).choice
    return " ".join(
        f"The {pick(NOUNS)} of my {pick(NOUNS)} {pick(VERBS)} the {pick(NOUNS)} {pick(PLACES)}."
        for _ in range(sentences)
    )


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def corpus(tmp_path):
    """Return a function that writes a configuration and runs the verb: exit code and folder."""

    def run(output="out", arguments=("--workers", "1"), **values):
        values = {"sources": {"web": {"source": f"jsonl:{tmp_path}/in/*.jsonl"}}, **values}
        config = tmp_path / "config.py"
        config.write_text(CONFIG.replace("{}", repr(values)))
        place = tmp_path / output
        return main(["corpus", "--config", str(config), "--output", str(place), *arguments]), place

    (tmp_path / "in").mkdir()
    return run


@pytest.fixture
def mixed(tmp_path):
    """Write three files: the second has German alone, the third duplicates of the first."""
    english = [{"text": prose(i), "id": f"a{i}", "license": "MIT"} for i in range(6)]
    write_jsonl(tmp_path / "in" / "1.jsonl", english)
    write_jsonl(tmp_path / "in" / "2.jsonl", [{"text": GERMAN, "id": "german"}])
    rows = [
        {"text": prose(3), "id": "same"},
        {"text": f"{prose(4)} However.", "id": "near"},
        {"text": f"<b>Write</b> to jane.doe@example.org. {prose(9)}", "id": "mail"},
    ]
    write_jsonl(tmp_path / "in" / "3.jsonl", rows)


RULES = ("language", "personal_data", "exact_duplicates", "near_duplicates")


def documents(place):
    found = []
    for path in sorted(place.glob("*.jsonl.gz")):
        found += [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return {row["id"]: row for row in found}


def digests(place):
    """Return the digest of every file of a finished corpus."""
    files = [path for path in place.rglob("*") if path.is_file()]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def removed(place):
    card = json.loads((place / "card.json").read_text())
    return {rule["label"]: rule["counts"].get("removed", 0) for rule in card["rules"]}


def test_every_rule_removes_its_faults_and_empty_tasks_do_not_shift_others(corpus, mixed):
    code, place = corpus(rules=RULES)
    found = documents(place)
    assert code == 0
    assert len(found) == 7
    assert len({"a3", "same"} & set(found)) == len({"a4", "near"} & set(found)) == 1
    assert found["mail"]["text"].startswith("<b>Write</b> to <email>.")
    assert found["a0"]["license"] == "MIT"
    assert found["a0"]["source"] == "web"
    assert removed(place) == dict(zip(RULES, (1, 0, 1, 1), strict=True))
    assert not (place / "work").exists()


def test_bytes_do_not_depend_on_workers(corpus, mixed):
    _, one = corpus("one", rules=RULES[1:3])
    _, two = corpus("two", ("--workers", "2"), rules=RULES[1:3])
    assert len(digests(one)) == 7
    assert digests(one) == digests(two)


def test_start_after_a_kill_skips_the_tasks_that_are_complete(corpus, mixed, monkeypatch):
    _, whole = corpus("whole", rules=RULES)
    run_task, done = corpus_run._run_task, []

    def killed(tasks, rank):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(rank)
        run_task(tasks, rank)

    monkeypatch.setattr(corpus_run, "_run_task", killed)
    code, place = corpus(rules=RULES)
    assert code == 130
    again = []
    monkeypatch.setattr(corpus_run, "_run_task", lambda t, r: (again.append(r), run_task(t, r)))
    assert corpus(rules=RULES)[0] == 0
    assert digests(place) == digests(whole)
    # The stages: 3 tasks, find, 3 tasks, 20 pairs, cluster, 3 tasks, card.
    assert len(done) + len(again) == 3 + 1 + 3 + 20 + 1 + 3 + 1
    again.clear()
    assert corpus(rules=RULES)[0] == 0
    assert again == []


def test_card_has_both_sides_escaped_and_no_personal_data(corpus, mixed):
    _, place = corpus(rules=RULES, card={"title": "<i>Title", "examples": 20})
    page, card = (place / "index.html").read_text(), (place / "card.json").read_text()
    assert "<i>" not in page
    assert "<b>Write" not in page
    assert "&lt;b&gt;Write&lt;/b&gt; to &lt;email&gt;." in page
    assert "jane.doe" not in page + card
    assert "default-src 'none'" in page
    assert "<script" not in page
    language, masked, _, near = json.loads(card)["rules"]
    assert list(language["reasons"]) == ["de"]
    assert language["examples"]["de"][0]["text"] == GERMAN[:300]
    assert len(language["examples"]["kept"]) == 9
    assert masked["details"] == {"masked_email": 1}
    (kept,), (gone,) = near["examples"]["kept"], near["examples"]["near_duplicates"]
    assert kept["cluster"] == gone["cluster"]
    assert kept["text"] == gone["text"]


def test_runs_know_the_card_of_their_corpus(corpus, mixed):
    _, place = corpus(rules=("exact_duplicates",))
    spec = f"jsonl:{place}/*.jsonl.gz"
    digest = hashlib.sha256((place / "card.json").read_bytes()).hexdigest()

    def make_data(**values):
        data = default().data
        data.update(tokenizer="byte", **values)
        return data

    assert open_dataset(make_data(source=spec)).fingerprint[f"card {spec}"] == digest
    held_out = open_dataset(make_data(source=spec, validation_fraction=0.3)).fingerprint
    assert held_out[f"card {spec} (train)"] == digest
    for other in ('{"kind": "another"}', "[]", "no JSON"):
        (place / "card.json").write_text(other)
        assert len(open_dataset(make_data(source=spec)).fingerprint) == 2


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "parquet"])
def test_other_formats(corpus, mixed, form):
    code, place = corpus(write={"format": form, "megabytes": 1}, rules=("exact_duplicates",))
    assert code == 0
    if form == "parquet":
        import pyarrow.parquet

        rows = [
            r
            for f in sorted(place.glob("*.parquet"))
            for r in pyarrow.parquet.read_table(f).to_pylist()
        ]
    else:
        opened = [
            fsspec.open(str(path), "rt", compression="infer") for path in place.glob(f"*.{form}")
        ]
        lines = []
        for file in opened:
            with file as text:
                lines += text.readlines()
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 9
    assert {row["license"] for row in rows if row.get("license")} == {"MIT"}


def test_test_sets_are_found_whole_and_by_n_grams(corpus, tmp_path, mixed):
    tests = tmp_path / "test.tsv"
    long = prose("test", 3)
    short = "a garden without any river forgets"
    tests.write_text(f"sentence\tlabel\n{long}\t1\n{short}\t0\ntoo short\t1\n")
    rows = [
        {"text": prose(20) + " " + long.upper().replace(".", " !") + prose(21), "id": "long"},
        {"text": f"{prose(22)} He said: A Garden, without any river -- forgets!", "id": "short"},
        {"text": f"{prose(23)} a garden without any river admires", "id": "other"},
    ]
    write_jsonl(tmp_path / "in" / "4.jsonl", rows)
    tests = {"sst2": {"source": f"tsv:{tests}", "field": "sentence"}}
    code, place = corpus(rules=("decontamination",), tests=tests)
    assert code == 0
    assert not {"long", "short"} & set(documents(place))
    assert "other" in documents(place)
    assert removed(place) == {"decontamination": 2}


def test_samples_have_their_size_and_do_not_depend_on_files(corpus, tmp_path):
    rows = [{"text": prose(i, 2), "id": str(i)} for i in range(200)]
    write_jsonl(tmp_path / "in" / "1.jsonl", rows)
    _, number = corpus("number", rules=("sample",), sample={"documents": 50})
    _, fraction = corpus("fraction", rules=("sample",), sample={"fraction": 0.25})
    _, seed = corpus("seed", rules=("sample",), sample={"documents": 50, "seed": 1})
    for i in range(4):
        write_jsonl(tmp_path / "in" / f"{i + 1}.jsonl", rows[i::4])
    _, parts = corpus("parts", rules=("sample",), sample={"documents": 50})
    assert len(documents(number)) == len(documents(seed)) == 50
    assert documents(number) == documents(parts)
    assert set(documents(number)) != set(documents(seed))
    assert 30 < len(documents(fraction)) < 70


def test_banned_words_of_a_file(corpus, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("Darn\nbad phrase\n坏话\n")
    texts = ["a DARN thing", "darned socks", "a bad phrase.", "他说坏话了", "good"]
    write_jsonl(tmp_path / "in" / "1.jsonl", [{"text": t, "id": t} for t in texts])
    _, place = corpus(rules=("banned_words",), banned_words={"words": str(words)})
    assert set(documents(place)) == {"darned socks", "good"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": ("langauge",)}, "unknown rule 'langauge'; did you mean language?"),
        ({"rules": ("language", "language")}, "language is listed twice"),
        ({"ruels": ()}, "unknown section or key config.ruels; did you mean rules?"),
        ({"language": {"langs": ("en",)}}, "rule language has no option 'langs'"),
        ({"rules": ("language",), "language": {"languages": ("xx",)}}, "unknown language 'xx'"),
        ({"rules": ("language",), "language": {"languages": "en"}}, "expected a tuple"),
        ({"gopher_quality": {"min_doc_words": "x"}}, "config.gopher_quality.min_doc_words='x'"),
        ({"rules": ("banned_words",)}, "needs its option: config.banned_words.words"),
        ({"rules": ("banned_words",), "banned_words": {"words": "no"}}, "no word list 'no'"),
        ({"rules": ("personal_data",), "personal_data": {"kinds": ("fax",)}}, "unknown kind 'fax'"),
        ({"rules": ("personal_data",), "personal_data": {"regions": ("XY",)}}, "region 'XY'"),
        ({"rules": ("decontamination",)}, "no test sets"),
        ({"rules": ("sample",), "sample": {"fraction": 0.0}}, "fraction=0.0 is not above 0"),
        ({"rules": ("near_duplicates",), "near_duplicates": {"num_buckets": 0}}, "at least 1"),
        ({"gopher_quality": {"by_language": 5}}, "expected {LANGUAGE: {OPTION: …}}"),
        ({"gopher_quality": {"by_language": {"de": {"min": 1}}}}, "by_language.de: rule gopher"),
        ({"rules": ("gopher_quality",), "gopher_quality": {"languages": ("xx",)}}, "'xx'"),
        ({"sources": {}}, "config.sources is empty"),
        ({"sources": {"a": {"source": "jsonl:none*"}}}, "config.sources.a: no file matches"),
        ({"sources": {"a": {"source": "what:x"}}}, "unknown data source 'what'"),
        ({"sources": {"a": {"url": "x"}}}, "unknown key config.sources.a.url"),
        ({"sources": {"a": {"license": "x"}}}, "config.sources.a.source is missing"),
        ({"tests": {"t": {"source": "text:none"}}}, "config.tests.t: no file matches"),
        ({"write": {"format": "xml"}}, "expected one of jsonl.gz"),
        ({"tasks": -1}, "config.tasks is below 0"),
        ({"words": "klingon"}, "config.words=klingon"),
        ({"rules": ("language",), "language": {"languages": ("fr",)}}, "all 10 documents were rem"),
    ],
)
def test_wrong_configurations_are_one_line_errors(corpus, mixed, tmp_path, capsys, values, message):
    code, place = corpus(**values)
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error.splitlines()[-1]
    assert not (place / "card.json").exists()


def test_wrong_inputs_are_one_line_errors(corpus, tmp_path, capsys):
    source = tmp_path / "in" / "1.jsonl"
    source.write_text("\n")
    assert corpus("empty")[0] == 2
    assert "config.sources.web contains no text" in capsys.readouterr().err
    source.write_text('{"text": "one"}\n{"words": "two"}\n')
    assert corpus("bad")[0] == 2
    assert "1.jsonl:2: no text in field 'text' (available: words)" in capsys.readouterr().err
    skip = {"web": {"source": f"jsonl:{source}", "bad_rows": "skip"}}
    code, place = corpus("skip", sources=skip)
    assert code == 0
    assert json.loads((place / "card.json").read_text())["read"]["details"] == {"rows_bad": 1}


def test_folder_with_something_else_stays_as_it_is(corpus, mixed, tmp_path, capsys):
    _, place = corpus(rules=("exact_duplicates",))
    before = digests(place)
    assert corpus(rules=("near_duplicates",))[0] == 2
    assert "config.rules: ['exact_duplicates'] → ['near_duplicates']" in capsys.readouterr().err
    write_jsonl(tmp_path / "in" / "1.jsonl", [{"text": "changed"}])
    assert corpus(rules=("exact_duplicates",))[0] == 2
    assert "sources.web" in capsys.readouterr().err
    assert digests(place) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert corpus("mine")[0] == 2
    assert "holds other files (file)" in capsys.readouterr().err


def test_shards_can_be_read_again_beside_their_own_columns(corpus, mixed, tmp_path):
    _, shards = corpus("shards", write={"format": "parquet"})
    sources = {"again": {"source": f"parquet:{shards}/*.parquet"}}
    sources["reader"] = {"source": f"datatrove-jsonl:{tmp_path}/in/*.jsonl"}
    code, place = corpus(sources=sources, rules=("exact_duplicates",))
    read = json.loads((place / "card.json").read_text())["read"]["values"]
    assert code == 0
    assert read["source_name"] == {"again": {"kept": 10}, "reader": {"kept": 10}}
    assert read["source"] == {"web": {"kept": 10}, "reader": {"kept": 10}}
    assert read["license"] == {"MIT": {"kept": 12}, "": {"kept": 8}}
    assert removed(place) == {"exact_duplicates": 11}


def test_command_line_changes_the_configuration(corpus, mixed, tmp_path):
    arguments = ["--workers", "1", "--config.rules=language,sample", "--config.sample.documents=2"]
    code, place = corpus("two", arguments)
    assert code == 0
    assert len(documents(place)) == 2
    with pytest.raises(UserError, match=r"config\.sample\.documents='x'|expected an integer"):
        load_corpus_config(str(tmp_path / "config.py"), {"sample.documents": "x"})


def test_rules_are_listed(capsys):
    assert main(["corpus", "--rules"]) == 0
    assert "    min_doc_words = 50\n" in capsys.readouterr().out


def test_shipped_configurations(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_DATA_DIR", str(tmp_path))
    for variant in ("web", "stdlib"):
        assert load_corpus_config(f"experiments/corpora/clean.py:{variant}", {})["rules"]


CHINESE = "昨天我们去了故宫，那里有很多人，天气也非常好，所以我们走了很久。"


def test_rules_for_english_leave_other_languages_alone_and_count_them(corpus, tmp_path):
    rows = [{"text": CHINESE * 3 + str(i), "id": f"zh{i}"} for i in range(3)]
    rows += [{"text": prose(i), "id": f"en{i}"} for i in range(3)]
    rows += [{"text": "0.125 7.5 | " * 30, "id": "numbers", "language": "English"}]
    write_jsonl(tmp_path / "in" / "1.jsonl", rows)
    rules = ("c4_quality", "gopher_quality", "fineweb_quality")
    code, place = corpus(rules=rules, c4_quality={"min_num_sentences": 2})
    card = json.loads((place / "card.json").read_text())
    assert code == 0
    assert set(documents(place)) == {row["id"] for row in rows[:-1]}
    assert [rule["details"]["not judged: zh"] for rule in card["rules"]] == [3, 3, 3]

    own = {"by_language": {"zh": {"stop_words": ("的",), "min_avg_word_length": 1}}}
    _, place = corpus("own", rules=("gopher_quality",), gopher_quality=own)
    card = json.loads((place / "card.json").read_text())
    assert card["rules"][0]["reasons"]["gopher_enough_stop_words"]["documents"] == 3
    assert card["config"]["gopher_quality"]["by_language"]["zh"]["min_doc_words"] == 50
    _, place = corpus("all", rules=("gopher_quality",), gopher_quality={"languages": ()})
    assert not any(name.startswith("zh") for name in documents(place))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_large_file_is_divided_among_the_tasks(corpus, tmp_path, monkeypatch, form):
    rows = [{"text": prose(i), "number": i} for i in range(12)]
    if form == "jsonl":
        write_jsonl(tmp_path / "in" / "1.jsonl", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in/1.parquet", row_group_size=3)
    monkeypatch.setattr(file_parts, "_LEAST", 2000)
    columns = {"format": "jsonl.gz", "columns": ("number",)}
    sources = {"web": {"source": f"{form}:{tmp_path}/in/*"}}
    code, place = corpus(sources=sources, write=columns)
    assert code == 0
    assert len(list(place.glob("*.jsonl.gz"))) >= 4
    found = documents(place)
    assert [row["number"] for row in found.values()] == list(range(12))
    _, place = corpus("one", sources=sources, write=columns, tasks=1)
    assert documents(place) == found


def test_unwritable_place_is_a_one_line_error(corpus, mixed, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in ("/proc/corpus", "file", "file/inner"):
        assert corpus(place, rules=())[0] == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be created: " in line


def test_another_list_of_words_is_another_corpus(corpus, mixed, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("deutscher\n")
    values = {"rules": ("banned_words",), "banned_words": {"words": str(words)}}
    _, place = corpus(**values)
    card = json.loads((place / "card.json").read_text())
    assert card["rule_inputs"] == {"banned_words": hashlib.sha256(b"deutscher\n").hexdigest()}
    words.write_text("river\n")
    assert corpus(**values)[0] == 2
    assert "sources.rule banned_words: " in capsys.readouterr().err
