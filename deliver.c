/* deliver.c: owns `almond deliver`: one message from standard input goes into a mailbox, whole or
 * not at all.  Runs as the mailbox's owner: root's rights are given up before a message or a
 * mailbox is looked at. */
#include "almond.h"

#if ENABLE_DELIVER
#include <signal.h>
#include <stdio.h>              /* renameat alone */
#include <sys/utsname.h>

/* fsync after each so many octets of a long message: then the dot-lock is touched often enough on
 * slow flash too. */
enum { PIECE = 1 << 20, MAX_SENDER = 320 };

enum { REFUSED = -EXDEV };      /* the mailbox is not safe to write; said already */

struct mail {
	const char *p, *end;            /* the message, its From_ line not in it */
	const char *line;               /* that line, or NULL; it ends at p */
	uint32_t when;                  /* seconds, for a line of ours */
	char sender[MAX_SENDER];
};

/* ---- the message ---- */

/* An address as one word, or MAILER-DAEMON. */
static void set_sender(struct mail *m, const char *p, size_t n)
{
	size_t k = 0;

	for (; n-- && k < sizeof m->sender - 1; p++)
		if ((unsigned char)*p > ' ' && *p != 0x7F && *p != '<' && *p != '>')
			m->sender[k++] = *p;
	m->sender[k] = 0;
	if (!k)
		fmt(m->sender, sizeof m->sender, "MAILER-DAEMON");
}

static int read_mail(struct mail *m, const char *sender)
{
	const char *p, *next;
	size_t n;
	char *text;
	int err = slurp(0, &text, &n);

	if (err)
		return complain(err, "standard input");
	m->p = text;
	m->end = text + n;
	next = next_line(m->p, m->end);
	if (ENABLE_MBOX && n && mbox_separator(m->p, (size_t)(next - m->p))) {
		m->line = m->p;
		m->p = next;
	}
	if (m->p == m->end) {
		log_line(L_ERROR, "no message on standard input");
		return EX_DATA;
	}
	set_sender(m, sender, sender ? strlen(sender) : 0);
	for (p = m->p; !sender && p < m->end && *p != '\n' && *p != '\r'; p = next) {
		next = next_line(p, m->end);
		if (field_is(p, (size_t)(next - p), "Return-Path")) {
			set_sender(m, p + 12, (size_t)(next - p) - 12);
			break;
		}
	}
	return 0;
}

/* ---- writing ---- */

/* The first octets are collected, not written: they come last.  `start` lies so far in front of a
 * Maildir's file that it has none. */
struct out {
	int fd, err;
	off_t start, at;
	bool dry;                       /* count, and write nothing */
	struct lock *lock;
	char first[MARK], last[MARK];   /* last: only of a dry run */
};

static void sync_out(struct out *o)
{
	if (!o->err)
		o->err = sync_fd(o->fd);
}

static void put(struct out *o, const char *p, size_t n)
{
	size_t k = n < MARK ? n : MARK;

	if (o->dry) {
		memmove(o->last, o->last + k, MARK - k);
		memcpy(o->last + MARK - k, p + n - k, k);
	}
	for (; n && o->at - o->start < MARK; n--)
		o->first[o->at++ - o->start] = *p++;
	for (; n && !o->err; n -= k, p += k, o->at += (off_t)k) {
		k = n < PIECE || o->dry ? n : PIECE;
		if (o->dry)
			continue;
		o->err = write_at(o->fd, p, k, (uint64_t)o->at);
		if (k == PIECE)
			sync_out(o);
		if (ENABLE_MBOX && o->lock)
			lock_touch(o->lock);
	}
}

static int refuse(const char *box, const char *what)
{
	log_line(L_ERROR, "mailbox %s is %s: not delivered; remove or chown it", box, what);
	return REFUSED;
}

/* ---- an mbox ---- */

/* ctime(3)'s form, in UTC and without the C library's time zones.  Days become years by counting
 * them off in 400s, from the first of March 0000, so that a leap day is a year's last. */
static void put_separator(struct out *o, const struct mail *m)
{
	static const char days[] = "Thu\0Fri\0Sat\0Sun\0Mon\0Tue\0Wed", months[] =
	    "Mar\0Apr\0May\0Jun\0Jul\0Aug\0Sep\0Oct\0Nov\0Dec\0Jan\0Feb";
	uint32_t s = m->when, z = s / 86400, day, year, month;
	static const uint8_t radix[] = { 10, 10, 1, 6, 10, 1, 6, 10 };
	char line[MAX_SEPARATOR], clock[] = "00:00:00";
	size_t i = sizeof radix;

	day = (z + 719468) % 146097;
	year = (day - day / 1460 + day / 36524 - day / 146096) / 365;
	day -= 365 * year + year / 4 - year / 100;
	month = (5 * day + 2) / 153;
	day -= (153 * month + 2) / 5;
	year += (z + 719468) / 146097 * 400 + (month > 9);
	for (s %= 86400; i--; s /= radix[i])
		clock[i] = (char)(clock[i] | (char)(s % radix[i]));
	put(o, line, fmt(line, sizeof line, "From %s %s %s %s%u %s %u\n", m->sender,
	    days + z % 7 * 4, months + month * 4, day < 9 ? " " : "", day + 1, clock, year));
}

/* A separator counts behind a blank line only: add what the mailbox's end lacks of one. */
static void put_gap(struct out *o)
{
	char t[3];
	ssize_t n = read_at(o->fd, t, o->at < 3 ? (size_t)o->at : 3, o->at < 3 ? 0 :
	    (uint64_t)o->at - 3);

	if (n < 0)
		o->err = (int)n;
	if (n <= 0)
		return;
	if (t[n - 1] != '\n') {
		put(o, "\n\n", 2);
		return;
	}
	n--;
	if (n && t[n - 1] == '\r')
		n--;
	if (n && t[n - 1] != '\n')
		put(o, t[n] == '\r' ? "\r\n" : "\n", t[n] == '\r' ? 2 : 1);
}

/* Is it "From " behind any number of '>'?  mboxrd: it gets one more. */
static bool must_quote(const char *p, const char *end)
{
	while (p < end && *p == '>')
		p++;
	return end - p >= 5 && !memcmp(p, "From ", 5);
}

/* Invariant: what stands before `from` is written, and no line between it and p needs a quote. */
static void put_text(struct out *o, const struct mail *m)
{
	const char *p, *from = m->p, *next = m->p;
	bool crlf = false;

	for (p = m->p; p < m->end; p = next) {
		next = next_line(p, m->end);
		if (must_quote(p, next)) {
			put(o, from, (size_t)(p - from));
			put(o, ">", 1);
			from = p;
		}
		crlf = next - p > 1 ? next[-2] == '\r' : crlf;
	}
	put(o, from, (size_t)(m->end - from));
	if (m->end[-1] != '\n')
		put(o, "\n", 1);
	put(o, &"\r\n"[!crlf], crlf ? 2 : 1);
}

static void put_mail(struct out *o, const struct mail *m)
{
	o->at = o->start;
	put_gap(o);
	if (m->line)
		put(o, m->line, (size_t)(m->p - m->line));
	else
		put_separator(o, m);
	put_text(o, m);
}

/* Under the lock.  The first octets, which make a message of the others, come when these are safe;
 * what a crash leaves without them, the next who locks takes away.  Where no note of that can be
 * left (a spool that lets its users make nothing) all is written in its order, as others do; it is
 * taken back on an error. */
static int append(int fd, struct lock *lock, const struct mail *m, off_t size)
{
	struct out o = { .fd = fd, .start = size, .dry = true, .lock = lock };
	off_t end;
	size_t k;
	int note;

	put_mail(&o, m);
	end = o.at;
	note = o.err ? o.err :
	    journal_intend(lock, (uint64_t)size, (uint64_t)end, o.first, o.last);
	if (note < 0 && note != -EPERM)
		return note;
	o.dry = false;
	k = end - size < MARK ? (size_t)(end - size) : MARK;
	o.err = note < 0 ? write_at(fd, o.first, k, (uint64_t)size) :
	    ftruncate(fd, end) < 0 ? -errno : 0;
	if (!o.err)
		put_mail(&o, m);
	sync_out(&o);
	if (!o.err)
		o.err = write_at(fd, o.first, k, (uint64_t)size);
	sync_out(&o);
	if (o.err && (ftruncate(fd, size) < 0 || fsync(fd) < 0))
		log_line(L_ERROR, "part of a message stays behind: %s", reason(errno));
	else if (note >= 0 && ftruncate(note, 0) == 0)
		close(note);
	return o.err;
}

/* A new mailbox is its owner's alone, and the spool's group's where that may write to the spool
 * (Debian's 660, group mail).  Until its name is safe it may be executed, so that who finds it sees
 * what is left to do. */
static int create(int spool, const char *box)
{
	int fd = openat(spool, box, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0700);

	return fd < 0 ? -errno : fd;
}

static int created(int spool, int fd)
{
	int err = sync_fd(spool);
	struct stat st;

	if (err || stat_fd(spool, &st) < 0)
		return err ? err : -errno;
	return give_group(fd, &st, 0660, 0600);
}

static const char *unsafe(const struct stat *st)
{
	return !S_ISREG(st->st_mode) ? "no plain file" :
	    st->st_nlink != 1 ? "a file with a second name" :
	    st->st_uid != geteuid() ? "another user's" : NULL;
}

/* One try.  -ESTALE: another program put another file in its place while we waited for the lock. */
static int try_mbox(int spool, const char *box, const struct mail *m)
{
	int fd = open_at(spool, box, O_RDWR | O_NOFOLLOW | O_NONBLOCK), err;
	const char *fault;
	struct stat st;
	struct lock lock;

	if (fd == -ENOENT)
		fd = create(spool, box);
	if (fd < 0)
		return fd == -EEXIST ? -ESTALE : fd == -ELOOP ? refuse(box, "a symbolic link") : fd;
	err = stat_fd(fd, &st) < 0 ? -errno : 0;
	fault = err ? NULL : unsafe(&st);
	if (fault)
		err = refuse(box, fault);
	if (!err && st.st_mode & S_IXUSR)
		err = st.st_size ? sync_fd(spool) : created(spool, fd);
	if (!err) {
		err = lock_take(&lock, spool, box, fd);
		if (!err && stat_fd(fd, &st) < 0)
			err = -errno;
		if (!err)
			err = append(fd, &lock, m, st.st_size);
		lock_drop(&lock);
	}
	close(fd);
	return err;
}

static int to_mbox(int spool, const char *box, const struct mail *m)
{
	int tries = 10, err;

	do
		err = try_mbox(spool, box, m);
	while (err == -ESTALE && --tries);
	return err;
}

/* ---- a Maildir ---- */

/* Seconds first, which are the order of delivery; the rest is unlike every other name, whatever the
 * clock says. */
static void name_it(char *to, size_t room)
{
	uint64_t t = wall_clock(), r = 0;
	struct utsname u;
	char *p;

	if (uname(&u) < 0)
		*u.nodename = 0;
	for (p = u.nodename; *p; p++)
		if (*p == '/' || *p == ':')
			*p = '_';
	random_bytes(&r, sizeof r);
	fmt(to, room, "%llu.M%u000P%dR%llx.%s", (unsigned long long)(t / 1000),
	    (unsigned)(t % 1000), (int)getpid(), (unsigned long long)r, u.nodename);
}

static int create_maildir(int spool, const char *box)
{
	int fd;

	if (mkdirat(spool, box, 0700) < 0 || fsync(spool) < 0 || (fd = open_dir(spool, box)) < 0)
		return -errno;
	if (mkdirat(fd, "cur", 0700) < 0 || mkdirat(fd, "tmp", 0700) < 0 ||
	    mkdirat(fd, "new", 0700) < 0 || fsync(fd) < 0)
		return -errno;
	return fd;
}

static int write_maildir(int tmp, int new, const struct mail *m)
{
	struct out o = { .start = -MARK };
	char name[160];

	name_it(name, sizeof name);
	o.fd = openat(tmp, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (o.fd < 0)
		return -errno;
	put(&o, m->p, (size_t)(m->end - m->p));
	if (!o.err && (fsync(o.fd) < 0 || renameat(tmp, name, new, name) < 0))
		o.err = -errno;
	else if (!o.err && fsync(new) < 0 && errno != EINVAL) {
		o.err = -errno;
		unlinkat(new, name, 0);
	}
	if (o.err)
		unlinkat(tmp, name, 0);
	return o.err;
}

static int to_maildir(int spool, const char *box, const struct mail *m, bool there)
{
	int dir = there ? open_dir(spool, box) : create_maildir(spool, box), tmp, new;
	struct stat st;

	if (dir < 0)
		return dir;
	new = open_dir(dir, "new");
	mkdirat(dir, "tmp", 0700);
	tmp = open_dir(dir, "tmp");
	if (stat_fd(dir, &st) < 0 || st.st_uid != geteuid() || new < 0 || tmp < 0)
		return refuse(box, "no whole Maildir of this user");
	return write_maildir(tmp, new, m);
}

/* ---- whose ---- */

/* name's mailbox and whose rights it takes.  1: the users file says; 0: it does not; or -errno. */
static int users_line(const char *name, struct account *who)
{
	int fd = open_at(AT_FDCWD, conf.users, O_RDONLY | O_NONBLOCK), found;
	struct lines l;
	struct user u;

	if (fd < 0)
		return fd;
	found = users_find(fd, name, &l, &u);
	if (found)
		fmt(who->box, sizeof who->box, "%s", u.box);
	wipe(&l, sizeof l);
	close(fd);
	return found;
}

/* Become who owns the mailbox: the users file's line, else the system's account, else a mailbox of
 * this name. */
static int become_user(const char *name, int spool, struct account *who)
{
	int err = system_account(name, who), found = 0;
	struct stat st;

	fmt(who->box, sizeof who->box, "%s", name);
	if (ENABLE_USERS && conf.users)
		found = users_line(name, who);
	/* an agent that calls us as the user himself cannot read the file, and need not */
	if (found < 0 && (found != -EACCES || err || who->uid != geteuid())) {
		complain(found, conf.users);
		return EX_TEMP;
	}
	if (found > 0 || (err && stat_at(spool, name, &st, AT_SYMLINK_NOFOLLOW) == 0))
		err = auth_owner(who);
	else if (err) {
		log_line(L_ERROR, "%s: no such user; `almond passwd %s` makes one", name, name);
		return EX_NOUSER_;
	}
	if (!err && !geteuid() && who->uid == conf.session_uid)
		err = -EPERM; /* nobody's yet, in root's spool: not the session user's either */
	if (!err)
		err = become(who->uid, who->gid);
	if (err)
		log_line(L_ERROR, "%s: %s", name, geteuid() ? "only root delivers to others" :
		    "it would be root's; alias it, or chown mailbox or spool to a user");
	return err ? EX_TEMP : 0;
}

static int deliver(int spool, const char *box, const struct mail *m)
{
	struct stat st;
	bool there = stat_at(spool, box, &st, AT_SYMLINK_NOFOLLOW) == 0;
	static const int patience[] = { SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGALRM, SIGXFSZ, 0 };
	int err;

	signal_open(patience);  /* an impatient caller must not leave half a message */
	if (ENABLE_MAILDIR && (there ? S_ISDIR(st.st_mode) : !ENABLE_MBOX))
		err = to_maildir(spool, box, m, there);
	else
		err = ENABLE_MBOX ? to_mbox(spool, box, m) : refuse(box, "no Maildir");
	if (err && err != REFUSED)
		complain(err, box);
	/* whatever it is, someone can mend it: the mail waits, and does not bounce */
	return err ? EX_TEMP : 0;
}

int tool_deliver(const struct wish *w)
{
	struct mail mail = { .when = (uint32_t)(wall_clock() / 1000) };
	struct account who;
	const char *fault;
	int code, spool;

	if (!w->operand)
		return EX_USAGE_;
	tool_conf(w);
	fault = name_fault(w->operand);
	if (fault) {
		log_line(L_ERROR, "%s", fault);
		return EX_NOUSER_;
	}
	spool = open_dir(AT_FDCWD, conf.spool);
	if (spool < 0) {
		complain(spool, conf.spool);
		return EX_TEMP;         /* not mounted yet: later is better than never */
	}
	if (ENABLE_MBOX)
		journal_prepare(spool);
	code = become_user(w->operand, spool, &who);
	if (!code)
		code = read_mail(&mail, w->value['f' & LETTER]);
	return code ? code : deliver(spool, who.box, &mail);
}
#endif
