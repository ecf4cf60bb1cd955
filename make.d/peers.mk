# make test-peers, bench-swarm, bench-carriers: peers. Included by the Makefile, which sets VENV, PYTHON and PIP.
#
# NIXL and Mooncake (270 MB together) are not among what make setup installs; test-peers adds them to the environment.

.PHONY: test-peers bench-swarm bench-carriers

$(VENV)/.peers: $(VENV)/.dev
	@$(PIP) --editable '.[nixl,mooncake]'
	@touch $@

test-peers: $(VENV)/.peers ## all tests of peers, over NIXL and Mooncake too, which it installs (270 MB)
	$(PYTHON) -m pytest -m 'slow or not slow' --timeout 1800 tests/peers tests/sync/test_peering.py

bench-swarm: $(VENV)/.dev ## 16 consumers behind 100 Mbit/s each: all from the store, then by swarm; needs root
	$(PYTHON) -m thinwire bench swarm --out $(or $(OUT),swarm.jsonl)

bench-carriers: $(VENV)/.peers ## GB/s between two processes: broadcast, swarm, NIXL, Mooncake, beside a copy
	$(PYTHON) -m thinwire bench carriers --out $(or $(OUT),carriers.jsonl)
