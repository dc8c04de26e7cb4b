import pytest

from lm.errors import UserError
from lm.evaluation.logical_forms import canonical_form, parse_form
from lm.evaluation.scores import score_predictions

FLIGHTS = "( lambda $0 e ( and ( flight $0 ) ( to $0 ap0 ) ( exists $1 ( and ( from $0 $1 ) ( city $1 ) ) ) ) )"  # noqa: E501
LARGEST = "( argmax $0 ( and ( city:t $0 ) ( loc:t $0 s0 ) ) ( size:i $0 ) )"


def score(prediction, reference):
    names = ["logical_form_match"]
    return score_predictions(names, [prediction], [reference])["logical_form_match"]


@pytest.mark.parametrize(
    ("reference", "prediction", "matches"),
    [
        # the pair that coarse2fine's logical/tree.py asserts to be equal
        (
            FLIGHTS,
            "(lambda $a e ( and ( to $a ap0 ) ( flight $a ) ( exists $0 ( and ( city $0 ) ( from $a $0 ) ) ) ) )",  # noqa: E501
            True,
        ),
        (FLIGHTS, FLIGHTS.replace("( from $0 $1 )", "( from $1 $0 )"), False),
        (FLIGHTS, FLIGHTS.replace("( city $1 )", "( city $0 )"), False),
        (FLIGHTS, FLIGHTS.replace("( city $1 )", "( city $1 ) ( city $1 )"), True),
        (LARGEST, "(argmax $3 (and (loc:t $3 s0) (city:t $3)) (size:i $3))", True),
        (LARGEST, "( argmax $0 ( size:i $0 ) ( and ( city:t $0 ) ( loc:t $0 s0 ) ) )", False),
        (LARGEST, LARGEST.replace("and", "or"), False),
        (LARGEST, LARGEST.replace("loc:t $0 s0", "loc:t s0 $0"), False),
        (LARGEST, LARGEST + " )", False),
        (LARGEST, LARGEST[:-2], False),
        (LARGEST, "", False),
        (LARGEST, "( " * 2000 + ") " * 2000, False),
        ("( next_to:t $0 s0 )", "( next_to:t $1 s0 )", False),  # free variables keep their names
        # variables of one name, of two binders side by side and of one within the other
        (
            "( > ( count $0 ( p $0 ) ) ( count $0 ( q $0 ) ) )",
            "( > ( count $0 ( p $0 ) ) ( count $1 ( q $1 ) ) )",
            True,
        ),
        (
            "( count $0 ( p ( the $0 ( q $0 ) ) ) )",
            "( count $0 ( p ( the $1 ( q $0 ) ) ) )",
            False,
        ),
        (["s0", LARGEST], " s0\n", True),
        ("answer ( or s0 s1 )", "answer ( or s1 s0 )", True),
    ],
)
def test_forms_match_up_to_names_and_to_the_order_of_and_and_or(reference, prediction, matches):
    assert score(prediction, reference) == 100 * matches


def test_order_of_arguments_does_not_depend_on_the_names_of_their_variables():
    """Sorting before renaming, as published, takes these two for different ones."""
    one, other = (
        f"( exists ${a} ( exists ${b} ( and ( p ${a} ) ( p ${b} ) ( r ${a} ${b} ) ) ) )"
        for a, b in ((0, 1), (1, 0))
    )
    assert canonical_form(parse_form(one)) == canonical_form(parse_form(other))


def test_damaged_reference_is_named():
    with pytest.raises(UserError, match=r"the reference of example 2: unclosed bracket in"):
        score_predictions(["logical_form_match"], ["s0", "s0"], ["s0", "( p s0"])
