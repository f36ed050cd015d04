# make demo and make test are all that a fresh machine needs.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
  if $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
  then echo $$p; break; fi; done)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint venv clean

demo: venv
	$(RUN) -m tq_tvm.demo

test: venv
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

venv: $(VENV)/.installed

# torch goes first: what else needs torch then takes this build, whichever it is.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.10, 3.11 or 3.12 must be on PATH"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch==2.13.0
	$(RUN) -m pip install -q -c constraints.txt -e '.[tune,dev,plot]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
