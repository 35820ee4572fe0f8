PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.rsmtdf-stamp
TYPING := build/typing/rsmtdf_cli
CODE := rsmtdf_cache rsmtdf_train cli tests docs bench
# One thread per test process: two processes with two threads each wait for one another on two cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)
PYTEST_FLAGS ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fmt bench bench-sample bench-accuracy torture torture-cluster docs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install rsmtdf with what demo and tests need (PYTHON=python3.12 to choose)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "rsmtdf needs Python >= 3.11; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Run: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time this downloads torch: minutes)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sample,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## real tiles, real teachers, three trained arms, table and pictures in demo/ (minutes, offline)
	$(BIN)/rsmtdf bench sample --seeds 1 --out demo

test: $(STAMP) ## run the test suite
	$(PYTEST)

check: $(STAMP) $(TYPING) ## lint, format, types, then the tests
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy -p rsmtdf_cache -p rsmtdf_train -p rsmtdf_cli -p tests
	$(PYTEST)

# mypy does not follow the import finder of an editable install, so it reads cli/ under its installed name here.
$(TYPING):
	@mkdir -p $(@D) && ln -sfn ../../cli $@

fmt: $(STAMP) ## format the code and sort imports
	$(BIN)/ruff check --fix --quiet $(CODE) || true
	$(BIN)/ruff format $(CODE)

bench: $(STAMP) ## how fast reading, pixels, workers, scale and steps are here, against peers (pip install '.[bench]'; JSON in bench-out/)
	$(BIN)/rsmtdf bench store --out bench-out/store
	$(BIN)/python bench/loader.py bench-out/loader.json --tiles 120 --rounds 3
	$(BIN)/python bench/pixels.py bench-out/pixels.json --rounds 3
	$(BIN)/python bench/workers.py bench-out/workers.json --workers 1,2 --rounds 1
	$(BIN)/python bench/scale.py bench-out/scale.json --tiles 100000 --rounds 1
	$(BIN)/python bench/gpu.py bench-out/step.json --rounds 1

bench-sample: $(STAMP) ## the README's table: three arms, five paired seeds (20 minutes on two cores)
	$(BIN)/rsmtdf bench sample --seeds 5 --out bench-out/sample

bench-accuracy: $(STAMP) ## what each part of the method is worth, on two sets (hours on two cores; continues; JSON in bench-out/)
	test -d bench-out/tree-crowns || $(BIN)/python bench/tree_crowns.py bench-out/tree-crowns
	$(BIN)/rsmtdf bench accuracy --out bench-out/accuracy --trees bench-out/tree-crowns

torture: $(STAMP) ## kill builds, flip bits, cut transfers, fill disks; a table of what was lost (minutes; JSON in bench-out/)
	$(BIN)/python -m tests.torture --kills 200 --flips 200 --cuts 50 --full 20 --out bench-out/torture.json

torture-cluster: $(STAMP) ## real dask workers, schedulers and clients that die, hang, differ and fill up, 20 rounds (an hour on two cores)
	for round in $$(seq 20); do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x tests/integration/test_workers.py || exit 1; done

docs: $(STAMP) ## write docs/cli.md from the commands and check the links of all pages
	$(BIN)/python docs/build.py
