"""A vLLM server on loopback, asked with the `openai` client."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT

NAME = "served"
START = 1200
"""Seconds in which a server has to be up.  Four processes import torch one after the other, about 40 seconds of
processor time in all; on a machine that is busy that is minutes."""
SIZES = (
    *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "24", "--max-num-batched-tokens", "128"),
    *("--block-size", "32", "--num-gpu-blocks-override", "40"),
)
"""Prompts of more than 128 tokens are read in chunks; eight requests of more than 160 do not fit at once."""
INSIDE = ("--worker-extension-cls", "benchmarks.vllm.inside.Told")


@dataclass(frozen=True)
class Server:
    """One that was started."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        """Until it is up.  Raises RuntimeError with the end of its log where it does not come up."""
        end = time.monotonic() + START
        while not _healthy(self.url):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not come up:\n{self.log.read_text()[-5000:]}")
            time.sleep(1)

    def tell(self, method: str, *arguments: str) -> None:
        """Have the worker run a method of `inside.Told`; what it had cached is forgotten."""
        self._post("/collective_rpc", {"method": method, "args": arguments})
        self._post("/reset_prefix_cache", {})

    def _post(self, path: str, content: dict[str, Any]) -> None:
        body, kind = json.dumps(content).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, kind), timeout=START):
            pass

    def processor_seconds(self) -> float:
        """What its processes have used so far."""
        root = psutil.Process(self.process.pid)
        times = [one.cpu_times() for one in (root, *root.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    def accepted(self) -> list[int]:
        """[cycles, drafts accepted in slot 0 (the root), 1, ..] so far."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        slots = re.findall(r'accepted_tokens_per_pos_total\{.*position="(\d+)".*\} ([\d.e+]+)', text)
        cycles = re.findall(r"spec_decode_num_drafts_total\{.*\} ([\d.e+]+)", text)
        by_slot = [int(float(n)) for _, n in sorted(slots, key=lambda found: int(found[0]))]
        return [*map(int, map(float, cycles)), *by_slot]

    def one(self, prompt: Sequence[int], tokens: int = 64, **options: Any) -> list[list[int]]:
        """Token ids that follow a prompt of token ids, of each copy."""
        return [choice.token_ids for choice in self.choices(prompt, tokens, **options)]

    def choices(self, prompt: Sequence[int], tokens: int, **options: Any) -> list[Any]:
        """As the client has them."""
        from openai import OpenAI

        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=START, max_retries=0)
        more = {"return_token_ids": True, **options.pop("extra_body", {})}
        options = {"temperature": 0, "max_tokens": tokens, **options}
        return client.completions.create(model=NAME, prompt=list(prompt), extra_body=more, **options).choices

    def together(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[list[int]]]:
        """As `one` for each prompt, all at the same time."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.one(prompt, **options), prompts))


def plain(model: Path, dtype: str) -> list[str]:
    """The command of a server without drafts."""
    start = [sys.executable, "-m", "retrofit.serving.vllm.start", "serve", str(model), "--no-async-scheduling"]
    return [*start, "--served-model-name", NAME, "--dtype", dtype, *SIZES, *INSIDE]


def drafting(artifact: str, dtype: str) -> list[str]:
    """The command of a server with drafts, as it is typed."""
    start = [sys.executable, "-m", "retrofit", "serve", artifact, "--engine", "vllm", "--offline"]
    return [*start, "--served-model-name", NAME, "--dtype", dtype, *SIZES, *INSIDE]


def environment() -> dict[str, str]:
    """Of every process that runs vLLM here."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**os.environ, **own, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[Server]:
    """A server that was started, while it lasts; several come up side by side.  `Server.wait` says when it is up."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port], stdout=out, stderr=out, env=environment()
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
