# One command each: make demo, make test. Both set up everything they need, once.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
DEMO_OUT ?= demo-out
BENCH_OUT ?= runs/bench
FLOORS_VENV ?= .venv-floors

PY := $(VENV)/bin/python
STAMP := $(VENV)/.hiplora-setup
# Each test process uses one thread: together they fill the cores.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.PHONY: help setup model demo test test-slow deepspeed quantised torture lint bench docs floors wheel supply newest clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, fetch the real model, run the demonstration and say where its report is"
	@echo "make test       set up, fetch the real model, lint, run the fast tests"
	@echo "make test-slow  the rest: real model, interrupted runs, several processes, a browser"
	@echo "make deepspeed  install DeepSpeed beside the rest, and test that two processes train under it as one"
	@echo "make quantised  install bitsandbytes, torchao and HQQ beside the rest, and test adapters over quantised bases"
	@echo "make torture    kill, starve and rob the commands, and damage their files (an hour); writes the tables of docs/reliability.md"
	@echo "make setup      create $(VENV) and install hiplora at the versions of constraints.txt"
	@echo "make model      fetch SmolLM2-135M into the cache"
	@echo "make lint       formatting, style, types, import direction, documentation"
	@echo "make docs       regenerate the reference and the tables of results, and build the site in build/site"
	@echo "make bench      measure side by side: training against LoRA, calibration, SVDs, starting, the bootstrap,"
	@echo "                merges, loading; with DATA=FOLDER also scoring"
	@echo "make floors     run the tests of tuner and training with the oldest supported versions"
	@echo "make wheel      build a wheel, twice the same, and try it in a bare environment"
	@echo "make supply     list the dependencies' licences, and look for their known vulnerabilities"
	@echo "make newest     run the tests of the tuner with the newest torch, transformers, PEFT and TRL"
	@echo "make clean      remove what the above made in this folder"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@bash tools/setup.sh "$(VENV)" "$(PYTHON)"
	@touch $@

model: $(STAMP)
	@$(PY) -m hiplora.models

demo: model
	@$(PY) -m hiplora demo --out "$(DEMO_OUT)" --overwrite

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy
	@$(PY) -m tools.check_imports
	@$(PY) -m tools.docs --check

test: model lint
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: model
	@$(PYTEST) -m slow $(PYTEST_ARGS)

deepspeed: $(STAMP)
	@DS_BUILD_OPS=0 $(PY) -m pip install -q --upgrade --target build/deepspeed --no-deps --no-build-isolation \
		deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo
	@PYTHONPATH=build/deepspeed $(PYTEST) -m slow -n 0 tests/contract/test_sharded.py -k deepspeed

quantised: $(STAMP)
	@$(PY) -m pip install -q --upgrade --target build/quantised --no-deps --no-build-isolation \
		bitsandbytes==0.50.2 torchao==0.18.0 hqq==0.2.8
	@PYTHONPATH=build/quantised $(PYTEST) -n 0 -m "slow or not slow" tests/contract/test_quantised.py \
		tests/integration/test_train_4bit.py

torture: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m tools.torture
	@OMP_NUM_THREADS=1 $(PY) -m tools.mutations

bench: model
	@$(PY) benchmarks/step.py --json "$(BENCH_OUT)/step.json"
	@$(PY) benchmarks/step.py --batch 1 --length 1024 --json "$(BENCH_OUT)/step-1024.json"
	@$(PY) benchmarks/calibrate.py --json "$(BENCH_OUT)/calibration.json"
	@$(PY) benchmarks/svd.py --json "$(BENCH_OUT)/svd.json"
	@$(PY) benchmarks/start.py --json "$(BENCH_OUT)/start.json"
	@$(PY) benchmarks/bootstrap.py --json "$(BENCH_OUT)/bootstrap.json"
	@$(PY) benchmarks/merge.py --json "$(BENCH_OUT)/merge.json"
	@$(PY) benchmarks/load.py --json "$(BENCH_OUT)/load.json"
ifdef DATA
	@$(PY) benchmarks/scoring.py --data "$(DATA)" --json "$(BENCH_OUT)/evaluation.json"
endif

docs: $(STAMP)
	@$(PY) -m tools.docs
	@$(PY) -m sphinx -q -W --keep-going -b html docs build/site
	@echo "docs: build/site/index.html"

floors:
	@bash tools/floors.sh "$(FLOORS_VENV)" "$(PYTHON)"

wheel: $(STAMP)
	@bash tools/try_wheel.sh "$(PY)" "$(PYTHON)"

supply: $(STAMP)
	@$(PY) -m tools.licences
	@bash tools/supply.sh audit .venv-audit "$(PYTHON)"

newest:
	@bash tools/supply.sh newest .venv-newest "$(PYTHON)"

clean:
	rm -rf "$(VENV)" "$(FLOORS_VENV)" .venv-audit .venv-newest "$(DEMO_OUT)" build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
