"""`hiplora eval` on a tiny model, against lm-eval's own command line with the same task files."""

import json
import os
import subprocess
import sys

import peft
import pytest
from typer.testing import CliRunner

from hiplora.cli.main import app, main
from hiplora.evaluation.suite import TASKS
from tiny import save_tiny, tiny_llama, write_jsonl

WORDS = ["rain", "stone", "river", "lamp", "cloud", "bread", "north", "seven"]


def rows(count, make):
    return [make(i) for i in range(count)]


def choice(i):
    return {
        "question": f"Which of these goes with {WORDS[i % 8]} number {i}?",
        "choices": [WORDS[(i + j) % 8] * (1 + j % 2) for j in range(4)],
        "answer": i % 4,
    }


# One task of each kind: letters, answers of several tokens, choices in the context, a last word, a text, a number.
DATA = {
    "mmlu_test": rows(7, choice),
    "arc_easy": rows(7, choice),
    "winogrande": rows(
        6,
        lambda i: {
            "context": f"The {WORDS[i]} is beside the {WORDS[i + 1]} since _ is {i} years old.",
            "choices": [WORDS[i], WORDS[i + 1]],
            "answer": i % 2,
        },
    ),
    "lambada": rows(6, lambda i: {"context": f"On day {i} they saw the {WORDS[i]} and the", "answer": WORDS[i + 1]}),
    "wikitext2_raw_valid": rows(3, lambda i: {"text": " ".join(WORDS[i:] * 9) + f"\n = {i} = \n", "title": str(i)}),
    "gsm8k_test": rows(
        6, lambda i: {"question": f"What is {i} and {i}?", "answer": f"It is <<{i}+{i}>>.\n#### {2 * i}"}
    ),
    "humaneval": rows(
        3,
        lambda i: {
            "task_id": f"T/{i}",
            "prompt": f"def add{i}(a, b):\n",
            "canonical_solution": "    return a + b\n",
            "entry_point": f"add{i}",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        },
    ),
}
KINDS = "mmlu,arc_easy,winogrande,lambada,wikitext,gsm8k"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_tiny(folder / "base")
    (folder / "data").mkdir()
    for name, found in DATA.items():
        write_jsonl(folder / "data" / f"{name}.jsonl", found)
    for seed in (1, 2):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_llama(), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(seed * 4)
        model.save_pretrained(folder / f"adapter{seed}")
    return folder


def command_line(place, out, suite):
    return ["eval", str(place / "base"), "--suite", suite, "--data", str(place / "data"), "--out", str(out)]


def run(place, out, *options, suite=KINDS):
    given = [*command_line(place, out, suite), *map(str, options)]
    return CliRunner().invoke(app, given, catch_exceptions=False)


@pytest.fixture(scope="module")
def scored(place):
    out = place / "scores.json"
    adapters = ("--adapter", place / "adapter1", "--adapter", f"second={place / 'adapter2'}")
    assert run(place, out, *adapters).exit_code == 0
    return json.loads(out.read_text())


def items(results, name, task, form="score"):
    return results["runs"][name][task][form]["items"]


@pytest.mark.slow
def test_lm_eval_itself_gives_the_same_numbers(place, scored, tmp_path):
    """An adapter's, by lm-eval's command line with the project's task files."""
    tasks, out = KINDS.split(","), tmp_path / "theirs"
    command = [sys.executable, "-W", "ignore", "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={place / 'base'},peft={place / 'adapter1'},dtype=float32", "--tasks"]
    command += [",".join(f"hiplora_{task}" for task in tasks), "--include_path", str(TASKS)]
    command += ["--device", "cpu", "--batch_size", "4", "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "HIPLORA_DATA": str(place / "data"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    for task in tasks:
        found, other = scored["runs"]["adapter1"][task], theirs[f"hiplora_{task}"]
        metric = scored["tasks"][task]["metrics"]["score"]
        if "score" in found:
            assert found["score"]["estimate"] == pytest.approx(100 * other[f"{metric},none"])
        for extra, value in found.get("others", {}).items():
            assert value == pytest.approx(other[f"{extra},none"], rel=1e-4)


def test_each_score_has_its_likelihood_beside_it(scored):
    assert scored["tasks"]["mmlu"]["metrics"] == {"score": "acc", "likelihood": "mean probability of the gold choice"}
    for task in scored["tasks"]:
        for name in scored["runs"]:
            found = scored["runs"][name][task]["likelihood"]
            assert 0 < found["low"] <= found["estimate"] <= found["high"] < 100


def test_differences_are_of_the_same_items(scored):
    rows = scored["differences"]["mmlu"]["likelihood"]
    assert [(row["of"], row["against"]) for row in rows] == [
        ("adapter1", "base"),
        ("second", "base"),
        ("second", "adapter1"),
    ]
    pairs = zip(
        items(scored, "adapter1", "mmlu", "likelihood"), items(scored, "base", "mmlu", "likelihood"), strict=True
    )
    differences = [one - other for one, other in pairs]
    assert rows[0]["estimate"] == pytest.approx(sum(differences) / len(differences))
    assert rows[0]["low"] <= rows[0]["estimate"] <= rows[0]["high"]


def test_a_limit_draws_items_by_the_seed_and_lm_eval_scores_those(place, scored, tmp_path):
    found = []
    for seed in (5, 5, 6):
        out = tmp_path / f"{len(found)}.json"
        assert run(place, out, "--limit", 3, "--seed", seed, suite="mmlu").exit_code == 0
        found.append(json.loads(out.read_text()))
    chosen = [one["tasks"]["mmlu"]["items"] for one in found]
    assert chosen[0] == chosen[1] != chosen[2]
    whole = items(scored, "base", "mmlu", "likelihood")
    assert items(found[0], "base", "mmlu", "likelihood") == pytest.approx([whole[i] for i in chosen[0]], rel=1e-4)


def test_an_interrupted_evaluation_goes_on(place, tmp_path, monkeypatch):
    from hiplora.evaluation import engine

    score, calls = engine.Engine.score, []

    def fails_at_the_adapter(self, model, *args, **kwargs):
        calls.append(type(model).__name__)
        if len(calls) == 2:
            raise RuntimeError("stopped")
        return score(self, model, *args, **kwargs)

    out = tmp_path / "scores.json"
    monkeypatch.setattr(engine.Engine, "score", fails_at_the_adapter)
    options = ("--adapter", place / "adapter1")
    with pytest.raises(RuntimeError, match="stopped"):
        run(place, out, *options, suite="lambada")
    assert not out.exists()
    assert run(place, out, *options, suite="lambada").exit_code == 0
    assert len(calls) == 3  # the base, the adapter that was interrupted, and that adapter again
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_code_runs_only_where_that_is_allowed(place, tmp_path, capsys):
    out = tmp_path / "scores.json"
    with pytest.raises(SystemExit):
        main(command_line(place, out, "humaneval"))
    assert "--allow-code-execution" in capsys.readouterr().err
    assert not out.exists()
    assert run(place, out, "--allow-code-execution", suite="humaneval").exit_code == 0
    assert items(json.loads(out.read_text()), "base", "humaneval") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(["--suite", "nonsense"], "'nonsense' is not known; expected one of", marks=pytest.mark.slow),
        (["--suite", "nothere.yaml"], "no such file"),
        (["--suite", "piqa"], "has no piqa"),
        (["--data", "/nowhere"], "no such folder"),
        (["--adapter", "/nowhere"], "no such folder"),
        (["--adapter", "one=adapter1", "--adapter", "one=adapter2"], "is taken"),
        (["--adapter", "base"], "holds no adapter_config.json"),
    ],
)
def test_wrong_input_is_refused_and_nothing_written(place, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(place)
    out = tmp_path / "scores.json"
    arguments = ["eval", "base", "--suite", "lambada", "--data", "data", "--out", str(out), *options]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_was_never_trained_is_refused(place, tmp_path, capsys):
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "idle")
    out = tmp_path / "scores.json"
    with pytest.raises(SystemExit):
        main([*command_line(place, out, "lambada"), "--adapter", str(tmp_path / "idle")])
    assert "changes no logit" in capsys.readouterr().err
    assert not out.exists()
