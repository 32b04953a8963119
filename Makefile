# Two commands to know: `make demo` trains a small model and asks it a question, `make test` runs the tests.
# They need Python 3.11 or newer, and nothing else: `make demo PYTHON=python3.12` picks another interpreter.
PYTHON ?= python3
ENVIRONMENT := .venv
BIN := $(ENVIRONMENT)/bin
OLDEST := .venv-oldest
# Models this small gain little from a second thread, and lose much when the cores are shared.
export OMP_NUM_THREADS ?= 1
QUESTION ?= Mia has 4 apples. Mia buys 5 more. How many apples does Mia have now?

.PHONY: demo test test-slow test-oldest lint clean

demo: $(ENVIRONMENT)/.train
	$(BIN)/python train/pretrain.py --config configuration/pretrain/smoke.yaml
	$(BIN)/python train/generate.py --model runs/smoke --question "$(QUESTION)"

test: $(ENVIRONMENT)/.dev
	$(BIN)/python -m pytest

test-slow: $(ENVIRONMENT)/.dev
	$(BIN)/python -m pytest -m slow --timeout 1800

# The same tests on the oldest transformers that the package supports.
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest

lint: $(ENVIRONMENT)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter modeling_coe

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(ENVIRONMENT)

$(ENVIRONMENT)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(transformers|huggingface_hub|hf-xet)==' constraints.txt > $(OLDEST)/constraints.txt
	echo 'transformers==5.16.0' >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(ENVIRONMENT) $(OLDEST) runs .pytest_cache .ruff_cache
