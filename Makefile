# make book | test | lab | figures | bench | publish   (PROFILE=cpu unless given; see profiles/)
# make book CLUSTER=slurm sends the jobs to a cluster (see profiles/cluster/); make test-slurm tries that on a Slurm of its own.
PROFILE ?= cpu
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CORES ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)))" 2>/dev/null || echo 2)

.PHONY: book test test-slurm lab figures bench publish plan

book: $(VENV)/.installed
	@$(PY) -m lorapar_utils.build $(PROFILE) --cores $(CORES) $(if $(CLUSTER),--cluster $(CLUSTER))

plan: $(VENV)/.installed
	@$(PY) -m lorapar_utils.build $(PROFILE) --cores $(CORES) --dry-run $(if $(MACHINE),--machine $(MACHINE))

test: $(VENV)/.installed
	$(PY) -m pytest

test-slurm: $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[cluster]'
	$(PY) -m pytest tests/cluster

lab: $(VENV)/.installed
	JUPYTER_CONFIG_PATH=$(CURDIR)/.jupyter $(VENV)/bin/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb

figures: $(VENV)/.installed
	@$(PY) -m lorapar_utils.plots results/$(PROFILE) figures
	@$(PY) -m lorapar_utils.exports results/$(PROFILE) tables

bench: $(VENV)/.installed
	$(PY) benchmarks/scoring.py
	$(PY) benchmarks/partition.py
	$(PY) benchmarks/voting.py
	$(PY) benchmarks/training.py
	$(PY) benchmarks/costs.py
	$(PY) benchmarks/processes.py
	$(if $(DATA),$(PY) benchmarks/harness.py $(DATA))

publish: $(VENV)/.installed
	@$(PY) -m lorapar_utils.publish $(PROFILE)

# Complete or not at all: the mark is written last, and an interrupted install is continued.
# torch comes first and alone: where a registry offers a CPU build under the same version, it is taken.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed; set PYTHON=…')"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
