# Every target first makes .venv if it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
SYSTEMS := $(filter-out __%,$(basename $(notdir $(wildcard magpo/systems/*.py))))
JOBS ?= 2
CUDA ?= cuda12
SMOKE_TASKS ?= coordsum/3x10-30 rware/tiny-2ag lbf/2s-8x8-2p-2f-coop connector/con-5x5x3a \
	mpe/simple_spread_3ag smax/3m mabrax/hopper-3x1
SMOKE_FEW ?= mpe/simple_spread_3ag
SMOKE_SKIP ?= magpo ctds mappo dae sable vdn qmix
SMOKE_RUNS := $(SMOKE_TASKS:%=smoke/%/magpo) smoke/smax/3m/qmix \
	$(foreach system,$(filter-out $(SMOKE_SKIP),$(SYSTEMS)),$(SMOKE_FEW:%=smoke/%/$(system)))
SMOKE := budget=quick tuned=false num_envs=4 rollout_length=16 total_steps=256 num_evaluations=2 \
	eval_episodes=2 env.time_limit=20 results_dir=results/smoke

# Always let Python cache the bytecode of imported modules, which saves each process 0.2 s. Compiling
# all modules on installation would take pip half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install train demo test lint smoke docs package benchmark gpu

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

# RWARE's reward is sparse, so a quick run improves little; `make demo` learns in minutes.
train: install
	$(BIN)/python -m magpo.systems.magpo env=rware/tiny-4ag budget=quick $(ARGS)

demo: install
	$(BIN)/python -m magpo.systems.magpo env=lbf/2s-8x8-2p-2f-coop budget=quick total_steps=491520 $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tiny runs of MAGPO on one task of every suite, and of the other systems on a continuous task (the
# tests run them on a discrete one), except systems whose networks are parts of another system's.
# QMIX, for discrete actions only, runs on SMAX.
# They are compiled without optimisation, which would take most of the time, as in tests/conftest.py.
# `make -j2 -O smoke` runs two at once.
# `make smoke SMOKE_FEW='$(SMOKE_TASKS)' SMOKE_SKIP='vdn qmix'` runs all others on all tasks.
smoke: $(SMOKE_RUNS)

smoke/%: export XLA_FLAGS += --xla_backend_optimization_level=0 \
	--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false
smoke/%: install
	@echo "== $*"
	@$(BIN)/python -m magpo.systems.$(@F) env=$(*:/$(@F)=) $(SMOKE) $(ARGS)

# Warnings are errors. The notebooks among the pages run.
docs: install
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build/html

package: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist >/dev/null
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

benchmark: install
	$(BIN)/python scripts/benchmark.py $(ARGS)

# All measurements on a GPU, in nine minutes; a second call continues where time ran out.
gpu: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(CUDA)]'
	$(BIN)/python scripts/gpu.py results/gpu $(ARGS)
