"""Recombine pairs of question and logical form into new ones, for training (Andreas 2020).

    python scripts/recombine.py PAIRS OUT [--held_out 0.25] [--seed 0]

Where two pairs differ in one phrase of the questions and one part of the forms, the phrases mean
the parts and can be exchanged: "what is the area of s0" and "what is the area of the largest state"
differ by "s0" and "the largest state". A new pair is an old one with an exchange that two others
show, "what river run through the largest state". A part is one or more arguments side by side.

PAIRS has a question and a form a line, separated by a tab. Half of OUT/train.txt are all new pairs
and half are copies of the old ones. A word that occurs once in the pairs becomes `<unk>`, so that
the words tokenizer learns what to do with unknown ones. With --held_out, that fraction of the
pairs, chosen by --seed as `data.validation_fraction` chooses, makes OUT/validation.txt, and nothing
is made of it. It takes 10 seconds for 600 pairs, and grows with the square of their number.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from lm.data.tokenizers.basic import UNKNOWN
from lm.evaluation.logical_forms import BOUND, UNORDERED, Form, parse_form, without_names

Part = tuple  # of a sequence of words, or of the arguments of a form
Pair = tuple[tuple[str, ...], Form]  # words of a question, and its parsed forms
Exchanges = Mapping[tuple[Part, Part], set[tuple[Part, Part]]]
T = TypeVar("T", bound=tuple)


def recombined_pairs(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return all new pairs by one exchange, sorted; questions of `pairs` are not new.

    Args:
        pairs: questions and logical forms.
    """
    parsed = sorted({(tuple(text.split()), parsed_forms(form)) for text, form in pairs}, key=repr)
    known = {words for words, _ in parsed}
    exchanges = find_exchanges(parsed)
    new = set()
    for words, form in parsed:
        for (phrase, part), others in exchanges.items():
            once = len(places(words, phrase)) == 1 and occurrences(form, part) == 1
            if part == form or not once:  # a whole form has no environment
                continue
            for other_phrase, other_part in others:
                question = replaced(words, phrase, other_phrase)
                found = exchanged(form, part, other_part)
                if question not in known and found is not None:
                    new.add((" ".join(question), found))
    return sorted(new)


def parsed_forms(text: str) -> Form:
    """Parse a form, or several side by side, into a tuple of forms without names."""
    return without_names(parse_form(f"( {text} )"))


def find_exchanges(pairs: Sequence[Pair]) -> Exchanges:
    """Return the phrases with their parts that each phrase with its part can be exchanged for."""
    found: dict[tuple[Part, Part], set[tuple[Part, Part]]] = defaultdict(set)
    for (words, form), (other_words, other_form) in combinations(pairs, 2):
        phrases = differing(words, other_words)
        if phrases == (words, other_words) or not all(phrases):
            continue
        parts = differing_parts(form, other_form)
        if parts[0] != form and all(any(_names(part)) for part in parts):
            one, other = zip(phrases, parts, strict=True)
            found[one].add(other)
            found[other].add(one)
    return found


def differing(one: T, other: T) -> tuple[T, T]:
    """Return what two sequences have between their common start and their common end."""
    shorter = min(len(one), len(other))
    start = next((i for i in range(shorter) if one[i] != other[i]), shorter)
    ends = range(shorter - start)
    end = next((i for i in ends if one[-1 - i] != other[-1 - i]), shorter - start)
    return one[start : len(one) - end], other[start : len(other) - end]  # type: ignore[return-value]


def differing_parts(one: Part, other: Part) -> tuple[Part, Part]:
    """Return the smallest parts in which two sequences of forms differ, at any depth."""
    parts = differing(one, other)
    if all(len(part) == 1 and isinstance(part[0], tuple) for part in parts):
        return differing_parts(parts[0][0], parts[1][0])
    return parts


def exchanged(form: Form, part: Part, other: Part) -> str | None:
    """Return parsed forms as text, with a part replaced; None if it is not well formed then.

    Only `and` and `or` take any number of arguments; `and` within `and` is merged, and an argument
    that repeats another is refused, as is a variable that nothing binds.
    """
    try:
        _, *words, _ = _words(_merged(_put(form, part, other)))
    except ValueError:
        return None
    return " ".join(words)


def places(sequence: Part, part: Part) -> list[int]:
    """Return where a part occurs in a sequence."""
    starts = range(len(sequence) - len(part) + 1)
    return [i for i in starts if sequence[i : i + len(part)] == part]


def occurrences(form: Form, part: Part) -> int:
    """Count a part in a form, at any depth."""
    if not isinstance(form, tuple):
        return 0
    return len(places(form, part)) + sum(occurrences(argument, part) for argument in form)


def replaced(sequence: Part, part: Part, other: Part) -> Part:
    """Replace the first occurrence of a part."""
    start = places(sequence, part)[0]
    return sequence[:start] + other + sequence[start + len(part) :]


def _names(form: Form) -> Iterator[bool]:
    """Yield whether a word is a name, for the words of a form: not a variable."""
    if isinstance(form, tuple):
        for part in form:
            yield from _names(part)
    else:
        yield isinstance(form, str) and form != BOUND


def _put(form: Form, part: Part, other: Part) -> Form:
    if not isinstance(form, tuple):
        return form
    if not places(form, part):
        return tuple(_put(argument, part, other) for argument in form)
    if len(part) != len(other) and form[0] not in UNORDERED:
        raise ValueError("another number of arguments")
    return replaced(form, part, other)


def _merged(form: Form) -> Form:
    if not isinstance(form, tuple):
        return form
    form = tuple(map(_merged, form))
    if form[:1] != ("and",):
        return form
    inner = [x[1:] if isinstance(x, tuple) and x[:1] == ("and",) else (x,) for x in form]
    form = sum(inner, ())
    if len(set(form)) < len(form):
        raise ValueError("an argument twice")
    return form


def _words(form: Form, depth: int = 0) -> Iterator[str]:
    """Yield the words of a form; variables are named $0, $1, … from the outermost."""
    if isinstance(form, tuple):
        depth += form[1:2] == (BOUND,)
        yield "("
        for part in form:
            yield from _words(part, depth)
        yield ")"
    elif form == BOUND:
        yield f"${depth - 1}"
    elif isinstance(form, str):
        yield form
    elif form < depth:
        yield f"${depth - 1 - form}"
    else:
        raise ValueError("a variable that nothing binds")


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read pairs; ValueError with the place if a line is no question and form."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text, *forms = line.split("\t")
        try:
            if len(forms) != 1 or not text.strip() or not parse_form(*forms):
                raise ValueError("not a question and a logical form, separated by a tab")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        pairs.append((text, *forms))
    return pairs


def write_pairs(
    path: Path, pairs: Sequence[tuple[str, str]], rare: frozenset[str] | set[str] = frozenset()
) -> None:
    """Write pairs, with rare words as unknown ones."""
    texts = (
        "\t".join(" ".join(UNKNOWN if w in rare else w for w in text.split()) for text in pair)
        for pair in pairs
    )
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def recombine(path: Path, out: Path, fraction: float, seed: int) -> None:
    """Write OUT/train.txt and, if a fraction is held out, OUT/validation.txt."""
    pairs = read_pairs(path)
    border = int(len(pairs) * (1 - fraction))
    if not 0 < border <= len(pairs):
        raise ValueError(f"holding out {fraction} of {len(pairs)} pairs leaves none to recombine")
    order = np.random.default_rng(seed).permutation(len(pairs))
    kept, held_out = ([pairs[i] for i in np.sort(part)] for part in np.split(order, [border]))
    counts = Counter(word for pair in kept for text in pair for word in text.split())
    rare = {word for word, count in counts.items() if count == 1}
    new = recombined_pairs(kept)
    print(f"{len(kept)} pairs, {len(new)} new ones")
    out.mkdir(parents=True, exist_ok=True)
    copies = max(1, round(len(new) / len(kept)))
    write_pairs(out / "train.txt", kept * copies + new, rare)
    if held_out:
        write_pairs(out / "validation.txt", held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--held_out", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    try:
        recombine(args.pairs, args.out, args.held_out, args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
