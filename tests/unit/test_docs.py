"""The documentation is checked, the check catches what it is for, and the README's code runs."""

import contextlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from hiplora import HipLoraConfig
from hiplora.cli.main import app
from tests.tiny import save_tiny
from tools import check_docs
from tools.docs_reference import all_commands, described_fields, help_parts, own_fields

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = all_commands(get_command(app))


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


@pytest.mark.parametrize("check", check_docs.CHECKS, ids=lambda check: check.__name__)
def test_the_projects_own_documentation_passes(check):
    assert list(check(ROOT)) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_its_help_with_an_example_that_its_options_accept(name):
    command = COMMANDS[name]
    prose, example = help_parts(command)
    assert prose
    first = example.splitlines()[0]
    assert first.startswith(f"hiplora {name}")
    with contextlib.suppress(
        typer.BadParameter
    ):  # a file of the example's is not there; its options are fine
        command.make_context(name, shlex.split(first)[1 + len(name.split()) :])
    assert all(line.startswith("hiplora ") for line in example.splitlines() if line)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_has_a_help_text(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("name", COMMANDS)
def test_no_bracket_of_a_help_text_is_taken_for_markup(name, capsys):
    command = COMMANDS[name]
    with pytest.raises(SystemExit):
        app(args=[*name.split(), "--help"])
    shown = capsys.readouterr().out
    texts = [command.help, *(parameter.help for parameter in command.params)]
    for bracket in re.findall(r"\[[^\]]*\]", " ".join(text or "" for text in texts)):
        assert bracket in shown


def test_every_field_of_the_configuration_is_described():
    assert set(described_fields(HipLoraConfig)) == {field.name for field in own_fields(HipLoraConfig)}


def test_a_stale_reference_is_found_and_rewritten(tmp_path):
    (tmp_path / "docs").mkdir()
    (problem,) = check_docs.check_reference(tmp_path)
    assert "run `make docs`" in problem
    assert list(check_docs.check_reference(tmp_path, write=True)) == []
    assert list(check_docs.check_reference(tmp_path)) == []
    assert (tmp_path / "docs/reference.md").read_text() == (ROOT / "docs/reference.md").read_text()


def test_a_name_that_does_not_exist_is_found(repo):
    root = repo(
        "docs/x.md", "`hiplora.spectral.retract` `hiplora.spectral.detract(A)` `hiplora.nowhere.x` `other.x`"
    )
    assert list(check_docs.check_names(root)) == [
        "docs/x.md: `hiplora.nowhere.x` does not exist",
        "docs/x.md: `hiplora.spectral.detract` does not exist",
    ]


def test_a_broken_link_is_found(repo):
    repo("docs/y.md", "# The *first* `x` heading, really\n\n```\n# no heading\n```\n")
    root = repo(
        "docs/x.md",
        "[a](y.md) [b](y.md#the-first-x-heading-really) [c](https://example.org/x) ![d](no.png) [e](../no.md) "
        "[f](y.md#no-heading)\n```\n[g](nothing.md)\n```\n",
    )
    assert list(check_docs.check_links(root)) == [
        "docs/x.md: link to no.png: no such file",
        "docs/x.md: link to ../no.md: no such file",
        "docs/x.md: link to y.md#no-heading: no such heading",
    ]


def test_a_number_that_differs_from_its_result_is_found_and_put_right(repo):
    repo("docs/results/r.json", json.dumps({"ratio": [{"at 0": 1.0149}]}))
    marker = "<!-- result: docs/results/r.json ratio 0 'at 0' .2f -->{}<!-- end -->"
    root = repo("README.md", f"| LoRA | {marker.format('0.99')}× |")
    (problem,) = check_docs.check_results(root)
    assert "README.md: result docs/results/r.json ratio 0 'at 0' .2f: not what the file says" in problem
    assert list(check_docs.check_results(root, write=True)) == []
    assert (root / "README.md").read_text() == f"| LoRA | {marker.format('1.01')}× |"
    assert list(check_docs.check_results(root)) == []


@pytest.mark.parametrize(
    "marker", ["docs/no.json a .2f", "docs/results/r.json b .2f", "docs/results/r.json a .2q", ""]
)
def test_a_result_that_cannot_be_read_is_found(repo, marker):
    repo("docs/results/r.json", json.dumps({"a": 1.5}))
    root = repo("README.md", f"<!-- result: {marker} -->1.50<!-- end -->")
    assert len(list(check_docs.check_results(root))) == 1


def test_a_result_marker_that_is_not_closed_is_found(repo):
    repo("docs/results/r.json", json.dumps({"a": 1.5}))
    root = repo("README.md", "<!-- result: docs/results/r.json a .2f -->1.50")
    assert list(check_docs.check_results(root)) == ["README.md: a result marker has no `<!-- end -->`"]


def test_a_marker_in_a_code_block_is_an_example(repo):
    text = "```\n<!-- result: FILE.json KEY .2f -->0.00<!-- end -->\n```\n"
    root = repo("README.md", text)
    assert list(check_docs.check_results(root, write=True)) == []
    assert (root / "README.md").read_text() == text


def test_a_result_without_provenance_is_found(repo):
    repo("docs/results/a.json", "{}")
    told = {"time": "2026", "commit": "abc", "libraries": {"torch": "2"}, "machine": {"cores": 2}}
    root = repo("docs/results/b.json", json.dumps({"provenance": told}))
    assert list(check_docs.check_provenance(root)) == [
        "docs/results/a.json: provenance without time, commit, libraries, machine"
    ]


def test_each_row_of_a_table_needs_provenance(repo):
    row = {"report.time": "2026", "report.libraries.torch": "2", "report.machine.cores": 2, "value": 1}
    repo("docs/results/a.json", json.dumps([{**row, "report.commit": "abc"}]))
    root = repo("docs/results/b.json", json.dumps([{**row, "report.commit": "abc"}, row]))
    assert list(check_docs.check_provenance(root)) == ["docs/results/b.json: provenance without commit"]


@pytest.mark.parametrize("record", ["[]", "[1]", "3"])
def test_a_result_that_cannot_say_where_it_comes_from_is_found(repo, record):
    (problem,) = check_docs.check_provenance(repo("docs/results/a.json", record))
    assert problem == "docs/results/a.json: provenance without time, commit, libraries, machine"


def test_a_folder_of_somebodys_machine_is_found(repo):
    home = "/ho" + "me/ada/models"
    root = repo("docs/results/a.json", f'{{\n"model": "{home}"}}')
    assert list(check_docs.check_private(root)) == [
        "docs/results/a.json:2: names a folder of one machine (/ho" + "me/ada/)"
    ]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    code = "\n".join(blocks)
    for real, tiny in (
        ('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"model"'),
        ("principal_rank=32", "principal_rank=8"),
    ):
        assert code.count(real) == 1
        code = code.replace(real, tiny)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "runs/first-lora/adapter_model.safetensors").is_file()
    assert scope["hiplora"].max_leak(scope["model"]) < 1e-5
