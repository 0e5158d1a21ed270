# make demo    everything, on the CPU: speech made up, training, WER, export (GPU: EXTRA=cuda12)
# make demo-long  the same for longer, to a lower WER
# make test    the test suite; make test-original adds the tests against qwen-asr 0.0.6
# make lint    format, lint and types

PYTHON ?= python3
EXTRA ?=
# Where torch's CPU build is to be had, it is enough: tests use torch as the reference only.
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := .venv/bin
COMMA := ,
ORIGINAL := .venv-original/bin

.PHONY: demo demo-long test test-original lint clean

demo: .venv/demo$(EXTRA)
	$(BIN)/hebasr demo

demo-long: .venv/demo$(EXTRA)
	$(BIN)/hebasr demo --config configs/demo_long.py --clips 12000

test: .venv/test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --check-skips

test-original: .venv/test .venv-original/ready
	HEBASR_ORIGINAL_PYTHON=$(ORIGINAL)/python $(BIN)/python -m pytest tests/original --check-skips

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/demo$(EXTRA): pyproject.toml | .venv/bin/python
	$(BIN)/python -c 'import sys; sys.exit("A GPU needs Python 3.12 or later: make clean, then add PYTHON=python3.12" if "$(EXTRA)".startswith("cuda") and sys.version_info < (3, 12) else 0)'
	$(BIN)/python -m pip install --quiet -e '.[demo$(if $(EXTRA),$(COMMA)$(EXTRA))]'
	touch $@

.venv/test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

# qwen-asr 0.0.6 pins transformers 4.57.6 and does not import beside transformers 5.
.venv-original/ready:
	$(PYTHON) -m venv .venv-original
	$(ORIGINAL)/python -m pip install --quiet '$(TORCH)'
	$(ORIGINAL)/python -m pip install --quiet transformers==4.57.6 accelerate nagisa soynlp librosa soundfile
	$(ORIGINAL)/python -m pip install --quiet --no-deps qwen-asr==0.0.6
	touch $@

clean:
	rm -rf .venv .venv-original tests/.programs
