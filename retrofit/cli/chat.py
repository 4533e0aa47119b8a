"""`retrofit chat`: lines in, answers out.  Works at a terminal and from a pipe.

With a chat template the conversation is sent as messages; without one the text so far is simply continued.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.errors import not_text, show
from retrofit.cli.options import (
    CONTEXT,
    Loading,
    answering_options,
    artifact_argument,
    base_option,
    generation_options,
    output_options,
    say_differences,
    seed_option,
    system_option,
)
from retrofit.cli.output import Totals, decodes_as, emit_json, result_json, say
from retrofit.errors import RetrofitError, UsageError

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine
    from retrofit.runtime.prompts import Prompt

COMMANDS = """\
/mode [MODE]   show or set the mode: ar, diffusion, self_spec
/stats         totals of this session
/reset         forget the conversation
/seed N        seed of the next answer; it grows by 1 with each
/help          this list
/exit          leave (so does Ctrl-D)"""


@click.command(context_settings=CONTEXT)
@artifact_argument
@generation_options
@system_option
@base_option
@seed_option
@answering_options
@output_options
def chat(
    folder: str,
    options: dict[str, Any],
    system: str | None,
    base: str | None,
    seed: int,
    loading: Loading,
    as_json: bool,
) -> None:
    """Talk with the model, line by line; /help lists the commands.

    Lines go through the model's chat template; a model without one just continues the text.  From a pipe
    every line is one turn.

    \b
    Examples:
      retrofit chat qwen-retrofit --max-new-tokens 512 --temperature 0.7
      printf '%s\\n' "Hello" "/stats" | retrofit chat qwen-retrofit
    """
    converse(Chat(loading.engine(folder, base), options, seed, as_json, system))


class Chat:
    """One conversation.  `options`: what `Engine.stream` takes, its mode included."""

    def __init__(
        self, engine: Engine, options: dict[str, Any], seed: int, as_json: bool, system: str | None = None
    ) -> None:
        """Raises UsageError for a system message that cannot be told, and options that mean nothing in the mode."""
        self.engine, self.options, self.seed, self.as_json = engine, options, seed, as_json
        self.beginning = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.beginning)
        self.text = ""
        self.totals = Totals()
        self.has_template = bool(getattr(engine.tokenizer, "chat_template", None))
        for name, given in (("--system", system), ("--template", options["template"])):
            if given is not None and not self.has_template:
                raise UsageError(f"{name} needs a chat template; this model's tokenizer has none", "leave it out")
        engine.stream([], **options)  # what is wrong with the options is said before the first line
        if self.has_template:
            say_differences(engine, options["template"])

    def answer(self, line: str) -> None:
        """Print the answer to one line and remember both.  A turn that fails or is cut off is forgotten."""
        prompt: Prompt
        if self.has_template:
            prompt = [*self.messages, {"role": "user", "content": line}]
        else:
            prompt = f"{self.text}\n{line}" if self.text else line
        for event in self.engine.stream([prompt], seed=self.seed, **self._options_of_mode()):
            if not self.as_json:
                click.echo(event.text, nl=False)
            result = event.result
        assert result is not None
        text = result.text or ""
        if self.as_json:
            emit_json(result_json(result))
        else:
            click.echo()
        if isinstance(prompt, str):
            self.text = prompt + text
        else:
            self.messages = [*self.messages, {"role": "user", "content": line}]
            self.messages.append({"role": "assistant", "content": text})
        self.seed += 1
        turn = Totals()
        for totals in (turn, self.totals):
            totals.add(result)
            totals.seconds += result.stats.seconds
        say(f"[{self.options['mode']}: {turn.line()}]")

    def _options_of_mode(self) -> dict[str, Any]:
        """The options without those that /mode has left without a meaning."""
        others = {"self_spec": ("threshold", "tolerance"), "diffusion": ("strategy", "prepare", "tree", "logprobs")}
        left_out = others.get(self.options["mode"], ("threshold", "tolerance", "strategy", "prepare", "tree"))
        return {name: value for name, value in self.options.items() if name not in left_out}

    def command(self, line: str) -> bool:
        """Obey a line that begins with `/`; False when it ends the chat.  Raises UsageError."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/mode":
            self._mode(value)
        elif name == "/seed":
            from retrofit.runtime.options import LARGEST_SEED, whole

            seed = int(value) if value.isdecimal() and len(value) < 20 else value
            self.seed = whole("/seed", seed, 0, LARGEST_SEED)
        elif name == "/reset":
            self.messages, self.text = list(self.beginning), ""
            say("conversation forgotten")
        elif name == "/stats":
            click.echo(f"{self.totals.requests} answers, {self.totals.line()}; {decodes_as(self.engine)}", err=True)
        elif name == "/help":
            click.echo(COMMANDS, err=True)
        else:
            raise UsageError(f"{name}: no such command", "/help lists them")
        return True

    def _mode(self, value: str) -> None:
        from retrofit.runtime.options import MODES

        if value and value not in MODES:
            raise UsageError(f"/mode {value}: no such mode", f"modes are {', '.join(MODES)}")
        self.options["mode"] = value or self.options["mode"]
        say(f"mode {self.options['mode']}")


def converse(chat: Chat) -> None:
    """Read lines until the end.  From a pipe the first error ends it; at a terminal it is printed."""
    if sys.stdin is None:
        raise UsageError("stdin is closed", "talk at a terminal, or pipe lines in")
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not chat.has_template:
        say("note: this model has no chat template; your text is continued as it stands")
    if at_terminal:
        say("/help lists the commands")
    for line in _lines("> " if at_terminal else None):
        if not line.strip():
            continue
        try:
            if not line.startswith("/"):
                chat.answer(line)
            elif not chat.command(line.strip()):
                return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            click.echo("\nanswer cut off", err=True)
        except RetrofitError as error:
            if not at_terminal:
                raise
            show(error)


def _lines(prompt: str | None) -> Iterator[str]:
    """Lines of stdin without their ends, asked for with `prompt` where there is one."""
    if prompt is None:
        try:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise not_text(error) from None
        return
    with suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    ask: Callable[[str], str] = input
    while True:
        try:
            yield ask(prompt)
        except EOFError:
            click.echo(err=True)
            return
