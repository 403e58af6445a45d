"""PEFT's comparison of methods on the smallest model, with rows, questions and articles of the published shapes."""

import json
import math
import shutil

import pytest

from hiplora.data.rows import read_rows
from hiplora.study.builder import Study
from hiplora.study.context import Context, Place
from hiplora.study.execute import run_job
from hiplora.study.jobs import Graph
from hiplora.study.pico import PICO_DATA
from hiplora.study.protocols import all_jobs, sections
from hiplora.study.recipe import load_study
from hiplora.study.store import Results
from tests.tiny import write_jsonl

SETTINGS = (
    *("model=pico", "train.steps=2", "train.max_length=192", "train.dtype=fp32", "train.lr=1e-2"),
    "evaluation.drift={texts: {wiki: finewiki.jsonl}, documents: 2, window: 48}",
    "domains.mathematics.tasks.gsm8k_solution=1",
    "methods.lora-rank32.method.r=4",
    "protocols.metamath.methods=[lora-rank32]",
)


def write_data(folder):
    """MetaMathQA, GSM8K and finewiki by the fields that the hub documents."""
    shutil.copytree(PICO_DATA, folder)
    rows = [row for _, row in read_rows(folder / "gsm8k_train.jsonl")]
    metamath = [
        {
            "type": "GSM_Rephrased",
            "query": row["question"],
            "original_question": row["question"],
            "response": row["answer"].replace("#### ", "The answer is: "),
        }
        for row in rows
    ]
    write_jsonl(folder / "metamathqa.jsonl", metamath)
    articles = [
        {"text": row["text"], "id": f"enwiki/{number}", "wikiname": "enwiki", "page_id": number}
        for number, (_, row) in enumerate(read_rows(folder / "wikitext2_raw_valid.jsonl"))
    ]
    write_jsonl(folder / "finewiki.jsonl", articles)


@pytest.mark.slow
def test_the_comparison_runs_on_local_files_and_writes_its_results(tmp_path):
    write_data(tmp_path / "data")
    study = Study(load_study("peft-metamath", SETTINGS), tmp_path / "data")
    jobs = Graph(all_jobs(study))
    assert (sorted(job.kind for job in jobs), study.missing) == (["evaluate", "evaluate", "train"], {})
    context = Context(Place(tmp_path / "store", "pico", tmp_path / "data"))
    assert [run_job(job, context) for job in jobs] == ["done"] * 3
    (section,) = sections(study, Results(context.store))
    assert section.missing == []
    results = [context.store.result(job) for job in jobs]
    (drift,) = [result["drift"] for result in results if result.get("drift")]
    assert drift["wiki"]["tokens"] == 2 * 47
    (text,) = section.files.values()
    record = json.loads(text)
    *_, last = record["train_info"]["metrics"]
    assert last["forgetting"] == math.log(drift["wiki"]["perplexity_ratio"]) != 0
    assert last["train samples"] == 8
    assert last["test accuracy"] in (0.0, 1.0)
    assert record["train_info"]["file_size"] > 0
    assert record["run_info"]["peft_config"]["target_modules"] == ["q_proj", "v_proj"]
