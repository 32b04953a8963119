# Two commands to know: `make demo` trains a small model and asks it a question, `make test` runs the tests.
# They need Python 3.11 or newer, and nothing else: `make demo PYTHON=python3.12` picks another interpreter.
PYTHON ?= python3
ENVIRONMENT := .venv
BIN := $(ENVIRONMENT)/bin
OLDEST := .venv-oldest
VLLM := .venv-vllm
# pip decides which build of torch it takes; on Linux that is the CUDA build, several GB. Where the CPU build is enough,
# name PyTorch's index for it (pytorch.org, "Get started"): `make demo TORCH_INDEX=...`
TORCH_INDEX ?=
# Models this small gain little from a second thread, and lose much when the cores are shared.
export OMP_NUM_THREADS ?= 1
QUESTION ?= Mia has 5 apples. Mia buys 4 more. Mia gives away 2. How many apples does Mia have now?
NEXT := Uma has 3 coins. Uma finds 4 more. Uma loses 2. How many coins does Uma have now?

.PHONY: demo test test-slow test-oldest test-vllm release-dry-run lint clean

demo: $(ENVIRONMENT)/.train
	$(BIN)/python train/pretrain.py --config configuration/pretrain/smoke.yaml
	$(BIN)/python train/show_routing.py --model runs/smoke --train_problems 1 --output_dir runs/smoke/routing
	$(BIN)/python train/generate.py --model runs/smoke --question "$(QUESTION)"
	@echo
	@echo 'Pictures: runs/smoke/loss_curve.png (loss), runs/smoke/routing/load.png (which experts each iteration chose)'
	@echo 'Next, ask it something else: make demo QUESTION="$(NEXT)"'

test: $(ENVIRONMENT)/.dev
	$(BIN)/python -m pytest

test-slow: $(ENVIRONMENT)/.dev
	$(BIN)/python -m pytest -m slow --timeout 1800

# The same tests on the oldest torch and transformers that pyproject.toml allows.
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest

# vLLM's CPU build in an environment of its own, and the chains in it beside transformers.
test-vllm: $(ENVIRONMENT)/.dev $(VLLM)/.installed
	$(BIN)/python -m pytest -m vllm tests/test_vllm.py

# What a release does, but for the uploads; RUNS are pairs of a run and the name of its repository.
RUNS ?= runs/smoke=coe-demo
release-dry-run: $(ENVIRONMENT)/.dev
	$(BIN)/python train/studies/release.py $(RUNS)

# transformers' own common model tests, from the source distribution of the installed version; about ten minutes.
test-transformers: $(ENVIRONMENT)/.dev
	mkdir -p .cache && cd .cache && name=$$(../$(BIN)/pip freeze | grep '^transformers==' | sed 's/==/-/') && \
	{ test -d "$$name" || { ../$(BIN)/pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
		"$$(echo $$name | sed 's/-/==/')" && tar xzf "$$name.tar.gz"; }; } && \
	../$(BIN)/pip install --quiet parameterized && ../$(BIN)/python ../tests/transformers_common.py "$$name"

lint: $(ENVIRONMENT)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter modeling_coe

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(ENVIRONMENT)

# $(call torch,environment,constraints): from torch's index only torch itself, for it lacks other pinned versions.
define torch
	$(if $(TORCH_INDEX),$(1)/bin/python -m pip --quiet install --constraint $(2) --no-deps --index-url $(TORCH_INDEX) torch)
endef

# $(call install,environment,constraints,extra)
define install
	$(call torch,$(1),$(2))
	$(1)/bin/python -m pip --quiet install --constraint $(2) --editable ".[$(3)]"
endef

$(ENVIRONMENT)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(ENVIRONMENT),constraints.txt,$*)
	touch $@

$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|transformers|huggingface_hub|hf-xet)==' constraints.txt > $(OLDEST)/constraints.txt
	printf '%s\n' torch==2.10.0 transformers==5.16.0 >> $(OLDEST)/constraints.txt
	$(call install,$(OLDEST),$(OLDEST)/constraints.txt,dev)
	touch $@

$(VLLM)/.installed: pyproject.toml tests/vllm_requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(call torch,$(VLLM),tests/vllm_requirements.txt)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement tests/vllm_requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(ENVIRONMENT) $(OLDEST) $(VLLM) build *.egg-info .pytest_cache .ruff_cache
