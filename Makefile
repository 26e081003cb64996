# make run            the whole tunnel on this machine, in front of a demo service
# make run TARGET=3000                                ... in front of your own service
# make test           all tests
# make check          everything that CI checks: formatting, lints, docs, tests, licences, a start of the built executables
# make bench          measures everything and writes docs/performance.md; needs wrk (apt install wrk) or oha, nginx, bore and
#                     rathole; MISSING=allow measures without those that are missing, and only prints

LISTEN ?= 127.0.0.1:8080
DEMO ?= 127.0.0.1:3999
TARGET ?= $(DEMO)
TOOLS := $(CURDIR)/.tools
BIN := $(or $(CARGO_TARGET_DIR),target)/release
CARGO_DENY := 0.20.2
CARGO_FUZZ := 0.13.2

# Administration: of the stack STACK, or of the data directory DATA of a tunnel-local.
#
# make token NAME=alice STACK=tunnel      creates an agent token and prints it, once
# make tokens | tunnels STACK=tunnel      lists them
# make revoke-token NAME=alice STACK=tunnel
# make release-tunnel ID=my-app STACK=tunnel
#
# make invoke EVENT=ready   runs a function in a container with sam local invoke; needs a running `tunnel-local --samples`.
#                           EVENT: connect disconnect ready ping http-response body-part agent-error http-v1 http-v2 url
# make sam-local            runs all of them, after sam build, and looks at the answers
# make servers              runs nginx, Flask, Vite, git and others behind the tunnel and compares with direct access
# make acme                 runs tunnel-local --acme with Pebble, an authority for tests; needs pebble, curl and openssl
# make proxies              runs ttf where only tinyproxy, squid or microsocks leads out; needs them, iproute2, openssl and root or sudo
# make inspector            the part of `make web` that looks at the inspector's page
# make web                  runs dev servers, WebSockets, logging in and the inspector behind the tunnel in headless Chromium
# make fuzz                 runs each target of fuzz/fuzz_targets for FUZZ_SECONDS; make fuzz-decode runs one of them
#                           failures go to fuzz/artifacts, inputs to fuzz/corpus
# make chaos                injects random faults into the built executables while visitors use the tunnel, for CHAOS_SECONDS;
#                           CHAOS_SEED repeats a run, CHAOS_RATE is requests per second, CHAOS_ONLY=kill,hold selects faults
# make chaos SCENARIO=...   rollovers, outage or soak instead
# make dist                 makes archives, Debian packages and checksums of a release in target/packages, with tools that it downloads
# make archives             makes the archives alone, of what `make build` has built
# make e2e-deploy           deploys to an emulator of AWS and sends requests through the tunnel
# make live                 deploys to your AWS account, measures what AWS does not document, and removes everything: docs/live.md

ADMIN = $(BIN)/tunnel-admin $(if $(DATA),--data $(DATA),--stack $(or $(STACK),tunnel))
EVENT ?= ready
FUNCTION = $(or $(patsubst %,ConnectFunction,$(filter connect,$(EVENT))),$(patsubst %,DisconnectFunction,$(filter disconnect,$(EVENT))),$(patsubst %,ForwardFunction,$(filter http-v1 http-v2 url,$(EVENT))),DefaultFunction)

FUZZ_SECONDS ?= 10
FUZZ := $(patsubst fuzz/fuzz_targets/%.rs,fuzz-%,$(wildcard fuzz/fuzz_targets/*.rs))
# Longer than the longest message. For the others, libFuzzer's default of 4,096 bytes is enough.
FUZZ_FLAGS_decode := -max_len=140000

.PHONY: run test check build fmt clippy doc deny smoke archives bench dist tools token tokens revoke-token tunnels release-tunnel invoke sam-local e2e-deploy live servers acme proxies inspector web chaos fuzz $(FUZZ)

tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust from https://rustup.rs and open a new shell" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "a C compiler is missing: apt install gcc, dnf install gcc, or xcode-select --install" >&2; exit 1; }

build: tools
	cargo build --release --locked --workspace --bins --examples

# The agent starts once the server is ready, so that it never connects to another server that has the port; all end with the server.
run: SHELL := bash
run: tools
	@echo "Building tunnel-local, ttf and the demo service. The first time this takes several minutes."
	cargo build --release --locked --workspace --bin tunnel-local --bin ttf --example demo
	@set -o pipefail; trap : INT TERM; $(BIN)/tunnel-local --listen $(LISTEN) 2>&1 | { \
	  trap 'kill $$(jobs -p) 2>/dev/null; wait' EXIT; \
	  while IFS= read -r line || [[ $$line ]]; do \
	    echo "$$line" >&2; \
	    [[ $$line = ready:* ]] || continue; \
	    if [ "$(TARGET)" = "$(DEMO)" ]; then $(BIN)/examples/demo $(DEMO) & fi; \
	    $(BIN)/ttf http $(TARGET) --endpoint ws://$(LISTEN)/_ws > >(while read -r url; do \
	      printf '\n  public URL: %s\n  try it:     curl %s/\n  stop it:    Ctrl-C\n\n' "$$url" "$$url"; done) & \
	  done; }

# The end-to-end suite once more, with every step as in AWS.
test: tools
	cargo test --release --locked --workspace
	TUNNEL_TEST_SHAPE=as-in-aws cargo test --release --locked --workspace --test it

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

bench: build
	.ci/deployed
	cargo bench --locked -p tunnel-bench --bench performance -- $(PART) $(if $(MISSING),--allow-missing)

dist: tools
	.ci/dist target/packages

archives: build
	.ci/dist target/packages $(BIN)

token: build
	@$(ADMIN) create-token $(or $(NAME),$(error set NAME, the name of the token: NAME=alice)) $(if $(EXPIRES),--expires $(EXPIRES))

tokens: build
	@$(ADMIN) list-tokens

revoke-token: build
	@$(ADMIN) revoke-token $(or $(NAME),$(error set NAME, the name of the token: NAME=alice))

tunnels: build
	@$(ADMIN) list-tunnels

release-tunnel: build
	@$(ADMIN) release-tunnel $(or $(ID),$(error set ID, the tunnel id: ID=my-app))

EVENTS := $(patsubst events/%.json,%,$(wildcard events/*.json))

invoke:
	@test -f events/$(EVENT).json || { echo "there is no event $(EVENT); EVENT is one of: $(EVENTS)" >&2; exit 1; }
	@command -v sam >/dev/null || { echo "sam is missing: pip install aws-sam-cli cargo-lambda" >&2; exit 1; }
	@test -d .aws-sam/build || { echo "the functions are not built: sam build" >&2; exit 1; }
	sam local invoke $(FUNCTION) -e events/$(EVENT).json $(INVOKE_FLAGS)

sam-local: build
	.ci/sam-local $(BIN) $(SAM_LOCAL_FLAGS)

e2e-deploy: tools
	.ci/e2e-deploy

live: build
	@test -x $(TOOLS)/sam/bin/sam || { python3 -m venv $(TOOLS)/sam && $(TOOLS)/sam/bin/pip install --quiet -r .ci/sam.txt; }
	PATH=$(TOOLS)/sam/bin:$$PATH sam build
	PATH=$(TOOLS)/sam/bin:$$PATH python3 .ci/live --ttf $(BIN)/ttf $(LIVE_FLAGS)

servers: build
	.ci/servers $(BIN)
	.ci/frameworks $(BIN)

acme: build
	.ci/acme $(BIN)

proxies: build
	.ci/proxies $(BIN)

inspector: build
	.ci/web/run $(BIN) inspector.test.js

web: build
	.ci/web/run $(BIN)

chaos: build
	$(BIN)/chaos $(SCENARIO)

fuzz: $(FUZZ)

# Without a sanitizer it works on stable Rust, and safe code does not need one.
$(FUZZ): fuzz-%: tools
	@command -v c++ >/dev/null || { echo "a C++ compiler is missing: apt install g++, dnf install gcc-c++, or xcode-select --install" >&2; exit 1; }
	@test -x $(TOOLS)/bin/cargo-fuzz || cargo install --locked --root $(TOOLS) --version $(CARGO_FUZZ) cargo-fuzz
	cargo fetch --locked --quiet --manifest-path fuzz/Cargo.toml
	$(TOOLS)/bin/cargo-fuzz build --sanitizer none $*
	@mkdir -p fuzz/artifacts fuzz/corpus/$*
	@echo "fuzzing $* for $(FUZZ_SECONDS) s"
	@$(TOOLS)/bin/cargo-fuzz run --sanitizer none $* fuzz/corpus/$* $(wildcard fuzz/seeds/$*) -- \
	  $(addprefix -dict=,$(wildcard fuzz/dictionaries/$*.dict)) $(FUZZ_FLAGS_$*) -max_total_time=$(FUZZ_SECONDS) -timeout=10 \
	  -rss_limit_mb=512 -verbosity=0 -print_funcs=0 -print_final_stats=1 >fuzz/artifacts/$*.log 2>&1 \
	  && grep '^stat::' fuzz/artifacts/$*.log || { cat fuzz/artifacts/$*.log >&2; exit 1; }
