/* almond's compile-time choices.  Edit here, or override on the command line: make
 * CPPFLAGS=-DENABLE_APOP=0
 *
 * A switch is 0 or 1 and always defined.  The price of a switch, in bytes of the static x86_64
 * file, stands in brackets behind it; `make sizes` measures it again.  `almond -V` prints what a
 * binary was built with. */
#ifndef CONFIG_H
#define CONFIG_H

/* ---- 1. What you may edit -------------------------------------------------------------------- */

/* Mailbox formats.  Which of them a user has is seen from what lies at SPOOL/user; at least one
 * must be on. */
#ifndef ENABLE_MBOX
#define ENABLE_MBOX 1 /* [14336] */
#endif
#ifndef ENABLE_MAILDIR
#define ENABLE_MAILDIR 1 /* [3965] */
#endif

/* Believe Content-Length in an mbox (mboxcl2 spools) where it leads exactly to the next separator
 * or the end.  Off, because where the delivery agent does not write the field itself, a sender can
 * use it to hide the next mail inside his own. */
#ifndef ENABLE_CONTENT_LENGTH
#define ENABLE_CONTENT_LENGTH 0 /* [368] */
#endif

/* How much a "From " line behind a blank line must look like a separator: 0 = as it is; 1 = it
 * holds a month's name, a time hh:mm and a year; 2 = a weekday's name too, as ctime(3) writes it.
 * 0 splits mail at a paragraph "From here on". */
#ifndef FROM_SHAPE
#define FROM_SHAPE 2
#endif

/* Where accounts come from: a users file (-u), the system's own (-s, through /etc/passwd and
 * /etc/shadow). */
#ifndef ENABLE_USERS
#define ENABLE_USERS 1 /* [7728] */
#endif
#ifndef ENABLE_SYSTEM
#define ENABLE_SYSTEM 1 /* [560] */
#endif

/* Password formats.  SCRAM-SHA-256 and {PLAIN} are always in.  ENABLE_CRYPT hands every other
 * format to the C library's crypt(3) and needs -lcrypt: `make ENABLE_CRYPT=1` sees to both
 * (yescrypt, "$y$", is the default of Debian, Ubuntu, Fedora and Raspberry Pi OS). */
/* $5$ and $6$ */
#ifndef ENABLE_SHA_CRYPT
#define ENABLE_SHA_CRYPT 1 /* [800] */
#endif
/* $1$ (OpenWrt to 23.05) and $apr1$ (htpasswd) */
#ifndef ENABLE_MD5_CRYPT
#define ENABLE_MD5_CRYPT 1 /* [32] */
#endif
#ifndef ENABLE_CRYPT
#define ENABLE_CRYPT 0 /* [77191] */
#endif

/* Protocol.  APOP is announced only where every account has a {PLAIN} secret.  LAST serves old
 * printers.  UTF8 (RFC 6856) adds UTF8 and LANG; with it, octets above 127 in a header are sent as
 * '?' to a client that did not say UTF8. */
#ifndef ENABLE_APOP
#define ENABLE_APOP 1 /* [880] */
#endif
#ifndef ENABLE_LAST
#define ENABLE_LAST 1 /* [48] */
#endif
#ifndef ENABLE_UTF8
#define ENABLE_UTF8 0 /* [416] */
#endif

/* Listen without inetd (and take sockets from systemd). */
#ifndef ENABLE_ALONE
#define ENABLE_ALONE 1 /* [2976] */
#endif

/* Two processes a session, so that the one that reads the network can open no file.  0 saves a
 * process where memory is short: a bug in the protocol's code is then a bug with the user's
 * rights, before the login with root's. */
#ifndef ENABLE_PRIVSEP
#define ENABLE_PRIVSEP 1 /* [2048] */
#endif

/* The tools in the same binary. */
#ifndef ENABLE_PASSWD
#define ENABLE_PASSWD 1 /* [5200] */
#endif
#ifndef ENABLE_DELIVER
#define ENABLE_DELIVER 1 /* [4528] */
#endif
#ifndef ENABLE_CHECK
#define ENABLE_CHECK 1 /* [3908] */
#endif

/* The delivery locks of an mbox and their order: LOCK_FCNTL, LOCK_DOT, LOCK_FLOCK.  Debian's
 * policy is fcntl, then the dot-lock; flock is for dma and OpenBSD's mail.local.  One that cannot
 * be had (a dot-lock in a directory that one may not write, flock on NFS) is left out at run time,
 * as long as another was taken. */
#ifndef LOCK_ORDER
#define LOCK_ORDER LOCK_FCNTL, LOCK_DOT, LOCK_FLOCK
#endif

/* Defaults of -d, -u and -U, and the directory (on tmpfs) that sessions started by root have for
 * their empty root. */
#ifndef SPOOL_DIR
#define SPOOL_DIR "/var/mail"
#endif
#ifndef USERS_FILE
#define USERS_FILE "/etc/almond.users"
#endif
#ifndef SESSION_USER
#define SESSION_USER "almond"   /* then "nobody", where there is no such user */
#endif
#ifndef RUN_DIR
#define RUN_DIR "/run/almond"
#endif

/* Limits.  Time is in milliseconds of the monotonic clock. */
/* from the connection to the login.  RFC 1939 knows 10 minutes only: a deviation that every
 * server makes, since whoever has not said who he is must not hold a place for long */
#ifndef LOGIN_DEADLINE
#define LOGIN_DEADLINE 60000
#endif
/* RFC 1939, section 3: at least 10 minutes */
#ifndef IDLE_TIMEOUT
#define IDLE_TIMEOUT 600000
#endif
/* no octet taken by the client for so long: it is dead */
#ifndef SEND_STALL
#define SEND_STALL 300000
#endif
/* a second login may end a session that was silent for so long */
#ifndef TAKEOVER_IDLE
#define TAKEOVER_IDLE 60000
#endif
/* for a delivery lock; then [IN-USE] */
#ifndef LOCK_WAIT
#define LOCK_WAIT 20000
#endif
/* a dot-lock of no living process that stayed the same for so long, while the kernel's locks
 * were free, is removed; must be below LOCK_WAIT */
#ifndef LOCK_STALE
#define LOCK_STALE 15000
#endif
/* seconds: what a dot-lock that names no process must be old, by the wall clock, to be stale;
 * others (liblockfile) wait for 5 minutes */
#ifndef LOCK_OLD
#define LOCK_OLD 300
#endif
/* a failed login is answered no sooner than this, times the tries so far */
#ifndef FAIL_DELAY
#define FAIL_DELAY 1000
#endif
/* logins tried on one connection */
#ifndef MAX_TRIES
#define MAX_TRIES 3
#endif
/* refused commands, one behind the other; then the line is cut */
#ifndef MAX_ERRORS
#define MAX_ERRORS 20
#endif
/* at a time, when alone; inetd has its own limit */
#ifndef MAX_SESSIONS
#define MAX_SESSIONS 64
#endif
/* of them from one address (IPv6: from one /64); loopback is not counted */
#ifndef MAX_PER_ADDRESS
#define MAX_PER_ADDRESS 16
#endif
/* in a mailbox; a fuller one is refused, not cut.  32 bytes each */
#ifndef MAX_MESSAGES
#define MAX_MESSAGES 1000000
#endif
/* octets of a file that are not on the disk: a sparse terabyte is an attack, or damage */
#ifndef MAX_HOLE
#define MAX_HOLE (16LL << 30)
#endif
/* sockets to listen on (-l) */
#ifndef MAX_LISTEN
#define MAX_LISTEN 8
#endif
/* networks of -n */
#ifndef MAX_NETS
#define MAX_NETS 16
#endif
/* what checking one password shall cost: `almond passwd` tunes the iterations to the host */
#ifndef PASSWD_TIME
#define PASSWD_TIME 100
#endif

/* Buffers, in octets: of them only what was used is resident. */
#ifndef WIRE_IN
#define WIRE_IN 2048
#endif
#ifndef WIRE_OUT
#define WIRE_OUT 32768
#endif
/* given back after each use */
#ifndef SCAN_BUFFER
#define SCAN_BUFFER 65536
#endif

/* ---- 2. What follows: no need to edit below this line ---------------------------------------- */
#define VERSION "0.1.0"
#define ENABLE_TOOLS (ENABLE_PASSWD || ENABLE_DELIVER || ENABLE_CHECK)
#define ENABLE_MD5 (ENABLE_MD5_CRYPT || ENABLE_APOP)
#define MAX_LINE 255            /* RFC 2449, section 4: a command line, its end included */
#define MAX_NAME 64             /* of a user or a mailbox */
#define MAX_SECRET 256          /* what fits into a line, and a NUL */
#define MAX_VERIFIER 512
#define MAX_SEPARATOR 512       /* a "From " line, its end included; longer ones are text */

/* ---- 3. What contradicts --------------------------------------------------------------------- */
#if !ENABLE_MBOX && !ENABLE_MAILDIR
#error "No mailbox format is left: set ENABLE_MBOX or ENABLE_MAILDIR to 1."
#endif
#if !ENABLE_USERS && !ENABLE_SYSTEM
#error "No account could log in: set ENABLE_USERS or ENABLE_SYSTEM to 1."
#endif
#if ENABLE_APOP && !ENABLE_USERS
#error "APOP needs secrets that only a users file holds: set ENABLE_USERS to 1 or ENABLE_APOP to 0."
#endif
#if ENABLE_PASSWD && !ENABLE_USERS
#error "`almond passwd` writes the users file: set ENABLE_USERS to 1 or ENABLE_PASSWD to 0."
#endif
#if ENABLE_CONTENT_LENGTH && !ENABLE_MBOX
#error "Content-Length is a matter of mboxes: set ENABLE_MBOX to 1 or ENABLE_CONTENT_LENGTH to 0."
#endif
#if FROM_SHAPE < 0 || FROM_SHAPE > 2
#error "FROM_SHAPE is 0, 1 or 2."
#endif
#if LOCK_STALE >= LOCK_WAIT
#error "LOCK_STALE must be below LOCK_WAIT, or no stale lock is ever found out."
#endif
#if WIRE_IN < 2 * MAX_LINE || WIRE_OUT < 4096 || SCAN_BUFFER < 4 * MAX_SEPARATOR
#error "A buffer is too small: WIRE_IN 2 lines, WIRE_OUT 4096 octets, SCAN_BUFFER 4 separators."
#endif
#endif
