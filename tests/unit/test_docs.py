"""The documentation agrees with the code, and the checks that say so can fail."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from hiplora import HipLoraConfig
from tools import docs, reference

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = reference.commands()


@pytest.fixture
def repo(tmp_path):
    """A git repository; call it with a path and a text to add a file."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    def add(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        subprocess.run(["git", "add", path], cwd=tmp_path, check=True)
        return tmp_path

    return add


@pytest.mark.parametrize("check", docs.CHECKS, ids=lambda check: check.__name__)
def test_the_projects_own_documentation_passes(check):
    assert list(check(ROOT)) == []


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


def test_a_name_that_does_not_exist_is_found(repo):
    root = repo("docs/x.md", "`hiplora.spectral.retract` `hiplora.spectral.detract(A)` `hiplora.nowhere.x`")
    assert [problem.split("`")[1] for problem in docs.check_names(root)] == [
        "hiplora.nowhere.x",
        "hiplora.spectral.detract",
    ]


def test_a_name_that_sphinx_is_to_document_must_exist(repo):
    root = repo(
        "docs/x.md",
        ".. currentmodule:: hiplora.spectral\n\n.. autofunction:: retract\n.. autoclass:: Nowhere\n",
    )
    assert list(docs.check_names(root)) == ["docs/x.md: `hiplora.spectral.Nowhere` does not exist"]


def test_a_broken_link_is_found(repo):
    repo("docs/y.md", "# The *first* `x` heading\n\n```\n# no heading\n```\n")
    root = repo("docs/x.md", "[a](y.md#the-first-x-heading) [b](no.md) [c](y.md#no-heading) [d](https://x.org)")
    assert [problem.split()[3] for problem in docs.check_links(root)] == ["no.md:", "y.md#no-heading:"]


@pytest.mark.parametrize(("written", "wrong"), [("1.01", 0), ("0.99", 1)])
def test_a_number_that_differs_from_its_result_is_found(repo, written, wrong):
    repo("docs/r.json", json.dumps({"ratio": [{"at": 1.0149}]}))
    repo("docs/numbers.csv", "page,text,file,path,format\nREADME.md,takes {} of,docs/r.json,ratio/0/at,.2f\n")
    root = repo("README.md", f"A step takes {written}\nof LoRA's time.")
    assert len(list(docs.check_numbers(root))) == wrong


def test_a_stale_table_is_found_and_rewritten(repo):
    repo("docs/t.csv", "method,loss\nLoRA,0.9\n")
    root = repo("docs/x.md", "<!-- table: docs/t.csv -->\nold\n<!-- /table -->")
    text = docs.generated(root)[root / "docs/x.md"]
    assert "| LoRA | 0.9 |" in text
    assert "old" not in text


def test_a_folder_of_somebodys_machine_is_found(repo):
    root = repo("docs/results/a.json", '{\n"model": "/ho' + 'me/ada/models"}')
    (problem,) = docs.check_private(root)
    assert problem.startswith("docs/results/a.json:2:")
