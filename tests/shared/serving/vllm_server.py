"""A real vLLM server on loopback, asked with the `openai` client: what the parity suite shares."""

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
from pathlib import Path
from typing import Any

NAME = "tiny"
START = 1200
"""Seconds in which a server has to be up, on a machine that is busy."""
SMALL = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "64", "--block-size", "32", "--num-gpu-blocks-override", "40"),
)
"""Prompts of more than 64 tokens are read in chunks; eight requests of more than 160 do not fit at once."""


def plain(model: Path, options: Sequence[str] = SMALL) -> list[str]:
    """The command of a server without drafts."""
    start = [sys.executable, "-m", "retrofit.serving.vllm.start", "serve", str(model)]
    return [*start, "--no-async-scheduling", "--served-model-name", NAME, *options]


def drafting(artifact: Path | str, options: Sequence[str] = SMALL) -> list[str]:
    """The command of a server with drafts."""
    start = [sys.executable, "-m", "retrofit", "serve", str(artifact), "--engine", "vllm"]
    return [*start, "--served-model-name", NAME, *options]


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[str]:
    """The address of a server, while it lasts."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port], stdout=out, stderr=out, env={**os.environ, **own}
        )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START
        while not _healthy(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(1)
        yield url
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


def accepted(url: str) -> list[int]:
    """[cycles, drafts accepted in slot 0 (the root), 1, ..] so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    slots = re.findall(r'accepted_tokens_per_pos_total\{.*position="(\d+)".*\} ([\d.e+]+)', text)
    cycles = re.findall(r"spec_decode_num_drafts_total\{.*\} ([\d.e+]+)", text)
    by_slot = [int(float(n)) for _, n in sorted(slots, key=lambda found: int(found[0]))]
    return [*map(int, map(float, cycles)), *by_slot]


class Asker:
    """Asks for completions of token ids, and gives token ids."""

    def __init__(self, url: str) -> None:
        from openai import OpenAI

        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=START, max_retries=0)

    def one(self, prompt: Sequence[int], tokens: int = 64, **options: Any) -> list[list[int]]:
        """The token ids of each copy."""
        more = {"return_token_ids": True, **options.pop("extra_body", {})}
        options = {"temperature": 0, "max_tokens": tokens, **options}
        answer = self.client.completions.create(model=NAME, prompt=list(prompt), extra_body=more, **options)
        return [choice.token_ids for choice in answer.choices]

    def together(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[list[int]]]:
        """As `one` for each prompt, all at the same time."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.one(prompt, **options), prompts))
