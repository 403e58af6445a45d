"""Whether a chat template from a stranger's model comes to an end."""

import functools
import json
import subprocess
import sys
from pathlib import Path

SECONDS = 30  # with the start of a process
_RENDER = """
import contextlib, json, re, sys
sys.path[:0] = json.loads(sys.argv[1])
from jinja2.sandbox import ImmutableSandboxedEnvironment
with contextlib.suppress(ImportError, ValueError, OSError):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
turns = [{"role": role, "content": "text"} for role in ("user", "assistant")]
try:
    template = re.sub(r"{%-?\\s*(end)?generation\\s*-?%}", "", sys.stdin.buffer.read().decode("utf-8", "replace"))
    ImmutableSandboxedEnvironment(**options).from_string(template).render(messages=turns, add_generation_prompt=True)
except MemoryError:
    sys.exit(3)
except Exception:
    pass
"""


@functools.cache
def renders(template: str) -> bool:
    """Return whether a chat template comes to an end, tried in a process that can be stopped: it may never do so.

    What else is wrong with it shows where it is used; so does a template that cannot be tried.
    """
    paths = [path for path in sys.path if path and Path(path) != Path.cwd()]  # nothing of a working folder runs
    command = [sys.executable, "-I", "-c", _RENDER, json.dumps(paths)]
    try:
        done = subprocess.run(command, input=template.encode(errors="replace"), capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode in (0, 1)
