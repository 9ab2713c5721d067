# make demo | make test | make gpu-check: see README.md and CONTRIBUTING.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
RESULTS_DIR ?= bench/results

.PHONY: demo bench test lint format pytest test-full-size test-head \
        test-emulated-gpu test-emulated-kernels test-emulated-engines test-stock-pins \
        gpu-check gpu-build gpu-test gpu-sanitize gpu-bench gpu-bench-kernels gpu-bench-t3 \
        gpu-bench-s3gen gpu-bench-s3gen-compiled gpu-bench-speech gpu-demo tables clean

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

# Most of what needs a GPU, on an emulated one: CONTRIBUTING.md says what is left out.
EMULATED_GPU := $(BIN)/python tests/emulated_gpu/build.py -m pytest
test-emulated-gpu: test-emulated-kernels test-emulated-engines
test-emulated-kernels: $(VENV)/.ready
	$(EMULATED_GPU) -m "gpu and kernel" -k "not triton" --ignore tests/test_engine.py \
	  --deselect tests/test_padded_attention.py::TestOnAGpu::test_results \
	  --deselect tests/test_add_norm.py::TestOnAGpu::test_places_beyond_32_bits $(ARGS)
test-emulated-engines: $(VENV)/.ready
	EMULATED_GPU_BY_CPU_OP=large $(EMULATED_GPU) -m gpu tests/test_emulated_gpu.py \
	  tests/test_engine.py tests/test_pool.py tests/test_graph.py tests/test_s3gen_*.py tests/parity $(ARGS)

# Thousands of modules are compiled when they are imported, which most never are.
INSTALL := pip install -q --no-compile

# torch 2.11 and its compiler, stock Chatterbox beside it, this package in place.
$(VENV)/.ready: setup.py pyproject.toml $(wildcard requirements/*.txt) \
                $(shell git ls-files csrc 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -r requirements/torch.txt
	$(BIN)/$(INSTALL) -r requirements/chatterbox.txt
	$(BIN)/$(INSTALL) --no-deps -r requirements/chatterbox-no-deps.txt
	$(BIN)/$(INSTALL) -e '.[dev]'
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
	.venv-pins/bin/$(INSTALL) chatterbox-tts==0.1.7 'setuptools<81'
	.venv-pins/bin/$(INSTALL) '.[dev]'
	touch $@

# ---- On a machine with a GPU. Uses PYTHON as it is, installs nothing into it, needs no network.
# WHEELS: a folder of wheels for what PYTHON lacks, optional.
WHEELS ?= .whl
SITE := $(CURDIR)/build/gpu-site
ON_GPU := PYTHONPATH=$(SITE) $(PYTHON)

# A part that fails does not keep the others: make -k gpu-check. ARGS narrows a part that is run alone:
#   make gpu-test ARGS="-n 8"; make gpu-bench-t3 ARGS="--positions 500 --without compiled"
gpu-check: gpu-build gpu-test gpu-bench gpu-sanitize
gpu-bench: gpu-bench-kernels gpu-bench-t3 gpu-bench-s3gen gpu-bench-speech gpu-demo \
           gpu-bench-s3gen-compiled

gpu-build:
	rm -rf $(SITE) && mkdir -p $(SITE)
	if ls $(WHEELS)/*.whl >/dev/null 2>&1; then $(PYTHON) -m pip install -q --no-index --no-deps \
	  --no-compile --target $(SITE) $(WHEELS)/*.whl; fi
	CHATTERBOX_FAST_CUDA=1 PYTHONPATH=$(SITE) $(PYTHON) -m pip install -q --no-index --no-deps \
	  --no-build-isolation --upgrade --target $(SITE) .
	cd build && $(ON_GPU) -m chatterbox_fast doctor

GPU_PYTEST := -m pytest -c ../pyproject.toml --rootdir ..

gpu-test:
	mkdir -p $(RESULTS_DIR)
	cd build && OMP_NUM_THREADS=1 $(ON_GPU) $(GPU_PYTEST) ../tests -m gpu \
	  --junitxml=$(abspath $(RESULTS_DIR))/gpu-test.xml $(ARGS)

# The CUDA kernels under memcheck, with every allocation torch's allocator would cut from a larger one
# on its own (which no capture survives), and those with shared memory under racecheck. Torch's own
# kernels are not watched, and of thousands of draws a few do.
SANITIZE := compute-sanitizer --kernel-name kns=chatterbox_fast --error-exitcode 1
SANITIZED := not triton and not (draws_are_stocks and None)
gpu-sanitize:
	cd build && PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$(SITE) $(SANITIZE) --tool memcheck \
	  $(PYTHON) $(GPU_PYTEST) -q ../tests -m "gpu and kernel" \
	  -k "$(SANITIZED) and not graph and not captured" $(ARGS)
	cd build && PYTHONPATH=$(SITE) $(SANITIZE) --tool racecheck \
	  $(PYTHON) $(GPU_PYTEST) -q ../tests -m "gpu and kernel" \
	  -k "$(SANITIZED) and not skinny and not snake and not add_norm" $(ARGS)

gpu-bench-kernels:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) $(GPU_PYTEST) ../bench --benchmark-only -m gpu -k "not reference" \
	  --benchmark-json=$(abspath $(RESULTS_DIR))/bench-cuda.json $(ARGS)

gpu-bench-t3:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) ../bench/t3_decode.py --steps 100 --forced 64 \
	  --json $(abspath $(RESULTS_DIR))/t3_decode-cuda.json $(ARGS)

# Without torch.compile, whose minutes a device that is lent has better uses for; so is speech.
gpu-bench-s3gen:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) ../bench/s3gen.py --rounds 10 --variants stock exact bf16 \
	  --json $(abspath $(RESULTS_DIR))/s3gen-cuda.json $(ARGS)

gpu-bench-s3gen-compiled:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) ../bench/s3gen.py --rounds 3 --seconds 2 10 \
	  --variants stock "stock, compiled" "exact, compiled" "bf16, compiled" \
	  --json $(abspath $(RESULTS_DIR))/s3gen_compiled-cuda.json $(ARGS)

gpu-bench-speech:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) ../bench/end_to_end.py --rounds 3 --variants stock exact bf16 int8 \
	  --json $(abspath $(RESULTS_DIR))/end_to_end-cuda.json $(ARGS)

gpu-demo:
	mkdir -p $(RESULTS_DIR)
	cd build && $(ON_GPU) -m chatterbox_fast demo --size full --tokens 250 --device cuda \
	  --out demo_out --json $(abspath $(RESULTS_DIR))/demo-cuda.json $(ARGS)

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
