"""Chat templates give the ids and spans of transformers; message text never becomes a token."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.chat.added_tokens import extended
from lm.data.chat.chat_encoder import _by_decoding, _located
from lm.data.chat.chat_template import ChatTemplate
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lm.data.tokenizers.folder import FolderTokenizer
from lm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from lm.errors import UserError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ("<s>", "</s>", "<|head|>", "<|turn|>", "<|end|>", "[INST]", "[/INST]")
ORDINARY = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<call>")
SHIPPED = SimpleNamespace(added_tokens="template", chat_template="", chat_markers=False)
TOOLS = [{"type": "function", "function": {"name": "f", "description": 'say "<|end|>" & é'}}]
# As Llama 3: trimmed contents, roles that are printed.
TRIMMED = """{{ bos_token }}{% for m in messages %}
{{ '<|head|>' + m.role + '<|turn|>\n\n' + m.content | trim + '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|turn|>\n\n' }}{% endif %}"""
# As Qwen 3: reasoning is taken out of earlier turns; tools as JSON; calls.
REASONING = """{% set ns = namespace(last=-1) %}
{% if tools %}{{ '<|turn|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>
{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content or '' %}
    {%- set thought = m.reasoning_content or '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|turn|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}{% generation %}
        {%- if loop.index0 > ns.last and thought %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<call>' + call.function.name + call.function.arguments | tojson }}
        {%- endfor %}
        {{- '<|end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}{{- content + '<|end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"""
# As Mistral: roles have to alternate, and nothing but the end of a text ends an answer.
INSTRUCTIONS = """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
# As DeepSeek: tokens of roles that are not special; system messages first.
FIRST = """{{ bos_token }}{% set ns = namespace(text='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.text = ns.text + m.content %}
{%- endif %}{% endfor %}{{ ns.text }}
{%- for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
# As GLM: the next turn's token ends an answer.
OPEN = """{% for m in messages %}{{ ('<|head|>' if m.role == 'user' else '<|turn|>') + '\n' }}
{%- if m.content.strip() %}{{ '\n' + m.content.strip() }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|turn|>{% endif %}"""
TEMPLATES = {
    "trimmed": TRIMMED,
    "reasoning": REASONING,
    "instructions": INSTRUCTIONS,
    "first": FIRST,
    "open": OPEN,
}


@pytest.fixture(scope="module")
def vocabulary():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["user assistant system\n\nThe cat sat <|turn|> on <|end|> the mat. [INST] \n"] * 20
    made.train_from_iterator(texts, trainer)
    added = tokenizers.AddedToken
    made.add_tokens([added(name, normalized=False) for name in ORDINARY])
    strips = ("<|head|>",)
    made.add_special_tokens(
        [added(name, normalized=False, rstrip=name in strips) for name in SPECIAL]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def pairs(vocabulary, tmp_path_factory):
    """Template of this library and tokenizer of transformers, by name of the template."""
    found = {}
    for name, source in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        vocabulary.chat_template = source
        vocabulary.save_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        found[name] = ChatTemplate.of(FolderTokenizer.read(folder)), theirs
    return found


def turns(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def reference(theirs, messages, mask=False, **options):
    found = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=mask, **options
    )
    return (found["input_ids"], found["assistant_masks"]) if mask else found["input_ids"]


ALPHABET = (
    (*SPECIAL, *ORDINARY, "<|tu", "rn|>", "<", "|>", "user", "assistant", "\n", "\r\n", "  ", "é",
     "👍🏽", "\U000f0000", "\U0010fffd", "\ufdd0", "a", "The cat", '"', "\\", "\u2028", "")
)  # fmt: skip
CONTENTS = st.lists(st.sampled_from(ALPHABET), max_size=6).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user", "assistant", "user")), "content": CONTENTS}
    ),
    min_size=1,
    max_size=5,
)


def alternating(messages):
    """Return the messages with roles that every template takes."""
    return turns(*(message["content"] for message in messages))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(messages=MESSAGES, prompt=st.booleans())
def test_ids_match_transformers_and_no_message_makes_a_token(pairs, name, messages, prompt):
    template, theirs = pairs[name]
    if name == "instructions":
        messages = alternating(messages)
    options = {"add_generation_prompt": prompt}
    expected = reference(theirs, messages, **options)
    marked = ChatTemplate(template.tokenizer, template.sources, reads_markers=True)
    assert marked.encode(messages, **options).ids.tolist() == expected
    found = template.encode(messages, **options)
    guarded = set(template._guarded.values())
    harmless = [m | {"content": re.sub(r"[<>|\[\]｜]", "x", m["content"])} for m in messages]
    kept = [[i for i in found.ids.tolist() if i in guarded]]
    kept.append([i for i in template.encode(harmless, **options).ids.tolist() if i in guarded])
    if name != "reasoning":  # there a message may hold "</think>"
        assert kept[0] == kept[1]
    text = template.tokenizer.decode(found.ids)
    assert "".join(text.split()) == "".join(template.render(messages, **options).split())
    if not any(word in m["content"] for m in messages for word in (*SPECIAL, *ORDINARY)):
        joined = "".join(m["content"] for m in messages)
        if "<|turn|>" not in joined:  # two messages may make a name
            assert found.ids.tolist() == expected
    assert sorted(found.message.tolist()) == found.message.tolist() or name == "first"


ODD = {
    "plain": turns("Hi", "Hello!", "Why?", "So."),
    "assistant first": turns("Hello", "Hi", "Bye", first="assistant"),
    "empty": turns("", "", "Hi", ""),
    "white space": turns(" Hi\r\n", "\n Hello ", " ", "\t"),
    "emoji": turns("👍🏽", "👩\u200d👩 ok 🎉"),
    "words of roles": turns("user", "assistant", "system", "user"),
    "repeated": turns("a", "a", "a", "a"),
    "two users": [*turns("Hi"), *turns("there", "Hello")],
    "systems": [{"role": "system", "content": x} for x in "AB"] + turns("Hi", "Hello"),
    "reasoning": turns("Hi", "<think>\nx\n</think>\n\nyes", "?", "<think>\ny\n</think>\n\nno"),
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": "é <|end|>"}}}


@pytest.mark.parametrize("case", ODD)
def test_spans_match_generation_marks_with_and_without_them(pairs, case):
    template, theirs = pairs["reasoning"]
    ids, mask = reference(theirs, ODD[case], mask=True)
    found = template.encode(ODD[case])
    assert found.ids.tolist() == ids
    assert found.assistant.tolist() == list(map(bool, mask))
    source = re.sub(r"{% (end)?generation %}", "", template.source)
    derived = ChatTemplate(template.tokenizer, {"default": source}).encode(ODD[case])
    assert derived.ids.tolist() == ids
    assert derived.assistant.tolist() == found.assistant.tolist()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trimmed", ["Hello!<|end|>", "So.<|end|>"]),
        ("instructions", [" Hello!</s>", " So.</s>"]),
        ("first", ["Hello!</s>", "So.</s>"]),
        ("open", ["\n\nHello!<|head|>", "\n\nSo."]),
    ],
)
def test_spans_end_with_the_token_that_ends_a_turn(pairs, name, said):
    template, _ = pairs[name]
    found = template.encode(ODD["plain"])
    spans = [found.ids[found.assistant & (found.message == i)] for i in (1, 3)]
    assert [template.tokenizer.decode(span) for span in spans] == said
    ends = {"trimmed": "<|end|>", "open": "<|head|>"}
    assert template.stop_ids[0] == template.tokenizer.token_id(ends.get(name, "</s>"))


def test_tools_and_calls_are_json_in_which_no_text_is_a_token(pairs):
    template, theirs = pairs["reasoning"]
    chat = [*turns("Hi"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    text = theirs.apply_chat_template(chat, tools=TOOLS, tokenize=False)
    assert template.render(chat, TOOLS) == text
    found, end = template.encode(chat, TOOLS), template.tokenizer.token_id("<|end|>")
    assert template.tokenizer.decode(found.ids) == text
    assert found.ids.tolist().count(end) == 3
    said = template.tokenizer.decode(found.ids[found.assistant])
    assert said == '<call>f{"a": 1, "b": "é <|end|>"}<|end|>'
    named = FolderTokenizer.from_files(
        {
            **template.tokenizer.files(),
            "additional_chat_templates/tool_use.jinja": b"{{ tools | length }} tool",
        }
    )
    assert ChatTemplate.of(named).render(turns("Hi"), TOOLS) == "1 tool"
    assert ChatTemplate.of(named).render(turns("Hi")) == template.render(turns("Hi"))


@pytest.mark.parametrize("name", ["trimmed", "instructions", "first"])
@pytest.mark.parametrize("begun", ["Hel", " Hello \n", "<think>"])
def test_started_answer_is_continued(pairs, name, begun):
    template, theirs = pairs[name]
    chat = turns("Hi", begun)
    found = template.encode(chat, continue_final_message=True)
    assert found.ids.tolist() == reference(theirs, chat, continue_final_message=True)


@pytest.mark.parametrize(
    "base",
    [
        ByteTokenizer(),
        CharTokenizer.fit([*ALPHABET, "<|im_end|> user assistant system"]),
        WordTokenizer.fit(["user assistant system Hi <|im_end|> b"]),
        SentencePieceTokenizer.fit(
            ["user\nassistant\nsystem\nHi <|im_end|> b é\n"] * 30, vocab_size=300
        ),
    ],
    ids=["byte", "char", "words", "sentencepiece"],
)
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(CONTENTS.map(lambda x: x.replace("\u2028", "")), min_size=1, max_size=3))
def test_no_message_makes_a_token_of_any_tokenizer(base, contents):
    tokenizer = extended(base, SHIPPED)
    template = ChatTemplate.of(tokenizer)
    chat = turns(*(text.replace("<|turn|>", "<|im_end|>") for text in contents))
    found = template.encode(chat)
    start, end = (tokenizer.token_id(f"<|im_{x}|>") for x in ("start", "end"))
    assert found.ids.tolist().count(start) == found.ids.tolist().count(end) == len(chat)
    assert np.all(np.diff(found.message) >= 0)
    for i, message in enumerate(chat):
        said = found.ids[found.assistant & (found.message == i)].tolist()
        own = [*base.encode(message["content"]).tolist(), end]
        assert said == (own if message["role"] == "assistant" else [])


WORDS = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
PIECES = SentencePieceTokenizer.fit(
    ["user\nassistant [INST] return 1\nHi  b é\n"] * 30, vocab_size=300
)
WHOLE = st.lists(
    st.sampled_from(
        ("▁", "    return 1", "  ", " ", "\n\n", "\t", "\r\n", "😀", "👍🏽", "\x1b", "\0",
         "\x7f", '"', "\\", "a", "é", "e\u0301", "\ufeff", "\ufffd", "\u2003", "\u2002", "</s>",
         "[/INST]")
    ),
    max_size=5,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("base", ["bpe", "pieces", "bytes", "words"])
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(WHOLE, min_size=2, max_size=4))
def test_targets_cover_all_assistant_text_without_gaps(pairs, base, contents):
    template, before, after = {
        "bpe": (pairs["instructions"][0], " ", "</s>"),
        "pieces": (ChatTemplate(PIECES, {"default": INSTRUCTIONS}), " ", ""),  # decodes no </s>
        "bytes": (ChatTemplate.of(extended(ByteTokenizer(), SHIPPED)), "", "<|im_end|>"),
        "words": (ChatTemplate(ByteTokenizer(), {"default": WORDS}), "", ""),
    }[base]
    if base == "words":
        contents = [
            x + "a" * (re.fullmatch(r'[\s"\\\x00-\x1f\x7f]*', x) is not None) for x in contents
        ]
    chat = turns(*contents)
    found = template.encode(chat)
    for i, message in enumerate(chat):
        at = np.flatnonzero(found.assistant & (found.message == i))
        assert np.all(np.diff(at) == 1)
        assert base != "pieces" or i % 2 == 0 or found.ids[at[-1]] == PIECES.eos_id
        said = template.tokenizer.decode(found.ids[at])
        assert said == (before + message["content"] + after if i % 2 else "")


@pytest.mark.parametrize("text", ["▁", "a▁▁b ▁", "é▁\n", "😀\ufffd▁ Hi"])
def test_characters_of_several_tokens_are_where_they_are(text):
    ids = PIECES.encode(text)
    for found in (_located(PIECES, text, ids), _by_decoding(PIECES, text, ids)):
        assert np.all(found.ends > found.starts)
        assert found.starts[0] == 0
        assert found.ends[-1] == len(text)
    assert np.all(np.diff(_located(PIECES, text, ids).starts) >= 0)


def test_invalid_input_is_rejected(pairs):
    template, _ = pairs["instructions"]
    for chat, problem in (
        ([], "no message"),
        (["Hi"], "message 1 is not an object"),
        ([{"content": "Hi"}], "message 1 is not an object"),
        (turns("Hi", "Ho", first="assistant"), "alternate"),
        (turns("\ud83d"), "not valid Unicode"),
        ([{"role": "user"}], "chat template"),
    ):
        with pytest.raises(UserError, match=problem):
            template.encode(chat)
    reversing = ChatTemplate(
        template.tokenizer, {"default": "{{ messages[0].content | urlencode }}"}
    )
    with pytest.raises(UserError, match="cannot be distinguished from its own"):
        reversing.encode(turns("a<b"))
    with pytest.raises(UserError, match="no default chat template"):
        ChatTemplate(template.tokenizer, {"tool_use": ""}).encode(turns("Hi"))


def test_turns_that_words_mark_are_known():
    template = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    marked = ChatTemplate(ByteTokenizer(), {"default": template})
    assert not marked.has_role_tokens
    found = marked.encode(turns("Hi", "Hello"))
    assert bytes(found.ids[found.assistant].tolist()) == b"Hello"


def test_last_turn_ends_with_all_that_ends_the_conversation(pairs):
    """As Phi 3, whose conversations end with a token of their own."""
    source = "{% for m in messages %}<|head|>{{ m.role + m.content }}<|end|>{% endfor %}</s>"
    template = ChatTemplate(pairs["trimmed"][0].tokenizer, {"default": source})
    found = template.encode(turns("?", "Hi", "?", "Ho"))
    assert template.tokenizer.decode(found.ids[found.assistant]) == "Hi<|end|>Ho<|end|></s>"
    end = template.tokenizer.token_id("<|end|>")
    assert template.stop_ids[0] == end


def test_values_that_name_keys_stay_what_they_are(pairs):
    """As gpt-oss, which looks for the name of an argument in a list."""
    source = (
        "{% for t in tools %}{% for name, of in t.arguments.items() %}"
        "{{ name }}{% if name not in t.required %}?{% endif %}: {{ of.about }}\n{% endfor %}"
        "{% endfor %}{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}"
    )
    template = ChatTemplate(pairs["trimmed"][0].tokenizer, {"default": source})
    tools = [
        {"required": ["city"], "arguments": {"city": {"about": "<|end|>"}, "n": {"about": ""}}}
    ]
    found = template.encode(turns("?"), tools)
    assert template.tokenizer.decode(found.ids) == "city: <|end|>\nn?: \n<|turn|>?<|end|>"
    assert found.ids.tolist().count(template.tokenizer.token_id("<|end|>")) == 1
