"""The keys of `data`: what is read, and how it becomes batches."""

from __future__ import annotations

from lm.config.key import Key

DATA: dict[str, Key] = {
    "data.source": Key(
        "stdlib",
        "Corpora, comma-separated: stdlib, text:FILE, jsonl:FILE, tfds:NAME. For seq2seq, "
        "classification and span_qa one of tsv:FILE, csv:FILE, jsonl:FILE, parallel:FILE|FILE, "
        "squad:FILE.",
    ),
    "data.weights": Key((), "Mixture weights of the corpora; (): by tokens."),
    "data.directory": Key(
        "", "Where relative paths start; empty: $LM_DATA_DIR, else the current folder.", free=True
    ),
    "data.field": Key("text", "Field of a jsonl or TFDS record that holds the text."),
    "data.documents": Key("file", "A text file's document.", choices=("file", "line")),
    "data.split": Key("train", "TFDS split to train on."),
    "data.validation_split": Key("validation", "TFDS split to validate on."),
    "data.validation_source": Key("", "Corpora for validation, written as data.source."),
    "data.test_source": Key("", "Corpora for `lm eval --split test`.", free=True),
    "data.columns": Key(
        "", "Columns of records by role, such as text=sentence,label=label; numbers count from 0."
    ),
    "data.header": Key(True, "TSV and CSV files start with the names of their columns."),
    "data.bad_rows": Key("error", "A bad row is an error, or skipped.", choices=("error", "skip")),
    "data.labels": Key("", "Names of the classes, comma-separated; empty: a number is learnt."),
    "data.target_length": Key(0, "Tokens of a target sequence; 0: data.sequence_length.", low=0),
    "data.doc_stride": Key(128, "Tokens from one window of a long context to the next.", low=1),
    "data.pack": Key(True, "Several short pairs share a row."),
    "data.order": Key(
        "shuffled",
        "Order of training windows; contiguous: row r of a batch goes on where it was before.",
        choices=("shuffled", "contiguous"),
    ),
    "data.validation_fraction": Key(
        0.0,
        "Part held out where there is no validation source: random documents or records, or the "
        "end of the only document.",
        low=0.0,
        high=0.9,
    ),
    "data.tokenizer": Key(
        "byte",
        "byte, char, words (of the corpus), words:FILE, sentencepiece (trained on the corpus), "
        "sentencepiece:FILE, tokenizers:FILE.json, gpt2:FOLDER, run:WORKDIR (that of a run).",
    ),
    "data.tokenizer_vocab_size": Key(
        4096, "Pieces of a SentencePiece model trained on the corpus; most words of words.", low=2
    ),
    "data.tokenizer_min_count": Key(1, "Rarer words are unknown to the words tokenizer.", low=1),
    "data.lowercase": Key(False, "The words tokenizer lower-cases."),
    "data.sequence_length": Key(256, "Tokens of an example.", low=1),
    "data.stride": Key(
        0, "Training windows start every so many tokens; 0: where the last one ended.", low=0
    ),
    "data.isolate_documents": Key(True, "Attention and positions stay within a document."),
    "data.batch_size": Key(8, "Sequences of a step, over all devices.", low=1),
    "data.cache_directory": Key(
        "", "Token stores; empty: $LM_CACHE_DIR, else ~/.cache/lm.", free=True
    ),
    "data.workers": Key(0, "Processes that tokenise; 0: one a core.", low=0, high=1024, free=True),
    "data.prefetch": Key(2, "Batches prepared ahead.", low=1, high=1024, free=True),
}
