"""From a recipe to jobs: what is one job, and what makes another."""

import hashlib
from pathlib import Path

import pytest

from hiplora.study.builder import Study, as_read, as_written
from hiplora.study.jobs import Graph
from hiplora.study.pico import PICO_DATA
from hiplora.study.plan import open_study
from hiplora.study.recipe import load_study
from hiplora.study.store import Place

HUB = "domains.mathematics.hub={hub: openai/gsm8k, held_out_fraction: 0.1}"


def study(*changes, data=PICO_DATA):
    return Study(load_study("pico", changes), Place(Path("none"), "pico", data))


def adapter(built, **more):
    return built.adapter(built.row("lora"), "mathematics", 42, **more)


@pytest.mark.parametrize(
    ("name", "jobs", "digest"), [("smol", 725, "f28f14098faeef71"), ("frontier", 791, "cefaba83f882ad4f")]
)
def test_keys_stay_what_they_were_when_records_were_published(tmp_path, name, jobs, digest):
    keys = sorted(job.key for job in open_study(load_study(name), tmp_path, None).graph)
    assert len(keys) == jobs
    assert hashlib.sha256("".join(keys).encode()).hexdigest()[:16] == digest


def test_scores_on_other_tasks_have_other_names():
    pico = study()
    for which in (None, adapter(pico)):
        names = [pico.score(which, tasks).name for tasks in (None, {"gsm8k": 2}, {"gsm8k": 2, "mbpp": 1})]
        assert len(set(names)) == 3


def test_a_projection_of_gradients_is_in_every_key_that_it_matters_for():
    named = {name: as_written(study().row(name).method) for name in ("lora", "hiplora")}
    assert named["hiplora"]["gradient_projection"] is True
    assert "gradient_projection" not in named["lora"]
    alone = study().variant("hiplora", gradient_projection=False)
    written = as_written(alone.method)  # as records that are older than the field
    assert written == {name: value for name, value in named["hiplora"].items() if name != "gradient_projection"}
    assert as_read(written)["gradient_projection"] is False
    assert "gradient_projection" not in as_written(study().variant("hiplora", residual_projection=False).method)


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        ("train.steps=7", True),
        ("train.max_length=64", True),
        ("methods.lora.method.r=5", True),
        ("domains.mathematics.train.held_out_limit=3", True),
        ("rates.grid=[1e-3]", True),
        ("methods.lora.lr=1e-3", True),
        ("title=x", False),
        ("methods.lora.title=y", False),
        ("domains.code.tasks.mbpp=1", False),
        ("protocols.adalora=null", False),
        ("seeds=[1]", False),
    ],
)
def test_what_a_training_depends_on_makes_another_job_and_nothing_else_does(change, matters):
    assert (adapter(study()) != adapter(study(change))) == matters


def test_a_rate_is_chosen_on_other_runs_than_those_that_are_reported():
    pico = study()
    choice = pico.rate(pico.row("lora"))
    trained = [job.settings["recipe"] for job in Graph([choice]) if job.kind == "train"]
    assert [(one["train"]["lr"], one["seed"]) for one in trained] == [(1e-3, 7), (1e-2, 7)]
    assert adapter(pico).settings["recipe"]["train"]["lr"] == {"$result": "rate.value"}
    assert adapter(pico).needs["rate"] == choice


@pytest.mark.parametrize(
    ("change", "lr", "taken"),
    [
        ("methods.lora.lr=3e-3", None, 3e-3),
        ("methods.lora.lr=3e-3", 0.5, 0.5),
        ("rates=null", None, 1e-2),
        ("methods.lora={title: L, method: lora, lr: chosen, train: {lr: 5e-3}}", None, 5e-3),
    ],
)
def test_a_given_rate_is_taken_as_it_is(change, lr, taken):
    training = adapter(study("rates=null", change), lr=lr)
    assert training.settings["recipe"]["train"]["lr"] == taken
    assert "rate" not in training.needs


def test_a_variant_takes_its_parents_rate_and_settings_that_other_jobs_choose():
    pico = study()
    parent, variant = pico.row("hiplora"), pico.variant("hiplora", stability_weight=0.5)
    assert (parent.method.stability_weight, variant.method.stability_weight) == (0.1, 0.5)
    job = pico.adapter(variant, "code", 42, like=parent)
    assert job.needs["rate"] == pico.rate(parent)
    choice = pico.choice("λ", {0.1: {"one": adapter(pico)}, 1.0: {"other": adapter(pico, lr=0.5)}})
    chosen = pico.adapter(parent, "code", 42, chosen={"stability_weight": choice})
    assert chosen.settings["recipe"]["method"]["stability_weight"] == {"$result": "stability_weight.value"}
    assert chosen.needs["stability_weight"] == choice
    assert len({job, chosen, pico.adapter(parent, "code", 42)}) == 3


def test_factors_are_shared_by_what_they_depend_on():
    pico = study()
    assert pico.factors(pico.row("lora")) is None
    weight = pico.factors(pico.row("hiplora"))
    assert weight == pico.factors(pico.variant("hiplora", r=2, lora_alpha=4))
    assert weight != pico.factors(pico.variant("hiplora", principal_rank=3))
    assert weight != pico.factors(pico.row("hiplora-activation"))


def test_changed_data_make_another_job_missing_files_are_named_and_hub_data_taken_instead(tmp_path):
    pico = study(data=tmp_path)
    adapter(pico)
    assert "gsm8k_train.jsonl" in pico.missing
    hub = study(HUB, data=tmp_path)
    assert adapter(hub).settings["recipe"]["data"]["hub"] == "openai/gsm8k"
    assert hub.missing == {}
    assert adapter(study(HUB)) == adapter(study())
    (tmp_path / "gsm8k_train.jsonl").write_text('{"question": "How many?", "answer": "#### 2"}\n')
    assert adapter(study(data=tmp_path)) != adapter(study())
