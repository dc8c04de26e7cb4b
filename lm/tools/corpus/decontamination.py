"""Decontamination: remove documents that contain n-grams, or short texts, of test sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from lm.tools.corpus.corpus_sources import NamedSource

_SHORT = "short.json"  # texts shorter than an n-gram, by test set


class DecontaminationIndex(NGramsDecontIndexer):
    """Index of test-set n-grams, and of shorter texts."""

    def __new__(cls, *args: object, **options: object) -> DecontaminationIndex:
        return object.__new__(cls)  # datatrove's own requires lighteval, which is not used

    def __init__(
        self,
        output_folder: str,
        tests: Sequence[NamedSource],
        config: NGramsDecontConfig,
        shortest: int,
        words: WordTokenizer,
    ):
        super().__init__(output_folder, config=config, language=words)
        self.tests, self.shortest = tuple(tests), shortest

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        short = {}
        for test in self.tests:
            hashes: set[int] = set()
            texts: set[str] = set()
            for document in test.documents():
                words = self.tokenizer.word_tokenize(
                    simplify_text(document.text, self.config.norm_config)
                )
                if len(words) >= self.config.n_grams:
                    hashes.update(self.compute_hashes(document.text))
                elif len(words) >= self.shortest:
                    texts.add(" ".join(words))
                else:
                    self.stat_update(f"too_short_{test.name}")
            array = np.array(sorted(hashes), dtype=self.config.hash_config.np_descr)
            with self.output_folder.open(f"{test.name}.index.hashes", "wb") as file:
                file.write(array.tobytes())
            short[test.name] = sorted(texts)
        with self.output_folder.open(_SHORT, "wb") as file:
            file.write(orjson.dumps(short))
        yield from ()


class Decontamination(NGramsDecontFilter):
    """Filter by the index."""

    def __init__(
        self, index_folder: str, config: NGramsDecontConfig, shortest: int, words: WordTokenizer
    ):
        super().__init__(index_folder, config, language=words)
        self.shortest = shortest
        self._short: dict[str, list[tuple[list[str], str]]] = {}  # by their first words

    def load_index_hashes(self) -> None:
        super().load_index_hashes()
        with self.index_folder.open(_SHORT, "rb") as file:
            for test, texts in orjson.loads(file.read()).items():
                for text in texts:
                    words = text.split(" ")
                    start = " ".join(words[: self.shortest])
                    self._short.setdefault(start, []).append((words, test))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        result = super().filter(doc)
        if result is True:
            words = self.tokenizer.word_tokenize(simplify_text(doc.text, self.config.norm_config))
            for at, start in enumerate(ngrams(words, self.shortest)):
                for text, test in self._short.get(" ".join(start), ()):
                    if words[at : at + len(text)] == text:
                        doc.metadata["contaminated_ngram"] = " ".join(text)
                        doc.metadata["contaminated_task"] = test
                        return False, test
            return True
        return False, doc.metadata["contaminated_task"]
