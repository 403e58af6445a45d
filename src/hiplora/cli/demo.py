"""`hiplora demo`: the method on a real model in a few minutes."""

from pathlib import Path

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table


def command(
    out: Path = typer.Option(
        Path("demo-out"), "--out", help="Output folder: new, or of an interrupted demo."
    ),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Edit 32 facts in SmolLM2-135M with LoRA and HiP-LoRA, and show what each disturbed; about six minutes.

    HiP-LoRA runs with the paper's basis, the weights' singular directions, and with what the layers are fed. Two sets
    of 16 edits are trained apart with each method; then each method's two adapters are added together.
    Measured: which edits work alone and after the addition, drift from the base model on prose and on code, cost, and
    that the export to plain LoRA is exact. The folder gets results.json, report.html with figures, all adapters, and
    their exports. Interrupted, it carries on when it is run again.

    Example:

        hiplora demo --out demo-out
    """
    import time

    from hiplora.reporting.terminal import print_summary
    from hiplora.study.demo import DemoSettings, demo

    began = time.perf_counter()
    results = demo(DemoSettings(), out, overwrite=overwrite)
    if as_json:
        emit_json(results)
        return
    print_summary(results)
    stages = [(name, f"{seconds:.1f}") for name, seconds in results["provenance"]["seconds"].items()]
    total = f"{time.perf_counter() - began:.1f}"
    print_table("Seconds", ("Stage", "s"), [*stages, ("in all, with starting up", total)])
    typer.echo(f"\nReport: {out / 'report.html'}")
