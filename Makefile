# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# llama-cpp-python is compiled here, for this machine's processor.
LLAMA_BUILD := CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc)

.PHONY: demo test check bench clean

demo: $(VENV)/.installed  ## edit, quantize and verify the embedded model; prints the verdict and where the report lies
	$(BIN)/trailmed run qwen2.5-coder-0.5b-instruct --out $(DEMO)

test: $(VENV)/.installed-dev check  ## linters and the whole suite
	$(BIN)/pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	mkdir -p $(VENV)/mypy && ln -sfn $(CURDIR) $(VENV)/mypy/trailmed
	MYPYPATH=$(VENV)/mypy $(BIN)/mypy -p trailmed

bench: $(VENV)/.installed  ## decoding and capture speeds on the embedded model, as ratios
	model=$$($(BIN)/trailmed models fetch qwen2.5-coder-0.5b-instruct) && $(BIN)/python bench/bench_activations.py --model $$model && \
	mkdir -p runs && $(BIN)/python -c "from pathlib import Path; from trailmed.export.bake import bake; bake(None, Path('$$model'), Path('runs/bench-Q8_0.gguf'), 'Q8_0')" && \
	$(BIN)/python bench/bench_decode.py runs/bench-Q8_0.gguf

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(LLAMA_BUILD) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hub]'
	touch $@

# What only the tests need: linters, and the harnesses and engines that are extras for users.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(LLAMA_BUILD) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hub,onnx,inspect,lm-eval,search]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
