# Every command sets up what it needs. PostgreSQL servers are found or fetched by tests/support/servers.sh.

CARGO ?= cargo

# Where Cargo keeps the sources of other packages. Paths of the machine that builds must not show in what is built.
cargo_home := $(or $(CARGO_HOME),$(HOME)/.cargo)
target_dir := $(or $(CARGO_TARGET_DIR),target)
# Compilers name what they are given, and also the folder that they are in, whose name has no symbolic links in it: both
# are remapped. The last that fits counts.
remapped = $(foreach path,$(CURDIR)=/pgcutover $(abspath $(target_dir))=/pgcutover/target $(realpath $(target_dir))=/pgcutover/target \
	$(foreach part,/registry /git,$(realpath $(cargo_home)$(part))=/cargo$(part)) $(realpath $(cargo_home))=/cargo $(cargo_home)=/cargo,\
	$(if $(filter =%,$(path)),,$(1)=$(path)))

.PHONY: demo test release package random servers screenshots check help

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: servers ## move a live database between two throw-away servers; ends with a report
	$(CARGO) run --quiet --release -- demo $(DEMO_ARGS)

test: servers ## every test, documentation examples included
	$(CARGO) test --no-fail-fast

release: ## the program to install, without paths of the machine that builds it; prints its size and digest
	RUSTFLAGS="$(call remapped,--remap-path-prefix)" CFLAGS="$(call remapped,-ffile-prefix-map)" \
		$(CARGO) build --release --locked --bin pgcutover
	@ls -s --block-size=1 $(target_dir)/release/pgcutover && sha256sum $(target_dir)/release/pgcutover

package: release ## the Debian package, with manual page and completions; needs cargo-deb (cargo install cargo-deb)
	mkdir -p target/package
	$(target_dir)/release/pgcutover man >target/package/pgcutover.1
	$(target_dir)/release/pgcutover completions bash >target/package/pgcutover.bash
	$(target_dir)/release/pgcutover completions zsh >target/package/_pgcutover
	$(target_dir)/release/pgcutover completions fish >target/package/pgcutover.fish
	$(CARGO) deb --no-build --strip

random: servers ## move random databases while everything is killed at random; SEEDS=200 for a night
	RANDOM_SEEDS=$(or $(SEEDS),10) $(CARGO) test --test randomised -- --nocapture

servers: ## make sure that PostgreSQL server programs are there
	@bash tests/support/servers.sh

screenshots: servers ## take the pictures of docs/images anew, in a browser that runs the whole story
	$(CARGO) test --test faces by_clicks_alone
	cp target/tmp/screenshots/story/06-ready.png docs/images/ready.png
	cp target/tmp/screenshots/story/13-switched-1.png docs/images/switched.png
	cp target/tmp/screenshots/story/16-list-dark.png docs/images/list-dark.png

check: ## formatting, lints, documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --document-private-items --quiet
