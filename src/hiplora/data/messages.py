"""Rows under one set of names: ShareGPT's, TRL's and OpenAI's conversations, and fields of popular data sets."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool", "bing": "assistant"}
# Fields of popular data sets → the project's names: Dolly; NuminaMath and Magicoder; OpenOrca; BoolQ; MBPP.
_FIELDS = (
    ({"instruction", "response"}, {"response": "output", "context": "input"}),
    ({"problem", "solution"}, {"problem": "question", "solution": "answer"}),
    ({"question", "response"}, {"response": "answer"}),
    ({"question", "passage", "answer"}, {"passage": "context"}),
    ({"text", "code"}, {"text": "prompt", "code": "completion"}),
)
BEFORE = ("system", "system_prompt", "history")  # fields of what came before a row's own task
_SPEAKERS = ("user", "assistant")
_PAIRS = (("instruction", "output"), ("question", "answer"), ("query", "response"), ("prompt", "completion"))


def renamed(row: Any) -> Any:
    """Return a row of a data set that names the usual fields otherwise under the project's names."""
    for fields, names in _FIELDS if isinstance(row, Mapping) else ():
        if row.keys() >= fields and not row.keys() & names.values():
            return {names.get(name, name): value for name, value in row.items()}
    return row


def has_history(row: Any) -> bool:
    """Return whether a row has a system message, or turns before its own, in separate fields."""
    return isinstance(row, Mapping) and any(row.get(name) for name in BEFORE)


def _system(row: Mapping[str, Any]) -> Any:
    return row.get("system") or row.get("system_prompt")


def with_history(row: Any) -> Any:
    """Return a row of one task and answer as messages, with the turns before; other and malformed rows unchanged."""
    if not isinstance(row, Mapping) or "messages" in row or "conversations" in row:
        return row
    pair = next((pair for pair in _PAIRS if all(isinstance(row.get(name), str) for name in pair)), None)
    system, material = _system(row), row.get("input") or row.get("context")
    turns = row.get("history") or []
    malformed = not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    if pair is None or malformed or not all(isinstance(text, str | None) for text in (system, material)):
        return row
    task = f"{row[pair[0]]}\n\n{material}" if material else row[pair[0]]
    turns = [*turns, [task, row[pair[1]]]]
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(_SPEAKERS, turn, strict=True)]
    return {**row, "messages": messages}


def as_messages(row: Any) -> Any:
    """Return conversational rows as messages, whether ShareGPT's, TRL's or OpenAI's; other rows unchanged."""
    if not isinstance(row, Mapping):
        return row
    turns, prompt, completion = row.get("conversations"), row.get("prompt"), row.get("completion", row.get("response"))
    if isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns):
        row = {**row, "messages": turns}
    elif None not in (prompt, completion) and (isinstance(prompt, list) or isinstance(completion, list)):
        before, after = _as_turns(prompt, "user"), _as_turns(completion, "assistant")
        row = {**row, "messages": [*before, *after], "learn_from": len(before)}
    if not isinstance(row.get("messages"), list):
        return row
    messages, system, tools = [_message(message) for message in row["messages"]], _system(row), row.get("tools")
    has_system = bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    if isinstance(system, str) and system.strip() and not has_system:
        messages.insert(0, {"role": "system", "content": system})
        if isinstance(row.get("learn_from"), int):
            row = {**row, "learn_from": row["learn_from"] + 1}
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            tools = json.loads(tools or "null")
        row = {**row, "tools": tools}
    return {**row, "messages": messages}


def _as_turns(turns: Any, role: str) -> list[Any]:
    return turns if isinstance(turns, list) else [{"role": role, "content": turns}]


def _message(raw: Any) -> Any:
    """Return a message under its usual names, with ShareGPT's roles renamed and parts of text joined."""
    if not isinstance(raw, Mapping):
        return raw
    role, content = raw.get("role", raw.get("from")), raw.get("content", raw.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    message = {key: value for key, value in raw.items() if key not in ("from", "value") and value not in (None, [])}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return {**message, "role": role, "content": content}


def _tool_call(call: Any) -> Any:
    """Return a tool call with its arguments as an object: templates would encode OpenAI's JSON text once more."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}} if isinstance(arguments, dict) else call
