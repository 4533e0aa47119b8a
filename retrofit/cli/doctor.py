"""`retrofit doctor`: what this machine has, and whether exactness holds on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.options import CONTEXT, Loading, base_option, engine_options, output_options
from retrofit.cli.output import emit_json, quieten_libraries
from retrofit.cli.tables import gib, print_table

if TYPE_CHECKING:
    from retrofit.eval.doctor import Diagnosis
    from retrofit.runtime.backends.hf.exact_rows import Priced

LEVELS = ("level", "holds", "rows", "ar, ms a step", "price")
CHECKS = ("what", "shape", "kernel", "rows", "bits")


@click.command(context_settings=CONTEXT)
@click.argument("folder", metavar="[ARTIFACT]", required=False)
@base_option
@engine_options
@output_options
def doctor(folder: str | None, base: str | None, loading: Loading, as_json: bool) -> None:
    """Show what this machine has, and test exactness on it.

    self_spec can emit exactly what ar emits only if a row's result does not depend on the rows beside it. That
    is a property of a machine's libraries and kernels, so it is tried out: every matrix product of the model in
    its shapes, attention, and whole forwards; a row alone, among others and in other places, compared bit for
    bit. The table says what was compared; DIFFER names the first arrangement that differs.

    \b
    Levels of --exact, and what each promises:
      bucket     every decoding forward has one row count (the default on a GPU); there, a product of the
                 library that fails is replaced by our kernel
      invariant  any row count: our kernels on a GPU; a model's own modules where their products allow it
      off        nothing beyond rounding

    Where our kernels cannot run, the model's own modules are tested (backend hf), and every level is shown with
    its price: a step of ar at that level against one at off. auto takes the cheapest level that holds; in fp32
    that needs packed weights, else it is off.

    Without ARTIFACT the test runs the model of --base without an adapter, or the base that ships with
    retrofit. Exits with 3 when a level that was asked for does not hold, and with 4 when the GPU that was asked
    for is missing.

    \b
    Examples:
      retrofit doctor
      retrofit doctor qwen-retrofit --exact invariant
      retrofit doctor --base Qwen/Qwen3-8B --json
    """
    quieten_libraries()
    from retrofit.eval.doctor import diagnose, environment

    # Printed first: whatever fails below, this is what a report about it needs.
    facts = environment()
    if not as_json:
        print_table(environment_rows(facts))
        click.echo()
    diagnosis = diagnose(folder, base, progress=True, **loading.keywords)
    if as_json:
        emit_json({"environment": facts, **diagnosis.to_dict()}, indent=2)
    else:
        show(diagnosis)
    if diagnosis.problem is not None:
        raise diagnosis.problem


def environment_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """`environment` for people: one line per fact."""
    from retrofit.eval.doctor import PACKAGES

    cpu, cache = facts["cpu"], facts["hub_cache"]
    memory = f", {gib(cpu['memory'])} of memory" if cpu["memory"] else ""
    gpus = [
        f"{gpu['name']}, {gib(gpu['free'])} of {gib(gpu['total'])} free, compute capability {gpu['capability']}"
        for gpu in facts["gpus"]
    ]
    cuda = f" (CUDA {facts['cuda']})" if facts["cuda"] else " (no CUDA)"
    offline = facts["HF_HUB_OFFLINE"]
    lines = [
        ("retrofit", facts["retrofit"]),
        ("python", f"{facts['python']} on {facts['platform']}, {facts['os']}"),
        *((name, (facts[name] or "not installed") + (cuda if name == "torch" else "")) for name in PACKAGES),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores{memory}"),
        ("threads", threads_line(facts)),
        *((f"gpu {i}" if i else "gpu", text) for i, text in enumerate(gpus or ["none"])),
        ("driver", facts["driver"] or "none found"),
        ("Hub cache", f"{cache['folder']}{'' if cache['exists'] else ' (not there)'}"),
        ("HF_HUB_OFFLINE", "not set" if offline is None else offline),
    ]
    if facts["TRITON_INTERPRET"] is not None:
        lines.append(("TRITON_INTERPRET", facts["TRITON_INTERPRET"]))
    return lines


def threads_line(facts: dict[str, Any]) -> str:
    """How many threads a step on the CPU has, and where that comes from."""
    cpu, asked = facts["cpu"], facts["OMP_NUM_THREADS"]
    said = "not set" if asked is None else asked
    return f"{cpu['threads']} a step on the CPU; physical cores to use {cpu['physical_cores']}, OMP_NUM_THREADS {said}"


def show(found: Diagnosis) -> None:
    """Print the checks and the verdict."""
    if found.checks or found.levels:
        bucket = f" of {found.bucket} rows" if found.bucket else ""
        click.echo(
            f"{found.model} in {found.dtype} on {found.device}, backend {found.backend}, exact={found.exact}{bucket}\n"
        )
    if found.levels:
        off = found.levels[0].seconds or 1.0
        print_table([_priced(level, off) for level in found.levels], LEVELS)
        click.echo()
    if found.checks:
        cells = [(c.what, c.shape, c.kernel, c.rows, "equal" if c.equal else "DIFFER") for c in found.checks]
        print_table(cells, CHECKS)
        click.echo()
    click.echo(found.verdict)


def _priced(found: Priced, off: float) -> tuple[str, ...]:
    rows = f"{found.rows}" if found.level == "bucket" else f"{found.rows} and more"
    if found.seconds is None:
        return found.level, "no", "", "", ""
    promises = "yes" if found.level != "off" else "promises nothing"
    return found.level, promises, rows, f"{1000 * found.seconds:.2f}", f"{found.seconds / off:.2f} x"
