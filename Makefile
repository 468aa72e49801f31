# Every target that needs Python packages creates .venv by itself; only Python (3.11 or newer) with pip, and make, are
# needed beforehand. pip's own settings apply: where only CPU builds of torch are wanted, set for example
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow conformance coverage lint format docs site notebooks bench constraints clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo 'Variables: PYTHON=python3.12 (needs a `make clean` when .venv exists), WORKERS=4, METHOD=RigL, ARGS="-k st3" for pytest'

install: $(STAMP)  ## Create or update .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Train sparse digits classifiers, or those of METHOD="RigL SET", and write a report to runs/digits
	$(RUN) examples/digits.py --output runs/digits $(addprefix --method ,$(METHOD))

test: $(STAMP)  ## Run the tests and the doctests, without the slow ones
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## Run the slow tests only
	$(RUN) -m pytest -m slow -o faulthandler_timeout=1800 $(ARGS)

conformance: $(STAMP)  ## Train each method next to its reference and write the differences to docs/conformance.md
	$(RUN) -m pytest -n $(WORKERS) --conformance docs/conformance.md tests/strategies

coverage: $(STAMP)  ## Run the tests in one process and report the covered lines and branches
	$(RUN) -m coverage run -m pytest $(ARGS)
	$(RUN) -m coverage report

lint: $(STAMP)  ## Check style, format, types, spelling and that notebooks hold no outputs; change nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	$(RUN) -m nbstripout --verify notebooks/*.ipynb

format: $(STAMP)  ## Repair what ruff can repair, and strip the outputs of notebooks
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(RUN) -m nbstripout notebooks/*.ipynb

docs: $(STAMP)  ## Write the tables of methods in README.md and docs/methods.md from the cards of the classes
	$(RUN) -m lightning_sparse methods --fill README.md docs/methods.md

site: $(STAMP)  ## Build the documentation site in build/site; warnings are errors
	$(RUN) -m sphinx -W --keep-going -q docs build/site
	@! grep -rE --include='*.html' '<(script|link|img|iframe)[^>]+(src|href)="(https?:)?//' build/site  # it works offline
	@echo 'The site begins at build/site/index.html'

notebooks: $(STAMP)  ## Run the notebooks on a small budget; the files stay as they are
	SMALL=1 $(RUN) -m pytest --nbmake --nbmake-timeout=600 notebooks

bench: $(STAMP)  ## Measure time, memory, selection and inference into docs/*.md, on a machine that is idle otherwise
	$(RUN) benchmarks/overhead.py --profile --output docs/overhead.md \
		--methods ST3 ST3Sigma STR AutoSparse TopKGradientAnnealing GMP RigL full-sort autograd parametrize ModelPruning
	$(RUN) benchmarks/memory.py --output docs/memory.md
	$(RUN) benchmarks/selection.py --output docs/selection.md
	$(RUN) benchmarks/inference.py --compile-accelerated --output docs/inference.md
	$(RUN) benchmarks/size.py --output docs/size.md
	$(RUN) benchmarks/slimming.py --dead half --output docs/slimming.md
	$(RUN) benchmarks/subnormals.py --output docs/subnormals.md

constraints:  ## Resolve everything but torch anew, with the newest versions, into constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@grep -E '^(#|torch==)' constraints.txt > $(VENV)/pins.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-input -c $(VENV)/pins.txt -e '.[dev]'
	@sed -i.bak '/^torch==/d' $(VENV)/pins.txt
	$(RUN) -m pip freeze --all --exclude-editable | grep -viE '^(pip==|nvidia|cuda|triton)' \
		| sed 's/+[a-z0-9.]*$$//' >> $(VENV)/pins.txt
	@cp $(VENV)/pins.txt constraints.txt && touch $(STAMP)

clean:  ## Remove .venv, caches and what runs have written
	rm -rf $(VENV) build dist runs htmlcov docs/api docs/method docs/notebook .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
