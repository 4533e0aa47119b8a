"""vLLM without a server: `python -m benchmarks.vllm.offline MODEL [OPTIONS]`, options as `vllm serve` has them.

Reads {"prompts": token ids of each, "tokens": how many to emit, "out": file for the answers} from stdin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.vllm.server import environment


def answers(command: Sequence[str], prompts: list[list[int]], tokens: int) -> list[Any]:
    """As `Server.one` answers each prompt, all given at once.  command: of the server with the same options."""
    options = command[command.index("serve") + 1 :]
    with tempfile.TemporaryDirectory(prefix="retrofit-vllm-") as folder:
        out = Path(folder, "answers.json")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.vllm.offline", *options],
            input=json.dumps({"prompts": prompts, "tokens": tokens, "out": str(out)}),
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"vLLM failed without a server:\n{done.stderr[-5000:]}")
        return [[ids] for ids in json.loads(out.read_text())]


def main() -> None:
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    asked = json.load(sys.stdin)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    model, *options = sys.argv[1:]
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(["--model", model, *options])))
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    settings = SamplingParams(temperature=0, max_tokens=asked["tokens"])
    results = llm.generate(prompts, settings, use_tqdm=False)
    Path(asked["out"]).write_text(json.dumps([list(result.outputs[0].token_ids) for result in results]))


if __name__ == "__main__":
    main()
