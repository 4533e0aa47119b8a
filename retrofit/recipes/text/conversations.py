"""Conversations as people have them, in the one form that chat templates read: `role`, `content` and what goes with it.

    {"role": "user", "content": "Hi"}                              as OpenAI and most data sets have it
    {"from": "human", "value": "Hi"}                               as ShareGPT has it
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]}  content in parts, which have to be text
    {"role": "assistant", "tool_calls": [...]}                     arguments as an object, or as JSON text

Not here: which record holds one (`formats.py`), what a template makes of it (`tokens.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from retrofit.recipes.text.faults import RowError
from retrofit.runtime.chat_template import REASONING

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from`, and the role that templates know."""
HINT = "write the conversation so, or name another column with data.field"


class Chat(NamedTuple):
    """A conversation; the assistant's messages are to be learned.

    tools: what the assistant may call; arguments: what the chat template is told besides.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = {}

    @property
    def answered(self) -> bool:
        """Whether an assistant says anything in it."""
        return any(message["role"] == "assistant" for message in self.messages)


def conversation(messages: Any, where: str, key: str, tools: Any = None) -> Chat:
    """A conversation out of the column `key`.  Raises RowError for what is none."""
    if messages == []:
        raise RowError("no_response", where, f"`{key}` is empty, so there is no response token", "remove the record")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        problem = f"`{key}` must be a list of objects with `role` and `content`"
        raise RowError("field", where, problem, HINT)
    found = [_message(message, where, f"`{key}` {number}: ") for number, message in enumerate(messages)]
    if found[0]["role"] == "assistant":
        problem = f"`{key}` begins with an assistant message, which answers nothing"
        raise RowError("template", where, problem, "remove it")
    return Chat(found, _tools(tools, where))


def text_of(record: Mapping[str, Any], key: str, where: str, at: str = "", blank: bool = False) -> str:
    """Text in a column.  `at`: where in the record, the beginning of what is said about it; blank: it may be.

    Raises RowError.
    """
    value = record.get(key)
    if not isinstance(value, str):
        hint = "make it text, or name another column with data.field"
        raise RowError("field", where, f"{at}`{key}` must be text, not {type(value).__name__}", hint)
    if not blank and not value.strip():
        kind = "empty" if key == "text" else "no_response"
        raise RowError(kind, where, f"{at}`{key}` is empty, so there is no response token", "remove the record")
    _check_characters(value, where, f"{at}`{key}`")
    return value


def _check_characters(text: str, where: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = f"{what} holds half of a surrogate pair, which is no character"
        raise RowError("encoding", where, problem, "write the text anew as UTF-8") from None


def _message(message: Mapping[str, Any], where: str, at: str) -> dict[str, Any]:
    # Rows of one table share their columns: what a message does not have stands there as null.
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given and "from" in given:
        given = _sharegpt(given, where, at)
    role = text_of(given, "role", where, at)
    if "content" in given and not isinstance(given["content"], str):
        given["content"] = _joined(given["content"], where, at)
    calls = _calls(given.pop("tool_calls", None), where, at)
    reasoning = {name: text_of(given, name, where, at, blank=True) for name in REASONING if name in given}
    if calls:
        given = {"content": "", **given, "tool_calls": calls}
    blank = role != "assistant" or bool(calls) or any(text.strip() for text in reasoning.values())
    if blank and reasoning:
        given.setdefault("content", "")
    text_of(given, "content", where, at, blank=blank)
    return given


def _sharegpt(message: Mapping[str, Any], where: str, at: str) -> dict[str, Any]:
    speaker = text_of(message, "from", where, at)
    if speaker not in SPEAKERS:
        problem = f"{at}`from` is {speaker[:40]!r}, which is no known speaker"
        raise RowError("field", where, problem, f"use one of {', '.join(SPEAKERS)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    said = {"content": message["value"]} if "value" in message else {}
    if speaker == "function_call" and isinstance(message.get("value"), str):
        said = {"tool_calls": [_parsed(message["value"], where, f"{at}`value`")]}
    return {"role": SPEAKERS[speaker], **said, **rest}


def _joined(parts: Any, where: str, at: str) -> str:
    """Content in parts, as one text."""
    if not isinstance(parts, list):
        problem = f"{at}`content` must be text or a list of parts, not {type(parts).__name__}"
        raise RowError("field", where, problem, "make it text, or name another column with data.field")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            named = f"of type `{kind}`" if isinstance(kind, str) else f"that is {type(part).__name__}, without a type"
            problem = f"{at}`content` has a part {named}; only parts of type `text` can be trained on"
            raise RowError("field", where, problem, "remove the part or the record")
        texts.append(text_of(part, "text", where, at, blank=True))
    return "".join(texts)


def _calls(calls: Any, where: str, at: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects, which is how templates write them."""
    if calls in (None, "", []):
        return []
    calls = _parsed(calls, where, f"{at}`tool_calls`") if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError("field", where, f"{at}`tool_calls` must be a list of objects", HINT)
    return [_call(call, where, at) for call in calls]


def _call(call: Mapping[str, Any], where: str, at: str) -> dict[str, Any]:
    """A call as templates read it: name and arguments under `function`."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _named(call["function"], where, at)}
    return {"type": "function", "function": _named(call, where, at)}


def _named(call: Mapping[str, Any], where: str, at: str) -> dict[str, Any]:
    given = {key: value for key, value in call.items() if value is not None}
    if not isinstance(given.get("name"), str):
        raise RowError("field", where, f"{at}a tool call has no `name`", HINT)
    if isinstance(given.get("arguments"), str):
        given["arguments"] = _parsed(given["arguments"] or "{}", where, f"{at}`arguments` of a tool call")
    return given


def _tools(tools: Any, where: str) -> Sequence[Any] | None:
    if tools in (None, "", []):
        return None
    tools = _parsed(tools, where, "`tools`") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("field", where, "`tools` must be a list of objects", "write them as JSON, or remove them")
    return tools or None


def _parsed(text: str, where: str, what: str) -> Any:
    """A value that stands in a record as JSON text."""
    _check_characters(text, where, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError("json", where, f"{what} is no valid JSON", "write it as JSON") from None
