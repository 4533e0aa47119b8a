"""Several processes that convert together, forked so that they need not import anything: what the tests share."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from recurrent_models import any_tiny
from tiny_conversion import RECIPE, briefly, run, tokenizer

from retrofit.artifact import folder as artifact

FORK = multiprocessing.get_context("fork")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


class Ended:
    """How a process ended: what its function returned, or what it raised, by class, text and hint."""

    def __init__(self, value: Any = None, error: BaseException | None = None):
        self.value = value
        self.kind = type(error).__name__ if error is not None else None
        self.message, self.hint = str(error), getattr(error, "hint", None)
        self.code = getattr(error, "code", getattr(error, "exit_code", None))
        self.notes = list(getattr(error, "__notes__", []))


def _child(pipe: Any, variables: dict[str, str], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    PartialState._reset_state()  # what the parent process may have made of it is not inherited by a started one
    try:
        ended = Ended(function(*arguments))
    except BaseException as error:
        ended = Ended(error=error)
    pipe.send(ended)


def together(
    function: Callable[..., Any], *arguments: Any, size: int = 2, seconds: float = 60, **variables: str
) -> list[Ended | None]:
    """Call a function in several processes; how each ended, None for one that was killed or did not end."""
    port = free_port()
    processes, pipes = [], []
    for rank in range(size):
        here, there = FORK.Pipe(duplex=False)
        process = FORK.Process(
            target=_child, args=(there, {**environment(rank, size, port), **variables}, function, arguments)
        )
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    ended: list[Ended | None] = []
    for pipe in pipes:
        try:
            ended.append(pipe.recv() if pipe.poll(seconds) else None)
        except EOFError:
            ended.append(None)
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    return ended


def values(ended: list[Ended | None]) -> list[Any]:
    """What all of them returned; fails where one did not."""
    for rank, one in enumerate(ended):
        if one is None or one.kind is not None:
            what = "was killed or did not end" if one is None else f"raised {one.kind}: {one.message}"
            pytest.fail(f"process {rank} {what}")
    return [one.value for one in ended if one is not None]


def saved_model(folder: Path, name: str = "llama") -> Path:
    """A tiny model as files."""
    any_tiny(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run_folder(out: Path, model: Path, texts: Path, **options: Any) -> artifact.Artifact:
    """As `tiny_conversion.run`, of a model in a folder."""
    recipe = {key.replace("__", "."): options.pop(key) for key in list(options) if "__" in key or key == "profile"}
    overrides = {**RECIPE, "data.source": str(texts), **recipe}
    return briefly(str(model), "tiny", out, overrides, quiet=True, offline=True, **options)


def rank() -> int:
    return int(os.environ["RANK"])


def quiet_end(ended: Ended | None, code: int | None = None) -> bool:
    """Whether a process other than the main one ended without a word."""
    return ended is not None and ended.kind == "SystemExit" and (code is None or ended.code == code)


def converts(out: Path, model: Path, texts: Path, options: dict[str, Any]) -> None:
    run_folder(out, model, texts, **options)


def converts_live(out: Path, texts: Path, options: dict[str, Any]) -> None:
    run(out, texts, **options)
