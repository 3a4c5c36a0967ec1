/* almond.h: the one private header; each function's contract, grouped by the file that holds it.
 *
 * Unless a contract says otherwise: 0 is success and a negative number is -errno; sizes are
 * octets; offsets count from the start of the file; time is milliseconds of the monotonic clock;
 * strings end in NUL; nothing is allocated, and what a pointer gives is valid until the next call
 * to the same function. */
#ifndef ALMOND_H
#define ALMOND_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include "config.h"

#define LEN(a) (sizeof (a) / sizeof *(a))

/* Exit codes: sysexits(3), which mail programs agree on. */
enum { EX_OK_ = 0, EX_USAGE_ = 64, EX_DATA = 65, EX_NOUSER_ = 67, EX_UNAVAIL = 69, EX_BROKEN = 70,
	EX_OS = 71, EX_CANTCREAT_ = 73, EX_TEMP = 75, EX_PERM = 77, EX_CONF = 78 };

/* ---- main.c: options, listening, limits, identity -------------------------------------------- */

/* What the command line chose; written once by main, before any fork. */
struct conf {
	const char *spool;      /* -d */
	const char *users;      /* -u; NULL: no users file */
	bool system;            /* -s */
	const char *session;    /* -U */
	uid_t session_uid;      /* what -U stands for, or our own uid where we are not root */
	gid_t session_gid;
};
extern struct conf conf;

/* Fill what the options left open: accounts (USERS_FILE where it exists, else the system's) and
 * the session user.  0, or an exit code. */
int conf_fill(void);

/* Counters for SIGUSR1, in a page that all processes share; added to with relaxed atomics. */
struct counters { uint32_t logins, failures, retrieved, deleted; };
extern struct counters *counters;

/* Take uid and gid for good, with the spool's group beside them where that group may write to the
 * spool (dot-locks). Does nothing and returns 0 where we are that user already.  -EPERM: not root,
 * or uid would be 0. */
int become(uid_t uid, gid_t gid);

/* The empty directory that root's sessions have for a root: made where it is missing.  False: it
 * cannot be had. */
bool make_empty_root(void);
/* What a session's process does before it hears the client: an empty root and conf's session user,
 * where we are root.  Exits where that fails. */
void become_session(void);

/* May a password cross in clear from the peer of descriptor fd?  True on loopback, a local socket,
 * no socket at all, and on the networks of -n.  *addr (of at least 48 octets) gets the peer's
 * address as text, "local" where it has none. */
bool peer_trusted(int fd, char *addr);

/* ---- text.c: text and time without stdio ----------------------------------------------------- */

/* printf's small sister: %s %c %d %u %x, with l, ll or z before d, u and x, and %%.  No width, no
 * precision.  Writes at most room octets, NUL included, and always a NUL; returns the length
 * written, cut or not.  room is at least 1. */
size_t fmt(char *to, size_t room, const char *format, ...) __attribute__((format(printf, 3, 4)));
size_t vfmt(char *to, size_t room, const char *format, va_list ap)
	__attribute__((format(printf, 3, 0)));

/* The whole of s as a decimal number of 0 to max: 0, and *n is set; -1 for anything else (empty,
 * sign, blank, text behind it, too large).  Leading zeros are taken. */
int number(const char *s, uint64_t max, uint64_t *n);

/* s made fit for a log line: octets outside 0x21 to 0x7E, '\\' and '=' become \xHH.  At most room
 * octets with the NUL. */
const char *escape(char *to, size_t room, const char *s, size_t n);

/* The first c in s, or NULL; strchr's, strrchr's and strcasecmp's cheaper cousins. */
char *find(const char *s, char c);
char *find_last(const char *s, char c);
int hex_digit(char c);                          /* 0 to 15, or -1 */
bool same_word(const char *a, const char *b);   /* equal but for the case of letters */

/* fork without libc's bookkeeping for threads, of which there are none. */
pid_t branch(void);
int control(int fd, int command, long argument);        /* fcntl(2) */
/* openat(2), never a controlling terminal; a descriptor or -errno */
int open_at(int dir, const char *path, int flags);
/* the same for a directory; no link, unless dir is AT_FDCWD */
int open_dir(int dir, const char *path);

int stat_at(int dir, const char *path, struct stat *, int flags);       /* fstatat(2) */
int stat_fd(int fd, struct stat *);                                     /* fstat(2) */
int open_socket(int domain, int type);                                  /* socket(2) */
int channel_pair(int pair[2]);          /* two ends of a line between processes; socketpair(2) */

/* Block the signals of a set that ends in 0, and get a descriptor that is readable when one came:
 * no handlers, so nothing is interrupted.  signal_next: the next that came, or 0. */
int signal_open(const int *signals);
int signal_next(int fd);

/* What is wrong with a name of a user or mailbox, as a reason for people; NULL where it can be a
 * file's name: 1 to MAX_NAME octets, no '/', ':' or control octet, no leading dot, no ".lock"
 * behind. */
const char *name_fault(const char *name);

/* Lines of a small text file.  Over-long lines (more than a buffer) and lines with a NUL come out
 * empty, so that counting goes on.  text_next: the next line without its end (LF or CRLF),
 * borrowed until the next call; NULL at the end. */
struct lines { int fd; size_t at, len; unsigned number; char buffer[2048]; };
char *text_next(struct lines *);

/* Log one line at a syslog level (3 error to 6 info) to where log_open pointed.  Never fails,
 * and waits for nothing but a full standard error.  User octets go through escape() first;
 * passwords never come here. */
void log_open(bool to_stderr);
bool log_open_stderr(void);     /* does the log go to descriptor 2? */
void log_line(int level, const char *format, ...) __attribute__((format(printf, 2, 3)));
enum { L_ERROR = 3, L_WARN = 4, L_NOTE = 5, L_INFO = 6 };
/* errno as words, for the few that an administrator meets; err may be negative */
const char *reason(int err);

uint64_t now(void);             /* CLOCK_MONOTONIC, ms */
/* CLOCK_REALTIME, ms; for dates in text only, never for a decision that must be right */
uint64_t wall_clock(void);
void nap(unsigned ms);
void wipe(void *, size_t);      /* zeros that the compiler does not take away */
int random_bytes(void *, size_t);

/* Write all n octets of p to descriptor fd, through short writes and EINTR. */
int write_all(int fd, const void *p, size_t n);
int write_at(int fd, const void *p, size_t n, uint64_t at);     /* the same at an offset */
/* fsync; a directory of a file system that knows no sync for those is no error */
int sync_fd(int fd);
/* n octets from an offset on, less only where the file ends; or -errno */
ssize_t read_at(int fd, void *p, size_t n, uint64_t at);

/* An invariant: if it does not hold, one log line, and exit 70 at once. */
void broken(const char *file, int line) __attribute__((noreturn));
#define must(x) ((x) ? (void)0 : broken(__FILE__, __LINE__))

/* ---- hash.c: digests ------------------------------------------------------------------------- */

enum hash_kind { SHA256, SHA512, MD5 };
enum { SHA256_SIZE = 32, SHA512_SIZE = 64, MD5_SIZE = 16 };
struct hash {
	enum hash_kind kind;
	uint64_t count;         /* octets so far, below 2^61 */
	union { uint32_t w[8]; uint64_t d[8]; } state;
	uint8_t block[128];
};
void hash_init(struct hash *, enum hash_kind);
void hash_add(struct hash *, const void *, size_t);
/* FIPS 180-4, RFC 1321; returns the digest's size and wipes the state */
size_t hash_end(struct hash *, uint8_t *out);

/* HMAC-SHA-256 (RFC 2104) and PBKDF2 with it (RFC 8018), 32 octets out; key and salt of any
 * length; rounds at least 1. */
void hmac_sha256(const void *key, size_t nk, const void *text, size_t n, uint8_t out[SHA256_SIZE]);
void pbkdf2_sha256(const void *secret, size_t n, const void *salt, size_t ns, uint32_t rounds,
	uint8_t out[SHA256_SIZE]);

/* Base64 with padding (RFC 4648, section 4).  encode: to holds 4 * ((n + 2) / 3) + 1 octets.
 * decode: n octets of s, strict (no blanks, padding where it belongs, unused bits zero); the count
 * of octets, or -1 if wrong or more than room. */
void base64_encode(char *to, const void *p, size_t n);
ssize_t base64_decode(void *to, size_t room, const char *s, size_t n);

/* Equal octets?  In a time that depends on n alone. */
bool same(const void *, const void *, size_t n);

/* A fast checksum, not a cryptographic one: of octets in any split.  sum_end may be called on a
 * copy at any point. */
struct sum { uint64_t h, word; uint64_t count; };
void sum_init(struct sum *);
void sum_add(struct sum *, const void *, size_t);
uint64_t sum_end(const struct sum *);

/* ---- verify.c: what a stored password looks like --------------------------------------------- */

/* Does the secret of n octets (no NUL among them) fit the verifier?  1 yes, 0 no, -1 a format that
 * is not built in or is malformed: never guessed.  A verifier of crypt's kind ends at its first
 * ':' (the rest of a shadow line may follow). */
int verify(const char *verifier, const char *secret, size_t n);

/* The format's name for a log line: "SCRAM-SHA-256", "{PLAIN}", "$6$", "locked" or "unknown";
 * borrowed, no secret in it. */
const char *verify_scheme(const char *verifier);

/* What verify would cost, as a number that only compares: 0 for a format that is not built in, 1
 * for {PLAIN}. */
uint64_t verify_cost(const char *verifier);

/* A new verifier into to: SCRAM-SHA-256$rounds:salt$StoredKey:ServerKey (RFC 5803), with a random
 * salt of 16 octets. */
int verify_make(char to[MAX_VERIFIER], const char *secret, size_t n, uint32_t rounds);
/* rounds (4,096 to 4,000,000) that take about ms on this host */
uint32_t verify_rounds(unsigned ms);

/* ---- auth.c: who may log in ------------------------------------------------------------------ */

struct account {
	char name[MAX_NAME + 1], box[MAX_NAME + 1];
	uid_t uid;              /* whose rights the session's monitor takes */
	gid_t gid;
};

/* Check a name and its secret against the users file, then the system's accounts, as conf says.
 * 0: *who is filled in; -EACCES: unknown, wrong or refused, after equal work; another: the files
 * could not be read.  Logs the cause, except that of a wrong password.  Called with the rights to
 * read them. */
int auth_password(const char *name, const char *secret, size_t n, struct account *who);
/* The same for APOP (RFC 1939, section 7): digest is MD5 of stamp, '<' and '>' included, and the
 * secret. */
int auth_apop(const char *name, const char *stamp, const uint8_t digest[MD5_SIZE],
	struct account *who);
/* every account that there is has a {PLAIN} secret, and there is one */
bool auth_apop_for_all(void);

/* One line of the users file, taken apart in place: 1 an account, 0 a comment or blank line, -1
 * malformed (*fault is set). */
struct user { char *name, *box, *verifier; const char *fault; };
int users_parse(char *line, struct user *);
/* Look all of it over: logs each fault with its line; the number of accounts, or -errno, and
 * *faults counts the rest. */
int users_check(const char *path, unsigned *faults);

/* Whose rights serve the mailbox `box` of a users file's account: the mailbox's owner, else the
 * spool's, else conf's session user for a mailbox that is not there.  -EPERM: only root is left. */
int auth_owner(struct account *who);
/* name's line in /etc/passwd.  -ENOENT: there is none. */
int system_account(const char *name, struct account *who);

/* ---- lock.c: the delivery locks of an mbox, and the one of a session ------------------------- */

enum { LOCK_FCNTL = 1, LOCK_DOT = 2, LOCK_FLOCK = 4 };   /* LOCK_ORDER's words */

struct lock {
	int dir, fd, dot;               /* dot: the dot-lock, -1 for none */
	const char *box;                /* the caller's */
	bool held;
	off_t end;                      /* of the dot-lock's last octet */
	uint64_t touched;
	char file[MAX_NAME + 6];
};

/* Take all delivery locks of LOCK_ORDER for the mailbox `box` in directory dir; fd is a descriptor
 * of it open for writing, which the caller keeps open as long as it holds them.  Waits up to
 * LOCK_WAIT, and mends what a crash left.  -EBUSY: another program holds one; -ESTALE: fd is not
 * the mailbox any more. */
int lock_take(struct lock *, int dir, const char *box, int fd);
void lock_touch(struct lock *); /* during long work, often: keeps the dot-lock young */
void lock_drop(struct lock *);
/* What is known of the process that the dot-lock `file` names. */
enum { OWNER_DEAD, OWNER_LIVES, OWNER_UNKNOWN };
int lock_owner(int dir, const char *file);
/* The mailbox's state while no one delivers to it, with no write anywhere: fd may be read-only.
 * -ESTALE: something is to be mended first. */
int lock_snapshot(int dir, const char *box, int fd, struct stat *);

/* The session lock of a mailbox: at most one session.  `idle` says how long the holder's client
 * has been silent; a holder that is asked and has been silent for TAKEOVER_IDLE gives way.
 * Returns a descriptor to poll for reading (then call session_asked), -EBUSY, or -errno.  A lock
 * that cannot be had for reasons other than a session is logged, and -ENOLCK: go on without. */
int session_lock(const struct stat *spool, const char *box, uid_t uid);
/* Answer who asks.  True: the lock is given away and closed; end now, and commit nothing. */
bool session_asked(int lock, uid_t uid, uint64_t silent);

/* ---- store.c: what the stores share ---------------------------------------------------------- */

/* A mailbox is a numbered snapshot.  32 octets a message. */
struct msg {
	/* mbox: first stored octet, after the separator line; Maildir: the monitor's number of
	 * it */
	uint64_t at;
	uint64_t stored;        /* octets in the store */
	uint64_t sum;           /* mbox: checksum of separator line and header */
	/* what RETR sends more than is stored, stuffing not counted (below 4 GiB) */
	uint32_t extra;
	uint16_t lead;          /* mbox: octets of the separator line */
	uint16_t flags;
};
enum {
	DELETED = 1,            /* by DELE */
	VANISHED = 2,           /* another program removed it */
	OPEN_END = 4            /* no last newline is stored; one is sent, and counted in extra */
};

struct box {
	const struct store *store;
	struct msg *msg;        /* one growing map; index 0 is message 1 */
	uint32_t count, room;
	/* mbox: the mailbox; Maildir: the message that was fetched last, or -1 */
	int fd;
	uint32_t fetched;       /* Maildir: which, count for none */
	uint64_t size;          /* mbox: where the snapshot ends */
	struct stat seen;       /* mbox: what the last look saw */
	struct uid *uid;        /* when asked for */
};

/* an extent, its separator included; or a Maildir's number in `at` */
struct gone { uint64_t at, size, sum; };

/* A store, as the session sees it.  Each returns -errno; -EAGAIN: another program changed the mail
 * under us; -ENOENT: the message is gone. */
struct store {
	bool extents;           /* messages lie in one file, at msg.at */
	int (*index)(struct box *);
	/* Get ready to read message i, and see that it is the one that was indexed; also before
	 * each final dot. */
	int (*look)(struct box *, uint32_t i);
	/* What must go so that message i is deleted, for the monitor. */
	void (*gone)(const struct box *, uint32_t i, struct gone *);
};
extern const struct store mbox_store, maildir_store;

static inline uint64_t wire_size(const struct msg *m) { return m->stored + m->extra; }

/* one more message, zeroed; NULL: no memory, or MAX_MESSAGES reached */
struct msg *box_add(struct box *);
/* Octets [at, at + n) of message i, which box->store->look was called for; less only at its end. */
ssize_t box_read(struct box *, uint32_t i, uint64_t at, void *, size_t n);

/* A file's octets [at, end) piece by piece: a piece is a line with its end, or, of a line longer
 * than the buffer, a part, which never ends in CR.  A piece that begins a line holds MAX_SEPARATOR
 * octets of it or all. piece_open maps the buffer, piece_close gives it back; piece_from may be
 * called any number of times between. piece_next: 1 and p, n, bol, eol are set (p is borrowed
 * until the next call); 0 at the end; -EAGAIN if the file is shorter than `end`; or -errno. */
struct pieces {
	int fd;
	uint64_t at, end;       /* the file's part that is not yet in the buffer */
	char *p;
	size_t n;
	bool bol, eol;          /* the piece begins a line; it ends one, with LF */
	char *buffer;
	size_t from, to;
	/* octets read at a time; piece_open sets SCAN_BUFFER, a smaller one suits headers */
	size_t step;
};
int piece_open(struct pieces *);
void piece_from(struct pieces *, int fd, uint64_t at, uint64_t end);
int piece_next(struct pieces *);
void piece_close(struct pieces *);
bool piece_bare(const struct pieces *);         /* it ends in an LF that has no CR in front */
bool piece_blank(const struct pieces *);        /* a line of nothing but its end, LF or CRLF */
/* does a header line begin with "name:", in any case? */
bool field_is(const char *p, size_t n, const char *name);

/* Octets of message i up to and with `lines` lines of its body (RFC 1939, TOP); *open says that
 * the last line sent has no end. box->store->look was called. */
int box_top(struct box *, uint32_t i, uint64_t lines, uint64_t *stored, bool *open);

/* The entries of a directory but those with a leading dot: fd is set and the rest zero before the
 * first call; NULL at the end, or with len below 0 where it cannot be read.  type is the kernel's:
 * 8 a file, 0 unknown. */
struct listing { int fd; unsigned char type; long at, len; _Alignas(8) char buffer[4096]; };
const char *next_name(struct listing *);

/* Sort n numbers by order(context, a, b) < 0. */
void sort_numbers(uint32_t *, uint32_t n, int (*order)(const void *, uint32_t, uint32_t),
	const void *context);
void *map(size_t);              /* zeroed pages, NULL if there are none */
/* *p_ is the map's address, and may change */
bool map_grow(void *p_, size_t old, size_t size);

/* A unique-id, at most UID_SIZE octets with the NUL, of message i: DESIGN: made of header and body
 * alone, so the same in both formats, after a restart and on another host.  The first call reads
 * the whole mailbox. */
enum { UID_SIZE = 36 };
int box_uid(struct box *, uint32_t i, char to[UID_SIZE]);

/* ---- mbox.c ---------------------------------------------------------------------------------- */

/* Is this line, of n octets, a separator's ("From addr date")?  Its place (first, or behind a
 * blank line) is the caller's. */
bool mbox_separator(const char *p, size_t n);
/* Does a message with this checksum begin at g->at and end, by the next separator or the
 * snapshot's end `size`, at g->at + g->size?  0, -EAGAIN or -errno.  The pieces are open, and free
 * for use. */
int mbox_fits(struct pieces *, int fd, const struct gone *g, uint64_t size);

/* The monitor's side of a mailbox, of either kind. */
struct vault {
	int spool;              /* the spool directory */
	char box[MAX_NAME + 1];
	bool maildir;
	/* the mbox or the Maildir, open for reading; -1: no mailbox, which is an empty one */
	int fd;
	struct stat seen;       /* mbox: the snapshot */
	uint32_t count;         /* Maildir: messages */
};
/* Open for reading, not following a link, not waiting for a FIFO's other end, leaving the access
 * time as it is where we own the file.  A descriptor, or -errno. */
int open_quiet(int dir, const char *path);
bool hollow(const struct stat *);       /* more than MAX_HOLE of the file is not on the disk */
/* Look at SPOOL/box and take the snapshot; symbolic links, hard links, foreign owners and what is
 * neither file nor Maildir are refused with -EPERM and a log line.  No mailbox is success, and
 * empty. */
int vault_open(struct vault *);
/* Remove the extents, ascending and disjoint, from the mailbox, as journal_take_out does.  Mail
 * behind the snapshot stays.  With n = 0 it only mends what a crash left. */
int mbox_commit(struct vault *, struct gone *, size_t n);

/* ---- journal.c: a change of an mbox that survives a crash ------------------------------------ */

/* Make SPOOL/.almond, where it is missing and we are root or the spool's owner.  False: it is not
 * there, or not root's or ours.  A mailbox whose owner cannot make a directory in it loses nothing,
 * but nothing can be deleted from its middle. */
bool journal_prepare(int spool);
/* Give what fd is open on the spool's group and `mode`, where that group may write to the spool;
 * else the mode `otherwise`. */
int give_group(int fd, const struct stat *spool, unsigned mode, unsigned otherwise);
/* Is there something to mend?  Two calls of stat, where there is nothing. */
bool journal_waits(int spool, const char *box);
/* Mend it, under the locks: the mailbox is whole afterwards, old or new; or -errno, and nothing may
 * be made of the mailbox until it can be mended. */
int journal_mend(struct lock *);
/* Take the extents, ascending and disjoint, out of the mailbox of `size` octets, under the locks.
 * On an error it is as it was, or journal_mend is what makes it so; but where there is no room for
 * a journal, messages at the end that were to go may be gone.  Writes nothing in front of g->at;
 * behind it at most twice, and a head; where nothing that stays lies behind g->at, a note of 80
 * octets, and not even that where g->at is 0 or there is no room.  g is used up. */
int journal_take_out(struct lock *, struct gone *g, size_t n, uint64_t size);
/* Leave a note: the mailbox's octets [at, end) are void unless `first`, the first of them, are all
 * there (or others than `last` stand at the end).  So who appends writes these last, when the
 * others are synced.  A descriptor, which the caller cuts to 0 when he is done; or -errno, -EPERM
 * where no such note can be left at all. */
enum { MARK = 16 };
int journal_intend(struct lock *, uint64_t at, uint64_t end, const char first[MARK],
	const char last[MARK]);

/* ---- maildir.c ------------------------------------------------------------------------------- */

/* The monitor's side; the names of the messages stay with it.  v->fd is the Maildir. */
/* -ENOTDIR: no Maildir, since cur or new is missing */
int maildir_snapshot(struct vault *);
/* a descriptor of a message, read-only; -ENOENT: it vanished */
int maildir_fetch(struct vault *, uint32_t number);
int maildir_commit(struct vault *, const struct gone *, size_t n);

/* ---- wire.c: a line in, one buffer out, one sticky error ------------------------------------- */

struct wire {
	int in, out;            /* descriptors of the client */
	/* readable when woken() must be called, -1: none; it says whether the session must end */
	int watch;
	bool (*woken)(void);
	int err;                /* sticky: -errno; all output is dropped from then on */
	uint64_t deadline;      /* for the next line, absolute; set by the caller */
	volatile uint32_t *pulse;       /* seconds: when the client was last heard of */
	size_t in_at, in_len, out_len;
	uint64_t sent;          /* octets */
	char last;              /* the octet of a message's text that was put last */
	char *tail;             /* what wire_room gave */
	char in_buffer[WIRE_IN], out_buffer[WIRE_OUT];
};
enum { LINE_LONG = -1, LINE_NUL = -2, LINE_GONE = -3 };

/* One line from the client without its end (LF or CRLF), NUL behind it; borrowed until the next
 * call, and the caller may write to it.  Its length, or LINE_LONG (more than MAX_LINE with its
 * end) and LINE_NUL, both consumed whole, or LINE_GONE: the client went, or the deadline passed
 * (err is -ETIMEDOUT), or the watch hung up.  Flushes before it waits. */
int wire_line(struct wire *, char **line);

void wire_put(struct wire *, const void *, size_t);
/* a line; adds CRLF */
void wire_say(struct wire *, const char *format, ...) __attribute__((format(printf, 2, 3)));
void wire_flush(struct wire *);
/* wipe what in_buffer no longer needs: a password was in it */
void wire_forget(struct wire *);

/* Room for message octets in the back of out_buffer: at least 1024, flushing where needed; *n gets
 * how many may be put there. */
char *wire_room(struct wire *, size_t *n);
/* Expand the n octets that were put there, from its start, into wire form: LF becomes CRLF, a dot
 * that starts a line is doubled.  No octet becomes more than two and 2n + 8 fit, so the writer
 * never passes the reader. */
void wire_stuff(struct wire *, size_t n);
void wire_begin(struct wire *);         /* a message's text starts */
/* it ends: a missing line end is added, then the final dot */
void wire_end(struct wire *, bool open_end);

/* ---- monitor.c: questions between the session and its monitor -------------------------------- */

/* What the two share: written by the session, read by the monitor for its log line and for the
 * takeover; nothing else. */
struct page {
	volatile uint32_t pulse;        /* seconds of the monotonic clock */
	uint32_t why;                   /* enum why */
	uint32_t retr, top, dele, left;
	uint64_t bytes;
};
enum why { WHY_LOST, WHY_QUIT, WHY_IDLE, WHY_ERRORS, WHY_STORE, WHY_TAKEN, WHY_STOP, WHY_COUNT };
enum note { NOTE_NAME, NOTE_CLEAR, NOTE_CHANGED, NOTE_READ, NOTE_FULL, NOTE_COUNT };

/* Facts for the greeting and CAPA.  stamp: APOP's, empty where it is not offered; clear: a
 * password may cross. */
struct hello { char host[65]; char stamp[96]; bool clear; };

/* The session's questions, each -errno. */
int ask_hello(struct hello *);
/* -EACCES: no; -EBUSY: no, and [IN-USE] */
int ask_pass(const char *name, const char *secret, size_t n);
int ask_apop(const char *name, const uint8_t digest[MD5_SIZE]);
/* store, fd, size, seen, and for a Maildir count messages with their numbers */
int ask_open(struct box *);
int ask_fetch(uint32_t number);         /* a descriptor */
/* remove what is DELETED; then, or if there is nothing, free the session lock */
int ask_commit(struct box *);
void ask_note(enum note, uint32_t number, int err);     /* one log line */

/* Serve the client on descriptors in and out, and return the exit code: the process becomes the
 * monitor and forks the session. */
int monitor(int in, int out);
extern struct page *page;

/* ---- pop3.c: the protocol -------------------------------------------------------------------- */

/* One session, from the greeting to its end. */
void pop3(struct wire *);

/* ---- tools.c: what main and passwd.c, deliver.c, check.c share ------------------------------- */

/* argv[0] is the tool's name.  The exit code; -1: no such tool. */
int tool(int argc, char **argv);
/* Options that main and the tools share: the next one of argv, or -1 when they end; '?' for one
 * not in `known` (letters, a ':' behind one that takes a value, which *value gets; for '?' it gets
 * the argument).  *at starts at 1 and ends at the first operand. */
int option(int argc, char **argv, int *at, const char *known, char **value);
/* to standard output */
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Log what makes the configuration unfit, and warn of what makes it unwise (a spool on tmpfs);
 * prepare: make what almond keeps in the spool.  0, or an exit code. */
int check_conf(bool prepare);

/* A tool's options and its one operand, in any order. */
struct wish { uint32_t flags; char *operand, *value[32]; };
enum { LETTER = 31 };           /* c & LETTER: an option's bit in flags and place in value */
static inline bool has_flag(const struct wish *w, char c) { return w->flags >> (c & LETTER) & 1; }

/* The exit code; after EX_USAGE_ the tool's help is printed. */
int tool_passwd(const struct wish *);
int tool_deliver(const struct wish *);
int tool_check(const struct wish *);

/* conf, as -d, -u and -s say, and else as main fills it */
void tool_conf(const struct wish *);
/* say that it failed, why, and what to do; the exit code that fits */
int complain(int err, const char *what);
int slurp(int fd, char **p, size_t *n);                 /* the rest of descriptor fd, in a map */
const char *next_line(const char *p, const char *end);  /* behind the line that begins at p */
/* name's line in the users file that fd is open on: 1 and *u points into *l; 0: there is none. */
int users_find(int fd, const char *name, struct lines *l, struct user *u);
/* what a spool on fd's file system means; NULL: nothing */
const char *fs_warning(int fd);
#endif
