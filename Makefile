# Every command sets up what it needs. PostgreSQL servers are found or fetched by tests/support/servers.sh.

CARGO ?= cargo

.PHONY: demo test servers check help

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: servers ## move a live database between two throw-away servers; ends with a report
	$(CARGO) run --quiet --release -- demo $(DEMO_ARGS)

test: servers ## every test, documentation examples included
	$(CARGO) test --no-fail-fast

servers: ## make sure that PostgreSQL server programs are there
	@bash tests/support/servers.sh

check: ## formatting, lints, documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --document-private-items --quiet
