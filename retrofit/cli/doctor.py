"""`retrofit doctor`: what this machine has, and whether exactness holds on it."""

from __future__ import annotations

import click

from retrofit.cli.options import CONTEXT, Loading, base_option, engine_options, output_options
from retrofit.cli.output import emit_json, quieten_libraries


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
    its price: a step of ar at that level against one at off. auto takes the cheapest level that holds in half
    precision, and off in fp32.

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
    from retrofit.eval.doctor import diagnose, environment, environment_table

    # Printed first: whatever fails below, this is what a report about it needs.
    facts = environment()
    if not as_json:
        click.echo(f"{environment_table(facts)}\n")
    diagnosis = diagnose(
        folder,
        base,
        device=loading.device,
        dtype=loading.dtype or "auto",
        backend=loading.backend,
        exact=loading.exact,
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
    )
    if as_json:
        emit_json({"environment": facts, **diagnosis.to_dict()}, indent=2)
    else:
        click.echo(diagnosis.table())
    if diagnosis.problem is not None:
        raise diagnosis.problem
