"""`retrofit` run in this process, and what is asked of its output: what the tests of commands share."""

from click.testing import CliRunner

from retrofit.cli import main as cli

PROMPT = "def area(radius):"
SHORT = [
    *("train.steps=2", "train.batch_size=1", "train.anchors=2", "train.warmup=0", "train.precision=float32"),
    *("adapter.rank=2", "adapter.markov_rank=2", "draft.block=4", "data.max_length=32", "data.held_out=1"),
]


def run(*arguments, stdin=None, **environment):
    return CliRunner(env=environment).invoke(cli.main, [str(a) for a in arguments], input=stdin)


def done(*arguments, **options):
    """stdout of a command that succeeds."""
    result = run(*arguments, **options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(result, code):
    """The message: stderr without traceback, of one line and perhaps a hint; nothing on stdout.

    Several problems of one recipe come as a list, indented.
    """
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    message, *more = result.stderr.strip().splitlines()
    hint = [line for line in more if not (line.startswith("  ") and "recipe" in message)]
    assert message.startswith("Error: "), result.stderr
    assert len(hint) <= 1, result.stderr
    assert all(line.startswith("hint: ") for line in hint)
    return result.stderr
