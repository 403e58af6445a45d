"""`hiplora demo`: the demonstration on a real small model."""

from pathlib import Path

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_frame


def command(
    out: Path = typer.Option(Path("demo-out"), "--out", help="Output folder: new, or of an interrupted demo."),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Edit 32 facts in SmolLM2-135M with LoRA and HiP-LoRA, and show what each disturbed; about six minutes.

    Two sets of 16 edits are trained apart with each of four methods: LoRA on the attention projections, LoRA on the
    MLPs, HiP-LoRA (on the MLPs, its default), and HiP-LoRA as in the paper. Then each method's two adapters are added
    together. Measured: which edits work alone and after the addition, and drift from the base model on prose and on
    code. The folder gets results.json, report.html and all adapters, the merged ones as plain LoRA. After an
    interruption, run it again to continue.

    Example:

        hiplora demo --out demo-out
    """
    import time

    from hiplora.demo import demo, summary

    began = time.perf_counter()
    results = demo(out, overwrite=overwrite)
    if as_json:
        emit_json(results)
        return
    print_frame(results["title"], summary(results))
    for note in results["notes"]:
        typer.echo(note)
    typer.echo(f"\nDone in {time.perf_counter() - began:.0f} s. Report: {out / 'report.html'}")
