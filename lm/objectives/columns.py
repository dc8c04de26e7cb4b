"""What an objective needs of the records that it is given."""

from __future__ import annotations

from lm.data.records.record_store import RecordStore
from lm.errors import UserError


def require_columns(store: RecordStore, *roles: str) -> None:
    """UserError unless the records have all these roles; those of a store have the same."""
    found = store[0].raw
    if missing := [role for role in roles if role not in found]:
        raise UserError(
            f"{store.manifest.source}: a record has no {missing[0]} (it has {', '.join(found)}): "
            f"name the columns of {', '.join(roles)} in --config.data.columns"
        )
