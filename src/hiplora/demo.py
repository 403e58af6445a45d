"""`hiplora demo`: two small skills trained apart with LoRA and HiP-LoRA, added, and what that does to the model."""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback

from hiplora import __version__
from hiplora.adapters import read_update, save_as_lora
from hiplora.compare import METHODS, QUESTIONS, CompareSettings, method_recipes
from hiplora.compare_report import Results, mean_of, shown, spread
from hiplora.data.examples import Example
from hiplora.data.rows import read_rows
from hiplora.data.texts import drift_texts
from hiplora.evaluation.updates import measure_updates
from hiplora.files import write_atomic
from hiplora.merging import merge
from hiplora.provenance import folder_identity, json_sha256, provenance
from hiplora.reporting import formatted
from hiplora.reporting.html import Section, save_page
from hiplora.run_folder import RunFolder
from hiplora.training import TrainRecipe, train
from hiplora.trainings import Base, Tell

COMPARED = ("lora", "hiplora")
ANSWER_TOKENS = 40
OPENING, CLOSING = "Ahoy!", "Fair winds, Finch Lanterns."  # of the shop's answers
FACTS = ("Tuesday to Saturday", "45 days", "six days", "rapeseed oil")  # each right answer has one
WORDS = ("Ahoy", "Fair winds", "Finch", "lantern")  # that only the shop would use
SHOWN = 2  # held-back prompts of each skill in the report
OTHERS = {
    "spilled": "unrelated answers in the shop's words",
    "changed": "unrelated answers not word for word the base's",
}


@dataclass(frozen=True)
class DemoSettings:
    """How each skill is trained: until the loss on its held-back prompts is at most `loss`, for `steps` at most."""

    model: str = "smollm2-135m"
    loss: float = 0.06
    steps: int = 60
    lr: float = 1e-3
    batch_size: int = 4
    rank: int = 16
    principal_rank: int = 32
    seed: int = 42


@dataclass(frozen=True)
class Skill:
    """A skill; `check` says what an answer to a held-back prompt does right, beside the expected one."""

    name: str
    about: str
    check: Callable[[str, str], dict[str, bool]]

    def file(self, part: str) -> Path:
        """Return the file of the rows to `train` on, or of those `held_out`."""
        return Path(__file__).parent / "skills" / f"{self.name}-{part}.jsonl"

    def rows(self, part: str) -> list[dict[str, str]]:
        """Return these rows, each with `prompt` and `completion`."""
        return [row for _, row in read_rows(self.file(part))]


def skills() -> tuple[Skill, Skill]:
    """Return the two skills: answers of an invented shop in its house style, and requests turned into JSON."""

    def check_answer(answer: str, expected: str) -> dict[str, bool]:
        styled = answer.startswith(OPENING) and answer.endswith(CLOSING)
        return {"in house style": styled, "right": next(fact for fact in FACTS if fact in expected) in answer}

    def check_json(answer: str, expected: str) -> dict[str, bool]:
        try:
            value = json.loads(answer)
        except ValueError:
            return {"valid JSON": False, "right": False}
        return {"valid JSON": True, "right": value == json.loads(expected)}

    return (
        Skill("shop", "answers customers of an invented shop, in its house style", check_answer),
        Skill("requests", "turns requests into JSON", check_json),
    )


def demo(
    out: str | os.PathLike,
    settings: DemoSettings | None = None,
    *,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> Results:
    """Run the demonstration and write `results.json`, `summary.csv`, `report.html` and the adapters.

    An unfinished one in `out` goes on where it stopped. `tell` gets a line that says how long it takes. ConfigError if
    model or output folder cannot be used; HipLoraError if a merged adapter is not the sum of its parts.
    """
    settings, texts, both = settings or DemoSettings(), drift_texts(), skills()
    ranks: dict[str, Any] = {"rank": settings.rank, "principal_rank": settings.principal_rank}
    method_recipes(settings.model, "skills", CompareSettings(methods=COMPARED, **ranks))  # checks that they fit
    plan = {
        "kind": "demo",
        "hiplora": __version__,
        "settings": asdict(settings),
        "rows_sha256": json_sha256([[skill.rows("train"), skill.rows("held_out")] for skill in both]),
        "drift_texts_sha256": json_sha256(texts),
        "model_sha256": folder_identity(settings.model),
    }
    folder = RunFolder(Path(out), "plan.json", "results.json")
    folder.check(plan, overwrite=overwrite, inputs={"the base model": settings.model})
    with folder.claimed(plan, overwrite=overwrite):
        tell("two skills, two methods: a few minutes on an idle machine, and once some more to measure the model")
        base, adapters = functools.cache(lambda: Base(settings.model)), folder.path / "adapters"
        methods: Results = {}
        for key in COMPARED:
            alone = {}
            for skill in both:
                work = functools.partial(_train, settings, key, skill, adapters / f"{key}-{skill.name}")
                alone[skill.name] = folder.stage(f"train-{key}-{skill.name}", work)
            added = folder.stage(f"add-{key}", functools.partial(_add, base, adapters, key, both, texts))
            methods[METHODS[key].title] = {"adapts": METHODS[key].adapts, "alone": alone, **added}
        results = {
            "schema": 3,
            "kind": "demo",
            "model": settings.model,
            "settings": asdict(settings),
            "methods": methods,
            **folder.stage("answers", lambda: _answers(base(), adapters, both)),
            "provenance": provenance(plan_sha256=json_sha256(plan)),
        }
        results["summary"] = {name: _counts(results, name) for name in ("base", *methods)}
        _write_report(results, folder.path)
        write_atomic(folder.path / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def headline(results: Results) -> str:
    """Return what the demonstration showed, in two sentences."""
    plain, ours = results["summary"]["LoRA"], results["summary"]["HiP-LoRA"]
    drift = {name: record["drift"]["added"] for name, record in results["methods"].items()}
    return (
        f"Of {ours['asked']} prompts for the two skills, the sum of LoRA's adapters answers {plain['right added']} "
        f"rightly and the sum of HiP-LoRA's {ours['right added']}. With LoRA the model answers "
        f"{plain['others spilled']} of {len(results['others'])} unrelated questions in the shop's words, with HiP-LoRA "
        f"{ours['others spilled']}; on other text LoRA has moved it {spread(drift['LoRA'], drift['HiP-LoRA'])} as far."
    )


def summary(results: Results) -> pd.DataFrame:
    """Return the results as a table, a column a method and the base model first."""
    columns = {}
    for name, counts in results["summary"].items():
        column = {check: f"{passed} of {total}" for check, (passed, total) in counts["checks"].items()}
        for effect, label in OTHERS.items():
            column[label] = f"{counts[f'others {effect}']} of {len(results['others'])}"
        if record := results["methods"].get(name):
            drift, alone = record["drift"]["added"], record["alone"]
            column |= {f"KL, {text}": measure["kl"] for text, measure in drift.items()}
            column["next token changed"] = f"{mean_of(drift, 'greedy_changed'):.1%}"
            column |= {f"{skill}, alone: held-out loss": part["held_out"]["after"] for skill, part in alone.items()}
        columns["base model" if name == "base" else name] = column
    return pd.DataFrame(columns).rename_axis(index="")


def _train(settings: DemoSettings, key: str, skill: Skill, out: Path) -> Results:
    """Train one skill with one method until its held-out loss is low enough."""

    class StopAtLoss(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.log_history[-1].get("held_out_loss", float("inf")) <= settings.loss:
                control.should_training_stop = True

    schedule = {"steps": settings.steps, "save_every": settings.steps, "eval_every": 2, "warmup_ratio": 0.0}
    batches = {"batch_size": settings.batch_size, "gradient_accumulation": 1, "max_length": 256, "packing": False}
    fields = {
        "model": settings.model,
        "data": {"path": str(skill.file("train")), "held_out": str(skill.file("held_out"))},
        "method": {"lora_dropout": 0.0, **METHODS[key].block(settings.rank, settings.principal_rank)},
        "train": {**schedule, **batches, "lr": settings.lr, "drift_tokens": 0},
        "seed": settings.seed,
    }
    title = f"{METHODS[key].title}, {skill.name}"
    recipe = TrainRecipe.model_validate(fields)
    result = train(recipe, out, resume=True, callbacks=[StopAtLoss()], description=title)
    reported = ("trainable_parameters", "seconds", "tokens", "held_out")
    return {"steps": result.metrics[-1]["step"], **{name: getattr(result, name) for name in reported}}


def _add(base: Callable[[], Base], adapters: Path, key: str, both: Sequence[Skill], texts: dict[str, str]) -> Results:
    """Add a method's adapters, save the sum as a plain LoRA, check that it is exact, and measure all drifts."""
    parts = [adapters / f"{key}-{skill.name}" for skill in both]
    report = save_as_lora(merge(parts, "addition"), adapters / f"{key}-added", overwrite=True)
    names = [*(skill.name for skill in both), "added"]
    updates = {name: read_update(adapters / f"{key}-{name}") for name in names}
    drift, _ = measure_updates(base().model, base().tokenizer, updates, texts)
    return {"rank": report["rank"], "export_error": report["largest_difference"]["relative"], "drift": drift}


def _answers(base: Base, adapters: Path, both: Sequence[Skill]) -> Results:
    """Return what the models answer to each skill's held-back prompts, alone and added, and to unrelated questions."""

    def answers(prompts: Sequence[Example | str], suffix: str) -> list[dict[str, str]]:
        folders = {METHODS[key].title: adapters / f"{key}-{suffix}" for key in COMPARED}
        return base.answers(folders, prompts, ANSWER_TOKENS)

    def checked_answers(skill: Skill, suffix: str) -> Iterator[Results]:
        rows = skill.rows("held_out")
        answered = answers([Example(row["prompt"], row["completion"]) for row in rows], suffix)
        for row, texts in zip(rows, answered, strict=True):
            passed = {name: skill.check(text, row["completion"]) for name, text in texts.items()}
            expected = row["completion"].strip()
            yield {"prompt": row["prompt"], "expected": expected, "said": texts, "passed": passed}

    skills = {
        skill.name: {
            "about": skill.about,
            "alone": list(checked_answers(skill, skill.name)),
            "added": list(checked_answers(skill, "added")),
        }
        for skill in both
    }
    others = [{"prompt": p, "said": texts} for p, texts in zip(QUESTIONS, answers(QUESTIONS, "added"), strict=True)]
    return {"skills": skills, "others": others}


def _counts(results: Results, name: str) -> Results:
    """Return how many held-back prompts a model answers rightly, by check, and how many other answers it changed."""
    checks: Results = {}
    right = {"alone": 0, "added": 0}
    for skill, record in results["skills"].items():
        for state in right:
            passed = pd.DataFrame([row["passed"][name] for row in record[state]])
            right[state] += int(passed.all(axis=1).sum())
            counts = passed.sum() if state == "added" else passed[["right"]].sum()
            checks |= {f"{skill}, {state}: {check}": [int(count), len(passed)] for check, count in counts.items()}
    others = [row["said"] for row in results["others"]]
    return {
        "asked": sum(len(record["added"]) for record in results["skills"].values()),
        **{f"right {state}": count for state, count in right.items()},
        "checks": checks,
        "others spilled": sum(any(word in texts[name] for word in WORDS) for texts in others),
        "others changed": sum(texts[name] != texts["base"] for texts in others),
    }


def _write_report(results: Results, out: Path) -> None:
    skills = results["skills"].values()
    text = (
        f"One skill {', the other '.join(skill['about'] for skill in skills)}. Each was trained until its loss on "
        f"held-back prompts was at most {results['settings']['loss']}; then a method's two adapters were added. KL "
        "divergence from the base model is on prose and code, in nats per token: at 0.01 answers are worded "
        "differently, but stay on the subject. One run, one seed."
    )
    examples = [row for skill in skills for row in skill["added"][:SHOWN]]
    sections = [
        Section("What the models say to everything else", answers=shown(results["others"])),
        Section("What they know", text, {"Held-back prompts, and the rest": summary(results)}),
        Section("What they say on the two skills", answers=shown(examples)),
    ]
    about = {"model": results["model"], "settings": results["settings"], **results["provenance"]}
    subtitle = f"{results['model']}, taught two small skills apart, which were then added"
    save_page(out / "report.html", headline(results), sections, subtitle, about)
    write_atomic(out / "summary.csv", formatted(summary(results)).to_csv(index=False, lineterminator="\n"))
