"""PEFT's comparison of methods: the section and the files in its format, from results made by hand."""

import json
import math

import pytest

from hiplora.recipes.protocols import BenchmarkPoint
from hiplora.reporting.study.write import write_report
from hiplora.study.builder import Study
from hiplora.study.engine.jobs import Graph
from hiplora.study.protocols import files, metamath
from hiplora.study.protocols.metamath_json import experiment
from tests.unit.study.protocols.made import finish, made_study, measured, results, scored, table, trained

CHANGES = (
    "rates=null",
    "train={lr: 1.0e-4, steps: 500, batch_size: 4, gradient_accumulation: 1, max_length: 768, packing: false, "
    "lr_scheduler: cosine, weight_decay: 0.1, dtype: bf16}",
    "domains={sums: {title: Sums, train: {path: gsm8k_train.jsonl, template: step_by_step, learn_prompt: true, "
    "held_out_fraction: 0.1}, tasks: {gsm8k_solution: 4}}}",
    "evaluation={drift: {texts: {wiki: wikitext2_raw_valid.jsonl}, documents: 3, window: 64}}",
    "protocols={metamath: {methods: [lora, lora-mlp], domain: sums, text: wiki, points: ["
    "{title: Near, accuracy: 0.5, forgetting: 0.03, source: s}, "
    "{title: Far, accuracy: 0.4, forgetting: 0.04, source: s}]}}",
)
# method → seed → (items, forgetting): 60 % and 0.02 nats, 40 % and 0.05
FOUND = {
    "lora": [([100, 100, 0, 100], 0.01), ([100, 0, 0, 100], 0.03)],
    "lora-mlp": [([100, 0, 0, 100], 0.04), ([100, 0, 0, 0], 0.06)],
}
# The benchmark's own files, field by field.
RUN_INFO = {
    *("created_at", "total_time", "experiment_name", "peft_branch", "peft_worktree_is_dirty", "train_config"),
    *("peft_config", "error_msg"),
}
TRAIN_CONFIG = {
    *("model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps"),
    *("compile", "use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs"),
    *("lr_scheduler", "use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation"),
    "init_kv_cache_prefix",
}
TRAIN_INFO = {
    *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"),
    *("train_time", "file_size", "num_trainable_params", "num_total_params", "status", "metrics"),
}
METRICS = {
    *("step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec"),
    *("mem allocated avg", "mem reserved avg", "elapsed time"),
}
LAST_METRICS = {
    "step",
    "test accuracy",
    "train loss",
    "train samples",
    "train total tokens",
    "forgetting",
}
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
PACKAGES = {
    f"{name}-{what}"
    for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    for what in ("version", "commit-hash")
}
SYSTEM = {"system", "release", "version", "machine", "processor", "accelerator"}


@pytest.fixture
def study(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.metamath
    finish(store, found.score(tasks={"gsm8k_solution": 4}), scored({"gsm8k_solution": [0, 0, 0, 100]}))
    for method, seeds in FOUND.items():
        for seed, run in zip(found.seeds(settings), seeds, strict=True):
            finish_run(found, store, method, seed, *run)
    return found, settings, store


def finish_run(found, store, method, seed, items, forgetting):
    train = found.adapter(found.row(method), "sums", seed)
    made = {**trained(90, curve=[(n, float(n > 250)) for n in range(1, 501)]), "steps": 500}
    times = {
        "training_seconds": 120.0,
        "peak_memory_bytes": 2**31,
        "peak_reserved_bytes": 2**32,
        "reserved_bytes_mean": 2**31 + 0.25,
    }
    finish(store, train, {**made, "adapter_bytes": 1234}, **times)
    result = scored({"gsm8k_solution": items})
    result["drift"] = {"wiki": {"kl": 0.001, "perplexity_ratio": math.exp(forgetting), "tokens": 9}}
    finish(store, found.score(train, {"gsm8k_solution": 4}), result)


def test_forgetting_is_the_growth_of_the_loss_and_accuracy_a_share(study):
    found, settings, store = study
    section = metamath.section(found, settings, results(store))
    rows = table(section, "metamath")
    assert rows["Base model"]["Test accuracy"].value == pytest.approx(0.25)
    assert rows["Base model"]["Forgetting"].value is None
    assert rows["LoRA"]["Test accuracy"].value == pytest.approx(0.625)
    assert rows["LoRA"]["Forgetting"].value == pytest.approx(0.02)
    assert rows["LoRA"]["Training, min"].value == 2
    assert rows["LoRA"]["Peak memory, GiB"].value == 2
    assert rows["LoRA"]["Trainable parameters"].text == "90"
    assert measured(section, "forgetting", "LoRA on the MLPs").value == pytest.approx(0.05)
    difference = measured(section, "score difference", "LoRA on the MLPs", form="accuracy")
    assert difference.value == pytest.approx(-25)
    assert section.missing == []


def test_the_benchmarks_own_points_are_marked_and_set_against_what_was_measured(study):
    found, settings, store = study
    section = metamath.section(found, settings, results(store))
    rows = table(section, "metamath")
    place = "The benchmark's frontier"
    assert rows["LoRA"][place].text == "on it"
    assert rows["LoRA on the MLPs"][place].text == "behind its Near"
    assert rows["Near (PEFT's benchmark, not measured here)"][place].text == "on it"
    assert rows["Far (PEFT's benchmark, not measured here)"][place].text == "behind its Near"
    assert rows["Near (PEFT's benchmark, not measured here)"]["Forgetting"].value == 0.03
    assert "behind it: LoRA on the MLPs (behind its Near)" in section.text[0]
    assert not any("Near" in one.method for one in section.measurements)
    theirs = section.figures[0].series[-1]
    assert "not measured here" in theirs.name
    assert (theirs.x, theirs.y) == ([0.4, 0.5], [0.04, 0.03])


@pytest.mark.parametrize(
    ("point", "better"),
    [((0.5, 0.03), None), ((0.5, 0.031), "A"), ((0.49, 0.03), "A"), ((0.3, 0.02), None), ((0.3, 0.03), "A")],
)
def test_a_point_is_behind_another_that_is_no_worse_in_either_and_better_in_one(point, better):
    other = BenchmarkPoint(title="A", accuracy=0.5, forgetting=0.03, source="s")
    found = metamath.ahead(point, [other])
    assert (found and found.title) == better


def test_a_row_appears_when_all_its_seeds_are_there(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    settings = found.recipe.protocols.metamath
    finish_run(found, store, "lora", found.seeds()[0], [0, 0, 100, 100], 0.01)
    section = metamath.section(found, settings, results(store))
    assert [row for row, _ in section.tables[0].rows if "benchmark" not in row] == []
    assert len(section.missing) == 7
    assert section.figures == []
    write_report(tmp_path / "report", "t", {}, [section], {})


def test_a_file_has_the_benchmarks_fields_and_no_others(study):
    found, _, store = study
    made = files(found, results(store), ())
    assert sorted(made) == [
        "metamath/lora--pico-lora-seed100.json",
        "metamath/lora--pico-lora.json",
        "metamath/lora--pico-mlp-seed100.json",
        "metamath/lora--pico-mlp.json",
    ]
    record = json.loads(made["metamath/lora--pico-lora.json"])
    assert list(record) == ["run_info", "train_info", "meta_info"]
    assert set(record["run_info"]) == RUN_INFO
    assert set(record["run_info"]["train_config"]) == TRAIN_CONFIG
    assert set(record["train_info"]) == TRAIN_INFO
    assert [set(row) for row in record["train_info"]["metrics"]] == [METRICS, METRICS, LAST_METRICS]
    meta = record["meta_info"]
    assert set(meta) == META_INFO
    assert set(meta["package_info"]) == PACKAGES
    assert set(meta["system_info"]) == SYSTEM
    unknown = {"sha": None, "created_at": None}
    assert meta["model_info"] == unknown
    assert meta["dataset_info"] == {"metamath": unknown, "gsm8k": unknown}


def test_a_file_says_what_was_trained_and_what_came_of_it(study):
    found, _, store = study
    record = json.loads(files(found, results(store), ())["metamath/lora--pico-mlp.json"])
    run, train = record["run_info"], record["train_info"]
    config = run["train_config"]
    assert run["experiment_name"] == "lora/pico-mlp"
    assert run["total_time"] == 2.0
    assert config["query_template"] == "Question: {query} Think step by step.\nAnswer:"
    assert config["optimizer_kwargs"] == {"lr": 1e-4, "weight_decay": 0.1}
    assert (config["lr_scheduler"], config["dtype"], config["max_seq_length"]) == ("cosine", "bfloat16", 768)
    assert (run["peft_config"]["peft_type"], run["peft_config"]["r"]) == ("LORA", 3)
    assert run["peft_config"]["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert (train["file_size"], train["num_trainable_params"], train["train_time"]) == (1234, 90, 120.0)
    assert train["accelerator_memory_max"] == 2**32
    assert train["accelerator_memory_reserved_avg"] == 2**31  # the benchmark's tables want whole numbers
    assert train["accelerator_memory_reserved_99th"] == 0  # not measured: as without an accelerator
    assert train["num_total_params"] > 90
    first, second, last = train["metrics"]
    assert (first["step"], first["train loss"], first["train samples"]) == (250, 0.0, 1000)
    assert (second["step"], second["train loss"], second["valid accuracy"]) == (500, 1.0, None)
    assert last["test accuracy"] == pytest.approx(0.5)
    assert last["forgetting"] == pytest.approx(0.04)
    assert (last["train samples"], last["train total tokens"]) == (2000, 1000)


def test_files_are_of_what_is_done_and_land_in_the_report(tmp_path):
    found, store = made_study(tmp_path, *CHANGES)
    assert files(found, results(store), ()) == {}
    finish_run(found, store, "lora", 42, [0, 0, 100, 100], 0.01)
    made = files(found, results(store), ())
    assert list(made) == ["metamath/lora--pico-lora.json"]
    write_report(tmp_path / "report", "t", {}, [], {}, files=made)
    assert json.loads((tmp_path / "report" / "metamath" / "lora--pico-lora.json").read_text())


def test_the_recipe_asks_for_the_benchmarks_methods_at_its_parameters():
    from hiplora.models.shapes import model_shape
    from hiplora.recipes.load_study import load_study
    from hiplora.study.estimate import full_settings

    recipe = load_study("peft-metamath")
    shape = model_shape(recipe.model)
    counts = {
        name: shape.trainable(full_settings(row.method.model_dump())) for name, row in recipe.methods.items()
    }
    # what the benchmark's own files give for the two LoRAs
    assert (counts["lora-rank32"], counts["lora-rank10-target-mlp"]) == (9_175_040, 9_461_760)
    assert counts["hiplora-rank10-activation"] == counts["lora-rank10-target-mlp"]
    assert counts["hiplora-rank16-paper"] == counts["lora-rank32"] + 32 * 4 * 28
    found = Study(recipe, None)
    assert experiment(found, "lora-rank32") == "lora/Llama-3.2-3B-rank32"
    assert found.source("mathematics").hub == "meta-math/MetaMathQA"
    plain = recipe.protocols.metamath.model_copy(
        update={"methods": ["lora-rank32", "lora-rank10-target-mlp"]}
    )
    assert Graph(metamath.jobs(found, plain)).counts() == {"evaluate": 3, "train": 2}
    assert found.missing == {}
