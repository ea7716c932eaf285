# Everything a fresh machine needs: `make plan` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev
DEVICE ?= cpu

.PHONY: help setup plan test lint format clean

help:
	@echo "make setup   create .venv with everything that effcc and its tests need"
	@echo "make plan    plan GPT-2's training step and write a report (DEVICE=$(DEVICE))"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

plan: setup
	@mkdir -p build
	@rm -rf build/passes
	@TRANSFORMERS_VERBOSITY=error $(BIN)/effcc plan examples/gpt2_train.py --train --device $(DEVICE) \
		-o build/plan.effcc --report build/report.html --dump build/passes

test: setup
	$(BIN)/python -m pytest -c tests/pytest.ini tests -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
