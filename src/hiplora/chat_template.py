"""Chat templates of unknown models: whether one terminates, and takes messages that are plain text."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 30  # with the start of a process
# Put before a template that takes the parts of a message, and would leave out or refuse plain text.
_PARTS = """\
{%- set text = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set message = dict(message, content=[{"type": "text", "text": message.content}]) -%}
{%- endif -%}
{%- set text.messages = text.messages + [message] -%}
{%- endfor -%}
{%- set messages = text.messages -%}
"""
_IN_PARTS = 4  # exit status: it works with these lines only
_RENDER = """
import json, re, sys
sys.path[:0] = json.loads(sys.argv[1])
from jinja2.sandbox import ImmutableSandboxedEnvironment
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
except (ImportError, ValueError, OSError):
    pass
options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
turns = [{"role": "user", "content": "31415"}, {"role": "assistant", "content": "27182"}]  # the same in any case
template = re.sub(r"{%-?\\s*(end)?generation\\s*-?%}", "", sys.stdin.buffer.read().decode("utf-8", "replace"))
for before, status in (("", 0), (sys.argv[2], int(sys.argv[3]))):
    try:
        made = ImmutableSandboxedEnvironment(**options).from_string(before + template)
        text = made.render(messages=turns, add_generation_prompt=True)
        if all(turn["content"] in text for turn in turns):
            sys.exit(status)
    except MemoryError:
        sys.exit(3)
    except Exception:
        pass
"""


def prepare_template(tokenizer: Any) -> bool:
    """Make a tokenizer's chat templates, of which there may be several by name, take messages that are plain text.

    Those of models that see pictures may want a message in parts. Returns False, and changes nothing, if one does not
    terminate.
    """
    original = getattr(tokenizer, "chat_template", None)
    templates = original if isinstance(original, dict) else {"default": original}
    prepared = {name: _prepared(text) for name, text in templates.items() if isinstance(text, str)}
    if None in prepared.values():
        return False
    if prepared:
        tokenizer.chat_template = prepared if isinstance(original, dict) else prepared["default"]
    return True


@functools.cache
def _prepared(template: str) -> str | None:
    """Return a template that takes plain text, tried in a process that can be stopped; None if that takes too long.

    Other faults, also of a template that cannot be tried, surface where it is used.
    """
    paths = [path for path in sys.path if path and Path(path) != Path.cwd()]  # no code of the working folder runs
    command = [sys.executable, "-I", "-c", _RENDER, json.dumps(paths), _PARTS, str(_IN_PARTS)]
    try:
        process = subprocess.run(
            command, input=template.encode(errors="replace"), capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    if process.returncode not in (0, 1, _IN_PARTS):
        return None
    return _PARTS + template if process.returncode == _IN_PARTS else template
