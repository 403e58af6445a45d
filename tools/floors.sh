#!/usr/bin/env bash
# Run the tests of tuner and training with the oldest versions that pyproject.toml allows.
#   tools/floors.sh [VENV] [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-floors} python=${2:-python3}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# The floors are read from pyproject.toml, so that they are stated once.
"$venv/bin/python" - <<'P' >"$venv/floors.txt"
import re, sys
try:
    import tomllib
except ModuleNotFoundError:
    import pip._vendor.tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["cli"], *extras["train"]]:
    if line.startswith("hiplora"):
        continue
    name, floor = re.match(r"([\w-]+)>=([\w.]+)", line).groups()
    print(f"{name}=={floor}.*" if floor.count(".") == 1 else f"{name}=={floor}")
P
"$venv/bin/python" -m pip --disable-pip-version-check install -qq -r "$venv/floors.txt" \
  pytest pytest-xdist hypothesis beartype
"$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps --editable .
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -m "not slow" tests/contract tests/property \
  tests/unit/spectral tests/unit/tuner tests/unit/data tests/unit/training
