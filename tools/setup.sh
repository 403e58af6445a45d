#!/usr/bin/env bash
# Make a virtual environment and install hiplora into it, at the versions of constraints.txt.
#   tools/setup.sh [VENV] [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv} python=${2:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "setup: '$python' is not a Python of at least 3.10; name one: make setup PYTHON=python3.12" >&2
  exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-compile -c constraints.txt "$@"; }

# PyPI's torch for Linux brings gigabytes of CUDA libraries: without a GPU look for the CPU build first, where
# pip is set up to look, then at PyTorch's own index; the plain one serves where neither has it.
torch=$(grep '^torch==' constraints.txt)
if ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#*==}')" 2>/dev/null; then
  echo "setup: installing $torch"
  installed=
  if ! { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then
    for index in "" "--extra-index-url=https://download.pytorch.org/whl/cpu"; do
      if install --retries 1 --timeout 15 ${index:+"$index"} "$torch+cpu" 2>/dev/null; then
        installed=yes
        break
      fi
    done
  fi
  [ "$installed" ] || install "$torch"
fi
echo "setup: installing hiplora and its dependencies"
install --editable '.[dev]'

# Compiling all that was installed takes as long as installing it: what hiplora imports is compiled, by importing it.
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c '
import importlib, pkgutil, hiplora
for module in pkgutil.walk_packages(hiplora.__path__, "hiplora."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
'
