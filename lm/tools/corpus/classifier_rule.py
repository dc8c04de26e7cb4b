"""Rule that removes documents by a classifier, which is a run of this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from lm.errors import UserError


class Classifier(BaseFilter):
    """Remove documents of some classes, by a classifier on CPU.

    A long document is classified in windows of the model's length; the largest probability counts.
    """

    name = "🧮 classifier"

    def __init__(
        self,
        workdir: str,
        remove: Sequence[str],
        threshold: float = 0.5,
        batch_size: int = 32,
        windows: int = 4,
    ):
        """Create the filter.

        Args:
            workdir: folder of the run.
            remove: classes, of --config.data.labels, to remove.
            threshold: maximum total probability of these classes that is kept.
            batch_size: windows per batch.
            windows: maximum number of windows per document, from its start.

        Raises:
            UserError: the run does not exist or is not a classifier, or a class is unknown.
        """
        if batch_size < 2 or windows < 1:
            raise UserError("batch_size must be at least 2, and windows at least 1")
        super().__init__(batch_size=batch_size)
        from lm.runs.text_classifier import class_columns

        self.columns = class_columns(workdir, remove, "to remove")
        self.workdir, self.threshold, self.windows = workdir, threshold, windows
        self.digest = self.digest_of(workdir)
        self.remove = tuple(remove)

    @staticmethod
    def digest_of(workdir: str, **options: object) -> str:
        """Return the weights digest of the run's newest checkpoint."""
        from lm.runs.text_classifier import weights_digest

        return weights_digest(workdir)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        classifier = _load(self.workdir, self.batch_size, self.digest)
        texts = [document.text for document in batch]
        together, by_class = classifier.largest(texts, self.columns, self.windows)
        for document, probability in zip(batch, together, strict=True):
            document.metadata["score"] = round(float(probability), 4)
        likeliest = (self.remove[column] for column in by_class.argmax(-1))
        return [
            bool(probability <= self.threshold) or (False, label)
            for probability, label in zip(together, likeliest, strict=True)
        ]


def _load(workdir: str, batch_size: int, digest: str) -> Any:
    import jax

    from lm.runs.text_classifier import load_classifier

    jax.config.update("jax_platforms", "cpu")
    return load_classifier(workdir, digest, batch_size)
