"""Parser of HLO text: shapes, loops and trip counts."""

from __future__ import annotations

import pytest

from lm.tools.planning.hlo import Shape, UnknownTripCount, parse_hlo, parse_shapes

LOOP = """
HloModule jit_f, is_scheduled=true

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %state = (s32[], f32[8,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{{1,0:T(8,128)}} get-tuple-element(%state), index=1
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %y = f32[8,4]{{1,0}} negate(%x), metadata={{op_name="jit(f)/while/body/neg"}}
  ROOT %out = (s32[], f32[8,4]{{1,0}}) tuple(%next, %y)
}}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {{
  %state.1 = (s32[], f32[8,4]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{{1,0}}) tuple(%zero, %p)
  %loop = (s32[], f32[8,4]{{1,0}}) while(%start), condition=%condition, body=%body{known}
  ROOT %result = f32[8,4]{{1,0}} get-tuple-element(%loop), index=1
}}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"7"}}'


def test_shapes_of_nested_tuples_with_layouts_memory_spaces_and_comments():
    text = "((bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, f32[]), /*index=2*/pred[3]{0}, s4[4]{0:E(4)})"
    shapes = parse_shapes(text)
    assert shapes == (
        Shape("bf16", (2, 8), 1),
        Shape("f32", ()),
        Shape("pred", (3,)),
        Shape("s4", (4,)),
    )
    assert [shape.bytes for shape in shapes] == [32, 4, 3, 2]


@pytest.mark.parametrize(
    ("limit", "step", "known", "turns"),
    [("12", 1, "", 12), ("12", 2, "", 6), ("12", 1, KNOWN, 7), ("{...}", 1, KNOWN, 7)],
)
def test_body_of_a_loop_runs_as_often_as_its_trip_count(limit, step, known, turns):
    module = parse_hlo(LOOP.format(limit=limit, step=step, known=known))
    times = {i.name: n for _, i, n in module.executions()}
    assert times["y"] == turns
    assert times["result"] == 1


def test_loop_without_a_trip_count_is_an_error():
    with pytest.raises(UnknownTripCount, match="loop in main"):
        list(parse_hlo(LOOP.format(limit="{...}", step=1, known="")).executions())


BRANCHES = """
%small (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %less = f32[8]{{0}} negate(%x)
}}

%large (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %more = f32[8]{{0}} exponential(%x)
}}

ENTRY %main (which: {type}[], x: f32[8]) -> f32[8] {{
  %which = {type}[] parameter(0)
  %x = f32[8]{{0}} parameter(1)
  ROOT %c = f32[8]{{0}} conditional(%which, %x, %x), {branches}
}}
"""


@pytest.mark.parametrize(
    ("kind", "branches"),
    [
        ("s32", "branch_computations={%small, %large}"),
        ("pred", "true_computation=%large, false_computation=%small"),
    ],
)
def test_branches_run_as_often_as_they_are_taken(kind, branches):
    module = parse_hlo(BRANCHES.format(type=kind, branches=branches), taken=0.25)
    times = {i.name: n for _, i, n in module.executions()}
    assert (times["less"], times["more"]) == (0.75, 0.25)


def test_names_operands_and_places():
    module = parse_hlo(LOOP.format(limit="12", step=1, known=""))
    body = module.computations["body"]
    y = body.instructions["y"]
    assert (y.opcode, y.operands, y.op_name) == ("negate", ("x",), "jit(f)/while/body/neg")
    assert body.root.name == "out"
    assert [user.name for user in body.users("y")] == ["out"]
    loop = module.computations["main"].instructions["loop"]
    assert loop.called("body") == ["body"]
    assert loop.called("condition") == ["condition"]
