#!/usr/bin/env bash
# Look for known vulnerabilities in the versions of constraints.txt, or try the newest releases of what the tuner builds on.
#   tools/supply.sh audit|newest VENV PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
what=$1 venv=$2 python=$3
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq "$@"; }
if [ "$what" = audit ]; then
  install pip-audit
  exec "$venv/bin/pip-audit" --no-deps --disable-pip --requirement constraints.txt
fi
install --upgrade --editable '.[train]' pytest hypothesis beartype
install --upgrade --no-deps torch transformers peft trl # beyond the bounds of pyproject.toml
"$venv/bin/python" -m pip list | grep -iE '^(torch|transformers|peft|trl) '
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -m "not slow" tests/contract tests/property
