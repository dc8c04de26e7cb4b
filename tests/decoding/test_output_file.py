import gzip
import json

import pytest

from lm.decoding.generate_file import continue_file, join_lines, read_inputs
from lm.errors import UserError

INPUTS = ["a", "b", "", "d"]
MADE_BY = {"step": 3, "beam_size": 5}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new folder" / "out.txt"


def run(output, inputs=INPUTS, made_by=MADE_BY):
    """Write each input in upper case; the number of the first that was written."""
    starts = []

    def lines_from(n):
        starts.append(n)
        yield from (text.upper() for text in inputs[n:])

    continue_file(output, inputs, made_by, lines_from)
    return starts[0]


def test_one_input_per_line(output):
    assert run(output) == 0
    assert output.read_text() == "A\nB\n\nD\n"


@pytest.mark.parametrize(
    ("size", "n_whole"), [(0, 0), (1, 0), (2, 1), (3, 1), (5, 3), (6, 3), (7, 4)]
)
def test_second_start_continues_wherever_the_first_was_cut(output, size, n_whole):
    run(output)
    whole = output.read_bytes()
    output.write_bytes(whole[:size])
    assert run(output) == n_whole
    assert output.read_bytes() == whole


def test_lines_survive_the_death_of_the_process(output):
    def lines_from(n):
        yield "A"
        assert output.read_text() == "A\n"
        yield "B"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continue_file(output, INPUTS, MADE_BY, lines_from)
    assert run(output) == 2


def test_inputs_may_get_more_at_the_end_only(output):
    run(output)
    assert run(output, [*INPUTS, "e"]) == 4
    assert output.read_text() == "A\nB\n\nD\nE\n"
    for others in (["x", *INPUTS], INPUTS[:2], ["a", "b", "", "x", "e"]):
        with pytest.raises(UserError, match="made from different inputs: delete"):
            run(output, others)
    assert output.read_text() == "A\nB\n\nD\nE\n"


def test_output_of_different_settings_is_not_changed(output):
    run(output)
    with pytest.raises(UserError, match=r"different settings \(beam_size: 5 → 4; new: None → 1\)"):
        run(output, made_by={"step": 3, "beam_size": 4, "new": 1})
    about = output.with_name("out.txt.json")
    about.write_text("{")
    with pytest.raises(UserError, match=r"out\.txt\.json is damaged"):
        run(output)
    about.unlink()
    with pytest.raises(UserError, match=r"out\.txt\.json does not: delete"):
        run(output)
    assert output.read_text() == "A\nB\n\nD\n"


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --output"):
        run(tmp_path / "file" / "out.txt")
    with pytest.raises(UserError, match="cannot write to --output"):
        run(tmp_path)


def test_inputs_are_lines_or_fields_of_objects(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo \u2028 words\r\nthree")
    assert read_inputs(tmp_path / "a.txt", "source", "") == ["one", "", "two \u2028 words", "three"]
    rows = [{"source": "s", "en": "e"}, {"en": "f\ng", "source": "t"}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_inputs(tmp_path / "a.jsonl.gz", "source", "") == ["s", "t"]
    columns = "source=en, target=de"
    assert read_inputs(tmp_path / "a.jsonl.gz", "source", columns) == ["e", "f\ng"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "a.jsonl:2: no text in a field 'prompt'"),
        ('{"text": "x"}', "a.jsonl:2: no text in a field 'prompt'"),
        ('{"prompt": ', "a.jsonl:2: not valid JSON"),
        ('{"prompt": "\\ud800"}', "a.jsonl:2: 'prompt' is not UTF-8"),
    ],
)
def test_bad_inputs_are_reported_with_their_place(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_inputs(file, "prompt", "")
    with pytest.raises(UserError, match=r"no file .*b\.txt"):
        read_inputs(tmp_path / "b.txt", "prompt", "")


def test_output_is_a_one_line_error():
    assert join_lines("a\nb\r\nc\rd\u2028") == "a b c d\u2028"
