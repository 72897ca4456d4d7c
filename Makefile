# kmsfs. `make demo` shows it, `make test` tests it; both install what they need
# from Debian's packages where they may, and otherwise say what to install.

GO        ?= go
BIN       := bin/kmsfs
VERSION   := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.6.1
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.1.4
FUZZTIME  ?= 1s
SOAK      ?= 1h

# Programs that the tests run, as program:package.
TEST_TOOLS := fusermount3:fuse3 gocryptfs:gocryptfs restic:restic borg:borgbackup rclone:rclone rsync:rsync \
	setfacl:acl setfattr:attr aws:awscli sqlite3:sqlite3 git:git tar:tar gcc:gcc softhsm2-util:softhsm2 pkcs11-tool:opensc chromium:chromium \
	stdbuf:coreutils initdb:postgresql pgbench:postgresql pg_amcheck:postgresql
DEMO_TOOLS := fusermount3:fuse3 getfattr:attr

BENCH_TOOLS := fusermount3:fuse3 gocryptfs:gocryptfs securefs:securefs

.PHONY: all bench build build-pkcs11 integration-pkcs11 demo test check unit integration fuzz fuzz-short crash faults kill pjdfstest soak vectors golden-stores vuln clean tools demo-tools install man

all: build

build:
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o $(BIN) ./cmd/kmsfs

# The same with pkcs11: keys. It needs a C compiler, and is linked dynamically:
# it loads the vendor's library at run time.
build-pkcs11:
	@mkdir -p bin
	CGO_ENABLED=1 $(GO) build -tags pkcs11 -trimpath -ldflags '-X main.version=$(VERSION)' -o $(BIN)-pkcs11 ./cmd/kmsfs

install: build
	install -D -m 0755 $(BIN) $(DESTDIR)/usr/local/bin/kmsfs
	ln -sf kmsfs $(DESTDIR)/usr/local/bin/mount.fuse.kmsfs

demo: demo-tools build
	@./docs/demo.sh $(BIN)

# check needs neither root nor FUSE nor the network (beyond modules).
check:
	@test -z "$$(gofmt -l cmd crypto fs integration | tee /dev/stderr)" || { echo "run gofmt -w on these"; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

# Unit tests, with the race detector.
unit:
	$(GO) test -race -timeout 20m ./cmd/... ./crypto/... ./fs/...

# Real mounts, real programs, the KMS test server. Not run from a cache: the
# programs and the kernel are part of what is tested. Most of what runs in
# parallel waits, for a key service that is away.
integration: integration-pkcs11
	$(GO) test -count=1 -timeout 30m -parallel 4 ./integration/...

# What needs the build tag, over SoftHSM2, and so a C compiler.
integration-pkcs11:
	@if command -v gcc >/dev/null; then set -x; \
		CGO_ENABLED=1 $(GO) vet -tags pkcs11 ./crypto/keywrap/pkcs11 ./cmd/kmsfs ./integration/hsm && \
		CGO_ENABLED=1 $(GO) test -count=1 -tags pkcs11 ./crypto/keywrap/pkcs11 ./integration/hsm; \
	else echo "no C compiler: PKCS#11 is not tested" >&2; [ "$$CI" != true ]; fi

# Mixed load for an hour, or as long as SOAK says, and what it came to: table,
# figures, chart. A short run is one of the integration tests.
soak: tools
	@mkdir -p bin/soak
	SOAK=$(SOAK) SOAK_OUT=$(CURDIR)/bin/soak $(GO) test -count=1 -v -timeout 0 -run 'TestSoak$$' ./integration/soak

# kmsfs against its peers and against FUSE itself, and how cost grows: prints
# tables, and writes them into docs. BENCH has further flags, such as
# BENCH='-rounds 3 -grow=false'. As root; needs 12 GiB of memory.
bench:
	@./integration/tools.sh $(BENCH_TOOLS)
	$(GO) run ./integration/bench -json docs/performance.json -page docs/performance.md -chart docs/performance.svg $(BENCH)

# pjdfstest on every placement, as root: make pjdfstest PJDFSTEST=CHECKOUT, a built
# checkout of github.com/pjd/pjdfstest. A quarter of an hour.
pjdfstest: build
	@test -n "$(PJDFSTEST)" || { echo "say where it is: make pjdfstest PJDFSTEST=CHECKOUT" >&2; exit 2; }
	./integration/pjdfstest.sh $(PJDFSTEST)

# Every state that a power cut can leave, after every sequence: hours. With
# CRASH_TIME=5m some of them, for about as long for each part.
crash: tools
	CRASH_FULL=1 CRASH_TIME=$(CRASH_TIME) $(GO) test -count=1 -v -timeout 0 ./integration/powercut

# Mounts, the programs on them, and unmounts under SIGKILL, 200 times in all.
kill: tools
	CRASH_ROUNDS=67 $(GO) test -count=1 -v -timeout 0 -run 'TestCrash$$' ./integration

# Every call of every operation on a disk that fails, with every errno; an hour.
faults:
	FAULT_FULL=1 $(GO) test -count=1 -v -timeout 0 ./integration/faultsweep

# A short run of every fuzz target; `make fuzz FUZZTIME=10m` for a long one.
fuzz-short:
	@FUZZTIME=$(FUZZTIME) GO=$(GO) ./integration/fuzz.sh

fuzz: FUZZTIME = 1m
fuzz: fuzz-short

# The last lines of this are go test's: the integration tests come last.
test: tools check fuzz-short unit integration

# Regenerates the format vectors; the tree must stay clean.
vectors:
	$(GO) test ./crypto/dare ./crypto/nameenc ./crypto/envelope ./fs/record -run 'Vectors' -update
	git diff --exit-code -- '*/testdata/*'

vuln:
	$(GO) run $(GOVULNCHECK) ./...

man: build
	@mkdir -p bin/man
	$(BIN) docs --dir bin/man

tools:
	@./integration/tools.sh $(TEST_TOOLS)

demo-tools:
	@./integration/tools.sh $(DEMO_TOOLS)

# Makes the golden stores that are not there yet; never one that is.
golden-stores:
	$(GO) test -count=1 ./integration -run 'TestGoldenStoresAreKept' -golden-stores

clean:
	rm -rf bin
