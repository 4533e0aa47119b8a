"""Records in the shapes that data sets have: each is the same document as the one written as `messages`."""

import json

import pytest
from text_sources import CHATML, MESSAGES, answers, read, write_lines

from retrofit.errors import DataError

TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "user"}]
SYSTEM = {"role": "system", "content": "You are a"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TOOL_TALK = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "1"},
    {"role": "assistant", "content": "three"},
]
QWEN = (
    "{% if tools %}<|im_start|>system\nTools:"
    "{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    "<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""What Qwen3's template does with reasoning, calls of tools and `enable_thinking`."""
SHAPES = {
    "sharegpt": ({"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "user"}]}, TALK),
    "sharegpt_by_role": ({"conversations": TALK}, TALK),
    "sharegpt_system": (
        {"system": "You are a", "conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "user"}]},
        [SYSTEM, *TALK],
    ),
    "sharegpt_says_system": (
        {"conversations": [{"from": "system", "value": "You are a"}, {"from": "user", "value": "a b"},
                           {"from": "chatgpt", "value": "user"}]},
        [SYSTEM, *TALK],
    ),
    "alpaca": ({"instruction": "a b", "input": "", "output": "user", "text": "all of it"}, TALK),
    "alpaca_input": (
        {"instruction": "a", "input": "b", "output": "user"}, [{"role": "user", "content": "a\n\nb"}, TALK[1]]
    ),
    "alpaca_null": ({"instruction": "a b", "input": None, "output": "user", "system": None}, TALK),
    "dolly": ({"instruction": "a b", "context": "", "response": "user", "category": "qa"}, TALK),
    "messages_of_completion": ({"prompt": TALK[:1], "completion": TALK[1:]}, TALK),
    "text_after_messages": ({"prompt": TALK[:1], "response": "user"}, TALK),
    "messages_after_text": ({"prompt": "a b", "completion": TALK[1:]}, TALK),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "user"}]}]},
        TALK,
    ),
    "columns_of_a_table": (
        {"messages": [{**message, "tool_calls": None, "reasoning_content": None} for message in TALK], "tools": None},
        TALK,
    ),
    "null_messages": ({"messages": None, "conversations": None, "instruction": "a b", "output": "user"}, TALK),
    "null_text": ({"text": None, "prompt": TALK}, TALK),
    "null_beside": ({"messages": TALK, "text": None, "prompt": "x"}, TALK),
    "arguments_as_text": (
        {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [
            {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}]}, *TOOL_TALK[2:]]},
        TOOL_TALK,
    ),
    "calls_as_text": (
        {"messages": [TALK[0], {"role": "assistant", "tool_calls": json.dumps([CALL])}, *TOOL_TALK[2:]]}, TOOL_TALK
    ),
    "calls_of_sharegpt": (
        {"conversations": [{"from": "human", "value": "a b"},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                           {"from": "observation", "value": "3"}, {"from": "gpt", "value": "three"}]},
        [TALK[0], {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "add", "arguments": {"a": 1}}}]}, *TOOL_TALK[2:]],
    ),
    "thinking": (
        {"messages": [TALK[0], {**TALK[1], "thinking": "so"}]}, [TALK[0], {**TALK[1], "reasoning_content": "so"}]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_is_the_document_of_its_messages(chat_tokenizer, tmp_path, row, messages):
    chat_tokenizer.chat_template = QWEN
    (found,) = read(write_lines(tmp_path / "a.jsonl", row), chat_tokenizer)
    (want,) = read(write_lines(tmp_path / "b.jsonl", {"messages": messages}), chat_tokenizer)
    assert (found.tokens, found.response) == (want.tokens, want.response)
    assert chat_tokenizer.decode(found.tokens) == chat_tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_completion_is_a_response(tokenizer, tmp_path):
    (found,) = read(write_lines(tmp_path / "a.jsonl", {"prompt": "def f", "completion": "(x)"}), tokenizer)
    (want,) = read(write_lines(tmp_path / "b.jsonl", {"prompt": "def f", "response": "(x)"}), tokenizer)
    assert (found.tokens, found.response) == (want.tokens, want.response)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
def test_tools_and_calls_go_through_the_template(chat_tokenizer, tmp_path, tools):
    chat_tokenizer.chat_template = QWEN
    (document,) = read(write_lines(tmp_path / "a.jsonl", {"messages": TOOL_TALK, "tools": tools}), chat_tokenizer)
    text = chat_tokenizer.decode(document.tokens)
    assert text.startswith(f"<|im_start|>system\nTools:\n{json.dumps(TOOLS[0])}<|im_end|>\n")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert answers(document, chat_tokenizer) == [call, "<think>\n\n</think>\n\nthree<|im_end|>"]


def test_a_call_where_the_template_leaves_out_what_is_said(chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}",
    )
    (document,) = read(write_lines(tmp_path / "a.jsonl", {"messages": TOOL_TALK}), chat_tokenizer)
    assert answers(document, chat_tokenizer) == ["add<|im_end|>", "three<|im_end|>"]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_the_template_by_the_name_it_reads(chat_tokenizer, tmp_path, name):
    row = {"messages": [TALK[0], {**TALK[1], name: "so"}]}
    for read_as in ("reasoning_content", "thinking", "reasoning"):
        chat_tokenizer.chat_template = QWEN.replace("reasoning_content", read_as)
        (document,) = read(write_lines(tmp_path / "a.jsonl", row), chat_tokenizer)
        assert answers(document, chat_tokenizer) == ["<think>\nso\n</think>\n\nuser<|im_end|>"]


def test_template_arguments_are_those_of_the_recipe(chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = QWEN
    path = write_lines(tmp_path / "a.jsonl", {"messages": TALK})
    (thinking,) = read(path, chat_tokenizer, template={"enable_thinking": True})
    (quick,) = read(path, chat_tokenizer, template={"enable_thinking": False})
    assert thinking.tokens == quick.tokens == read(path, chat_tokenizer)[0].tokens
    assert answers(thinking, chat_tokenizer) == ["<think>\n\n</think>\n\nuser<|im_end|>"]
    assert answers(quick, chat_tokenizer) == ["user<|im_end|>"], "what the prompt says is not the response's"


def test_a_list_of_values_is_drawn_from_per_document(chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = QWEN
    path = write_lines(tmp_path / "a.jsonl", *[{"messages": TALK}] * 400)

    def modes(seed, order):
        found = read(path, chat_tokenizer, seed=order, data_seed=seed, template={"enable_thinking": [True, False]})
        return {document.id: len(answers(document, chat_tokenizer)[0]) > 20 for document in found}

    first = modes(0, 0)
    assert 160 < sum(first.values()) < 240
    assert modes(0, 1) == first, "whatever the order of an epoch"
    assert modes(1, 0) != first


BAD = {
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, TALK[1]]},
        "`messages` 0: `content` has a part of type `image_url`; only parts of type `text`",
    ),
    "part_of_text": (
        {"messages": [{"role": "user", "content": ["hi"]}, TALK[1]]},
        "has a part that is str, without a type",
    ),
    "content_number": ({"messages": [{"role": "user", "content": 3}, TALK[1]]}, "must be text or a list of parts"),
    "speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "`from` is 'narrator', which is no known"),
    "tools": ({"messages": TALK, "tools": "{"}, "`tools` is no valid JSON"),
    "tools_number": ({"messages": TALK, "tools": [3]}, "`tools` must be a list of objects"),
    "calls": ({"messages": [TALK[0], {"role": "assistant", "tool_calls": [3]}]}, "`tool_calls` must be a list"),
    "call_name": ({"messages": [TALK[0], {"role": "assistant", "tool_calls": [{}]}]}, "a tool call has no `name`"),
    "call_arguments": (
        {"messages": [TALK[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "`arguments` of a tool call is no valid JSON",
    ),
    "alpaca_blank": ({"instruction": "a", "output": " "}, "`output` is empty, so there is no response token"),
    "alpaca_alone": ({"instruction": "a"}, "data.responses=regenerate"),
    "nothing_said": ({"messages": [TALK[0], {"role": "assistant"}]}, "`content` must be text, not NoneType"),
}


@pytest.mark.parametrize(("row", "problem"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_used_is_named(chat_tokenizer, tmp_path, row, problem):
    with pytest.raises(DataError) as caught:
        read(write_lines(tmp_path / "a.jsonl", {"messages": MESSAGES}, row), chat_tokenizer)
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ")
    assert problem in f"{caught.value}; {caught.value.hint}"
