"""A user's mistake is one line that names it, exit status 2, and nothing is written; of some before the model loads."""

import shlex
import shutil

import pytest

from tests.commands import run
from tests.tiny import write_jsonl

EDIT = "edit base builtin --out new --locality 1"
EVAL = "eval base --suite items.jsonl --data . --out new"
CHECK = "merge-check items=one more=lora --suite items.jsonl,more.jsonl --out new"
COMPARE = "compare base rows.jsonl --out new"
TRAIN = "train recipe.yaml --out new"
PROBE = "probe base --out new --text text.txt"
MISTAKES = [
    ("export one --to gguf --out new", "gguf"),
    ("export one --to lora", "--out"),
    ("export one --to lora --out new --pad-rank 0", "--pad-rank"),
    ("export one --to dense --out new --pad-rank 64", "--pad-rank"),
    ("export one --to lora --out there", "--overwrite"),
    ("export one --to lora --out new --data rows.jsonl", "--data"),
    ("merge one lora --out new --method average", "'average' is not known; expected one of addition"),
    ("merge one lora --out new --method ties --format lora", "pass --rank, for example --rank 64"),
    ("merge one lora --out new --method ties --format hiplora", "ties keeps no gains apart, only addition does"),
    ("merge one lora --out new --method ties --set density", "--set density: expected key=value"),
    ("merge one lora --out new --weights 1,x", "--weights 1,x: expected numbers"),
    ("merge one lora --out new --format gguf", "gguf"),
    ("merge one lora --out there", "--overwrite"),
    (f"{CHECK} --method ties --set density=2", "density is 2"),
    (f"{CHECK} --sizes 5", "5 of 2 adapters"),
    (f"{CHECK} --sizes two", "whole numbers"),
    (f"{EDIT} --method rome", "method is 'rome'; expected one of adalora, corda, hiplora"),
    (f"{EDIT} --method alphaedit --steps 3", "steps has no use with alphaedit"),
    (f"{EDIT} --method alphaedit --set rank=3", "--set rank: "),
    (f"{EDIT} --method lora --set k=3", "--set k: "),
    (f"{EDIT} --set r", "expected key=value"),
    (f"{EDIT} --mode single --edits-per-batch 2 --method lora", "no use in the mode single"),
    (f"{EDIT} --sample 2 --method lora", "sample is for the mode single"),
    (f"{EDIT} --method lora --lr 0", "--lr: "),
    (f"{EDIT} --category Colours", "--category: "),
    (f"{EDIT} --method lora --set target_modules=[nope] --limit 2", "does not fit the model"),
    ("edit base builtin --out there", "exists already"),
    (f"{EVAL} --suite nothere.yaml", "no such file"),
    (f"{EVAL} --suite piqa", "has no piqa"),
    (f"{EVAL} --data /nowhere", "no such folder"),
    (f"{EVAL} --adapter /nowhere", "no such folder"),
    (f"{PROBE} --out there", "exists already"),
    (f"{PROBE} --layers one", "--layers one: expected numbers and spans"),
    (f"{PROBE} --directions 33 --modules k_proj", "33 directions of 32"),
    (f"{PROBE} --text nowhere.txt", "nowhere.txt: cannot be read"),
    ("factorize base --target-modules q_porj", "target_modules"),
    ("factorize base --target-modules mlp", "LlamaMLP"),
    ("factorize base --tolerance nan", "svd_tolerance"),
    ("factorize base --device abacus", "--device abacus"),
    ("factorize none", "cannot be loaded"),
    ("drift base --adapter one --device cuda:7", "--device cuda:7: not available here"),
    (f"{TRAIN} --set data.path=gone.jsonl", "gone.jsonl: no such file"),
    (f"{TRAIN} --resume --overwrite", "pass one of them"),
    (f"{TRAIN} --set method.target_modules=[nope]", "check method.target_modules"),
    (f"{TRAIN} --set train.batch_size=1000000000000000000000", "train.batch_size: should be less than"),
    (f"{TRAIN} --dry-run --set method.r=60", "principal_rank 8 and r 60 do not fit"),
    (f"{TRAIN} --preview -1", "--preview"),
    ("train --data rows.jsonl --out new", "give --model and --data"),
    ("study run pico --out new --address 127.0.0.1:1", "add --executor ray"),
    ("study run pico --out new --gpus-per-job 1", "add --executor ray"),
    ("study run pico --out new --reuse text.txt", "--reuse text.txt: cannot be read"),
    ("study plan study.yaml", "domains: is missing"),
    ("inspect there", "no adapter_config.json"),
]
BEFORE_THE_MODEL_LOADS = [
    ("protect lora --out new --strength nan", "strength"),
    ("protect lora --out new --principal-rank many", "principal_rank is 'many'"),
    ("protect lora --out new --text none.txt", "none.txt: no such file"),
    ("protect lora --out new --drift-text empty.txt", "empty.txt: is empty"),
    ("protect lora --out new --data wrong.jsonl", "wrong.jsonl"),
    ("protect lora --out new --tokens 1", "tokens"),
    ("protect lora --out there", "--overwrite"),
    ("compare /no/model rows.jsonl --out new", "no such folder"),
    (f"{COMPARE} --drift-text /no/such.txt", "/no/such.txt"),
    (f"{COMPARE} --prompts /no/such.txt", "--prompts /no/such.txt"),
    (f"{COMPARE} --methods lora,hip", "--methods hip: expected some of lora, "),
    (f"{COMPARE} --methods ,", "--methods names none"),
    (f"{COMPARE} --steps 0", "steps"),
    (f"{COMPARE} --lr nan", "lr"),
    (f"{COMPARE} --heldout-fraction 1.0", "fraction"),
    (f"{COMPARE} --rank 4 --principal-rank 61", "_proj: principal_rank 61 and r 4 do not fit"),
    (f"{COMPARE} --rank 5000", "_proj: r 5000 exceeds min(out, in) = "),
]


@pytest.fixture(scope="module")
def place(adapters, tiny_model_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    (place / "there").mkdir()
    for name in ("there/mine", "empty.txt"):
        (place / name).touch()
    (place / "text.txt").write_text("The harbour master writes down every ship that comes in. " * 3)
    (place / "base").symlink_to(tiny_model_dir)
    for name in ("one", "lora"):
        shutil.copytree(adapters[name], place / name)
    for name in ("items.jsonl", "more.jsonl"):
        write_jsonl(place / name, [{"question": "Which?", "choices": ["red", "blue"], "answer": 1}])
    write_jsonl(place / "wrong.jsonl", [{"nothing": "useful"}])
    write_jsonl(place / "rows.jsonl", [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)])
    (place / "study.yaml").write_text("study: x\nmodel: pico\nsteps: 3\n")
    (place / "recipe.yaml").write_text("{model: base, data: rows.jsonl, method: {principal_rank: 8}}")
    return place


@pytest.mark.parametrize(("command", "said"), [*MISTAKES, *BEFORE_THE_MODEL_LOADS])
def test_wrong_usage_is_one_line_and_writes_nothing(place, monkeypatch, capsys, command, said):
    monkeypatch.chdir(place)
    if (command, said) in BEFORE_THE_MODEL_LOADS:
        monkeypatch.delattr("transformers.PreTrainedModel.from_pretrained")
    before = sorted(place.rglob("*"))
    code, out, err = run(capsys, *shlex.split(command))
    assert (code, out, "Traceback" in err) == (2, "", False)
    assert said in " ".join(err.split())
    assert sorted(place.rglob("*")) == before
