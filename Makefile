# `make quickstart` and `make test` set everything up by themselves; a second run reuses .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart quickstart-language quickstart-chat quickstart-reasoning quickstart-vision demo-vision demo-r1 \
	demo-r1-report demo-text test test-slow llama-cpp kenlm lint format clean

quickstart: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m training.quickstart

quickstart-language quickstart-chat quickstart-reasoning quickstart-vision: quickstart-%: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m training.quickstart $*

# Three seeds of a longer pretraining, each beside training from scratch; about half an hour.
demo-vision: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.pretraining_gain

# The road of DeepSeek-R1 from a pretrained base to a report. So small a model is no faster on more threads.
demo-r1: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m training.r1 --config training/recipes/llama_style/r1_demo/r1.yaml

# The same with three seeds and 1,000 problems.
demo-r1-report: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m training.r1 --config training/recipes/llama_style/r1_demo/report.yaml

# Clean English text out of the small crawl, and the report of what was dropped; about a minute.
demo-text: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m training.train_language_id --config training/recipes/text_pipeline/language_id_quickstart.yaml
	HF_HUB_OFFLINE=1 $(BIN)/python -m training.prepare_text --config training/recipes/text_pipeline/quickstart.yaml

# A process a core; the tests of a file stay together, since they share what a fixture has trained.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# What `tests/test_llama_cpp.py` needs: a build for any processor, without the parts for images; about 12 minutes.
llama-cpp: $(INSTALLED)
	CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" \
		$(BIN)/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt llama-cpp-python

# KenLM for perplexity: the Python module, and the programs that estimate a model; about five minutes. On Debian it needs
# cmake, g++, libboost-program-options-dev, libboost-system-dev, libboost-thread-dev and libboost-test-dev.
KENLM := $(VENV)/kenlm
kenlm: $(INSTALLED)
	rm -rf $(KENLM)
	$(BIN)/pip download --quiet --no-cache-dir --disable-pip-version-check -c constraints.txt \
		--no-deps --no-binary kenlm --dest $(KENLM) kenlm
	tar -xzf $(KENLM)/kenlm-*.tar.gz -C $(KENLM) --strip-components 1
	cmake -S $(KENLM) -B $(KENLM)/build -DCMAKE_BUILD_TYPE=Release
	cmake --build $(KENLM)/build --parallel $$(nproc) --target lmplz build_binary
	cp $(KENLM)/build/bin/lmplz $(KENLM)/build/bin/build_binary $(BIN)
	$(BIN)/pip install --no-cache-dir --disable-pip-version-check $(KENLM)/kenlm-*.tar.gz
	rm -rf $(KENLM)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-cache-dir --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
