"""Guard: a classifier that withholds generated texts before they are shown, and counts them.

It judges complete outputs, so nothing is shown before an output is complete; withheld text is
discarded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

from lm.config.registry import listed
from lm.decoding.generated import Generation
from lm.errors import UserError
from lm.runs.text_classifier import class_columns, load_classifier, weights_digest

_GROUP = 32  # outputs judged together


class Guard:
    """Classifier that judges outputs.

    Attributes:
        digest: digest of its weights.
        n_judged: number of outputs so far.
        n_withheld: number of withheld outputs so far.
    """

    def __init__(self, workdir: str, labels: str, threshold: float):
        """Load a classifier.

        Args:
            workdir: folder of the run.
            labels: classes to withhold, comma-separated.
            threshold: maximum total probability of these classes that is shown.

        Raises:
            UserError: the run does not exist or is not a classifier, or a class is unknown.
        """
        try:
            self._columns = class_columns(workdir, listed(labels), "to withhold")
        except UserError as error:
            raise UserError(f"--config.decode.guard: {error}") from None
        self.digest = weights_digest(workdir)
        self._classifier = load_classifier(workdir, self.digest)
        self._threshold = threshold
        self.n_judged = self.n_withheld = 0

    def withholds(self, texts: list[str]) -> list[bool]:
        """Return which texts to withhold, and count them."""
        if not texts:
            return []
        together, _ = self._classifier.largest(texts, self._columns, windows=64)
        found = (together > self._threshold).tolist()
        self.n_judged += len(found)
        self.n_withheld += sum(found)
        return found

    def screened(self, outputs: Iterable[list[Generation]]) -> Iterator[list[Generation]]:
        """Yield the generations of each input, with withheld texts removed."""
        outputs = iter(outputs)
        while group := list(islice(outputs, _GROUP)):
            texts = [one.text for generations in group for one in generations]
            withheld = iter(self.withholds(texts))
            for generations in group:
                yield [one.without_text() if next(withheld) else one for one in generations]

    def summary(self) -> str:
        """Return a line with the number of withheld outputs."""
        return f"guard: {self.n_withheld} of {self.n_judged} outputs withheld"


def open_guard(decode: Any) -> Guard | None:
    """Return the cached guard for section `decode` of a configuration.

    Raises:
        UserError: it cannot be loaded.
    """
    if not decode.guard:
        return None
    return _guard(decode.guard, decode.guard_labels, decode.guard_threshold)


@lru_cache(maxsize=4)
def _guard(workdir: str, labels: str, threshold: float) -> Guard:
    return Guard(workdir, labels, threshold)
