"""The Python of the documentation runs, and its shell lines are valid commands."""

import re
import shlex
import shutil
import textwrap
from pathlib import Path

import peft
import pytest
import torch

from hiplora import HipLoraConfig
from tests.commands import run
from tests.tiny import save_tiny, tiny_llama
from tools import docs, reference

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = reference.commands()
MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in docs.tracked(ROOT, "README.md", "docs/tutorials", "docs/howto", "docs/explanation")
}
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)


def fenced(text: str, *languages: str) -> list[str]:
    """Return the code blocks of a page in one of the languages, without the indentation that they have in lists."""
    return [textwrap.dedent(match[3]) for match in FENCE.finditer(text) if match[2] in languages]


PYTHON = {page: code for page, text in PAGES.items() if (code := fenced(text, "python"))}
SHELL = [
    (page, line)
    for page, text in PAGES.items()
    for block in fenced(text, "", "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("hiplora ")
]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A tiny model, and adapters of it in runs/, for what the pages only name."""
    folder = tmp_path_factory.mktemp("docs")
    base = save_tiny(folder / "model")
    for seed, name in enumerate(("first", "maths", "code")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_llama(), config)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder / "runs" / name)
    return folder


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, stand_ins, tmp_path, monkeypatch):
    code = "\n".join(PYTHON[page])
    for name in MODELS:
        code = code.replace(f'"{name}"', repr(str(stand_ins / "model")))
    monkeypatch.chdir(tmp_path)
    if page != "README.md":  # which trains its own
        shutil.copytree(stand_ins / "runs", "runs")
    exec(compile(code, f"<{page}>", "exec"), {"__name__": "page"})


@pytest.mark.slow
def test_the_first_ten_minutes_are_as_the_page_says(tmp_path, monkeypatch, capsys):
    page, base = PAGES["docs/tutorials/ten-minutes.md"], save_tiny(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for match in FENCE.finditer(page):
        code = match[3].replace("smollm2-135m", str(base))
        if match[2] == "python":
            exec(compile(code, "<ten-minutes>", "exec"), {"__name__": "page"})
        if match[2] == "yaml":
            Path("recipe.yaml").write_text(code)
        for line in code.splitlines():
            if line.startswith("hiplora "):
                status, _, error = run(capsys, *shlex.split(line)[1:])
                assert status == 0, f"{line}: {error}"
    assert (tmp_path / "runs" / "compare" / "report.html").is_file()
    peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "runs" / "ten-lora"))


@pytest.mark.parametrize(("page", "line"), SHELL, ids=lambda value: value.partition("/")[0][:60])
def test_a_shell_line_is_a_valid_command(page, line):
    words = shlex.split(line, comments=True)[1:]
    name = " ".join(words[:2]) if words[0] == "study" else words[0]
    COMMANDS[name].make_context(name, words[len(name.split()) :])


def test_the_readme_trains_the_default_method_and_lists_every_command():
    assert "peft_config=hiplora.HipLoraConfig(task_type=" in "\n".join(PYTHON["README.md"])
    assert HipLoraConfig().preset == "function-aware"
    listed = re.findall(r"^\| `hiplora ([\w-]+)", PAGES["README.md"], re.MULTILINE)
    assert sorted(listed) == sorted({name.split()[0] for name in COMMANDS})
