"""Chat tuning: predict the assistant's turns, with several conversations per row.

Shape letters: B batch, L length, D model.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.chat.chat_template import ChatTemplate
from lm.data.chat.messages import content_text
from lm.data.record_store import PackedRecords, Record, RecordStore, pack_records
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.models.embedding_noise import embedding_noise
from lm.objectives.losses import token_loss
from lm.objectives.objective import Batch, BoundModel, LossSums, Objective, Reference, Shapes

_COLUMN = "messages"


@dataclass(frozen=True)
class ChatTuning(Objective[RecordStore, Example]):
    """Next-token prediction of the assistant's turns, including their end-of-turn tokens.

    Attention and positions stay within a conversation.

    Attributes:
        length: row length L in tokens.
        pack: pack several conversations into a row.
        last_turn_only: train only on the last assistant message of a conversation.
        neftune: scale alpha of the embedding noise (Jain et al. 2023); 0: none.
        label_smoothing: probability mass spread over the vocabulary.
        z_loss: weight of the squared log-partition function.
        seed: seed of the packing order.
    """

    families: ClassVar = ("decoder",)
    columns: ClassVar = (_COLUMN,)
    task: ClassVar[str] = "generate"

    length: int
    _: KW_ONLY
    pack: bool = True
    last_turn_only: bool = False
    neftune: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    seed: int = 0

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> ChatTuning:
        return cls(
            config.data.sequence_length,
            pack=config.data.pack,
            last_turn_only=config.objective.last_turn_only,
            neftune=config.objective.neftune,
            label_smoothing=config.objective.label_smoothing,
            z_loss=config.objective.z_loss,
            seed=config.seed,
        )

    @property
    def shapes(self) -> Shapes:
        names = ["inputs", "targets", "segment_ids", "positions"]
        names += ["segment_lengths"] if self.neftune else []
        shapes = dict.fromkeys(names, ((self.length,), "int32"))
        return {**shapes, "weights": ((self.length,), "float32")}

    def examples(self, store: RecordStore, training: bool) -> PackedRecords:
        """Return rows of packed conversations, each without its last token."""
        self.require_columns(store)
        limits = (self.length,)
        lengths = store.lengths(_COLUMN)[:, None] - 1
        if not self.pack:
            lengths[:] = limits
        return PackedRecords(store, pack_records(lengths, limits, self.seed))

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return arrays [L]; segments number the conversations of a row from 1; 0 is padding.

        With NEFTune, "segment_lengths" has the length of each token's conversation.
        """
        row = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        end = 0
        for segment, record in enumerate(example["records"], start=1):
            ids = record.tokens[_COLUMN]
            here = slice(end, end := end + len(ids) - 1)
            row["inputs"][here], row["targets"][here] = ids[:-1], ids[1:]
            row["weights"][here] = self.is_target(record)[1:]
            row["segment_ids"][here] = segment
            row["positions"][here] = np.arange(len(ids) - 1)
            if self.neftune:
                row["segment_lengths"][here] = len(ids) - 1
        return row

    def is_target(self, record: Record) -> np.ndarray:
        """Return which tokens of a conversation are targets, bool [n]."""
        turns = record.turns[_COLUMN]
        if self.last_turn_only:
            turns = turns[turns[:, 2] == turns[-1, 2]]
        found = np.zeros(len(record.tokens[_COLUMN]), bool)
        for start, end, _ in turns:
            found[start:end] = True
        return found

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the cross-entropy of the assistant's tokens."""
        alpha = 0.0 if model.deterministic else self.neftune
        with embedding_noise(alpha, batch.get("segment_lengths")):
            x_BLD = model.hidden(batch["inputs"], batch["positions"], batch["segment_ids"])
        targets, weights = batch["targets"], batch["weights"]
        return token_loss(model, x_BLD, targets, weights, self.label_smoothing, self.z_loss)

    # --- task: generate the assistant's last message

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("rouge", "exact_match")

    def source(self, record: Record) -> np.ndarray:
        """Return the tokens before the last assistant message that is a target."""
        turns = record.turns[_COLUMN]
        return record.tokens[_COLUMN][: turns[turns[:, 2] == turns[-1, 2]][0, 0]]

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the token ids that end an assistant turn."""
        return ChatTemplate.of(tokenizer).stop_ids

    def reference(self, record: Record) -> Reference:
        """Return the text of the last assistant message that is a target."""
        return content_text(record.raw[_COLUMN][record.turns[_COLUMN][-1, 2]]["content"])

    def require_columns(self, store: RecordStore) -> None:
        if _COLUMN not in store.manifest.n_tokens:
            raise UserError(f"{store.manifest.source}: its records are not conversations")
