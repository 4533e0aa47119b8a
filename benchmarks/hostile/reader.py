"""The process that reads mutated files, under limits of time and memory; a line of JSON for each case.

python -m benchmarks.hostile.reader FIRST END
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from types import FrameType

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cpu.subjects import write_artifact
from benchmarks.hostile.cases import case
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import folder as artifact
from retrofit.hub import live_fingerprint

SECONDS = 1.0
"""Of the processor, that a case may take beyond a whole artifact's."""
ROOM = 1 << 30
"""Bytes that the process may take beyond what it had when the first case began."""
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
ADAPTER = {"rank": 2, "alpha": 4.0, "targets": ["q", "v"], "markov_rank": 2, "confidence": True}
CHANCES = [0.5, 0.25, 0.1, 0.05]
MEASURED = {
    "conditional": {"greedy": CHANCES, "sampled": CHANCES},
    "ranks": {"greedy": [CHANCES] * 4, "sampled": [CHANCES] * 4},
    "by_context": [{"up_to": 512, "blocks": 3, "tau": 1.7, "greedy": CHANCES, "sampled": CHANCES}],
}


class Slow(BaseException):
    """A case took too long."""


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def whole_artifact(folder: Path, model: LlamaForCausalLM) -> dict[str, bytes]:
    """The files of an artifact of a live model, with a certificate and what was measured."""
    attached = attach(model, DraftLayout(block=4), **ADAPTER)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.05)
    write_artifact(folder, "model", live_fingerprint(model), model, attached, ADAPTER, acceptance=MEASURED)
    attached.detach()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    artifact.add(folder, "certificate.json", json.dumps({"ok": True, "level": "quick", "checks": [{"name": "gate"}]}))
    (folder / artifact.LOCAL).write_text(json.dumps({"base": "somewhere"}))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def limit_memory() -> None:
    """Let the process grow by ROOM and no more."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))


def main(first: int, end: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    def late(number: int, frame: FrameType | None) -> None:
        raise Slow

    signal.signal(signal.SIGVTALRM, late)
    with tempfile.TemporaryDirectory(prefix="retrofit-hostile-") as place:
        model = small_model()
        files = whole_artifact(Path(place, "whole"), model)
        for number in range(-3, 0):  # imports, and what is made once
            case(number, files, model, Path(place, "first"))
        limit_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, end):
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                outcome = case(number, files, model, Path(place, "mutated"))
            except Slow:
                outcome = f"slow: more than {SECONDS:g} s"
            except MemoryError:
                outcome = f"memory: more than {ROOM:,} bytes"
            except Exception as error:
                outcome = f"crashed: {type(error).__name__}: {str(error)[:200]}"
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(json.dumps([number, outcome, grown]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
