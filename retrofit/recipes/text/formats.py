"""What a record of training text holds: a conversation, a prompt and its response, a prompt alone, or text.

    messages [tools]                             a conversation, for the tokenizer's chat template
    conversations [system] [tools]               the same, as ShareGPT has it
    instruction [input] output [system]          the same, as Alpaca has it; also `context` and `response`
    prompt, response or completion               as text; where they are lists of messages, a conversation
    text                                         all of it to be learned
    prompt; instruction; a conversation that     prompts alone, which the base answers
      ends with the user                           (data.responses=regenerate)

Not here: where records come from, what becomes of conversations (`conversations.py`), tokens (`tokens.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from retrofit.recipes.text.conversations import Chat, conversation, text_of
from retrofit.recipes.text.faults import RowError


class Text(NamedTuple):
    """Text, all of it to be learned."""

    text: str
    complete: bool = True
    """The document ends here, so EOS follows."""


class Pair(NamedTuple):
    """A prompt, and the response to learn."""

    prompt: str
    response: str


class Asked(NamedTuple):
    """A prompt alone: what a user says, or the beginning of a text."""

    prompt: str


Content = Text | Pair | Chat | Asked


class Form(NamedTuple):
    """How records are read.  field: the column to read, None finds it; alone: prompts may lack a response."""

    field: str | None = None
    alone: bool = False


COLUMNS = "`text`, `messages`, `conversations`, `prompt` and `response` or `completion`, or `instruction` and `output`"


def parse(line: str, where: str, form: Form) -> Content:
    """Content of one line of a JSONL file; `where` (file:line) begins the message of every RowError."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} (column {error.colno})"
        raise RowError("json", where, message, "put one JSON object on each line") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        problem = f"not valid JSON: {one_line(error)}"
        raise RowError("json", where, problem, "put one JSON object on each line") from None
    return content(record, where, form)


def content(record: Any, where: str, form: Form) -> Content:
    """What a record holds.

    Raises RowError for missing fields, wrong types, and records without anything to learn.
    """
    if not isinstance(record, Mapping):
        problem = f"a record must be a JSON object, not {type(record).__name__}"
        raise RowError("json", where, problem, "put one JSON object on each line")
    found = _named(record, form.field, where) if form.field is not None else _found(record, where)
    unanswered = isinstance(found, Asked) or (isinstance(found, Chat) and not found.answered)
    if unanswered and not form.alone:
        key = form.field or next((key for key in ("messages", "conversations") if key in record), "prompt")
        problem = f"`{key}` has no response, so there is no response token"
        if isinstance(found, Chat):
            problem = f"`{key}` has no assistant message, so there is no response token"
        hint = "remove the record, or let the base answer with data.responses=regenerate"
        raise RowError("no_response", where, problem, hint)
    return found


def _named(record: Mapping[str, Any], field: str, where: str) -> Content:
    if field not in record:
        hint = "set data.field to one of these"
        raise RowError("field", where, f"no field `{field}`; there are {_keys(record)}", hint)
    if isinstance(record[field], list):
        return conversation(record[field], where, field, record.get("tools"))
    return Text(text_of(record, field, where))


def _found(record: Mapping[str, Any], where: str) -> Content:
    # Rows of one table share their columns: what a record does not have stands there as null.
    there = {key for key, value in record.items() if value is not None}
    for key in ("messages", "conversations", "conversation"):
        if key in there:
            return _with_system(conversation(record[key], where, key, record.get("tools")), record, where)
    answer = next((key for key in ("response", "completion", "output") if key in there), None)
    if "instruction" in there:
        return _alpaca(record, answer, where)
    if "prompt" in there and answer in ("response", "completion"):
        return _prompted(record, answer, where)
    if "text" in there or ("text" in record and "prompt" not in there):
        return Text(text_of(record, "text", where))
    if isinstance(record.get("prompt"), list):
        return conversation(record["prompt"], where, "prompt", record.get("tools"))
    if "prompt" in record:
        return Asked(text_of(record, "prompt", where))
    raise RowError(
        "field", where, f"needs {COLUMNS}; there are {_keys(record)}", "rename the fields, or set data.field"
    )


def _alpaca(record: Mapping[str, Any], answer: str | None, where: str) -> Chat:
    more = next((key for key in ("input", "context") if record.get(key) is not None), None)
    parts = [text_of(record, "instruction", where), text_of(record, more, where, blank=True) if more else ""]
    messages = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    if answer is not None:
        messages.append({"role": "assistant", "content": text_of(record, answer, where)})
    return _with_system(Chat(messages), record, where)


def _prompted(record: Mapping[str, Any], answer: str, where: str) -> Pair | Chat:
    prompt, response = record["prompt"], record[answer]
    if not isinstance(prompt, list) and not isinstance(response, list):
        return Pair(text_of(record, "prompt", where, blank=True), text_of(record, answer, where))
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": text_of(record, "prompt", where)}]
    after = response
    if not isinstance(response, list):
        after = [{"role": "assistant", "content": text_of(record, answer, where)}]
    return conversation([*before, *after], where, "prompt", record.get("tools"))


def _with_system(chat: Chat, record: Mapping[str, Any], where: str) -> Chat:
    """What stands in a column of its own and the assistant is told first."""
    if (
        not isinstance(record.get("system"), str)
        or not record["system"].strip()
        or chat.messages[0]["role"] == "system"
    ):
        return chat
    first = {"role": "system", "content": text_of(record, "system", where)}
    return chat._replace(messages=[first, *chat.messages])


def one_line(error: Exception) -> str:
    """Message of a foreign error, without its line breaks."""
    return " ".join(str(error).split())


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in list(record)[:10]) or "none"
