"""`lm chat` and `lm generate --chat` from the command line, and the terminal on a pty."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from lm.cli import chat_terminal, main

# A session that answers slowly, in the loop of the verb.
SLOW = """
import fcntl, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from lm.cli.chat_terminal import Terminal

class Session:
    n_forgotten = 0

    def say(self, text):
        yield "to " + ascii(text) + chr(27)
        for i in range(200 if text == "long" else 0):
            time.sleep(0.05)
            yield "."

Terminal(Session(), sys.stdin.isatty() and sys.stdout.isatty(), sys.stdout).run()
print("left")
"""


class Pty:
    """A program on a terminal of 80 columns."""

    def __init__(self, *command):
        main_end, end = pty.openpty()
        self._end = main_end
        environment = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
        self._process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, start_new_session=True, env=environment
        )
        os.close(end)
        self.text = ""

    def type(self, text):
        os.write(self._end, text.encode())

    def wait_for(self, text):
        deadline = time.monotonic() + 30
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self._end], [], [], 0.1)[0]:
                self.text += os.read(self._end, 4096).decode()
        before, _, self.text = self.text.partition(text)
        return before

    def end(self):
        code = self._process.wait(timeout=30)
        os.close(self._end)
        return code


@pytest.mark.skipif(sys.platform != "linux", reason="a terminal of Linux")
def test_terminal_edits_and_is_interrupted_and_left():
    terminal = Pty(sys.executable, "-c", SLOW)
    terminal.wait_for(">>> ")
    terminal.type("wrld\x02\x02\x02o\n")  # Ctrl-B moves back
    terminal.wait_for("to 'world'\ufffd")  # an escape of the model's is not obeyed
    terminal.wait_for(">>> ")
    terminal.type("\x10\n")  # Ctrl-P: the line before
    terminal.wait_for("to 'world'")
    terminal.wait_for(">>> ")
    terminal.type("long\n")
    terminal.wait_for("to 'long'")
    terminal.wait_for("..")
    terminal.type("\x03")
    assert terminal.wait_for(">>> ").count(".") < 190
    time.sleep(0.3)  # readline misses a signal between its prompt and its wait
    terminal.type("half a line\x03")
    terminal.wait_for(">>> ")
    terminal.type('"""a\nb\n"""\n')
    terminal.wait_for("to 'a\\nb'")
    terminal.wait_for(">>> ")
    terminal.type("/nope\n")
    terminal.wait_for("error: no command /nope; /help lists them")
    terminal.wait_for(">>> ")
    terminal.type("\x04")
    terminal.wait_for("left")
    assert terminal.end() == 0


@pytest.fixture
def lm(tiny_run, one_device, monkeypatch, capsys):
    """Return what a verb on the run prints, or its error."""

    def run(verb, *words, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([verb, "--workdir", str(tiny_run), *map(str, words)])
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err.splitlines()[-1]

    return run


def test_scripted_chat(lm, tmp_path):
    file = tmp_path / "saved.jsonl"
    script = f"hello\n/system Be short.\n\n/regenerate\n/save {file}\n"
    printed = lm("chat", "--greedy", stdin=script)
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "hello"
    assert printed.endswith(messages[2]["content"] + "\n")
    assert lm("chat", "--greedy", "--system", "Be short.", stdin="hello\n") in printed
    assert lm("chat", stdin=f"/load {file}\n/undo\n/exit\nhello\n") == ""
    lm("chat", stdin=f'/load {file}\n/system ""\n"""/etc\nis it?"""\n/save {file}\n')
    said = [message["content"] for message in json.loads(file.read_text())["messages"]]
    assert [said[0], said[2]] == ["hello", "/etc\nis it?"]
    help_of_commands = lm("chat", stdin="/help\n/exit now\n")
    assert help_of_commands == "error: /exit takes no argument"
    assert set(chat_terminal.COMMANDS) >= {"/reset", "/regenerate", "/save", "/load", "/undo"}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("/nope\n", "no command /nope"),
        ("/save\n", "/save FILE"),
        ("/load /nowhere/x.jsonl\n", "no file /nowhere/x.jsonl"),
        ("/save /nowhere/x.jsonl\n", "/nowhere/x.jsonl: No such file"),
        ("/save ~nobody-here/x.jsonl\n", "~nobody-here/x.jsonl"),
        ("/regenerate\n", "no question to answer"),
        ("x" * 300 + "\n", "the message has"),
        ("\udcff\n", "must be UTF-8"),
    ],
)
def test_error_ends_a_script(lm, script, said):
    assert said in lm("chat", stdin=script)


def test_generate_answers_messages(lm, tmp_path):
    options = ["--chat", "--greedy", "--max_new_tokens", "4"]
    (made,) = json.loads(lm("generate", *options, "--prompt", "hello", "--json"))
    assert made["prompt"] == "hello"
    assert lm("generate", *options, "--prompt", "hello") == made["text"] + "\n"
    rows = [
        {"messages": [{"role": "user", "content": "hello"}]},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "hello"}]},
        {"prompt": "hello"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--input", source, "--output", output]
    assert lm("generate", *options, *files) == ""
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] == made["text"] for row in found] == [True, False, True]
    assert found[0]["messages"] == rows[0]["messages"]
    assert found[1]["messages"][0] == {"role": "system", "content": "S"}
    assert lm("generate", *options, *files) == ""  # continued: nothing is missing
    (tmp_path / "in.txt").write_text("hello\n")
    lines = ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt"]
    assert lm("generate", *options, *lines) == ""
    assert (tmp_path / "out.txt").read_text() == made["text"].replace("\n", " ") + "\n"
    source.write_text('{"messages": [{"role": "user"}]}\n')
    assert "in.jsonl:1: message 1: no content" in lm("generate", *options, *files)
    assert "--system needs --chat" in lm("generate", "--system", "S", "--prompt", "x")
