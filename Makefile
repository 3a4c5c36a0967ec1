# almond's Makefile.  `make` needs a C compiler and make, nothing else.
#
#   make            build/almond, with the host's compiler
#   make static     build/almond-static, with musl: one file, no loader, no libraries
#   make run        try it: a sample spool on loopback
#   make test       everything that proves it
#   make crash      the long proof that no crash loses mail
#   make sizes      what it weighs, and what each switch costs
#   make install    DESTDIR and PREFIX are honoured
#   make help       the rest
#
# Yours to set: CC CFLAGS CPPFLAGS LDFLAGS LDLIBS DESTDIR PREFIX CROSS (a prefix, as in CROSS=mips-linux-gnu-), WERROR=
# (empty: warnings are no errors), ENABLE_CRYPT=1 (all formats of crypt(3); needs -lcrypt).  The other switches are in
# config.h, or here: make CPPFLAGS=-DENABLE_APOP=0

ifeq ($(origin CC),default)
CC = $(CROSS)gcc
endif
CFLAGS = -O2
PREFIX = /usr/local
SBINDIR = $(PREFIX)/sbin
MANDIR = $(PREFIX)/share/man
INSTALL = install
MUSLCC = musl-gcc
STRIP = $(CROSS)strip
PYTHON = /usr/bin/python3
WERROR = -Werror

SRC := $(sort $(wildcard *.c))
HEADERS := $(wildcard *.h)

WARNINGS = -std=c11 -Wall -Wextra -Wpedantic -Wshadow -Wundef -Wconversion -Wsign-conversion -Wstrict-prototypes \
	-Wmissing-prototypes -Wpointer-arith -Wcast-qual -Wwrite-strings -Wvla -Wformat=2 $(WERROR)

# A build with ENABLE_CRYPT lies beside the others.
ENABLE_CRYPT =
ifneq ($(filter-out 0,$(ENABLE_CRYPT)),)
O = build/crypt
CRYPT_DEFS = -DENABLE_CRYPT=1
CRYPT_LIBS = -lcrypt
MUSL_CRYPT = build/libxcrypt/libcrypt.a
else
O = build
endif

# What makes the static file small: each flag was tried and took something off.
SMALL = -Oz -flto=auto -fomit-frame-pointer -fno-asynchronous-unwind-tables -fno-unwind-tables -ffunction-sections -fdata-sections \
	-fno-stack-protector -fno-pie -fno-ident -fmerge-all-constants -fno-jump-tables -fno-caller-saves \
	-fno-inline-functions-called-once -fno-tree-loop-im -fno-optimize-sibling-calls -fno-tree-tail-merge -fno-ipa-sra \
	-fno-move-loop-invariants -fno-expensive-optimizations -fno-strict-aliasing -fno-if-conversion -fno-partial-inlining
ifneq ($(findstring x86_64,$(shell $(MUSLCC) -dumpmachine 2>/dev/null)),)
SMALL_X86 = -mno-sse
endif
SMALL_LD = -static -no-pie -s -flto-partition=one -Wl,--gc-sections,--build-id=none,-z,noseparate-code,-z,norelro,-z,common-page-size=256,--hash-style=gnu,-O1

# The tests' build waits less; FAIL_DELAY and the like are in milliseconds.
TEST_DEFS = -DFAIL_DELAY=20 -DTAKEOVER_IDLE=1500 -DLOCK_WAIT=3000 -DLOCK_STALE=1500 -DLOCK_OLD=0 -DPASSWD_TIME=5 \
	-DRUN_DIR='"/run/almond-test"'
# The crash proofs' build is the static file, but for its waits.
CRASH_DEFS = -DFAIL_DELAY=20 -DTAKEOVER_IDLE=1500 -DLOCK_WAIT=4000 -DLOCK_STALE=5 -DLOCK_OLD=0 -DRUN_DIR='"/run/almond-test"'
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

.PHONY: all static static-armhf test-build crash-build asan-build clang-build musl-build run test crash frugal sizes install uninstall check-style \
	clean help FORCE
all: $(O)/almond

# ---- one rule for each way to build ------------------------------------------------------------------------------------

# $(call kind,directory,compiler,flags,link flags,strip): objects in $(O)/directory, linked as what depends on them.
# The flags are kept in a file, so that others make the objects anew.
define kind
$(O)/$(1)/%.o: %.c $(HEADERS) $(O)/$(1)/flags
	$(2) $(WARNINGS) $(3) $$(CRYPT_DEFS) $$(CPPFLAGS) -c -o $$@ $$<
$(O)/$(1)/flags: FORCE
	@mkdir -p $$(@D)
	@echo '$$(subst ','\'',$(2) $(WARNINGS) $(3) $$(CRYPT_DEFS) $$(CPPFLAGS) $(4) $$(LDFLAGS) $$(SRC))' >$$@.new
	@cmp -s $$@.new $$@ && rm -f $$@.new || mv -f $$@.new $$@
$(O)/$(1)/almond: $$(SRC:%.c=$(O)/$(1)/%.o)
	$(2) $(WARNINGS) $(3) $(4) $$(LDFLAGS) -o $$@ $$(SRC:%.c=$(O)/$(1)/%.o) $(5) $$(LDLIBS)
endef

$(eval $(call kind,host,$$(CC),$$(CFLAGS),,$$(CRYPT_LIBS)))
$(eval $(call kind,static,$$(MUSLCC),$$(SMALL) $$(SMALL_X86) $$(SMALL_MORE),$$(SMALL_LD),$$(MUSL_CRYPT)))
$(eval $(call kind,armhf,$$(ARMCC),$$(SMALL) -mthumb $$(SMALL_MORE),$$(SMALL_LD),))
$(eval $(call kind,test,$$(CC),-O1 -g $$(TEST_DEFS),,$$(CRYPT_LIBS)))
$(eval $(call kind,crash,$$(MUSLCC),$$(SMALL) $$(SMALL_X86) $$(CRASH_DEFS),$$(SMALL_LD),$$(MUSL_CRYPT)))
$(eval $(call kind,asan,$$(CC),-O1 -g $$(SANITIZE) $$(TEST_DEFS),$$(SANITIZE),$$(CRYPT_LIBS)))
$(eval $(call kind,clang,clang,-O1 -g $$(TEST_DEFS),,$$(CRYPT_LIBS)))
$(eval $(call kind,musl,$$(MUSLCC),-O1 -g $$(TEST_DEFS),-static,$$(MUSL_CRYPT)))

$(O)/almond: $(O)/host/almond
	cp $< $@
$(O)/almond-static: $(O)/static/almond
	cp $< $@
$(O)/almond-armhf: $(O)/armhf/almond
	cp $< $@

static: $(O)/almond-static
static-armhf: $(O)/almond-armhf
test-build: $(O)/test/almond
asan-build: $(O)/asan/almond
clang-build: $(O)/clang/almond
musl-build: $(O)/musl/almond
crash-build: $(O)/crash/almond

# Debian's musl for armhf, unpacked below build/; its compiler is Debian's cross gcc.
ARMCC = arm-linux-gnueabihf-gcc -specs build/musl-armhf/gcc.specs
ARMSPECS = build/musl-armhf/gcc.specs
$(SRC:%.c=$(O)/armhf/%.o): | $(ARMSPECS)
$(ARMSPECS):
	tools/musl-armhf build/musl-armhf

# crypt(3) for musl, which has none in Debian: libxcrypt, from Debian's source package.
ifneq ($(MUSL_CRYPT),)
$(O)/static/almond $(O)/musl/almond: $(MUSL_CRYPT)
$(SRC:%.c=$(O)/static/%.o) $(SRC:%.c=$(O)/musl/%.o): | $(MUSL_CRYPT)
$(O)/static/%.o $(O)/musl/%.o: CRYPT_DEFS += -idirafter build/libxcrypt
$(MUSL_CRYPT):
	MUSLCC='$(MUSLCC)' tools/libxcrypt build/libxcrypt
endif

# ---- trying, proving, weighing ------------------------------------------------------------------------------------------

run:
	tools/deps run
	$(MAKE) all
	tools/run

test:
	tools/deps test
	MAKE='$(MAKE)' PYTHON='$(PYTHON)' tools/test

crash:
	tools/deps test crash
	MAKE='$(MAKE)' PYTHON='$(PYTHON)' tools/test crash

frugal: crash-build test-build
	tools/deps test
	$(PYTHON) test/crash/frugal.py

sizes:
	tools/deps sizes
	MAKE='$(MAKE)' tools/sizes

check-style:
	tools/check-style

install: all
	$(INSTALL) -d $(DESTDIR)$(SBINDIR) $(DESTDIR)$(MANDIR)/man8 $(DESTDIR)$(MANDIR)/man5
	$(INSTALL) -m 755 $(O)/almond $(DESTDIR)$(SBINDIR)/almond
	$(INSTALL) -m 644 doc/almond.8 $(DESTDIR)$(MANDIR)/man8/almond.8
	$(INSTALL) -m 644 doc/almond.users.5 $(DESTDIR)$(MANDIR)/man5/almond.users.5

uninstall:
	rm -f $(DESTDIR)$(SBINDIR)/almond $(DESTDIR)$(MANDIR)/man8/almond.8 $(DESTDIR)$(MANDIR)/man5/almond.users.5

clean:
	rm -rf build

help:
	@sed -n '3,15s/^# \{0,1\}//p' Makefile
	@echo 'Also: frugal static-armhf check-style uninstall clean; test-build crash-build asan-build clang-build musl-build for the tests.'

FORCE:
