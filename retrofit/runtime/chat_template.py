"""The chat template of a tokenizer: what it makes of a conversation, and what tells one template from another.

The one way from messages to tokens, for decoding, for training and for the responses that a base writes anew: drafts
are accepted where all three see the same tokens.
Not here: what may be a prompt (`prompts.py`), which tokens are a response's (`recipes/text/tokens.py`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from retrofit.errors import UsageError

TAKEN = (
    *(
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
        "padding",
    ),
    *("continue_final_message", "sanitize_control_tokens", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "self"),
)
"""What `apply_chat_template` takes itself, and never hands on to a template as an argument."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""What data sets and templates call the reasoning of a message; transformers itself fills in the first two."""

Messages = Sequence[Mapping[str, Any]]


def source(tokenizer: Any) -> str:
    """The template that conversations go through; empty where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return str(template.get("default", "") if isinstance(template, dict) else template or "")


def applied(
    tokenizer: Any,
    messages: Messages,
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """What `apply_chat_template` makes of messages; it and the template may raise anything.

    tools: descriptions of functions, as the template wants them.  arguments: further names that the template reads,
    such as enable_thinking.  Reasoning reaches the template under the names that it reads.
    """
    template = source(tokenizer)
    known = [name for name in REASONING if name in template]
    messages = [_reasoning(message, known) for message in messages]
    return tokenizer.apply_chat_template(messages, tools=list(tools) if tools else None, **(arguments or {}), **options)


def _reasoning(message: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    found = next((message[name] for name in REASONING if message.get(name)), None)
    return dict(message) if found is None else {**message, **dict.fromkeys(known, found)}


def prompt_tokens(
    tokenizer: Any,
    messages: Messages,
    tools: Sequence[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids up to where the assistant speaks: its turn is begun, or its message continued where it is the last."""
    going_on = bool(messages) and messages[-1]["role"] == "assistant"
    encoded = applied(
        tokenizer, messages, tools, arguments,
        add_generation_prompt=not going_on, continue_final_message=going_on, return_dict=True,
    )  # fmt: skip
    return list(encoded["input_ids"])


def check_arguments(arguments: Any, name: str) -> None:
    """Raises UsageError for what is no set of named template arguments, and for names that mean something else."""
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in arguments):
        raise UsageError(f"{name} must be names and values", "such as {enable_thinking: false}")
    for key in arguments:
        if key in TAKEN:
            raise UsageError(f"{name}.{key}: `{key}` is no argument of a template's own", "leave it out")


def identity(tokenizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an artifact keeps of the template it was trained with; None where the tokenizer has none.

    arguments: each a value, or a list of those that were mixed.
    """
    template = source(tokenizer)
    return {"sha256": _digest(template), "arguments": dict(arguments)} if template else None


def differences(
    trained: Mapping[str, Any] | None, tokenizer: Any, arguments: Mapping[str, Any] | None = None
) -> list[str]:
    """In which ways conversations are put otherwise now than in training; each is a sentence that says what to do.

    trained: what `identity` gave then; None, as in artifacts that kept nothing, differs in nothing.
    """
    if not trained:
        return []
    found = []
    if _digest(source(tokenizer)) != trained["sha256"]:
        found.append(
            "the tokenizer's chat template is not the one the adapter was trained with, so fewer drafts may be "
            "accepted; take the base's own template, or convert again"
        )
    mixed = {key: value if isinstance(value, list) else [value] for key, value in trained["arguments"].items()}
    given = dict(arguments or {})
    for key in sorted({*mixed, *given}):
        if key in given and given[key] in mixed.get(key, ()):
            continue
        if key not in given and len(mixed[key]) > 1:
            continue  # whichever of them is the template's own default, others were learned beside it
        now = _shown(given[key]) if key in given else "left to the template"
        then = " or ".join(map(_shown, mixed[key])) if key in mixed else "left to the template"
        found.append(
            f"the template argument {key} is {now}, and was {then} in training, so fewer drafts may be accepted; "
            + (f"give {key}={_shown(mixed[key][0])}" if key in mixed else "leave it out")
        )
    return found


def warn_of_differences(
    trained: Mapping[str, Any] | None, tokenizer: Any, asked: Iterable[tuple[Any, Any]], told: set[str]
) -> None:
    """Python warnings of `differences` for the prompts that are messages.

    asked: each prompt and what is asked of it, its `params.template` the arguments.  told: what was said before, which
    is not said again; grows.
    """
    if not trained:
        return
    for prompt, what in asked:
        if isinstance(prompt, Sequence) and any(isinstance(part, Mapping) for part in prompt):
            for line in differences(trained, tokenizer, what.params.template):
                if line not in told:
                    told.add(line)
                    warnings.warn(line, stacklevel=4)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _digest(template: str) -> str:
    return hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()
