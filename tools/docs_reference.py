"""Write the reference of commands and settings from the code itself."""

import dataclasses
import enum
import inspect
import re
from typing import Any

from typer.main import get_command

HEADER = """# Reference

Written by `make docs` from the code: do not edit. For recipes, see [training](training.md); for the ideas, see
[the method](method.md).

Every command takes `--help`, and `--debug` to show the traceback of an error. It leaves with 0 when it did its
work, 1 when it failed, 2 when it was used wrongly or its input is wrong, and 130 after Ctrl-C. Environment:
`HIPLORA_CACHE` is the folder for models and factors, `HIPLORA_DEBUG=1` is `--debug`.
"""


def reference() -> str:
    """Return docs/reference.md as it should be."""
    from hiplora import HipLoraConfig
    from hiplora.cli.main import app

    group: Any = get_command(app)
    parts = [HEADER]
    parts += [_command(name, command) for name, command in all_commands(group).items()]
    parts.append(_settings(HipLoraConfig))
    return "\n".join(parts)


def all_commands(group: Any) -> dict[str, Any]:
    """Return the commands of a group by name, those of a group within it as `GROUP COMMAND`."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = all_commands(command) if hasattr(command, "commands") else None
        found |= {name: command} if inner is None else {f"{name} {key}": one for key, one in inner.items()}
    return found


def help_parts(command: Any) -> tuple[str, str]:
    """Split a command's help into what it says and its example, the lines after `Example:`."""
    text = inspect.cleandoc(command.help or "").replace("\b", "")
    prose, _, example = text.partition("Example:")
    return prose.strip(), inspect.cleandoc(example).strip()


def _command(name: str, command: Any) -> str:
    prose, example = help_parts(command)
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join(f"{item.name.upper()}" for item in arguments)
    lines = [
        f"## hiplora {name}",
        "",
        f"`hiplora {name} {usage} [OPTIONS]`".replace("  ", " "),
        "",
        prose,
        "",
    ]
    if example:
        lines += ["```", example, "```", ""]
    lines += ["| | default | |", "|---|---|---|"]
    lines += [_row(f"`{item.name.upper()}`", _default(item), item.help) for item in arguments]
    lines += [_row(_flags(item), _default(item), item.help) for item in options if item.name != "help"]
    return "\n".join([*lines, ""])


def _flags(option: Any) -> str:
    annotation = option.type_descriptor.annotation
    if option.is_flag:
        value = ""
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        value = " " + "|".join(str(choice.value) for choice in annotation)
    else:
        value = f" {option.metavar or option.name.upper()}"
    return ", ".join(f"`{name}{value}`" for name in [*option.opts, *option.secondary_opts])


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or value in ((), []) or callable(value):
        return ""
    return "`on`" if value is True else f"`{getattr(value, 'value', value)}`"


def _row(name: str, default: str, text: str | None) -> str:
    cells = (name, default, " ".join((text or "").split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def described_fields(cls: type) -> dict[str, str]:
    """Return what a dataclass's docstring says of each field, from its `Args:` section."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(section).splitlines():
        if match := re.match(r"(\w+): (.*)", line):
            name, entries[match[1]] = match[1], match[2]
        elif name:
            entries[name] += f" {line.strip()}"
    return entries


def own_fields(cls: type) -> list[dataclasses.Field]:
    """Return the fields that a dataclass declares itself, without those of its bases."""
    own = inspect.get_annotations(cls)
    return [field for field in dataclasses.fields(cls) if field.name in own]


def _settings(cls: type) -> str:
    told = described_fields(cls)
    lines = [
        f"## {cls.__name__}",
        "",
        "`peft.get_peft_model(base, hiplora.HipLoraConfig(...))`; `import hiplora` makes PEFT know the method.",
        "",
        "| field | default | |",
        "|---|---|---|",
    ]
    for field in own_fields(cls):
        empty = field.default is dataclasses.MISSING
        default = "`{}`" if empty else f"`{field.default!r}`"
        lines.append(_row(f"`{field.name}`", default, told.get(field.name)))
    return "\n".join([*lines, ""])
