"""`hiplora generate` and `hiplora chat`: what a model says with and without adapters, side by side."""

import sys
from collections.abc import Mapping

import typer

from hiplora.cli.common import DEVICE_OPTION, JSON_OPTION, emit_json

ADAPTERS_OPTION = typer.Option([], "--adapter", help="Adapter folder, or NAME=FOLDER; may be repeated.")
TOKENS_OPTION = typer.Option(96, "--tokens", min=1, help="Length of an answer, at most.")


def command(
    model: str = typer.Argument(..., help="Base model: a folder, a hub name, or smollm2-135m."),
    adapter: list[str] = ADAPTERS_OPTION,
    prompt: list[str] = typer.Option(..., "--prompt", help="What to answer; may be repeated."),
    tokens: int = TOKENS_OPTION,
    raw: bool = typer.Option(False, "--raw", help="Continue the prompt as text, without the chat template."),
    device: str = DEVICE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Answer prompts greedily with the base model and with adapters on it, with the differences marked.

    A prompt goes through the tokenizer's chat template where it has one. Words in which an adapter's answer differs
    from the base's are highlighted on a terminal, and stand in [brackets] elsewhere.

    Example:

        hiplora generate smollm2-135m --adapter runs/first --prompt "Why is the sky blue?" --prompt "Write a haiku."
    """
    from hiplora.evaluation.answers import chat_prompt, side_by_side
    from hiplora.evaluation.mounting import load_model, name_adapters

    named = name_adapters(adapter)
    network, tokenizer = load_model(model, device)
    asked = prompt if raw else [chat_prompt(tokenizer, [{"role": "user", "content": one}]) for one in prompt]
    answers = side_by_side(network, tokenizer, named, asked, tokens)
    if as_json:
        emit_json([{"prompt": one, "answers": row} for one, row in zip(prompt, answers, strict=True)])
        return
    for one, row in zip(prompt, answers, strict=True):
        typer.secho(f"\n{one}", bold=True)
        _show(row)


def chat(
    model: str = typer.Argument(..., help="Base model: a folder, a hub name, or smollm2-135m."),
    adapter: list[str] = ADAPTERS_OPTION,
    tokens: int = TOKENS_OPTION,
    device: str = DEVICE_OPTION,
) -> None:
    """Talk to the base model and to adapters on it at once; each continues its own conversation.

    Differences from the base's answer are marked. An empty line or Ctrl-D ends.

    Example:

        hiplora chat smollm2-135m --adapter runs/first
    """
    from hiplora.evaluation.answers import chat_prompt, side_by_side
    from hiplora.evaluation.mounting import BASE, load_model, name_adapters

    named = name_adapters(adapter)
    network, tokenizer = load_model(model, device)
    said: dict[str, list[dict[str, str]]] = {name: [] for name in (BASE, *named)}
    while words := _line():
        for turns in said.values():
            turns.append({"role": "user", "content": words})
        prompts = {name: [chat_prompt(tokenizer, turns)] for name, turns in said.items()}
        (answers,) = side_by_side(network, tokenizer, named, prompts, tokens)
        for name, turns in said.items():
            turns.append({"role": "assistant", "content": answers[name]})
        _show(answers)


def _line() -> str:
    try:
        return input("\nyou: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _show(answers: Mapping[str, str]) -> None:
    """Print the base's answer and the others, with what differs marked."""
    from hiplora.evaluation.answers import changes

    base, *others = answers.items()
    typer.echo(f"{typer.style(base[0], fg='cyan')}: {base[1].strip()}")
    for name, text in others:
        marked = "".join(
            _marked(part) if changed else part for part, changed in changes(base[1].strip(), text.strip())
        )
        same = " (the same)" if text.strip() == base[1].strip() else ""
        typer.echo(f"{typer.style(name, fg='cyan')}{same}: {marked}")


def _marked(part: str) -> str:
    words = part.strip()
    styled = typer.style(words, fg="yellow", bold=True) if sys.stdout.isatty() else f"[{words}]"
    return part.replace(words, styled, 1) if words else part
