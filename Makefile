# make install, demo, test, soak, check, docs, bench, engines. `make PYTHON=python3.12 test` picks another Python.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/installed

.PHONY: install demo test machines soak check docs bench engines format clean
.DEFAULT_GOAL := demo

# Made once; again only when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt tools/install.py
	@$(PYTHON) tools/install.py

install: $(STAMP)

demo: $(STAMP)
	@rm -rf runs/demo runs/smollm2-deepseek
	@.venv/bin/smolseek demo --out runs

# Processes that share the tests, of one thread each: they compute in each other's pauses. `make machines` takes more threads.
JOBS ?= 2
test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 SMOLSEEK_TEST_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

# The tests that depend on the processor, the compiler or the number of threads, as four kinds of machine run them.
machines: $(STAMP)
	@bash tests/machines/run

# Twenty SIGKILLs of one run, a disk that is full (as root), 400 damaged commands and files, a server with 64 clients and
# 300 damaged requests, the playground in Chromium (with the extra browser): minutes, figures into docs/results/soak.json,
# processes.json, fuzz.json, serve_*.json and notebook.json (the notebook from top to bottom).
soak: $(STAMP)
	HF_HUB_OFFLINE=1 SOAK_RESULT=docs/results/soak.json PROCESSES_RESULT=docs/results/processes.json \
		FUZZ_RESULT=docs/results/fuzz.json SERVE_RESULT=docs/results/serve_load.json \
		SERVE_FUZZ_RESULT=docs/results/serve_fuzz.json NOTEBOOK_RESULT=docs/results/notebook.json \
		$(PY) -m pytest -m soak tests/soak tests/fuzz tests/serve tests/test_docs.py

check: $(STAMP)
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) bench/architecture.py --check
	$(PY) tools/names.py

# The documentation as a site, build/site: it ends at a dead link and at a page outside the navigation.
docs: .venv/installed-docs
	$(PY) tools/docs.py

.venv/installed-docs: $(STAMP)
	@$(PYTHON) tools/install.py docs

# The standard measurements, into docs/results/; nothing else should run meanwhile.
bench: $(STAMP)
	$(PY) bench/train_step.py
	$(PY) bench/decode.py
	$(PY) bench/balance.py
	$(PY) bench/loader.py

# llama.cpp, mlx-lm and vLLM beside stock transformers, into docs/results/engines.json: the first time about an hour and
# 6 GB in build/engines.
engines: $(STAMP)
	$(PY) tools/engines.py
	HF_HUB_OFFLINE=1 $(PY) bench/engines.py

format: $(STAMP)
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

# Everything that can be made again, the environment included; runs/ is yours and stays.
clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
