"""scripts/recombine.py: new pairs of question and form from exchanges that pairs show."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lm.data.held_out import split_records
from lm.evaluation.logical_forms import parse_form, without_names

SCRIPTS = Path(__file__).parents[2] / "scripts"
LARGEST = "( argmax $0 ( state:t $0 ) ( size:i $0 ) )"
UNKNOWN = "<unk>\t( <unk> s9 )"  # a pair of words that occur once, as it is written
PAIRS = [
    ("what is the area of s0", "( area:i s0 )"),
    ("what is the area of the largest state", f"( area:i {LARGEST} )"),
    ("what river run through s0", "( lambda $0 e ( and ( river:t $0 ) ( loc:t $0 s0 ) ) )"),
]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import recombine

        return recombine


def test_phrases_that_two_pairs_exchange_are_exchanged_in_a_third(script):
    inner = LARGEST.replace("$0", "$1")
    form = f"( lambda $0 e ( and ( river:t $0 ) ( loc:t $0 {inner} ) ) )"
    new = [("what river run through the largest state", form)]
    assert script.recombined_pairs(PAIRS) == new
    assert script.recombined_pairs([(x, y.replace("$0", "$a")) for x, y in PAIRS]) == new
    whole = [("is s0", "s0"), ("is s1", "s1"), ("where is s0", "( where s0 )")]
    assert script.recombined_pairs(whole) == []  # the forms have nothing in common
    assert script.recombined_pairs([*PAIRS, ("name s0", "s0")]) == new


@pytest.mark.parametrize(
    ("form", "part", "other", "expected"),
    [
        ("( p ( the $0 ( q $0 ) ) )", "( q $0 )", "( r s0 $0 )", "( p ( the $0 ( r s0 $0 ) ) )"),
        ("( the $0 ( q $0 ) )", "( q $0 )", "( q $0 ) ( r $0 )", None),  # `the` takes one
        ("( the $0 ( and ( q $0 ) ) )", "( q $0 )", "( q $0 ) ( q $0 )", None),
        ("( or p q )", "q", "( or r s ) t", "( or p ( or r s ) t )"),
        ("( and p q )", "q", "( and r s )", "( and p r s )"),
        ("( p s0 )", "s0", "( q $0 )", None),  # its variable would be free
        ("answer s0 ( )", "s0", "( p )", "answer ( p ) ( )"),
    ],
)
def test_exchange_leaves_a_form_well_formed(script, form, part, other, expected):
    # the parts as arguments of a binder of $0
    part, other = (without_names(parse_form(f"( the $0 {x} )"))[2:] for x in (part, other))
    assert script.exchanged(script.parsed_forms(form), part, other) == expected


def test_held_out_pairs_are_not_recombined_and_half_of_the_output_is_new(
    script, tmp_path, monkeypatch, capsys
):
    pairs = [*PAIRS * 4, *((f"seldom{i}", f"( rare{i} s9 )") for i in range(8))]
    lines = ["\t".join(pair) for pair in pairs]
    file, out = tmp_path / "pairs.txt", tmp_path / "out"
    file.write_text("".join(f"{line}\n" for line in lines))
    words = ["recombine.py", str(file), str(out), "--held_out", "0.3", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    train, validation = (
        (out / f"{name}.txt").read_text().splitlines() for name in ("train", "validation")
    )

    class Store(list):
        def select(self, rows: np.ndarray) -> list[str]:
            return [self[i] for i in rows]

    class Data:
        validation_fraction, validation_seed = 0.3, 3

    kept, held_out = split_records(Store(lines), Data)
    assert validation == held_out
    assert train[:-1] == [line if "area" in line or "river" in line else UNKNOWN for line in kept]
    assert train[-1].startswith("what river run through the largest state\t")

    file.write_text("what is it\t( area:i s0 )\nwhat is it\t( area:i s0\n")
    with pytest.raises(SystemExit):
        script.main()
    assert f"{file}:2: unclosed bracket" in capsys.readouterr().err
