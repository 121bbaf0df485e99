# The entry points of the project. `make help` lists them.

SHELL := /bin/bash
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
BIN := $(CURDIR)/target/$(HOST)/release
BINARIES := weftd weft weft-cni weft-lab
LAB ?= lab
NODES ?= 3
LAB_ARGS ?=
TEST_ARGS ?=

# What is run beside cargo, "command:debian-package": by the build and the lab, and by the tests in addition.
NEEDS_LAB := cc:gcc ip:iproute2 unshare:util-linux nsenter:util-linux ping:iputils-ping nft:nftables ethtool:ethtool
# By the images and nodes of `make test-kubernetes`; Go, which builds the rest of it, is taken from PATH or from PyPI.
NEEDS_KUBERNETES := curl:curl dig:bind9-dnsutils iptables:iptables
# By the guest of `make test-vm`; its kernel is downloaded and not installed.
NEEDS_VM := qemu-system-x86_64:qemu-system-x86 cpio:cpio modprobe:kmod objcopy:binutils tc:iproute2 mawk:mawk
NEEDS_TEST := conntrack:conntrack nc.openbsd:netcat-openbsd c++:g++ etcd:etcd-server setpriv:util-linux iperf3:iperf3 tcpdump:tcpdump wg:wireguard-tools wireguard-go:wireguard-go containerd:containerd ctr:containerd runc:runc busybox:busybox-static openssl:openssl

.DEFAULT_GOAL := help
.PHONY: help programs deps deps-lab deps-vm deps-kubernetes installed build lab lab-down test test-vm kubernetes kubernetes-e2e test-kubernetes conformance lint bench peers interop bench-cni fuzz fuzz-build fuzz-short sim chaos mutants bench-control bench-scale bench-vxlan bench-wireguard bench-nat bench-node bench-kubernetes image install manifests deploy-tools

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

deps: NEEDS := $(NEEDS_LAB) $(NEEDS_TEST)
deps: NEEDS_FILES := /usr/lib/cni/bridge:containernetworking-plugins
deps: installed ## install what the lab and the tests run (Debian packages, as root; otherwise names them)

deps-lab: NEEDS := $(NEEDS_LAB)
deps-lab: installed

deps-vm: NEEDS := $(NEEDS_LAB) $(NEEDS_TEST) $(NEEDS_VM)
deps-vm: NEEDS_FILES := /usr/lib/cni/bridge:containernetworking-plugins
deps-vm: installed

deps-kubernetes: NEEDS := $(NEEDS_LAB) $(NEEDS_TEST) $(NEEDS_KUBERNETES)
deps-kubernetes: NEEDS_FILES := /usr/lib/cni/bridge:containernetworking-plugins
deps-kubernetes: installed

installed:
	@command -v cargo >/dev/null || { echo "make deps: cargo is missing: install Rust 1.95 or newer (https://rustup.rs)"; exit 1; }
	@missing=(); \
	for need in $(NEEDS); do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v "$${need%%:*}" >/dev/null || missing+=("$${need##*:}"); done; \
	for need in $(NEEDS_FILES); do [ -e "$${need%%:*}" ] || missing+=("$${need##*:}"); done; \
	missing=($$(printf '%s\n' "$${missing[@]}" | sort -u)); \
	if [ $${#missing[@]} -eq 0 ]; then echo "deps: everything is here"; exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "deps: installing $${missing[*]}"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get install -y --no-install-recommends "$${missing[@]}" </dev/null \
			|| { apt-get update </dev/null && apt-get install -y --no-install-recommends "$${missing[@]}" </dev/null; }; \
	else \
		echo "deps: these packages are missing: $${missing[*]}"; \
		echo "deps: install them, on Debian with: sudo apt-get install $${missing[*]}"; exit 1; \
	fi

# One static build for all executables: the CNI shim must run in any image's mount namespace. The target is named so that
# the flags reach only what is shipped and not the procedural macros, which cannot be static.
build: ## build the release executables: weftd, weft, weft-cni, weft-lab
	@[ -n "$(HOST)" ] || { echo "make build: rustc is missing: install Rust 1.95 or newer (https://rustup.rs)"; exit 1; }
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target $(HOST) --workspace --bins
	@echo "build: $(BINARIES) in $(BIN)"

image: build ## make the container image as a docker archive: target/weft-image.tar
	deploy/image $(BIN) target/weft-image.tar

# The network list is not installed where a runtime takes it: `weft install-cni` does that once the node is configured.
PREFIX ?= /usr/local
install: ## install the built executables, the unit and the samples below DESTDIR and PREFIX (/usr/local)
	@for name in weftd weft weft-cni; do [ -e "$(BIN)/$$name" ] || { echo "make install: $(BIN)/$$name is missing: run make build"; exit 1; }; done
	install -d $(addprefix $(DESTDIR),$(PREFIX)/bin $(PREFIX)/lib/systemd/system $(PREFIX)/share/weft /opt/cni/bin)
	install -m 755 $(addprefix $(BIN)/,weftd weft weft-cni) $(DESTDIR)$(PREFIX)/bin/
	install -m 755 $(BIN)/weft-cni $(DESTDIR)/opt/cni/bin/
	install -m 644 deploy/weft.toml deploy/cni/10-weft.conflist $(DESTDIR)$(PREFIX)/share/weft/
	sed 's|/usr/local/bin|$(PREFIX)/bin|' deploy/systemd/weftd.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/weftd.service
	chmod 644 $(DESTDIR)$(PREFIX)/lib/systemd/system/weftd.service

lab: deps-lab build ## bring up three nodes with two pods each, and show peers, routes and the ping matrix
	@$(BIN)/weft-lab --name $(LAB) up --nodes $(NODES) --dual-stack $(LAB_ARGS)
	@echo; echo '== weft peers (on n1)'; $(BIN)/weft-lab --name $(LAB) exec n1 -- weft peers
	@echo; echo '== weft routes (on n1)'; $(BIN)/weft-lab --name $(LAB) exec n1 -- weft routes
	@echo; echo '== ping: every pod to every pod'; $(BIN)/weft-lab --name $(LAB) ping
	@$(BIN)/weft-lab --name $(LAB) hints

lab-down: ## take the lab down
	@$(BIN)/weft-lab --name $(LAB) down

test: deps build peers deploy-tools programs fuzz-short ## install what the tests need and run all of them
	WEFT_BIN_DIR=$(BIN) cargo test --locked --no-fail-fast --workspace $(TEST_ARGS) </dev/null

# What runs in the guest: TARGET, or TARGET:parts,of,names. The other tests of encryption hold the daemon to what a kernel
# does not promise (not a packet lost at a rotation).
VM_TESTS ?= vm encrypted:no_byte,pods_hear,a_clear_route,the_impl reach:encrypted
test-vm: deps-vm build ## run the tests of kernel WireGuard in a virtual machine (qemu, emulated: minutes)
	@tests=(); for wanted in $(VM_TESTS); do \
		built=$$(cargo test --locked -p weft-tests --test "$${wanted%%:*}" --no-run 2>&1) || { echo "$$built"; exit 1; }; \
		path=$$(sed -n 's/^ *Executable .*(\(.*\))$$/\1/p' <<<"$$built"); \
		case $$wanted in *:*) path=$$path:$${wanted#*:};; esac; tests+=("$$path"); done; \
	tests/vm/run $(BIN) "$${tests[@]}"

# Built once into the user's cache from the Go modules that tests/kubernetes/go pins.
KUBERNETES := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft-tests/kubernetes
kubernetes: deps-kubernetes ## build a Kubernetes, containerd and CoreDNS for the tests, and images (minutes, once; 1 GB)
	tests/kubernetes/build $(KUBERNETES)

programs:
	@$(MAKE) --no-print-directory kubernetes || echo "programs: not built, see above; the tests that need them are skipped"

kubernetes-e2e: kubernetes ## build Kubernetes's own tests of conformance too (minutes, once)
	tests/kubernetes/build $(KUBERNETES) e2e

test-kubernetes: kubernetes build ## run the tests in a real Kubernetes on this machine (root, minutes); TEST_ARGS=all runs every case, or names cases
	WEFT_BIN_DIR=$(BIN) cargo test --locked -p weft-tests --test kubernetes -- $(TEST_ARGS) </dev/null

# One suite at a time: TEST_ARGS=weft_nftables, or =reference_nftables.
conformance: TEST_ARGS := $(or $(TEST_ARGS),weft_nftables)
conformance: kubernetes-e2e build ## run Kubernetes's own tests of conformance for networks, on the suite that TEST_ARGS names (root, an hour)
	WEFT_BIN_DIR=$(BIN) cargo test --locked -p weft-tests --test kubernetes -- $(TEST_ARGS)::conformance </dev/null

# What libFuzzer needs to see which way an input took; no nightly compiler. The targets are those of `cargo fuzz`.
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing
FUZZ_TARGETS := $(notdir $(basename $(wildcard tests/fuzz/fuzz_targets/*.rs)))
FUZZ_SECONDS ?= 300
FUZZ := target/fuzz/$(HOST)/release

fuzz-build:
	RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --release --locked --manifest-path tests/fuzz/Cargo.toml \
		--target $(HOST) --target-dir target/fuzz

fuzz-short: SECONDS_EACH := 4
fuzz: SECONDS_EACH := $(FUZZ_SECONDS)
fuzz: ## fuzz every decoder and the mesh, FUZZ_SECONDS each (300)
fuzz fuzz-short: deps fuzz-build
	@for target in $(FUZZ_TARGETS); do \
		echo "fuzz: $$target"; mkdir -p target/fuzz/found/$$target; \
		$(FUZZ)/$$target -max_total_time=$(SECONDS_EACH) -timeout=20 -rss_limit_mb=2048 -print_final_stats=0 \
			-artifact_prefix=target/fuzz/found/$$target- target/fuzz/found/$$target tests/fuzz/corpus/$$target \
			>target/fuzz/$$target.log 2>&1 \
			|| { tail -40 target/fuzz/$$target.log; echo "fuzz: $$target failed, its input is target/fuzz/found/$$target-*"; exit 1; }; \
		grep -E '(INITED|DONE)' target/fuzz/$$target.log | tail -1; \
	done

SIM_SEEDS ?= 1000
sim: ## simulate whole nodes, SIM_SEEDS runs (1000); WEFT_SEED=n SIM_SEEDS=1 repeats one
	SIM_SEEDS=$(SIM_SEEDS) cargo test --release --locked -p weft-tests --test node_sim -- --nocapture whatever

CHAOS_SEEDS ?= 10
CHAOS_STEPS ?= 200
chaos: deps build ## break everything in a lab, CHAOS_SEEDS runs (10) of CHAOS_STEPS steps (200); CHAOS_BACKEND=wireguard encrypts
	WEFT_BIN_DIR=$(BIN) CHAOS_SEEDS=$(CHAOS_SEEDS) CHAOS_STEPS=$(CHAOS_STEPS) \
		cargo test --locked -p weft-tests --test chaos -- --nocapture befell

mutants: deps ## break the code on purpose, one fault at a time, and see that a test fails for each
	cargo bench --locked -p weft-tests --bench mutants

bench: bench-vxlan bench-wireguard bench-cni bench-node bench-control ## all benches but bench-scale; ratios last

bench-scale: ## the mesh from 10 to 5,000 nodes, as a table and as plots in docs/plots (an hour)
	cargo bench --locked -p weft-tests --bench scale

bench-vxlan: deps build ## pod to pod against the same VXLAN made by hand; ratios last (root)
	WEFT_BIN_DIR=$(BIN) cargo bench --locked -p weft-tests --bench vxlan </dev/null

bench-nat: deps build ## each pair of kinds of NAT: direct or relayed, the first ping, throughput (root, five minutes)
	WEFT_BIN_DIR=$(BIN) cargo bench --locked -p weft-tests --bench nat </dev/null

# The newest releases of others, built once into the user's cache.
PEERS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft-tests
$(PEERS)/bin/wireguard:
	GOBIN=$(PEERS)/bin go install golang.zx2c4.com/wireguard@v0.0.0-20260522210424-ecfc5a8d5446
$(PEERS)/bin/2023/wireguard:
	GOBIN=$(PEERS)/bin/2023 go install golang.zx2c4.com/wireguard@v0.0.0-20231211153847-12269c276173
$(PEERS)/bin/boringtun-cli:
	cargo install --root $(PEERS) boringtun-cli@0.7.1
$(PEERS)/bin/gotatun:
	cargo install --root $(PEERS) gotatun-cli@0.10.2

# Whom the tunnels are tried with: a minute or three, once. Where it cannot be had, the tests that need it say SKIP, and fail
# under CI.
peers: ## build boringtun-cli and gotatun for the tests, into the user's cache (a minute or three, once)
	@$(MAKE) --no-print-directory $(addprefix $(PEERS)/bin/,boringtun-cli gotatun) \
		|| echo "peers: not built, see above; the tests that need them are skipped"

# What renders deploy/. Newest releases that this Go builds; pinned, since the rendering is committed.
$(PEERS)/bin/kustomize:
	CGO_ENABLED=0 GOBIN=$(PEERS)/bin go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.2
$(PEERS)/bin/helm:
	CGO_ENABLED=0 GOBIN=$(PEERS)/bin go install -ldflags "-s -w" helm.sh/helm/v4/cmd/helm@v4.3.1

deploy-tools: ## build kustomize and helm for manifests and tests, into the user's cache (some minutes, once)
	@$(MAKE) --no-print-directory $(addprefix $(PEERS)/bin/,kustomize helm) \
		|| echo "deploy-tools: not built, see above; the tests that need them are skipped"

manifests: $(PEERS)/bin/kustomize ## render deploy/weft.yaml, and copy what the Helm chart shares with the base
	cp deploy/cni/10-weft.conflist deploy/kubernetes/base/
	cp deploy/cni/10-weft.conflist $(addprefix deploy/kubernetes/base/,crd.yaml rbac.yaml admission.yaml) deploy/helm/weft/files/
	$(PEERS)/bin/kustomize build deploy/kubernetes/base >deploy/weft.yaml.next
	mv deploy/weft.yaml.next deploy/weft.yaml

TUNNEL_SECONDS ?= 260
interop: deps peers ## tunnels under traffic for TUNNEL_SECONDS (260) with three other implementations: sessions are renewed in time
	WEFT_TUNNEL_SECONDS=$(TUNNEL_SECONDS) cargo test --locked -p weft-daemon --test tunnel sessions_last -- --nocapture --test-threads 3

bench-wireguard: deps build $(addprefix $(PEERS)/bin/,wireguard 2023/wireguard boringtun-cli gotatun) ## pod to pod, encrypted in user space, against wireguard-go (newest, 2023), boringtun-cli and gotatun; ratios last (root)
	WEFT_BIN_DIR=$(BIN) cargo bench --locked -p weft-tests --bench wireguard </dev/null

bench-cni: deps build ## time CNI calls against the reference plugins; ratios last (root)
	WEFT_BIN_DIR=$(BIN) cargo bench --locked -p weft-tests --bench cni

bench-kubernetes: kubernetes build ## weft in a real Kubernetes: apply to Ready, pod starts against the reference plugins, memory; ratios last (root)
	WEFT_BIN_DIR=$(BIN) cargo bench --locked -p weft-tests --bench kubernetes </dev/null

bench-node: deps build ## memory and processor time of a daemon with 3 and 999 peers, and start to ready
	WEFT_BIN_DIR=$(BIN) cargo bench --locked -p weft-tests --bench node </dev/null

bench-control: deps ## time programming and withdrawing peers against ip -batch; ratios last (root)
	cargo bench --locked -p weft-tests --bench control </dev/null

lint: ## rustfmt and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo clippy --locked -p weft-tests --test vm --test kubernetes -- -D warnings
