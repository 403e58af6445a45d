#!/usr/bin/env bash
# Build a wheel and try it outside the checkout: the tuner alone, then the command line with all extras' data files.
#   tools/try_wheel.sh BUILD_PYTHON PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1 python=$2
rm -rf build
export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
for place in build/wheel build/again; do
  "$build" -m pip --disable-pip-version-check wheel -q --no-deps -w "$place" .
done
cmp build/wheel/hiplora-*.whl build/again/hiplora-*.whl
wheel=$(ls "$PWD"/build/wheel/hiplora-*.whl)
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"$python" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install -qq -c constraints.txt "$wheel"
cd "$venv"
"$venv/bin/python" - <<'P'
import importlib.resources as r
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import peft, hiplora

config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
base = LlamaForCausalLM(config)
model = peft.get_peft_model(base, hiplora.HipLoraConfig(preset="paper", principal_rank=4, r=4, task_type="CAUSAL_LM"))
model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
model.save_pretrained("adapter")
hiplora.export.save_as_lora(model, "lora")
peft.PeftModel.from_pretrained(model.unload(), "adapter")
files = {path.name for path in r.files("hiplora").joinpath("study").iterdir()}
print("tuner: ok;", len(files), "files in study/")
P
# Without the extras the command line names the one that it needs.
"$venv/bin/hiplora" --help 2>&1 | tail -n 1 || true
"$venv/bin/python" -m pip --disable-pip-version-check install -qq -c "$OLDPWD/constraints.txt" "$wheel[all]"
"$venv/bin/hiplora" --help >/dev/null
"$venv/bin/hiplora" study plan pico >/dev/null
echo "wheel: ok ($wheel)"
