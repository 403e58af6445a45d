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
    found = {}
    for name, folder in named.items():
        with mounted(network, folder) as adapted:
            found[name] = measure_drift(adapted, reference)
    drift = {name: {of: one.as_dict() for of, one in parts.items()} for name, parts in found.items()}
    yield {"schema": 1, "kind": "drift", "model": model, "text": text_source(text), "drift": drift}
    rows = [
        (name, of, f"{one.kl:.2g}", f"{one.greedy_changed:.1%}", f"{one.perplexity_ratio - 1:+.2%}", f"{one.tokens:,}")
        for name, parts in found.items()
        for of, one in parts.items()
    ]
    columns = ("adapter", "text", "KL, nats per token", "greedy tokens changed", "perplexity", "tokens")
    yield f"Drift from {model}", columns, rows
    furthest = max(found, key=lambda name: max(one.kl for one in found[name].values()))
    yield next_step("hiplora", "generate", model, "--adapter", named[furthest], "--prompt", "…", why="see it")
    yield next_step("hiplora", "protect", named[furthest], "--out", "DIR", why="lower it")
