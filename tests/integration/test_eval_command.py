"""`hiplora eval` on a tiny model, against lm-eval's own command line; its numbers are also among the golden values."""

import json
import os
import subprocess
import sys

import peft
import pytest

from hiplora.evaluation import engine
from hiplora.evaluation.suite import TASKS
from tests.calls import watch
from tests.commands import run
from tests.golden.make import DATA
from tests.tiny import save_tiny, tiny_llama, write_jsonl

PROGRAMS = [
    {
        "task_id": f"T/{i}",
        "prompt": f"def add{i}(a, b):\n",
        "canonical_solution": "    return a + b\n",
        "entry_point": f"add{i}",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    }
    for i in range(3)
]
KINDS = "mmlu,arc_easy,winogrande,lambada,wikitext,gsm8k"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_tiny(folder / "base")
    (folder / "data").mkdir()
    for name, rows in {**DATA, "humaneval": PROGRAMS}.items():
        write_jsonl(folder / "data" / f"{name}.jsonl", rows)
    for name, init in (("adapter", False), ("other", False), ("idle", True)):
        config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
        peft.get_peft_model(tiny_llama(), config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def score(place, tmp_path, capsys, monkeypatch):
    """Run `hiplora eval` in the place; return its exit status, what it said, and the results, if there are any."""
    monkeypatch.chdir(place)

    def scored(*options, out="scores.json"):
        file = tmp_path / out
        code, _, err = run(capsys, "eval", "base", "--data", "data", "--out", file, *options)
        return code, err, json.loads(file.read_text()) if file.is_file() else None

    return scored


@pytest.mark.slow
def test_lm_eval_itself_gives_the_same_numbers(place, score, tmp_path):
    """An adapter's, by lm-eval's command line with the project's task files."""
    tasks, out = KINDS.split(","), tmp_path / "theirs"
    command = [sys.executable, "-W", "ignore", "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={place / 'base'},peft={place / 'adapter'},dtype=float32", "--tasks"]
    command += [",".join(f"hiplora_{task}" for task in tasks), "--include_path", str(TASKS)]
    command += ["--device", "cpu", "--batch_size", "4", "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HIPLORA_DATA": str(place / "data"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    _, _, scored = score("--suite", KINDS, "--adapter", "adapter")
    for task in tasks:
        ours, other = scored["runs"]["adapter"][task], theirs[f"hiplora_{task}"]
        metric = scored["tasks"][task]["metrics"]["score"]
        if "score" in ours:
            assert ours["score"]["estimate"] == pytest.approx(100 * other[f"{metric},none"])
        for extra, value in ours.get("others", {}).items():
            assert value == pytest.approx(other[f"{extra},none"], rel=1e-4)


def test_all_models_are_compared_on_the_same_items_drawn_by_the_seed(score):
    command = ("--suite", "mmlu", "--adapter", "adapter", "--adapter", "second=other")
    _, _, whole = score(*command, out="whole.json")
    samples = [score(*command, "--limit", 3, "--seed", seed, out=f"{i}.json")[2] for i, seed in enumerate((5, 5, 6))]
    chosen = [one["tasks"]["mmlu"]["items"] for one in samples]
    assert chosen[0] == chosen[1] != chosen[2]
    for name in ("base", "adapter", "second"):
        every, some = (one["runs"][name]["mmlu"]["likelihood"]["items"] for one in (whole, samples[0]))
        assert some == pytest.approx([every[i] for i in chosen[0]], rel=1e-4)
    differences = [(row["of"], row["against"]) for row in whole["differences"]["mmlu"]["likelihood"]]
    assert differences == [("adapter", "base"), ("second", "base"), ("second", "adapter")]


def test_an_interrupted_evaluation_goes_on(score, tmp_path, monkeypatch):
    calls = watch(monkeypatch, engine.Engine, "score", 2, RuntimeError("stopped"))
    command = ("--suite", "lambada", "--adapter", "adapter")
    assert score(*command)[0] == 1
    assert score(*command)[0] == 0
    assert len(calls) == 3  # the base, the adapter that was interrupted, and that adapter again
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_code_runs_only_where_that_is_allowed(score):
    code, said, results = score("--suite", "humaneval")
    assert (code, results) == (2, None)
    assert "--allow-code-execution" in said
    _, _, results = score("--suite", "humaneval", "--allow-code-execution")
    assert results["runs"]["base"]["humaneval"]["score"]["items"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        pytest.param(["--suite", "nonsense"], 2, "'nonsense' is not known; expected one", marks=pytest.mark.slow),
        (["--adapter", "idle"], 1, "changes no logit"),
    ],
)
def test_a_task_or_an_adapter_that_means_nothing_is_refused(score, tmp_path, options, status, said):
    code, message, _ = score("--suite", "lambada", *options)
    assert (code, said in message) == (status, True)
    assert list(tmp_path.iterdir()) == []
