# make test-s3: the store tests against real S3 servers. Included by the Makefile, which sets PYTHON.
#
# Ceph's object gateway enforces create-only puts; s3rver ignores them and must be found out. Both listen on loopback
# and end with the tests. Installing Ceph needs root; without npm the test of s3rver is skipped.

CEPH_PACKAGES := radosgw ceph-mon ceph-osd ceph-common
S3RVER := build/s3rver/node_modules/.bin

.PHONY: test-s3
test-s3:
	@if command -v radosgw >/dev/null && command -v ceph-mon >/dev/null && command -v ceph-osd >/dev/null; then \
	  :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update && apt-get install -y --no-install-recommends $(CEPH_PACKAGES); \
	else \
	  echo "make test-s3 needs Ceph's object gateway. Install it as root and run this again (Debian, Ubuntu:" >&2; \
	  echo "apt-get install --no-install-recommends $(CEPH_PACKAGES))." >&2; \
	  exit 2; \
	fi
	@if [ ! -x $(S3RVER)/s3rver ] && command -v npm >/dev/null; then \
	  npm install --no-audit --no-fund --silent --prefix build/s3rver s3rver@3.7.1; \
	fi
	PATH="$(CURDIR)/$(S3RVER):$$PATH" $(PYTHON) -m pytest -m net tests/stores
