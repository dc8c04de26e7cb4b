"""Measure recall and precision of the rules of `lm corpus` on text with planted faults.

    LM_DATA_DIR=DATA python scripts/prove_corpus.py FOLDER [--workers N]

$LM_DATA_DIR has wikitext2/, sentencepiece/botchan.txt, chinese/, multi30k/ and sst2/
(experiments/RESULTS.md says where they are from). Documents are paragraphs of WikiText-2, lines of
botchan, Chinese poems and sentences, and modules of the standard library. Planted faults are near
and exact duplicates, personal data, sentences of test sets, German text, and boilerplate. Each rule
then runs alone on all documents. Recall is the fraction of its planted faults that a rule finds.
Precision is the fraction of what it removes that was planted; for duplicates, the fraction of
removed documents that share 30 % of their 5-grams with another one; for masks, only outside the
standard library, which contains real addresses. FOLDER/all has the card of all rules together. The
table is in experiments/RESULTS.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import string
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from datatrove.utils.text import TextNormConfig, simplify_text
from ml_collections import ConfigDict

from lm.config import default
from lm.data.dataset import open_corpus
from lm.tools.corpus.corpus_config import load_corpus_config
from lm.tools.corpus.corpus_run import make_corpus
from lm.tools.corpus.text_blocks import UnicodeWords

DATA = Path(os.environ.get("LM_DATA_DIR", "."))
N = 200  # faults of each kind
RATES = (1, 5, 10, 15, 20)  # percent of words changed in a near duplicate
LONG = 100  # words of a copied paragraph
RULES = (
    *("language", "gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality"),
    *("exact_duplicates", "near_duplicates", "decontamination", "personal_data"),
)
BANDS = ((14, 8), (20, 5), (28, 4), (40, 3))  # buckets × hashes of near_duplicates
SIMILAR = 0.3  # least share of 5-grams in common with which a document may be called a duplicate
QUALITY = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")


def lines(name: str) -> list[str]:
    path = DATA / name
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        return [line.strip() for line in file if line.strip()]


def untokenized(text: str) -> str:
    """Undo WikiText's spaces around punctuation."""
    text = re.sub(r" @([-,.])@ ", r"\1", text).replace(" n't", "n't")
    text = re.sub(r" ([,.;:!?)\]%'])", r"\1", text)
    return re.sub(r"([(\[$]) ", r"\1", text).replace("<unk>", "Smith")


def paragraphs() -> list[str]:
    found = [untokenized(t) for t in lines("wikitext2/wiki.train.tokens.gz") if t[:2] != "= "]
    return list(dict.fromkeys(text for text in found if len(text.split()) >= 40))


def edited(text: str, percent: int, words: list[str], rng: random.Random) -> str:
    """Return a text with a fraction of its words replaced."""
    found = text.split(" ")
    for at in rng.sample(range(len(found)), max(1, round(len(found) * percent / 100))):
        found[at] = rng.choice(words)
    return " ".join(found)


def personal(kind: str, rng: random.Random) -> str:
    digit = lambda n: "".join(rng.choices(string.digits, k=n))  # noqa: E731
    name = "".join(rng.choices(string.ascii_lowercase, k=7))
    if kind == "email":
        return rng.choice(["{0}.{1}@{2}.com", "{0}_{3}@{2}.co.uk", "{1}+{0}@mail.{2}.org"]).format(
            name, name[::-1], name[:5], digit(2)
        )
    if kind == "ip":
        return f"{rng.choice((8, 23, 52, 91))}.{'.'.join(str(rng.randrange(256)) for _ in 'abc')}"
    if kind == "phone":
        area = rng.choice(("212", "415", "617", "303"))
        return rng.choice(
            ["({0}) 5{1}-{2}", "+1 {0} 5{1} {2}", "{0}-5{1}-{2}", "+44 20 7946 0{3}"]
        ).format(area, f"{rng.randrange(20, 100)}", digit(4), digit(3))
    if kind == "iban":
        body = digit(18)
        return f"DE{98 - int(f'{body}131400') % 97:02}{body}"
    number = "4" + digit(14)
    total = sum(
        sum(divmod(2 * int(d), 10)) if i % 2 == 0 else int(d) for i, d in enumerate(number[::-1])
    )
    return re.sub(r"(\d{4})(?=\d)", r"\1 ", f"{number}{-total % 10}")


MENU = ("Home", "About us", "Contact", "Log in", "Cart (0)")
LOREM = "Lorem ipsum dolor sit amet, consectetur adipiscing elit. "
COOKIES = "This site uses cookies, see our privacy policy number"
BOILERPLATE = {
    "menu": lambda rng: "\n".join(rng.choices(MENU, k=30)),
    "repeated lines": lambda rng: f"Click here to read about item {rng.random()}.\n" * 20,
    "lorem ipsum": lambda rng: LOREM * (3 + rng.randrange(6)),
    "cookie notice": lambda rng: "\n".join(f"{COOKIES} {rng.random()}." for _ in range(8)),
    "numbers": lambda rng: " ".join(f"{rng.random():.4f}" for _ in range(150)),
    "bullets": lambda rng: "\n".join(f"- buy {rng.random():.3f} now ..." for _ in range(25)),
}


def documents(rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield all documents; "fault" names the planted fault, and "of" a copy's original."""
    clean = paragraphs()
    rng.shuffle(clean)
    vocabulary = sorted({word for text in clean[:500] for word in text.split()})
    long = iter([(n, text) for n, text in enumerate(clean) if len(text.split()) >= LONG])
    for n, text in enumerate(clean):
        yield {"id": f"wiki{n}", "text": text, "fault": ""}
    for n, text in enumerate(lines("sentencepiece/botchan.txt")):
        yield {"id": f"botchan{n}", "text": text, "fault": "short"}
    poems = lines("chinese/poetry.txt.gz")
    for n, text in enumerate(rng.sample(poems, 2000) + lines("chinese/wiki_modern.txt")):
        yield {"id": f"zh{n}", "text": text, "fault": "zh"}
    corpus = open_corpus("stdlib", default().data, "train")
    for n, chunk in enumerate(corpus.chunks()):
        if chunk.first:
            yield {"id": f"python{n}", "text": chunk.text, "fault": "code"}
    for percent in RATES:
        for n, text in (next(long) for _ in range(N)):
            copy = edited(text, percent, vocabulary, rng)
            yield {
                "id": f"near{percent}-{n}",
                "text": copy,
                "fault": f"near {percent} %",
                "of": f"wiki{n}",
            }
    for n, text in (next(long) for _ in range(N)):
        yield {"id": f"exact-{n}", "text": text, "fault": "exact", "of": f"wiki{n}"}
    for kind in ("email", "phone", "ip", "card", "iban"):
        for n in range(N):
            planted = personal(kind, rng)
            words = rng.choice(clean).split(" ")[:60]
            words.insert(rng.randrange(len(words)), planted)
            text = " ".join(rng.sample(words, len(words)))  # no near duplicate
            yield {
                "id": f"{kind}-{n}",
                "text": text.replace(planted, f"({planted})"),
                "fault": kind,
                "planted": planted,
            }
    sst2 = [line.split("\t")[0].strip() for line in lines("sst2/glue/test-labeled.tsv")[1:]]
    for kind, tests in (("sst2", sst2), ("multi30k", lines("multi30k/test_2016_flickr.en.gz"))):
        for n, sentence in enumerate(rng.sample(tests, N)):
            words = rng.choice(clean).split(" ")[:80]
            words = rng.sample(words, len(words))
            words.insert(rng.randrange(len(words)), f"{sentence.capitalize()}\n")
            yield {"id": f"{kind}-{n}", "text": " ".join(words), "fault": kind, "planted": sentence}
    german = lines("multi30k/train.de.gz")
    for n in range(N):
        yield {"id": f"de-{n}", "text": " ".join(rng.sample(german, 5)), "fault": "de"}
    for kind, make in BOILERPLATE.items():
        for n in range(N // 4):
            yield {"id": f"{kind}-{n}", "text": make(rng), "fault": kind}


def configuration(folder: Path, name: str, rules: tuple[str, ...]) -> ConfigDict:
    config = ConfigDict()
    config.sources = {"dirty": {"source": f"jsonl:{folder}/dirty/*.jsonl"}}
    config.rules = rules
    config.tests = {
        "sst2": {"source": f"tsv:{DATA}/sst2/glue/test-labeled.tsv", "field": "sentence"},
        "multi30k": {"source": f"text:{DATA}/multi30k/test_2016_flickr.en.gz", "documents": "line"},
    }
    config.c4_quality = {"min_num_sentences": 3}
    if name.count(" "):
        buckets, _, hashes = name.split(" ")[1:]
        config.near_duplicates = {"num_buckets": int(buckets), "hashes_per_bucket": int(hashes)}
    config.personal_data = {"regions": ("US",)}
    return config


def run(
    folder: Path, name: str, rules: tuple[str, ...], workers: int
) -> tuple[dict[str, str], float]:
    """Run rules; return the remaining texts by id, and the seconds."""
    file = folder / f"{name}.py"
    values = configuration(folder, name, rules).to_dict()
    file.write_text(f"def get_config():\n    return {values!r}\n")
    start = time.monotonic()
    make_corpus(
        load_corpus_config(str(file), {}), str(folder / name), "local", workers, lambda _: None
    )
    seconds = time.monotonic() - start
    found = {}
    for path in (folder / name).glob("*.jsonl.gz"):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            row = json.loads(line)
            found[row["id"]] = row["text"]
    return found, seconds


def similarities(everything: dict[str, dict], names: set[str]) -> dict[str, float]:
    """Return the largest Jaccard similarity, by 5-grams, of some documents to any other."""
    words, norm = UnicodeWords(), TextNormConfig()

    def shingles(text: str) -> set[int]:
        found = words.word_tokenize(simplify_text(text, norm))
        return {hash(tuple(found[i : i + 5])) for i in range(max(1, len(found) - 4))}

    of_names = {name: shingles(everything[name]["text"]) for name in sorted(names)}
    owners = defaultdict(list)
    for name, own in of_names.items():
        for shingle in own:
            owners[shingle].append(name)
    largest = dict.fromkeys(of_names, 0.0)
    for other, row in everything.items():
        theirs = shingles(row["text"])
        common = Counter(name for shingle in theirs for name in owners.get(shingle, ()))
        for name, n in common.items():
            if name != other:
                union = len(of_names[name]) + len(theirs) - n
                largest[name] = max(largest[name], n / union)
    return largest


def table_rows(everything: dict[str, dict], rule: str, left: dict[str, str]) -> Iterator[tuple]:
    """Yield (fault, planted, found, removed in total, of this kind) for a rule."""
    by_fault = defaultdict(list)
    for name, row in everything.items():
        by_fault[row["fault"]].append(name)
    gone = everything.keys() - left.keys()

    def counted(faults: list[str], of_kind: list[str]) -> Iterator[tuple]:
        right = gone & {name for fault in of_kind for name in by_fault[fault]}
        for fault in faults:
            yield (
                fault,
                len(by_fault[fault]),
                len(gone & set(by_fault[fault])),
                len(gone),
                len(right),
            )

    if rule == "language":
        yield from counted(["zh", "de", "short", "code", ""], ["zh", "de"])
    elif rule in QUALITY:
        prose = {"", "exact", *(f"near {percent} %" for percent in RATES)}
        others = sorted(by_fault.keys() - prose)
        yield from counted([*BOILERPLATE, "short", "code", "zh", ""], others)
    elif rule in ("exact_duplicates", "near_duplicates"):
        copies = {name: row["of"] for name, row in everything.items() if "of" in row}
        right = [
            n for n, similarity in similarities(everything, gone).items() if similarity >= SIMILAR
        ]
        for fault in ("exact", *(f"near {percent} %" for percent in RATES)):
            found = sum(bool({name, copies[name]} & gone) for name in by_fault[fault])
            yield fault, len(by_fault[fault]), found, len(gone), len(right)
    elif rule == "decontamination":
        yield from counted(["sst2", "multi30k"], ["sst2", "multi30k"])
    else:
        for kind in ("email", "phone", "ip", "card", "iban"):
            names = by_fault[kind]
            found = sum(everything[name]["planted"] not in left[name] for name in names)
            masks = sum(
                text.count(f"<{kind}>")
                for name, text in left.items()
                if everything[name]["fault"] != "code"
            )
            yield kind, len(names), found, masks, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=RULES, choices=RULES, help="rules to run")
    args = parser.parse_args()
    rows = list(documents(random.Random(0)))
    everything = {row["id"]: row for row in rows}
    dirty = args.folder / "dirty"
    dirty.mkdir(parents=True, exist_ok=True)
    random.Random(1).shuffle(rows)
    for part in range(8):
        text = "".join(f"{json.dumps({k: r[k] for k in ('id', 'text')})}\n" for r in rows[part::8])
        if not (dirty / f"{part}.jsonl").exists():
            (dirty / f"{part}.jsonl").write_text(text)
    size = sum(len(row["text"]) for row in rows)
    print(f"{len(rows):,} documents, {size:,} characters\n")
    print("| rule | fault | planted | recall | taken out | precision | MB/s |")
    print("|---|---|---|---|---|---|---|")
    bands = [f"near_duplicates {buckets} × {hashes}" for buckets, hashes in BANDS]
    chosen = [name for name in RULES if name in args.only]
    for name in [n for rule in chosen for n in (bands if rule == "near_duplicates" else [rule])]:
        rule = name.partition(" ")[0]
        left, seconds = run(args.folder, name, (rule,), args.workers)
        for fault, planted, found, total, right in table_rows(everything, rule, left):
            cells = [name, fault or "(clean paragraphs)", planted]
            cells += [f"{100 * found / planted:.1f} %", total]
            cells += [f"{100 * right / total:.1f} %" if total else "–"]
            cells += [f"{size / 1e6 / seconds:.2f}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    if tuple(chosen) != RULES:
        return
    left, seconds = run(args.folder, "all", RULES, args.workers)
    print(f"\nall rules: {len(left):,} documents left, {seconds:.0f} s; card in {args.folder}/all")


if __name__ == "__main__":
    main()
