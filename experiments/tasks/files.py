"""Data and metrics of the tasks in this folder, from local files under LM_DATA_DIR.

Nothing is downloaded. Each function returns the splits of a task as lm-eval's `custom_dataset`.
"""

import gzip
import json
import os
import re
from pathlib import Path

from datasets import Dataset, DatasetDict

from lm.evaluation.scores import squad


def _file(name):
    path = Path(os.environ.get("LM_DATA_DIR") or ".") / name
    if not path.exists():
        raise FileNotFoundError(
            f"no file {path}: set LM_DATA_DIR to the folder that contains {name}"
        )
    return path


def _test(rows):
    return DatasetDict({"test": Dataset.from_list(list(rows))})


def json_lines(path, **_):
    """Return the rows of a JSON lines file, or of all files that match a glob, in order."""
    folder = Path(os.environ.get("LM_DATA_DIR") or ".")
    files = sorted(folder.glob(path)) or [_file(path)]
    lines = (line for file in files for line in file.open(encoding="utf-8") if line.strip())
    return _test(map(json.loads, lines))


def wikitext(path, **_):
    """Return the articles of a WikiText file; each begins with a heading "= Title ="."""
    articles = [[]]
    with gzip.open(_file(path), "rt", encoding="utf-8") as lines:
        for line in lines:
            if re.match(r" = [^=].*[^=] = $", line):
                articles.append([])
            articles[-1].append(line)
    pages = ("".join(lines) for lines in articles)
    return _test({"page": page} for page in pages if page.strip())


def word_perplexity(doc, results):
    """Return the log-likelihood per word, counting line ends as words, and per byte."""
    (nats,) = results
    n_words = len(doc["page"].split()) + doc["page"].count("\n")
    n_bytes = len(doc["page"].encode())
    return {"word_perplexity": (nats, n_words), "bits_per_byte": (nats, n_bytes)}


def sst2(path, **_):
    """Return the sentences and labels of a GLUE file."""
    lines = _file(path).read_text(encoding="utf-8").split("\n")[1:]
    rows = (line.rsplit("\t", 1) for line in lines if line.strip())
    return _test({"sentence": text.strip(), "label": int(label)} for text, label in rows)


def xquad(path, **_):
    """Return the questions of a file in SQuAD's format."""
    articles = json.loads(_file(path).read_text(encoding="utf-8"))["data"]
    return _test(
        {
            "context": paragraph["context"],
            "question": question["question"],
            "answers": [answer["text"] for answer in question["answers"]],
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    )


def answer_scores(doc, results):
    """Exact match and F1 of the words of an answer, SQuAD's."""
    found = squad([results[0].strip()], [doc["answers"]])
    return {"exact_match": found["squad_exact_match"] / 100, "f1": found["squad_f1"] / 100}
