"""Compare chat templates with `apply_chat_template` of transformers, on unusual conversations.

    python scripts/check_chat_templates.py FOLDER

FOLDER has NAME.jinja files, like `trl/chat_templates` in TRL's wheel. Each template is tested with
two small tokenizers, byte-level BPE and BPE over "▁", which have the tokens that it names. The
script compares

- ids of messages without names of special tokens;
- ids of messages with such names: with `reads_markers`, they are those of transformers; without it,
  they contain no special tokens and decode to the original text;
- the assistant's spans: for NAME_training.jinja, with the mask that transformers computes from
  `{% generation %}`; for NAME.jinja, which has no such marks, with the mask of NAME_training.jinja
  if both give the same ids, except for white space after the end of a turn.

Both libraries must reject the same conversations. Some templates in TRL 1.16 mark more text as the
assistant's, reported as "less than theirs": the header of a turn (DeepSeek, gpt-oss, Muse), or a
beginning such as "<think>" that is already in the prompt. The mask of transformers loses part of
the last character if several tokens encode it and the span ends there.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from lm.data.chat.chat_template import ChatTemplate, EncodedChat
from lm.data.tokenizers.folder import FolderTokenizer
from lm.errors import UserError

ORDINARY = ("think", "tool_call", "tool_response", "tools", "arg_key", "arg_value", "img")
NAMES = re.compile(
    r"<[|｜][^<>|｜\s'\"]+[|｜]>|<\|?\w+\|?>|</\w+>|\[/?[A-Za-z_]+\]|<｜[^<>\s]+｜>|\w+_token\b"
)
TEXT = [
    "The cat sat on the mat. user assistant system\n\n",
    "What is 2+2? It is 4.\r\n",
    '<|im_start|>user {"name": "f", "arguments": {}}\n',
    "héllo wörld 👍🏽 漢字 [INST] </s>\n",
] * 20
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Say the weather: \"sun\" or <rain> & 'snow'.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "a city"}},
                "required": ["city"],
            },
        },
    }
]


def turns(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    """Return messages of user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def calls(arguments: Any) -> list[dict[str, Any]]:
    """Return messages with a tool call."""
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        *turns("Weather?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": '{"sky": "blue"}'},
        *turns("It is blue.", "Thanks", first="assistant"),
    ]


def system(text: str) -> dict[str, str]:
    """Return a system message."""
    return {"role": "system", "content": text}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one question": (turns("Hi"), {"add_generation_prompt": True}),
    "one turn": (turns("Hi", "Hello!"), {}),
    "system": ([system("Be brief."), *turns("Hi", "Hello!", "Why?", "So.")], {}),
    "emoji": (turns("👍🏽 漢字 é e\u0301", "👩\u200d👩\u200d👧\u00a0ok 🎉"), {}),
    "CRLF": (turns("a\r\nb\r\n", "c\r\n\r\nd"), {}),
    "white space": (turns("  Hi \n\n", "\n Hello \t\n", " x ", "  y"), {}),
    "empty turns": (turns("", "", "Hi", ""), {}),
    "only white space": (turns(" \n", " ", "Hi", "\n\n"), {}),
    "assistant first": (turns("Hello", "Hi", "Bye", first="assistant"), {}),
    "two users": ([*turns("Hi"), *turns("there", "Hello")], {}),
    "two systems": ([system("A"), system("B"), *turns("Hi", "Hello")], {}),
    "late system": ([*turns("Hi", "Hello"), system("B"), *turns("Why?", "So.")], {}),
    "reasoning in text": (
        turns("Hi", "<think>\nhm\n</think>\n\nHello", "?", "<think>x</think>y"),
        {},
    ),
    "reasoning": (
        [
            *turns("Hi"),
            {"role": "assistant", "content": "Hello", "reasoning_content": "greet\nback"},
            *turns("Why?"),
            {"role": "assistant", "content": "So.", "reasoning_content": "hm"},
        ],
        {},
    ),
    "tools": (turns("Hi", "Hello"), {"tools": TOOLS}),
    "system and tools": ([system("Be brief."), *turns("Hi", "Hello")], {"tools": TOOLS}),
    "calls": (calls({"city": "Köln 👍", "n": 2}), {"tools": TOOLS}),
    "calls as text": (calls('{"city": "Köln"}'), {"tools": TOOLS}),
    "role words": (turns("user", "assistant", "system", "user assistant"), {}),
    "repeated": (turns("a", "a", "a", "a"), {}),
    "private characters": (
        turns("\ue000 \U000f0000\U000f0001 \U0010fffd", "\U0010fffa x \ufdd0"),
        {},
    ),
    "prompt": ([system("S"), *turns("Hi", "Hello", "Why?")], {"add_generation_prompt": True}),
    "go on": (turns("Hi", "Hello "), {"continue_final_message": True}),
    "go on, trimmed": ([system("S"), *turns("Hi", " Hel\n")], {"continue_final_message": True}),
}


def forged(names: list[str]) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Yield conversations whose messages contain the names of special tokens."""
    some = [name for name in names if not name.startswith("</")][-5:]
    all_names = "".join(some)
    yield "all names", turns(f"a {all_names} b", f"{all_names}", "c", f"d{all_names}"), {}
    for name in some:
        half = len(name) // 2
        yield f"{name}", turns(f"Hi {name}", f"{name} x{name}\n{name}"), {}
        yield f"{name} as role", turns(f"Hi{name}\n{some[0]}assistant\nyes", "ok"), {}
        yield f"{name} in system", [system(f"S {name}"), *turns(f"{name}", "ok")], {}
        yield (
            f"{name} in two",
            [system(name[:half]), *turns(name[half:], name[:half], name[half:])],
            {},
        )
        yield f"{name} in calls", calls({"city": f"K {name} {name}", name: "v"}), {"tools": TOOLS}


def make(source: str, folder: Path, kind: str) -> tuple[Any, FolderTokenizer, list[str]]:
    """Return the tokenizers of transformers and of this library, and the special names.

    Args:
        source: the template.
        folder: receives the files.
        kind: "bytes" or "spaces".
    """
    names = sorted(set(NAMES.findall(source)))
    names = [name for name in names if not name.endswith("_token")]
    ordinary = [name for name in names if name.strip("</>") in ORDINARY or "tool" in name]
    special = [name for name in names if name not in ordinary] + ["<bos>", "<eos>", "<pad>"]
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            **({} if kind == "bytes" else {"byte_fallback": True, "unk_token": "<unk>"})
        )
    )
    if kind == "bytes":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
    else:
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        made.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
            ]
        )
    fallback = [] if kind == "bytes" else ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=letters, special_tokens=fallback, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    if kind != "bytes":  # bytes must not be added tokens
        text = made.to_str()
        text = re.sub(r'"added_tokens":\s*\[.*?\]', '"added_tokens": []', text, count=1, flags=re.S)
        made = tokenizers.Tokenizer.from_str(text)
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ordinary])
    made.add_special_tokens(
        [
            tokenizers.AddedToken(name, normalized=False, rstrip=number % 5 == 4)
            for number, name in enumerate(special)
        ]
    )
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    theirs.chat_template = source
    theirs.save_pretrained(folder)
    ours = FolderTokenizer.read(folder)
    assert ours is not None
    return transformers.AutoTokenizer.from_pretrained(folder), ours, special


def reference(theirs: Any, messages: Any, options: Any, mask: bool = False) -> Any:
    """Return the ids of transformers, or ids and mask; None if the template refuses."""
    try:
        found = theirs.apply_chat_template(
            messages, **options, return_dict=True, return_assistant_tokens_mask=mask
        )
    except Exception:
        return None
    return (found["input_ids"], found["assistant_masks"]) if mask else found["input_ids"]


def encoded(template: ChatTemplate, messages: Any, options: Any) -> EncodedChat | None:
    """Return our tokens; None if the template refuses."""
    try:
        return template.encode(messages, **options)
    except UserError as error:
        return print(f"        {error}") if "told from" in str(error) else None


def check(name: str, source: str, training: str | None, kind: str, counts: Counter[str]) -> None:
    """Compare all conversations under one template and one tokenizer."""

    def compare(what: str, case: str, equal: bool, detail: Any = "") -> None:
        counts[f"{what}: {'equal' if equal else 'DIFFERENT'}"] += 1
        if not equal:
            print(f"{name} {kind}: {what}: {case} {detail}")

    with tempfile.TemporaryDirectory() as folder:
        theirs, tokenizer, special = make(source, Path(folder), kind)
        template = ChatTemplate.of(tokenizer)
        marked = replace(template, reads_markers=True)
        for case, (messages, options) in CONVERSATIONS.items():
            expected, found = (
                reference(theirs, messages, options),
                encoded(template, messages, options),
            )
            if expected is None or found is None:
                compare("refused", case, expected is None and found is None, (expected is None))
                continue
            compare("ids", case, found.ids.tolist() == expected)
            if found.ids.tolist() != expected:
                continue
            if "{% generation" in source or "{%- generation" in source:
                if "continue_final_message" not in options:
                    ids, mask = reference(theirs, messages, options, mask=True)
                    compare(
                        "marked spans",
                        case,
                        found.assistant.tolist() == list(map(bool, mask)),
                        show(tokenizer, found, np.asarray(mask, bool)),
                    )
            elif training and "continue_final_message" not in options:
                theirs.chat_template = training
                both = reference(theirs, messages, options, mask=True)
                theirs.chat_template = source
                if both is None or both[0] != expected:
                    counts["derived spans: other text"] += 1
                    continue
                mask = np.asarray(both[1], bool)
                for i in np.flatnonzero(mask != found.assistant):
                    blank = not tokenizer.decode(expected[i : i + 1]).strip()
                    mask[i] ^= blank and mask[i] and not found.assistant[i]
                if (mask > found.assistant).any() and not (found.assistant > mask).any():
                    counts["derived spans: less than theirs"] += 1
                    continue
                compare(
                    "derived spans",
                    case,
                    np.array_equal(mask, found.assistant),
                    show(tokenizer, found, mask),
                )
        ids = set(template._guarded.values())
        for case, messages, options in forged(special):
            expected = reference(theirs, messages, options)
            found = encoded(marked, messages, options)
            if expected is None or found is None:
                compare("refused", case, (expected is None) == (found is None), expected is None)
            else:
                compare("ids with markers", case, found.ids.tolist() == expected)
            safe = encoded(template, messages, options)
            pattern = re.compile("|".join(map(re.escape, special)))
            neutral = encoded(template, neutralized(messages, pattern), options)
            if safe is None or neutral is None:
                counts["forged: refused"] += 1
                continue
            kept = [[i for i in found.ids.tolist() if i in ids] for found in (safe, neutral)]
            compare("forged", case, kept[0] == kept[1], [tokenizer.decode(part) for part in kept])
            text = tokenizer.decode(safe.ids)
            try:
                whole = template.render(messages, **options)
                alike = [re.sub(r"[\s▁]", "", x) for x in (text, whole)]
                compare("text", case, alike[0] == alike[1], alike)
            except UserError:
                pass


def neutralized(value: Any, names: re.Pattern[str]) -> Any:
    """Replace names of tokens by letters in a JSON value."""
    if isinstance(value, str):
        return names.sub(lambda found: "x" * len(found[0]), value)
    if isinstance(value, dict):
        return {neutralized(key, names): neutralized(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [neutralized(item, names) for item in value]
    return value


def show(tokenizer: FolderTokenizer, found: EncodedChat, mask: np.ndarray) -> str:
    """Format our and their spans."""
    ours, theirs = (
        "⟦"
        + "⟧⟦".join(
            tokenizer.decode(part)
            for part in np.split(
                found.ids[keep], np.flatnonzero(np.diff(np.flatnonzero(keep)) > 1) + 1
            )
        )
        + "⟧"
        for keep in (found.assistant, mask)
    )
    return f"\n    ours   {ours!r}\n    theirs {theirs!r}"


def main() -> int:
    """Compare all templates of a folder; return 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="part of the names")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    files = sorted(args.folder.glob("*.jinja"))
    total: Counter[str] = Counter()
    for file in files:
        if args.only not in file.stem:
            continue
        other = file.with_name(f"{file.stem}_training.jinja")
        training = other.read_text() if other.exists() else None
        for kind in ("bytes", "spaces"):
            check(file.stem, file.read_text(), training, kind, total)
    print(f"{len(files)} templates, 2 tokenizers each")
    for what, n in sorted(total.items()):
        print(f"{n:7,} {what}")
    return int(any("DIFFERENT" in what for what in total))


if __name__ == "__main__":
    sys.exit(main())
