"""What a user hands over as prompts, as lists of token ids; everything that cannot be one is one clear error.

    text                raw, special tokens only as the tokenizer itself adds them
    token ids           a list, a numpy array or a tensor of one dimension
    messages            through the chat template; where the last one is the assistant's, it is continued
    text and images     what the model's own processor makes of them, a mapping with pixels

Prompts come as a list or tuple of these, as a tokenizer's output (`BatchEncoding`: padding is taken off by its
attention mask, on either side), as a tensor or array [prompts, tokens], or as one prompt's ids alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrofit.adapters.given import Given
from retrofit.errors import UsageError
from retrofit.runtime.backends.interface import Backend
from retrofit.runtime.chat_template import prompt_tokens
from retrofit.runtime.options import as_int, shown

Prompt = str | Mapping[str, Any] | Sequence[int] | Sequence[Mapping[str, Any]] | Tensor | np.ndarray[Any, Any]
Prompts = Sequence[Prompt] | Sequence[int] | Mapping[str, Any] | Tensor | np.ndarray[Any, Any]

MEDIA = re.compile(r"pixel_|image|video|audio|input_features")
"""Names of what processors add to token ids."""
HOW = "give a list of prompts: texts, lists of token ids, or lists of messages"


def listed(prompts: Any) -> list[Any]:
    """The prompts one by one, not yet encoded.  Raises UsageError for what is no collection of prompts."""
    if isinstance(prompts, Mapping):
        return list(media_prompts(prompts)) if has_media(prompts) else _unpadded(prompts)
    if hasattr(prompts, "tolist"):
        return _rows(prompts, "prompts")
    if isinstance(prompts, str):
        raise UsageError("prompts is a string; give a list of prompts", "put the text into a list: [text]")
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray | memoryview):
        raise UsageError(f"prompts is {_kind(prompts)}", HOW)
    if prompts and all(isinstance(message, Mapping) and not has_media(message) for message in prompts):
        raise UsageError("prompts is one conversation; give a list of prompts", "put its messages into a list of lists")
    if prompts and all(as_int(token) is not None for token in prompts):
        return [list(prompts)]
    return [one for prompt in prompts for one in (media_prompts(prompt) if has_media(prompt) else [prompt])]


def has_media(given: Any) -> bool:
    """Whether this is a processor's output with more than text in it."""
    return isinstance(given, Mapping) and any(
        MEDIA.search(str(name)) and value is not None for name, value in given.items()
    )


class MediaPrompt:
    """One prompt of a processor's output, which is read whole, once."""

    def __init__(self, inputs: Mapping[str, Any], row: int, read: list[tuple[list[int], Given]]):
        """read: shared by the prompts of one output; filled by whoever is the first to be read."""
        self.inputs, self.row, self._read = inputs, row, read

    def read(self, backend: Backend, name: str) -> tuple[list[int], Given]:
        """Token ids, and the prompt as the text decoder takes it in.  Raises UsageError, UnsupportedModelError."""
        if not self._read:
            self._read += backend.read_prompts(self.inputs)
        tokens, given = self._read[self.row]
        wrong = next((t for t in tokens if not 0 <= t < backend.input_vocab), None)
        if wrong is not None:
            raise UsageError(f"{name} holds token id {wrong}; the vocabulary has {backend.input_vocab}")
        return tokens, given


def media_prompts(inputs: Mapping[str, Any]) -> Sequence[MediaPrompt]:
    """The prompts of a processor's output.  Raises UsageError where it is none of tensors."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise UsageError(
            "prompts with images need input_ids as a tensor [prompts, tokens]",
            'give what the model\'s own processor returns with return_tensors="pt"',
        )
    read: list[tuple[list[int], Given]] = []
    return [MediaPrompt(inputs, row, read) for row in range(len(ids))]


def encode(
    prompt: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab: int,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one prompt, at least one, all below `vocab`.  name: what errors call it.

    template: arguments of the chat template, for messages.  Raises UsageError.
    """
    if hasattr(prompt, "tolist"):
        rows = _rows(prompt, name)
        if len(rows) != 1:
            raise UsageError(f"{name} holds {len(rows)} rows of token ids; a prompt is one", HOW)
        prompt = rows[0]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise UsageError(f"{name} is {_kind(prompt)}; it must be a text, token ids or messages", HOW)
    if len(prompt) == 0:
        raise UsageError(f"{name} is empty", "a model needs at least one token to continue from")
    if isinstance(prompt, str):
        tokens = _text_tokens(prompt, name, tokenizer)
    elif any(isinstance(part, Mapping) for part in prompt):
        tokens = _message_tokens(prompt, name, tokenizer, template)
    else:
        tokens = [_token(token, name) for token in prompt]
    wrong = next((t for t in tokens if not 0 <= t < vocab), None)
    if wrong is not None:
        given = isinstance(prompt, str) or isinstance(prompt[0], Mapping)
        hint = "the tokenizer is another model's, or was extended: give the one that belongs to it" if given else None
        raise UsageError(f"{name} holds token id {shown(wrong)}; the vocabulary has {vocab}", hint)
    return tokens


def _text_tokens(text: str, name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if tokenizer is None:
        raise UsageError("text prompts need a tokenizer; this engine has none", "give token ids, or pass tokenizer=")
    _check_unicode(text, name)
    try:
        tokens = list(tokenizer(text)["input_ids"])
    except Exception as error:  # a tokenizer may raise anything, and what it could not read is the text
        raise UsageError(f"{name} cannot be tokenized: {_first_line(error)}") from error
    if not tokens:
        raise UsageError(f"{name} holds no token: {shown(text)}")
    return tokens


def _message_tokens(
    messages: Sequence[Any],
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    arguments: Mapping[str, Any] | None,
) -> list[int]:
    """The conversation by the chat template: a new turn of the assistant's begun, or its last message continued."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or _says_nothing(message):
            raise UsageError(
                f"{name}: message {number} is {shown(message)}; it must hold a role and a content",
                '{"role": "user", "content": "..."}',
            )
        if isinstance(message.get("content"), str):
            _check_unicode(message["content"], f"{name}: message {number}")
    if tokenizer is None:
        raise UsageError("messages need a tokenizer; this engine has none", "give token ids, or pass tokenizer=")
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("messages need a chat template; this model's tokenizer has none", "give plain text")
    messages = [dict(message) for message in messages]
    if messages[-1]["role"] == "assistant" and messages[-1].get("content") == "":
        messages.pop()  # nothing to continue: its turn begins
    try:
        tokens = prompt_tokens(tokenizer, messages, arguments=arguments)
    except Exception as error:  # the template is the model's own program, and may raise anything
        raise UsageError(f"{name}: the model's chat template refuses these messages: {_first_line(error)}") from error
    if not tokens:
        raise UsageError(f"{name} holds no token: the model's chat template makes nothing of these messages")
    return tokens


def _says_nothing(message: Mapping[str, Any]) -> bool:
    return message.get("content") is None and not message.get("tool_calls")


def _token(token: Any, name: str) -> int:
    found = as_int(token)
    if found is None:
        raise UsageError(f"{name} holds {shown(token)}, which is no token id", HOW)
    return found


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is no Unicode text: half a character (a lone surrogate) at {error.start}",
            "it was cut inside a character, or read in the wrong encoding",
        ) from None


def _rows(array: Any, name: str) -> list[list[Any]]:
    """Rows of a tensor or numpy array of one or two dimensions.  Raises UsageError."""
    rows = array.tolist()
    if isinstance(rows, list) and rows and not any(isinstance(row, list) for row in rows):
        rows = [rows]
    if not isinstance(rows, list) or any(isinstance(token, list) for row in rows for token in row):
        raise UsageError(f"{name} is {_kind(array)}; token ids come as [tokens] or [prompts, tokens]", HOW)
    return rows


def _unpadded(encoding: Mapping[str, Any]) -> list[list[Any]]:
    """Prompts of a tokenizer's output, without the positions its attention mask leaves out."""
    if "input_ids" not in encoding:
        held = ", ".join(map(str, encoding)) or "nothing"
        raise UsageError(f"prompts is a mapping without input_ids (it holds {shown(held)[1:-1]})", HOW)
    rows = _encoded(encoding["input_ids"], "input_ids")
    mask = encoding.get("attention_mask")
    if mask is None:
        return rows
    masks = _encoded(mask, "attention_mask")
    if [len(row) for row in rows] != [len(row) for row in masks]:
        raise UsageError("input_ids and attention_mask of the prompts differ in shape")
    return [[t for t, seen in zip(row, keep, strict=True) if seen] for row, keep in zip(rows, masks, strict=True)]


def _encoded(value: Any, name: str) -> list[list[Any]]:
    if hasattr(value, "tolist"):
        return _rows(value, name)
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name} of the prompts is {_kind(value)}; it must hold token ids", HOW)
    if any(as_int(token) is not None for token in value):
        return [list(value)]
    rows = []
    for row in value:
        found = _rows(row, name) if hasattr(row, "tolist") else [row]
        if len(found) != 1 or not isinstance(found[0], list | tuple):
            raise UsageError(f"{name} of the prompts holds {shown(row)}; it must hold lists of token ids", HOW)
        rows.append(list(found[0]))
    return rows


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"an array of shape {list(shape)}"
    return shown(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line[:200].encode(errors="backslashreplace").decode()
