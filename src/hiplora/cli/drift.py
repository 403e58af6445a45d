"""`hiplora drift`: how far adapters move a model on text that they were not trained on."""

from pathlib import Path

from typer import Option

from hiplora.cli.common import DEVICE, MODEL, Shown, next_step


def command(
    model: str = MODEL,
    adapter: list[str] = Option(..., help="Adapter folder, or NAME=FOLDER; may be repeated."),
    text: Path | None = Option(None, help="Text to measure on. Default: prose and code of Python's own."),
    tokens: int = Option(1024, min=2, help="Tokens of each text."),
    device: str = DEVICE,
) -> Shown:
    """Measure how far adapters of any method move a model from its base, on text with which they have nothing to do.

    KL is the divergence of the next-token predictions from the base's, in nats per token; beside it, the share of
    tokens for which another token became the likeliest, and how much less likely the text itself became.

    Example:

        hiplora drift smollm2-135m --adapter runs/first --adapter lora=runs/rival
    """
    from hiplora.data.texts import drift_texts, text_source
    from hiplora.evaluation import BaseReference, measure_drift
    from hiplora.evaluation.mounting import load_model, mounted, name_adapters

    named, texts = name_adapters(adapter), drift_texts(text)
    network, tokenizer = load_model(model, device)
    reference = BaseReference.build(network, tokenizer, texts, max_tokens=tokens)
    drifts = {}
    for name, folder in named.items():
        with mounted(network, folder) as adapted:
            drifts[name] = measure_drift(adapted, reference)
    record = {name: {title: drift.as_dict() for title, drift in by_text.items()} for name, by_text in drifts.items()}
    yield {"schema": 1, "kind": "drift", "model": model, "text": text_source(text), "drift": record}
    rows = [
        (
            *(name, title, f"{drift.kl:.2g}", f"{drift.greedy_changed:.1%}"),
            *(f"{drift.perplexity_ratio - 1:+.2%}", f"{drift.tokens:,}"),
        )
        for name, by_text in drifts.items()
        for title, drift in by_text.items()
    ]
    columns = ("adapter", "text", "KL, nats per token", "greedy tokens changed", "perplexity", "tokens")
    yield f"Drift from {model}", columns, rows
    furthest = max(drifts, key=lambda name: max(drift.kl for drift in drifts[name].values()))
    yield next_step("hiplora", "generate", model, "--adapter", named[furthest], "--prompt", "…", why="see it")
    yield next_step("hiplora", "protect", named[furthest], "--out", "DIR", why="lower it")
