# make run            the whole tunnel on this machine, in front of a demo service
# make run TARGET=3000                                ... in front of your own
# make test           all tests
# make check          all that CI checks: formatting, lints, docs, tests, licences, a start of the built executables

LISTEN ?= 127.0.0.1:8080
DEMO ?= 127.0.0.1:3999
TARGET ?= $(DEMO)
TOOLS := $(CURDIR)/.tools
BIN := $(or $(CARGO_TARGET_DIR),target)/release
CARGO_DENY := 0.20.2

.PHONY: run test check build fmt clippy doc deny smoke tools

tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust from https://rustup.rs and open a new shell" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "a C compiler is missing: apt install gcc, dnf install gcc, or xcode-select --install" >&2; exit 1; }

build: tools
	cargo build --release --locked --workspace --bins --examples

run: build
	@trap 'trap "" INT TERM; kill $$pids 2>/dev/null; wait' EXIT; trap 'exit 0' INT TERM; \
	$(BIN)/tunnel-local --listen $(LISTEN) & pids=$$!; \
	if [ "$(TARGET)" = "$(DEMO)" ]; then $(BIN)/examples/demo $(DEMO) & pids="$$pids $$!"; fi; \
	{ $(BIN)/ttf http $(TARGET) --endpoint ws://$(LISTEN)/_ws & echo $$! >&3; wait; } 3>&1 | { \
	  read -r ttf; trap 'kill $$ttf 2>/dev/null' EXIT; \
	  while read -r url; do printf '\n  public URL: %s\n  try it:     curl %s/\n  stop it:    Ctrl-C\n\n' "$$url" "$$url"; done; }

test: tools
	cargo test --release --locked --workspace

check: fmt clippy doc test deny smoke

fmt: tools
	cargo fmt --all --check

clippy: tools
	cargo clippy --release --locked --workspace --all-targets -- -D warnings

doc: tools
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps

deny: tools
	@test -x $(TOOLS)/bin/cargo-deny || cargo install --locked --root $(TOOLS) --version $(CARGO_DENY) --no-default-features cargo-deny
	$(TOOLS)/bin/cargo-deny --locked check bans licenses sources

smoke: build
	.ci/smoke $(BIN)
