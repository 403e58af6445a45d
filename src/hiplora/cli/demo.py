"""`hiplora demo`: the demonstration on a real small model."""

from pathlib import Path

from typer import Option

from hiplora.cli.common import OVERWRITE, Shown, tell, told_to_repeat


def command(
    out: Path = Option(Path("demo-out"), help="Output folder: new, or of an interrupted demo."),
    overwrite: bool = OVERWRITE,
) -> Shown:
    """Teach SmolLM2-135M two small skills with LoRA and with HiP-LoRA, add them, and show what became of the model.

    One skill answers customers of an invented shop in its house style, the other turns requests into JSON. Each is
    trained apart with each method to the same held-out loss; then a method's two adapters are added. Measured: do both
    skills still work, how far the model moved on other text, and what it answers to unrelated questions. The folder
    gets results.json, report.html and all adapters, the added ones as plain LoRA.
    After an interruption, run it again to continue.

    Example:

        hiplora demo --out demo-out
    """
    import time

    from hiplora.demo import demo, headline, summary

    start = time.perf_counter()
    with told_to_repeat(out):
        results = demo(out, overwrite=overwrite, tell=tell)
    yield results
    yield "Two skills, added into one model", summary(results)
    yield headline(results)
    yield f"\nDone in {time.perf_counter() - start:.0f} s. Report: {out / 'report.html'}"
    yield "Your own data: hiplora compare smollm2-135m rows.jsonl --out runs/compare"
