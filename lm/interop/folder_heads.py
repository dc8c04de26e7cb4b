"""Heads of the class that a model folder contains, from its config.json and its tensors."""

from __future__ import annotations

from collections.abc import Collection

from lm.interop.family import Family, Values

TASK_MODULES = frozenset({"pooler", "classifier", "span_head"})
_OF_TASKS = TASK_MODULES - {"pooler"}


def folder_heads(family: Family, about: Values, names: Collection[str]) -> frozenset[str]:
    """Return the heads of a folder.

    A class for a task, as `architectures` of config.json states it, has its own heads only: files
    of fine-tuned models may still hold the pooler, or the output layer, that they were pretrained
    with. Otherwise the tensors tell; of heads that share some, or modules, the one that fits best.

    Args:
        family: family of the folder.
        about: values of config.json.
        names: names of its tensors in the family's table.
    """
    architectures = about.get("architectures")
    stated = architectures if isinstance(architectures, list) else []
    own = {name: {m.name for m in head.mappings} for name, head in family.heads.items()}
    present = {name: tensors.intersection(names) for name, tensors in own.items()}
    for heads, class_name in family.classes.items():
        of_task = [n for n in heads if _OF_TASKS.intersection(family.heads[n].modules)]
        if class_name in stated and any(present[n] for n in of_task):
            return heads
    found: list[str] = []
    taken: set[str] = set()
    for name in sorted(own, key=lambda n: (len(own[n] - present[n]), -len(present[n]))):
        parts = present[name].union(family.heads[name].modules)
        if present[name] and not parts & taken:
            found.append(name)
            taken |= parts
    return frozenset(found)


def unused_tensors(family: Family, heads: Collection[str], names: Collection[str]) -> list[str]:
    """Return the tensors of heads that a folder's class lacks; for arguments see `folder_heads`."""
    used = {m.name for name in heads for m in family.heads[name].mappings}
    other = {m.name for head in family.heads.values() for m in head.mappings} - used
    if any(family.heads[name].replaces_output for name in heads):
        other.add(family.output)
    other |= {copy for copy, of in family.copies.items() if of in other}
    return sorted(other.intersection(names))
