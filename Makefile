# make book | read | plan | rehearse | test | lab | figures | bench | publish   (PROFILE=laptop unless given: a name of profiles/, or the
# path of a YAML file; CORES=1 for fewer than this machine has)
# make book CLUSTER=slurm sends the jobs to a cluster (see profiles/cluster/); make test-slurm tries that on a Slurm of its own.
PROFILE ?= laptop
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# What was given, as one word of the shell: folders may have spaces, quotes and dollar signs in their names.
quoted = '$(subst ','\'',$(value $(1)))'
profile = $(call quoted,PROFILE)

.PHONY: book read test test-slurm lab figures pages columns tables bench publish plan rehearse

book: $(VENV)/.installed
	@$(PY) -m lorapar_utils.build $(profile) $(if $(CORES),--cores $(CORES)) $(if $(CLUSTER),--cluster $(call quoted,CLUSTER))

read: $(VENV)/.installed
	@$(PY) -m lorapar_utils.build $(profile) --read $(if $(CORES),--cores $(CORES))

plan: $(VENV)/.installed
	@$(PY) -m lorapar_utils.build $(profile) $(if $(CORES),--cores $(CORES)) --dry-run $(if $(MACHINE),--machine $(call quoted,MACHINE))

rehearse: $(VENV)/.installed
	@$(PY) -m lorapar_utils.planning.rehearsal $(profile)

test: $(VENV)/.installed
	$(PY) -m pytest -n $(or $(CORES),2) --dist loadfile --no-loadscope-reorder

test-slurm: $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[cluster]'
	$(PY) -m pytest tests/cluster

lab: $(VENV)/.installed
	JUPYTER_CONFIG_PATH="$$PWD/.jupyter" $(VENV)/bin/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# Figures for pages, figures for a paper's columns, and tables: at once, because each keeps only one core busy.
figures: $(VENV)/.installed
	@$(MAKE) --no-print-directory -j 3 pages columns tables
pages:
	@$(PY) -m lorapar_utils.report.figures figures --formats svg png
columns:
	@$(PY) -m lorapar_utils.report.figures figures --formats pdf
tables:
	@$(PY) -m lorapar_utils.report.exports tables

bench: $(VENV)/.installed
	$(PY) benchmarks/scoring.py
	$(PY) benchmarks/partition.py
	$(PY) benchmarks/voting.py
	$(PY) benchmarks/training.py
	$(PY) benchmarks/shares.py
	$(PY) benchmarks/costs.py
	$(PY) benchmarks/processes.py
	$(if $(DATA),$(PY) benchmarks/harness.py $(call quoted,DATA))

publish: $(VENV)/.installed
	@$(PY) -m lorapar_utils.report.publish $(profile)

# Complete or not at all: the mark is written last, and an interrupted install is continued.
# torch comes first, alone and by pip: where a registry offers a CPU build under the same version, it is taken. The rest
# comes by uv, in a fifth of pip's time, or by pip where uv cannot be had.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed; set PYTHON=…')"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	($(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)" \
	  && $(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) -r requirements.lock) \
	  || $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
