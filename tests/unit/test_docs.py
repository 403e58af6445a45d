"""Commands and fields are described, and the checks of the documentation (which `make lint` runs) can fail."""

import json
import shlex
import subprocess

import pytest

from hiplora import HipLoraConfig
from tools import docs, reference

COMMANDS = reference.commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_its_options_accept_and_a_help_for_every_parameter(name):
    command = COMMANDS[name]
    prose, example = reference.help_parts(command)
    assert prose
    first = example.splitlines()[0]
    assert first.startswith(f"hiplora {name}")
    command.make_context(name, shlex.split(first)[1 + len(name.split()) :])
    assert all(parameter.help for parameter in command.params)


def test_every_field_of_the_configuration_is_described():
    own = {field.name for field in reference.own_fields(HipLoraConfig)}
    assert set(reference.described_fields(HipLoraConfig)) == own


TABLE = "<!-- table: docs/t.csv -->\nold\n<!-- /table -->"
PAGE = {"docs/y.md": "# The *first* `x` heading\n\n```\n# no heading\n```\n"}
NUMBER = {
    "docs/r.json": json.dumps({"ratio": [{"at": 1.0149}]}),
    "docs/numbers.csv": "page,text,file,path,format\nx.md,takes {} of,docs/r.json,ratio/0/at,.2f\n",
}


@pytest.fixture
def root(tmp_path):
    """A git repository."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        subprocess.run(["git", "add", name], cwd=root, check=True)


@pytest.mark.parametrize(
    ("check", "text", "others", "found"),
    [
        (docs.check_names, "`hiplora.tuner.retract_` `hiplora.tuner.no(A)`", {}, "`hiplora.tuner.no`"),
        (docs.check_names, ".. currentmodule:: hiplora.spectral\n\n.. autoclass:: No\n", {}, "`hiplora.spectral.No`"),
        (docs.check_names, ".. currentmodule:: hiplora.spectral\n\n.. autofunction:: retract\n", {}, ""),
        (docs.check_links, "[a](docs/y.md#the-first-x-heading) [b](no.md) [c](https://x.org)", PAGE, "no.md"),
        (docs.check_links, "[a](docs/y.md#no-heading)", PAGE, "docs/y.md#no-heading"),
        (docs.check_numbers, "A step takes 1.01\nof LoRA's time.", NUMBER, ""),
        (docs.check_numbers, "A step takes 0.99\nof LoRA's time.", NUMBER, "takes 1.01 of"),
        (docs.check_private, '{\n"model": "/ho' + 'me/ada/models"}', {}, "x.md:2"),
    ],
)
def test_what_is_wrong_in_a_page_is_found(root, check, text, others, found):
    write(root, {**others, "x.md": text})
    problems = list(check(root))
    assert len(problems) == bool(found)
    assert found in "".join(problems)


def test_a_stale_table_is_found_and_rewritten(root):
    write(root, {"docs/t.csv": "method,loss\nLoRA,0.9\n", "x.md": TABLE})
    text = docs.generated(root)[root / "x.md"]
    assert "| LoRA | 0.9 |" in text
    assert "old" not in text
