"""`hiplora generate` and `hiplora chat`: what a model says with and without adapters, side by side."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer import Option

from hiplora.cli.common import ADAPTERS, DEVICE, MODEL, Shown, next_step

TOKENS = Option(96, min=1, help="Length of an answer, at most.")


def command(
    model: str = MODEL,
    adapter: list[str] = ADAPTERS,
    prompt: list[str] = Option(..., help="What to answer; may be repeated."),
    tokens: int = TOKENS,
    raw: bool = Option(False, "--raw", help="Continue the prompt as text, without the chat template."),
    device: str = DEVICE,
) -> Shown:
    """Answer prompts greedily with the base model and with adapters on it, with the differences marked.

    A prompt goes through the tokenizer's chat template if it has one. Words in which an adapter's answer differs
    from the base's are highlighted on a terminal, and stand in [brackets] elsewhere.

    Example:

        hiplora generate smollm2-135m --adapter runs/first --prompt "Why is the sky blue?" --prompt "Write a haiku."
    """
    from hiplora.evaluation.answers import chat_prompt, side_by_side
    from hiplora.evaluation.mounting import load_model, name_adapters

    named = name_adapters(adapter)
    network, tokenizer = load_model(model, device)
    texts = prompt if raw else [chat_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompt]
    answers = side_by_side(network, tokenizer, named, texts, tokens)
    rows: list[dict[str, Any]] = [{"prompt": text, "answers": row} for text, row in zip(prompt, answers, strict=True)]
    yield {"schema": 1, "kind": "answers", "model": model, "prompts": rows}
    for row in rows:
        yield typer.style(f"\n{row['prompt']}", bold=True)
        yield from _compared(row["answers"])
    folders = [part for folder in named.values() for part in ("--adapter", folder)]
    yield ""
    if folders:
        yield next_step("hiplora", "drift", model, *folders, why="measure how far they are")
    else:
        yield next_step("hiplora", "chat", model, why="talk to it")


def chat(model: str = MODEL, adapter: list[str] = ADAPTERS, tokens: int = TOKENS, device: str = DEVICE) -> None:
    """Talk to the base model and to adapters on it at once; each continues its own conversation.

    Differences from the base's answer are marked. An empty line or Ctrl-D ends.

    Example:

        hiplora chat smollm2-135m --adapter runs/first
    """
    from hiplora.evaluation.answers import chat_prompt, side_by_side
    from hiplora.evaluation.mounting import BASE, load_model, name_adapters

    named = name_adapters(adapter)
    network, tokenizer = load_model(model, device)
    conversations: dict[str, list[dict[str, str]]] = {name: [] for name in (BASE, *named)}
    while words := _line():
        for turns in conversations.values():
            turns.append({"role": "user", "content": words})
        prompts = {name: [chat_prompt(tokenizer, turns)] for name, turns in conversations.items()}
        (answers,) = side_by_side(network, tokenizer, named, prompts, tokens)
        for name, turns in conversations.items():
            turns.append({"role": "assistant", "content": answers[name]})
        for line in _compared(answers):
            typer.echo(line)


def _line() -> str:
    try:
        return input("\nyou: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _compared(answers: Mapping[str, str]) -> Iterator[str]:
    """Yield the base's answer and the others, with what differs marked."""
    from hiplora.evaluation.answers import changes

    base, *others = ((typer.style(name, fg="cyan"), text.strip()) for name, text in answers.items())
    yield f"{base[0]}: {base[1]}"
    for name, text in others:
        marked = "".join(_marked(part) if changed else part for part, changed in changes(base[1], text))
        yield f"{name}{' (the same)' if text == base[1] else ''}: {marked}"


def _marked(part: str) -> str:
    words = part.strip()
    styled = typer.style(words, fg="yellow", bold=True) if sys.stdout.isatty() else f"[{words}]"
    return part.replace(words, styled, 1) if words else part
