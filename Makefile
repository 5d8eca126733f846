# make serve   set up .venv, make sure there is a model, serve it      MODEL=<folder or hub id>  ARGS="--port 9000"
# make test    set up .venv and run the whole test suite
# make test-fast  the tests that compile nothing, in under two minutes
# make fuzz    tens of thousands of odd requests to a small server       REQUESTS=30000 MEDIA=5000 SCHEMAS=5000
# make setup   .venv alone                                              EXTRA=gpu or EXTRA=tpu
PYTHON ?= python3
VENV ?= .venv
EXTRA ?=
MODEL ?=
ARGS ?=
# The oracle (transformers' own forward, in torch) is left out with ORACLE=; the tests that need it then say so and are not run.
ORACLE ?= oracle
# LINT= runs the tests alone.
LINT ?= lint
REQUESTS ?= 30000
MEDIA ?= 5000
SCHEMAS ?= 5000

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
comma := ,

.PHONY: setup serve test test-fast test-full fuzz lint clean

setup: $(VENV)/.setup$(EXTRA)

$(VENV)/.setup$(EXTRA): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

$(VENV)/.test$(ORACLE): $(VENV)/.setup$(EXTRA)
	$(PIP) --editable '.[test$(if $(ORACLE),$(comma)$(ORACLE))]'
	@touch $@

serve: setup
	$(BIN)/python -m serve $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(VENV)/.test$(ORACLE) $(LINT)
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal --quiet $(ARGS)

test-fast: $(VENV)/.test$(ORACLE)
	$(BIN)/python -m pytest --fast --numprocesses=2 --dist=loadfile --quiet $(ARGS)

# Minutes long and gigabytes large: the full-size model against transformers, conversion's peak memory.
# CHECKPOINT=<folder in the released format> takes the place of the random one that the tests make.
test-full: $(VENV)/.test$(ORACLE)
	MINICPMV46_CHECKPOINT=$(CHECKPOINT) $(BIN)/python -m pytest -m full --quiet -s $(ARGS)

# MINICPMV46_SEED=<number> repeats a run; python -m tests.fuzz --help fuzzes a server that runs.
fuzz: $(VENV)/.test$(ORACLE)
	MINICPMV46_FUZZ_REQUESTS=$(REQUESTS) MINICPMV46_FUZZ_MEDIA=$(MEDIA) MINICPMV46_FUZZ_SCHEMAS=$(SCHEMAS) \
		$(BIN)/python -m pytest --quiet -s $(ARGS) tests/fuzz

lint: $(VENV)/.test$(ORACLE)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info
