# make demo | make test | make gpu-check: see README.md and CONTRIBUTING.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
RESULTS_DIR ?= bench/results

.PHONY: demo bench test lint format pytest test-full-size test-head test-stock-pins \
        gpu-check gpu-build gpu-test gpu-sanitize gpu-bench tables clean

demo: $(VENV)/.ready
	$(BIN)/chatterbox-fast demo $(ARGS)

test: lint pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# A process each for JOBS files at a time: tests are too small to gain from threads.
JOBS ?= 2
pytest: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

# 200 tokens by a full-size T3, stock against ours: minutes on a CPU.
test-full-size: $(VENV)/.ready
	$(BIN)/pytest -m full_size -s $(ARGS)

# torch 2.11 and its compiler, stock Chatterbox beside it, this package in place.
$(VENV)/.ready: setup.py pyproject.toml $(wildcard requirements/*.txt) \
                $(shell git ls-files csrc 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/torch.txt
	$(BIN)/pip install -q -r requirements/chatterbox.txt
	$(BIN)/pip install -q --no-deps -r requirements/chatterbox-no-deps.txt
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

# The suite against a checkout of upstream: make test-head HEAD=path/to/chatterbox
test-head: $(VENV)/.ready
	test -f "$(HEAD)/src/chatterbox/tts.py" || (echo "HEAD=path of a chatterbox checkout"; exit 2)
	PYTHONPATH="$(HEAD)/src" $(BIN)/pytest $(ARGS)

# The suite in the environment that stock's own metadata asks for (torch 2.6.0).
test-stock-pins: .venv-pins/.ready
	.venv-pins/bin/pytest $(ARGS)

.venv-pins/.ready: setup.py pyproject.toml $(shell git ls-files csrc 2>/dev/null)
	test -x .venv-pins/bin/python || $(PYTHON) -m venv .venv-pins
	.venv-pins/bin/pip install -q chatterbox-tts==0.1.7 'setuptools<81'
	.venv-pins/bin/pip install -q '.[dev]'
	touch $@

# ---- On a machine with a GPU. Uses PYTHON as it is, installs nothing into it, needs no network.
# Each part can be run alone. WHEELS: a folder of wheels for what PYTHON lacks, optional.
WHEELS ?= .whl
SITE := $(CURDIR)/build/gpu-site
ON_GPU := PYTHONPATH=$(SITE) $(PYTHON)

gpu-check: gpu-build gpu-test gpu-sanitize gpu-bench

gpu-build:
	rm -rf $(SITE) && mkdir -p $(SITE)
	if ls $(WHEELS)/*.whl >/dev/null 2>&1; then $(PYTHON) -m pip install -q --no-index --no-deps \
	  --no-compile --target $(SITE) $(WHEELS)/*.whl; fi
	CHATTERBOX_FAST_CUDA=1 PYTHONPATH=$(SITE) $(PYTHON) -m pip install -q --no-index --no-deps \
	  --no-build-isolation --upgrade --target $(SITE) .
	cd build && $(ON_GPU) -m chatterbox_fast doctor

gpu-test:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) -m pytest -c ../pyproject.toml --rootdir .. ../tests \
	  --junitxml=$(abspath $(RESULTS_DIR))/gpu-test.xml $(ARGS)

# The CUDA kernels under memcheck and racecheck.
gpu-sanitize:
	for tool in memcheck racecheck; do \
	  (cd build && PYTHONPATH=$(SITE) compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PYTHON) -m pytest -q -c ../pyproject.toml --rootdir .. ../tests -m "gpu and kernel") \
	    || exit 1; \
	done

gpu-bench:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) -m pytest -c ../pyproject.toml --rootdir .. ../bench --benchmark-only \
	  --benchmark-json=$(abspath $(RESULTS_DIR))/bench-cuda.json
	cd build && $(ON_GPU) ../bench/t3_decode.py --steps 100 --forced 64 \
	  --json $(abspath $(RESULTS_DIR))/t3_decode-cuda.json
	cd build && $(ON_GPU) ../bench/s3gen.py --rounds 20 \
	  --json $(abspath $(RESULTS_DIR))/s3gen-cuda.json
	cd build && $(ON_GPU) ../bench/end_to_end.py --rounds 3 \
	  --json $(abspath $(RESULTS_DIR))/end_to_end-cuda.json
	cd build && $(ON_GPU) -m chatterbox_fast demo --size full --tokens 250 --device cuda \
	  --out demo_out --json $(abspath $(RESULTS_DIR))/demo-cuda.json

# Every benchmark: RESULTS_DIR gets the raw JSON.
bench: $(VENV)/.ready
	mkdir -p $(RESULTS_DIR)
	$(BIN)/pytest bench --benchmark-only --benchmark-json=$(RESULTS_DIR)/bench.json $(ARGS)
	$(BIN)/python bench/t3_decode.py --json $(RESULTS_DIR)/t3_decode.json
	$(BIN)/python bench/s3gen.py --json $(RESULTS_DIR)/s3gen.json
	$(BIN)/python bench/end_to_end.py --json $(RESULTS_DIR)/end_to_end.json

# The tables of README and guide, from the raw results.
tables: $(VENV)/.ready
	$(BIN)/python -m bench.table

clean:
	rm -rf build $(VENV) .venv-pins chatterbox_fast/*.so chatterbox_fast/_build.json
