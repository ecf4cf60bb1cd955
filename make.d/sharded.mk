# make test-sharded: all tests of sharded publishing and reading, in processes too. Included by the Makefile, which sets VENV and PYTHON.

.PHONY: test-sharded

test-sharded: $(VENV)/.dev ## all tests of sharded training and serving, with four processes over Gloo
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m 'slow or not slow' --timeout 1800 tests/sharded \
		tests/integrations/test_runtime.py tests/integrations/test_runtime_parts.py tests/integrations/test_serving_parts.py \
		tests/cli/test_following.py tests/cli/test_following_parts.py tests/cli/test_sharded_stores.py
