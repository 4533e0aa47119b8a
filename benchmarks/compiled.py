"""Compile every kernel of a decoding step for a GPU that need not be there, and say what each one takes.

The fused decoder runs at full size on tensors without memory; each launch is caught, and what it would have compiled is
compiled for the architecture.  Shows registers, shared memory and spilled bytes; exits 1 if a kernel does not compile,
or takes more shared memory than a program may have.

    python -m benchmarks.compiled --arch 90 --model llama-8b
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.backends.fused.weights import head_width
from retrofit.runtime.device.loop import DeviceLoop
from retrofit.runtime.plan import cut_cycle, fixed_cycle
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import DraftTree, grow

META = torch.device("meta")
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory of one program, bytes (CUDA C++ Programming Guide, technical specifications)."""
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-8b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=8192,
    ),
    "qwen3-0.6b": lambda: Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "qwen2-7b": lambda: Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=2, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, max_position_embeddings=8192,
    ),
    "mistral-7b": lambda: MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=8192, sliding_window=4096,
    ),
}  # fmt: skip
TREE = grow(((0.6, 0.15, 0.1),) * 8, 18)
WAYS: tuple[tuple[str, str | int, DraftTree | None], ...] = (
    ("ar", "all", None), ("two_forward", "all", None), ("fused", "all", None), ("fused", 3, None),
    ("fused", "all", TREE),
)  # fmt: skip
"""Strategy, accept lengths prepared, tree."""
PROMPT, CAPACITY = 300, 2048


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel, as a launch asked for it."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Compiled:
    name: str
    constants: str
    shared: int
    registers: int | None
    spilled: int | None
    seconds: float


@contextmanager
def caught(launches: dict[Launch, None]) -> Iterator[None]:
    """Note launches in place of making them."""
    run = JITFunction.run

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches[launch_of(self, args, kwargs)] = None

    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = run


def launch_of(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """What Triton would compile: 1 and multiples of 16 are specialised on, unless the kernel says not to."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value, kind = given.pop(parameter.name), "constexpr"
        if isinstance(value, torch.Tensor) and not parameter.is_constexpr:
            kind = TYPES[value.dtype]
            aligned.append(i)
        elif (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            constants.append((parameter.name, value))
        else:
            kind = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(i)
        signature.append((parameter.name, kind))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(given.items())))


def launches_of(
    config: PreTrainedConfig, exact: str, dtype: torch.dtype, temperature: float, lanes: int
) -> list[Launch]:
    """Every distinct launch of a prefill and of one step of each plan, cut to the bucket where there is one."""
    layout = DraftLayout(block=8)
    with META:
        heads = Heads(config.hidden_size, config.vocab_size, layout.drafts, 128, True)
        backend = FusedGQA(
            config,
            meta_checkpoint(config),
            layout,
            heads,
            meta_adapter(config, 32),
            device=META,
            dtype=dtype,
            exact=exact,
        )
        cache = backend.new_cache(lanes, CAPACITY)
        loop = DeviceLoop(backend, cache, Processing(temperature=temperature))
    found: dict[Launch, None] = {}
    rows_each = None if backend.most_rows is None else backend.most_rows // lanes
    cache.open(0, CAPACITY)
    with caught(found), torch.inference_mode():
        backend.forward(backend.row_plan([SequenceRows(0, 0, [0] * PROMPT, last_logits_only=True)]), cache)
        for strategy, prepare, tree in WAYS:
            for plan in cut_cycle(fixed_cycle(strategy, prepare, layout, tree), layout, rows_each):
                loop.step(plan, lanes)
    return list(found)


def meta_checkpoint(config: PreTrainedConfig) -> Callable[[str], torch.Tensor]:
    """Tensors of a checkpoint without memory."""
    width = head_width(config)
    q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    H, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "q_proj": (q, H), "k_proj": (kv, H), "v_proj": (kv, H), "o_proj": (H, q), "gate_proj": (inner, H),
        "up_proj": (inner, H), "down_proj": (H, inner), "q_norm": (width,), "k_norm": (width,),
        "embed_tokens": (config.vocab_size, H), "lm_head": (config.vocab_size, H),
    }  # fmt: skip

    def read(name: str) -> torch.Tensor:
        part, kind = name.split(".")[-2:]
        if (part in ("q_norm", "k_norm") and config.model_type != "qwen3") or (
            kind == "bias" and not (config.model_type == "qwen2" and part in ("q_proj", "k_proj", "v_proj"))
        ):
            raise KeyError(name)
        shape = shapes.get(part, (H,))
        return torch.empty(shape[:1] if kind == "bias" else shape, device=META)

    return read


def meta_adapter(config: PreTrainedConfig, rank: int) -> dict[str, torch.Tensor]:
    """LoRA on every projection, without memory."""
    read, found = meta_checkpoint(config), {}
    for i in range(config.num_hidden_layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            block = "mlp" if part in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"model.layers.{i}.{block}.{part}"
            rows, columns = read(f"{name}.weight").shape
            found[f"base_model.model.{name}.lora_A.weight"] = torch.empty(rank, columns, device=META)
            found[f"base_model.model.{name}.lora_B.weight"] = torch.empty(rows, rank, device=META)
    return found


def compiled(launch: Launch, arch: int) -> Compiled:
    """Compile one launch for sm_<arch>.  Raises what the compiler raises."""
    begin = time.perf_counter()
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    registers, spilled = resources(made.asm["cubin"])
    constants = " ".join(f"{n}={v}" for n, v in launch.constants if v is not None and not isinstance(v, str))
    return Compiled(
        launch.kernel.__name__, constants, made.metadata.shared, registers, spilled, time.perf_counter() - begin
    )


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers a thread, bytes of stack a thread) by the disassembler that Triton carries, if it does."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(part.split(":") for part in text.split() if part.count(":") == 1 and part.split(":")[1].isdigit())
    return int(fields["REG"]), int(fields["STACK"])


@click.command(help=__doc__)
@click.option(
    "--arch", type=click.Choice(["80", "90"]), default="90", show_default=True, help="80: A100; 90: H100, H200."
)
@click.option("--model", type=click.Choice(list(CONFIGS)), multiple=True, help="Shapes; all if not given.")
@click.option(
    "--exact",
    type=click.Choice(["off", "bucket", "invariant"]),
    multiple=True,
    default=("invariant",),
    show_default=True,
)
@click.option("--temperature", type=float, multiple=True, default=(0.0, 0.8), show_default=True)
@click.option("--lanes", type=int, multiple=True, default=(1, 8), show_default=True, help="Requests of a step.")
def main(
    arch: str, model: tuple[str, ...], exact: tuple[str, ...], temperature: tuple[float, ...], lanes: tuple[int, ...]
) -> None:
    wanted: dict[Launch, None] = {}
    for name in model or CONFIGS:
        for level in exact:
            for t in temperature:
                for n in lanes:
                    wanted |= dict.fromkeys(launches_of(CONFIGS[name](), level, torch.bfloat16, t, n))
    failed = 0
    for launch in wanted:
        try:
            made = compiled(launch, int(arch))
        except Exception as error:
            failed += 1
            print(f"{launch.kernel.__name__}: does not compile: {error}", file=sys.stderr)
            continue
        too_much = made.shared > MOST_SHARED[int(arch)]
        failed += too_much
        print(
            f"{made.name:22s} shared {made.shared:7d}{' TOO MUCH' if too_much else ''}  registers {made.registers}  "
            f"stack {made.spilled}  {made.seconds:5.1f} s  {made.constants}"
        )
    print(f"{len(wanted) - failed} of {len(wanted)} kernels for sm_{arch}, Triton {triton.__version__}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
