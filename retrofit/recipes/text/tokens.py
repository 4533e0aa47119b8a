"""The tokens of what a record holds, and which of them are a response's.

Text and responses end with the tokenizer's EOS token, conversations with what the template writes, so that the end is
drafted too.  Of a conversation the responses are what the template itself marks by `{% generation %}`; where it marks
nothing they are found by what it writes around a message.  A prompt alone has no response token: it ends where the base
is to speak.
Not here: what may stand in a record (`formats.py`).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from retrofit.recipes.text.conversations import Chat
from retrofit.recipes.text.faults import RowError
from retrofit.recipes.text.formats import Asked, Content, Pair, one_line
from retrofit.runtime.chat_template import applied, prompt_tokens, source


def encode(
    content: Content, tokenizer: Any, where: str, vocab: int | None = None, to_answer: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids, and as many flags, True for the tokens of a response.

    A prompt is tokenized by itself, as it is when decoding.  vocab: how many token ids the model knows.  to_answer: the
    base writes the responses of conversations anew, so they are not looked for.
    Raises RowError for a conversation that the tokenizer cannot render or that has no response token, and for
    a token the model does not know.
    """
    tokens, response = _tokens(content, tokenizer, where, to_answer)
    if vocab is not None and max(tokens, default=0) >= vocab:
        known = f"the model knows {vocab:,} and the tokenizer {len(tokenizer):,}"
        problem = f"token id {max(tokens)} is outside the model's vocabulary ({known})"
        raise RowError("vocabulary", where, problem, "use the tokenizer that belongs to the model")
    return tokens, response


def _tokens(content: Content, tokenizer: Any, where: str, to_answer: bool) -> tuple[list[int], list[bool]]:
    if isinstance(content, Chat):
        return _chat_tokens(content, tokenizer, where, to_answer)
    if isinstance(content, Asked):
        prompt = token_ids(tokenizer, content.prompt)
        return prompt, [False] * len(prompt)
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


def asked_tokens(chat: Chat, tokenizer: Any, where: str) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak.  Raises RowError."""
    return list(_guarded(prompt_tokens, where, tokenizer, chat.messages, chat.tools, chat.arguments))


def _ended(tokenizer: Any, tokens: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _chat_tokens(chat: Chat, tokenizer: Any, where: str, to_answer: bool) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        hint = "give records of `text`, or of `prompt` and `response`"
        raise RowError("template", where, "the tokenizer has no chat template", hint)
    if not chat.answered:
        tokens = asked_tokens(chat, tokenizer, where)
        return tokens, [False] * len(tokens)
    if to_answer:
        tokens = list(_applied(chat, tokenizer, where, return_dict=True)["input_ids"])
        return tokens, [False] * len(tokens)
    if not tokenizer.is_fast:
        hint = "give records of `prompt` and `response`"
        raise RowError("template", where, "conversations need a fast tokenizer", hint)
    found = _marked(chat, tokenizer, where) or _surrounded(chat, tokenizer, where)
    if not any(found[1]):
        raise RowError("no_response", where, "the chat template leaves no response token", "remove the record")
    return found


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _marked(chat: Chat, tokenizer: Any, where: str) -> tuple[list[int], list[bool]] | None:
    """Tokens, and which of them the chat template marks as the assistant's; None where it marks nothing.

    None also for a tokenizer that leaves characters out: transformers looks for the token of a span's last character,
    and without one marks all that follows.
    """
    if not _GENERATION.search(source(tokenizer)):
        return None
    encoded = _applied(
        chat,
        tokenizer,
        where,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    if any(end < start for (_, end), (start, _) in pairwise(encoded["offset_mapping"])):
        return None
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _surrounded(chat: Chat, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them lie in the assistant's turns as `_render` finds them."""
    text, spans = _render(chat, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), _inside(encoded["offset_mapping"], spans)


def _applied(chat: Chat, tokenizer: Any, where: str, **options: Any) -> Any:
    """What the chat template makes of a conversation.  Raises RowError where it refuses it."""
    return _guarded(applied, where, tokenizer, chat.messages, chat.tools, chat.arguments, **options)


def _guarded(apply: Any, where: str, *arguments: Any, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return apply(*arguments, **options)
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


def _render(chat: Chat, tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the chat template writes it, and the character span of every assistant turn.

    A span runs from the end of the generation prompt (of the turn's header, where the prompt has more than
    the turn) to the end of the turn's closing token.  Templates may write a turn otherwise once others
    follow (reasoning is dropped), so spans are found by what surrounds the content, never by the content.
    """

    def render(turns: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        some = chat._replace(messages=turns)
        return str(_applied(some, tokenizer, where, tokenize=False, add_generation_prompt=ask))

    whole = render(list(chat.messages))
    spans = []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = list(chat.messages[:number])
        header, found, closing = render([*before, {**message, "content": ANSWER}]).rpartition(ANSWER)
        # Beside a call nothing need be said; templates then leave out the line end before it, and some what is said.
        calls = bool(message.get("tool_calls"))
        closing = closing.strip() if calls else closing.rstrip()
        openings = [render(before, ask=True), *([header] if found else [])]
        starts = [len(opening) for opening in openings if whole.startswith(opening)]
        end = -1
        if calls and whole.startswith(upto := render([*before, message]).rstrip()):
            end = len(upto)
        elif starts and found and closing in whole[starts[0] :]:
            end = whole.index(closing, starts[0]) + len(closing)
        if (not closing and found) or not starts or end < starts[0]:
            raise RowError(
                "template",
                where,
                f"cannot tell where the chat template puts message {number}",
                "give records of `prompt` and `response`",
            )
        spans.append((starts[0], end))
    return whole, spans
