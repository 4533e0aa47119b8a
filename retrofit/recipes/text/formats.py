"""What a record of training text holds, and its tokens.

A record has `messages` (a conversation, rendered by the tokenizer's chat template), or `prompt` and
`response`, or `text`.  Text and responses end with the tokenizer's EOS token, conversations with what the
template writes, so that the end is drafted too.  Of a conversation the responses are what the template itself marks by
`{% generation %}`; where it marks nothing they are found by what it writes around a message.
Not here: where records come from.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

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


class Chat(NamedTuple):
    """A conversation; the assistant's messages are to be learned."""

    messages: Sequence[Mapping[str, Any]]


Content = Text | Pair | Chat


def parse(line: str, where: str, field: str | None) -> Content:
    """Content of one line of a JSONL file; `where` (file:line) begins the message of every RowError."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg} (column {error.colno})"
        raise RowError("json", where, message, "put one JSON object on each line") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        problem = f"not valid JSON: {one_line(error)}"
        raise RowError("json", where, problem, "put one JSON object on each line") from None
    return content(record, where, field)


def content(record: Any, where: str, field: str | None) -> Content:
    """What a record holds.  `field` names the column to read, of text or of messages; None finds it.

    Raises RowError for missing fields, wrong types, and records without anything to learn.
    """
    if not isinstance(record, Mapping):
        problem = f"a record must be a JSON object, not {type(record).__name__}"
        raise RowError("json", where, problem, "put one JSON object on each line")
    if field is not None:
        if field not in record:
            hint = "set data.field to one of these"
            raise RowError("field", where, f"no field `{field}`; there are {_keys(record)}", hint)
        if isinstance(record[field], list):
            return _chat(record[field], where, field)
        return Text(_string(record, field, where))
    if "messages" in record:
        return _chat(record["messages"], where, "messages")
    if "prompt" in record and "response" in record:
        return Pair(_string(record, "prompt", where, blank=True), _string(record, "response", where))
    if "text" in record:
        return Text(_string(record, "text", where))
    raise RowError(
        "field",
        where,
        f"needs `text`, or `prompt` and `response`, or `messages`; there are {_keys(record)}",
        "rename the fields, or set data.field",
    )


def encode(content: Content, tokenizer: Any, where: str, vocab: int | None = None) -> tuple[list[int], list[bool]]:
    """Token ids, and as many flags, True for the tokens of a response.

    A prompt is tokenized by itself, as it is when decoding.  vocab: how many token ids the model knows.
    Raises RowError for a conversation that the tokenizer cannot render or that has no response token, and for
    a token the model does not know.
    """
    tokens, response = _tokens(content, tokenizer, where)
    if vocab is not None and max(tokens, default=0) >= vocab:
        known = f"the model knows {vocab:,} and the tokenizer {len(tokenizer):,}"
        problem = f"token id {max(tokens)} is outside the model's vocabulary ({known})"
        raise RowError("vocabulary", where, problem, "use the tokenizer that belongs to the model")
    return tokens, response


def _tokens(content: Content, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    if isinstance(content, Chat):
        return _chat_tokens(content.messages, tokenizer, where)
    if isinstance(content, Pair):
        prompt = token_ids(tokenizer, content.prompt)
        answer = _ended(tokenizer, token_ids(tokenizer, content.response, special=False))
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    tokens = token_ids(tokenizer, content.text)
    tokens = _ended(tokenizer, tokens) if content.complete else tokens
    return tokens, [True] * len(tokens)


def token_ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of a text of any length; `special`: with BOS and whatever else the tokenizer adds."""
    # verbose: it would warn of documents longer than the context, which are cut later
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def one_line(error: Exception) -> str:
    """Message of a foreign error, without its line breaks."""
    return " ".join(str(error).split())


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in list(record)[:10]) or "none"


def _string(record: Mapping[str, Any], key: str, where: str, at: str = "", blank: bool = False) -> str:
    """`at`: where in the record, the beginning of what is said about it."""
    value = record.get(key)
    if not isinstance(value, str):
        hint = "make it text, or name another column with data.field"
        raise RowError("field", where, f"{at}`{key}` must be text, not {type(value).__name__}", hint)
    if not blank and not value.strip():
        kind = "no_response" if key in ("response", "content") else "empty"
        raise RowError(kind, where, f"{at}`{key}` is empty, so there is no response token", "remove the record")
    try:
        value.encode()
    except UnicodeEncodeError:
        problem = f"{at}`{key}` holds half of a surrogate pair, which is no character"
        raise RowError("encoding", where, problem, "write the text anew as UTF-8") from None
    return value


def _chat(messages: Any, where: str, key: str) -> Chat:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        problem = f"`{key}` must be a list of objects with `role` and `content`"
        raise RowError("field", where, problem, "write the conversation so, or name another column with data.field")
    for number, message in enumerate(messages):
        at = f"`{key}` {number}: "
        _string(message, "role", where, at)
        _string(message, "content", where, at, blank=message["role"] != "assistant")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        problem = f"`{key}` has no assistant message, so there is no response token"
        raise RowError("no_response", where, problem, "remove the record")
    if roles[0] == "assistant":
        problem = f"`{key}` begins with an assistant message, which answers nothing"
        raise RowError("template", where, problem, "remove it")
    return Chat(messages)


def _ended(tokenizer: Any, tokens: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _chat_tokens(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        hint = "give records of `text`, or of `prompt` and `response`"
        raise RowError("template", where, "the tokenizer has no chat template", hint)
    if not tokenizer.is_fast:
        hint = "give records of `prompt` and `response`"
        raise RowError("template", where, "conversations need a fast tokenizer", hint)
    found = _marked(messages, tokenizer, where) or _surrounded(messages, tokenizer, where)
    if not any(found[1]):
        raise RowError("no_response", where, "the chat template leaves no response token", "remove the record")
    return found


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _marked(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> tuple[list[int], list[bool]] | None:
    """Tokens, and which of them the chat template marks as the assistant's; None where it marks nothing.

    None also for a tokenizer that leaves characters out: transformers looks for the token of a span's last character,
    and without one marks all that follows.
    """
    template = tokenizer.chat_template
    template = template.get("default", "") if isinstance(template, dict) else template
    if not _GENERATION.search(template):
        return None
    encoded = _applied(
        messages,
        tokenizer,
        where,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    if any(end < start for (_, end), (start, _) in pairwise(encoded["offset_mapping"])):
        return None
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _surrounded(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them lie in the assistant's turns as `_render` finds them."""
    text, spans = _render(messages, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), _inside(encoded["offset_mapping"], spans)


def _applied(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, **options: Any) -> Any:
    """What the chat template makes of messages.  Raises RowError where it refuses them."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, ValueError) as error:  # templates may also trip over what they are given
        problem = f"the chat template refuses the messages: {one_line(error)}"
        hint = "change the roles to those the template knows, or remove the record"
        raise RowError("template", where, problem, hint) from None


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens lie wholly in one of the spans, which are in order and apart; a token of no character does not."""
    starts = [start for start, _ in spans]
    found = []
    for first, last in offsets:
        number = bisect_right(starts, first) - 1
        found.append(number >= 0 and first < last <= spans[number][1])
    return found


ANSWER = "RETROFIT-ANSWER"  # stands in for a message's content, to see what the template writes around it


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the chat template writes it, and the character span of every assistant turn.

    A span runs from the end of the generation prompt (of the turn's header, where the prompt has more than
    the turn) to the end of the turn's closing token.  Templates may write a turn otherwise once others
    follow (reasoning is dropped), so spans are found by what surrounds the content, never by the content.
    """

    def render(turns: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        return str(_applied(turns, tokenizer, where, tokenize=False, add_generation_prompt=ask))

    whole = render(list(messages))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = list(messages[:number])
        header, found, closing = render([*before, {**message, "content": ANSWER}]).rpartition(ANSWER)
        closing = closing.rstrip()
        starts = [len(opening) for opening in (render(before, ask=True), header) if whole.startswith(opening)]
        end = whole.find(closing, starts[0]) if starts else -1
        if not found or not closing or end < 0:
            raise RowError(
                "template",
                where,
                f"cannot tell where the chat template puts message {number}",
                "give records of `prompt` and `response`",
            )
        spans.append((starts[0], end + len(closing)))
    return whole, spans
