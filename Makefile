# SPDX-License-Identifier: Apache-2.0
# Needs Python >= 3.11 with pip, and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

export HF_HUB_OFFLINE ?= 1

.PHONY: demo dist docs test test-full test-families test-range test-nightly test-gpu \
    test-report test-docs test-package test-llmcompressor lint families \
    bench-overhead bench-routing train-demo clean

demo: $(STAMP)
	$(BIN)/vsraq demo

# One process per core and one thread each: the tiny models are too small for threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

test: $(STAMP)
	$(PYTEST)

# every case of every test: hours
test-full: $(STAMP)
	$(PYTEST) --full

# every MoE family, every scheme and option of AutoRound; `test` has some of each kind
test-families: $(STAMP)
	$(PYTEST) --full tests/test_every_family.py tests/test_families.py \
	    tests/test_replay.py

test-range: $(STAMP)
	$(PYTEST) --full tests/test_autoround_range.py

# runs killed at every write, and ten times as many corrupted recipes and exports
test-nightly: $(STAMP)
	$(PYTEST) --full tests/test_killed_runs.py tests/test_verify_fuzz.py \
	    tests/test_recipe_fuzz.py

# what needs CUDA; elsewhere it says what is missing
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -rs tests/test_gpu.py

# a report in chromium, which has to be there
test-report: $(STAMP)
	VSRAQ_BROWSER_REQUIRED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	    tests/test_report.py tests/test_report_browser.py

# the wheel, in environments with nothing but what it asks for
test-package: $(STAMP)
	VSRAQ_TEST_PACKAGE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/package

# what a release uploads
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m hatchling build

# the documentation as a site, in out/site
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(BIN)/python -m mkdocs build

# its code blocks and links; its pages in chromium, which has to be there
test-docs: $(STAMP)
	VSRAQ_BROWSER_REQUIRED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	    tests/test_code_blocks.py tests/test_site.py

# an environment of its own, because llmcompressor's metadata forbids our versions
LLMC := .venv-llmcompressor
LLMC_PINS := tests/llm_compressor/constraints.txt
test-llmcompressor: $(LLMC)/installed
	OMP_NUM_THREADS=1 $(LLMC)/bin/python -m pytest tests/llm_compressor

$(LLMC)/installed: pyproject.toml constraints.txt $(LLMC_PINS)
	$(PYTHON) -m venv $(LLMC)
	$(LLMC)/bin/python -m pip install -q --disable-pip-version-check \
	    -c constraints.txt -c $(LLMC_PINS) -e . hypothesis pytest loguru nvidia-ml-py pillow
	$(LLMC)/bin/python -m pip install -q --disable-pip-version-check \
	    --no-deps -c $(LLMC_PINS) llmcompressor
	touch $@

families: $(STAMP)
	$(BIN)/python tests/family_table.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-overhead: $(STAMP)
	$(BIN)/python benchmarks/overhead.py

# Models trained here are others than those of benchmarks/routing.jsonl.
RESULTS ?= out/routing.jsonl
bench-routing: $(STAMP)
	$(BIN)/python benchmarks/routing.py run --results $(RESULTS)
	$(BIN)/python benchmarks/routing.py table --results $(RESULTS) --plot out/routing.png
	$(BIN)/python benchmarks/nvfp4_floor.py
	$(BIN)/python benchmarks/routing_ceiling.py

train-demo: $(STAMP)
	$(BIN)/python examples/train_demo_moe.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "vsraq needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check \
	    -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-llmcompressor dist build
