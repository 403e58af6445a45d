"""Rows under one set of names: ShareGPT's, TRL's and OpenAI's conversations, and fields of popular data sets."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool", "bing": "assistant"}


# What data sets have → the names here: Dolly; NuminaMath and Magicoder; OpenOrca; MBPP.
_FIELDS = (
    ({"instruction", "response"}, {"response": "output", "context": "input"}),
    ({"problem", "solution"}, {"problem": "question", "solution": "answer"}),
    ({"question", "response"}, {"response": "answer"}),
    ({"text", "code"}, {"text": "prompt", "code": "completion"}),
)
BEFORE = ("system", "system_prompt", "history")  # fields of what came before a row's own task
_SPEAKERS = ("user", "assistant")
_PAIRS = (("instruction", "output"), ("question", "answer"), ("query", "response"), ("prompt", "completion"))


def renamed(row: Any) -> Any:
    """Return a row of a data set with other names for the usual fields under the names here."""
    for fields, names in _FIELDS if isinstance(row, Mapping) else ():
        if row.keys() >= fields and not row.keys() & names.values():
            return {names.get(name, name): value for name, value in row.items()}
    return row


def has_history(row: Any) -> bool:
    """Return whether a row has a system message, or turns before its own, in fields beside it."""
    return isinstance(row, Mapping) and any(row.get(name) for name in BEFORE)


def _system(row: Mapping[str, Any]) -> Any:
    return row.get("system") or row.get("system_prompt")


def with_history(row: Any) -> Any:
    """Return a row of one task and answer as messages, with the turns before; others, and odd ones, as they are."""
    if not isinstance(row, Mapping) or "messages" in row or "conversations" in row:
        return row
    pair = next((pair for pair in _PAIRS if all(isinstance(row.get(name), str) for name in pair)), None)
    system, material = _system(row), row.get("input") or row.get("context")
    turns = row.get("history") or []
    odd = not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    if pair is None or odd or not all(isinstance(text, str | None) for text in (system, material)):
        return row
    task = f"{row[pair[0]]}\n\n{material}" if material else row[pair[0]]
    said = [*turns, [task, row[pair[1]]]]
    messages = [{"role": role, "content": text} for turn in said for role, text in zip(_SPEAKERS, turn, strict=True)]
    return {**row, "messages": messages}


def as_messages(row: Any) -> Any:
    """Return conversational rows as messages, whether ShareGPT's, TRL's or OpenAI's; others as they are."""
    if not isinstance(row, Mapping):
        return row
    said, prompt, completion = row.get("conversations"), row.get("prompt"), row.get("completion", row.get("response"))
    if isinstance(said, list) and all(isinstance(one, Mapping) for one in said):
        row = {**row, "messages": said}
    elif None not in (prompt, completion) and (isinstance(prompt, list) or isinstance(completion, list)):
        before, after = _turns(prompt, "user"), _turns(completion, "assistant")
        row = {**row, "messages": [*before, *after], "learn_from": len(before)}
    if not isinstance(row.get("messages"), list):
        return row
    messages, system, tools = [_message(one) for one in row["messages"]], _system(row), row.get("tools")
    if isinstance(system, str) and system.strip() and not any(_role(one) == "system" for one in messages[:1]):
        messages.insert(0, {"role": "system", "content": system})
        row = {**row, **({"learn_from": row["learn_from"] + 1} if isinstance(row.get("learn_from"), int) else {})}
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools or "null")
        row = {**row, "tools": tools}
    return {**row, "messages": messages}


def _turns(said: Any, role: str) -> list[Any]:
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _message(one: Any) -> Any:
    """Return a message under its usual names, with ShareGPT's roles renamed and parts of text put together."""
    if not isinstance(one, Mapping):
        return one
    role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    given = {key: value for key, value in one.items() if key not in ("from", "value") and value not in (None, [])}
    if isinstance(given.get("tool_calls"), list):
        given["tool_calls"] = [_call(call) for call in given["tool_calls"]]
    return {**given, "role": role, "content": content}


def _call(call: Any) -> Any:
    """Return a tool call with its arguments as an object: templates would encode OpenAI's, JSON text, once more."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}} if isinstance(arguments, dict) else call
