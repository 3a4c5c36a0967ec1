/* monitor.c: owns the few questions between the session and its monitor.  The first part runs in
 * the session; the rest in the monitor, as root until a login where it was started so, then as the
 * user; it parses nothing that came from the net: questions and answers are structs of fixed size,
 * and each side checks all that it reads.
 *
 * question   when               answer               checked
 * HELLO      first, once        greeting, CAPA       -
 * PASS APOP  then, MAX_TRIES    0, -EACCES           name ends in NUL; in clear only where it may
 * OPEN       logged in, once    snapshot, descriptor -
 * FETCH      open, a Maildir    descriptor           number
 * GONE       open               -                    count; COMMIT looks at the extents
 * COMMIT     open, once         0 or -errno          each extent, by the store, under the lock
 * NOTE       any                -                    enum
 * As root: HELLO, PASS and APOP.  As the user, where we were root: the rest. */
#include "almond.h"

#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>

struct page *page;

enum op { HELLO, PASS, APOP, OPEN, FETCH, GONE, COMMIT, NOTE };
enum { GONES = 13, MAX_NOTES = 20 };
struct question {
	uint32_t op, n;
	int32_t err;
	union {
		struct { char name[MAX_NAME + 1], secret[MAX_SECRET - 1]; } login;
		struct gone gone[GONES];
	} u;
};
struct answer {
	int32_t err;
	uint32_t maildir;
	uint64_t size;
	union { struct hello hello; struct stat seen; } u;
};

static int ask(struct question *q, struct answer *a, int *fd);

/* ---- the session's side ---- */

int ask_hello(struct hello *h)
{
	struct question q = { .op = HELLO };
	struct answer a;

	ask(&q, &a, NULL);
	*h = a.u.hello;
	h->host[sizeof h->host - 1] = h->stamp[sizeof h->stamp - 1] = 0;
	return a.err;
}

static int ask_login(enum op op, const char *name, const void *secret, size_t n)
{
	struct question q = { .op = op, .n = (uint32_t)n };
	struct answer a;

	must(n <= sizeof q.u.login.secret && !name_fault(name));
	memcpy(q.u.login.name, name, strlen(name));
	memcpy(q.u.login.secret, secret, n);
	ask(&q, &a, NULL);
	wipe(&q, sizeof q);
	return a.err;
}

int ask_pass(const char *name, const char *secret, size_t n)
{
	return ask_login(PASS, name, secret, n);
}

int ask_apop(const char *name, const uint8_t digest[MD5_SIZE])
{
	return ask_login(APOP, name, digest, MD5_SIZE);
}

static const struct store *const stores[] = {
#if ENABLE_MBOX
	&mbox_store,
#else
	NULL,
#endif
#if ENABLE_MAILDIR
	&maildir_store,
#else
	NULL,
#endif
};

int ask_open(struct box *b)
{
	struct question q = { .op = OPEN };
	struct answer a;

	b->fd = -1;
	ask(&q, &a, &b->fd);
	if (a.err == -ENOENT)   /* no mailbox is an empty one */
		return 0;
	if (!a.err && !a.maildir && b->fd < 0)
		return -EIO;
	b->store = stores[a.maildir & 1];
	b->size = a.size;
	b->seen = a.u.seen;
	return a.err;
}

int ask_fetch(uint32_t number)
{
	struct question q = { .op = FETCH, .n = number };
	struct answer a;
	int fd = -1;

	ask(&q, &a, &fd);
	return a.err ? a.err : fd < 0 ? -EIO : fd;
}

int ask_commit(struct box *b)
{
	struct question q = { .op = GONE };
	struct answer a;
	uint32_t i;

	page->dele = 0;
	for (i = 0; i < b->count; i++) {
		if (!(b->msg[i].flags & DELETED))
			continue;
		b->store->gone(b, i, &q.u.gone[q.n++]);
		page->dele++;
		if (q.n < GONES)
			continue;
		if (ask(&q, &a, NULL))
			return a.err;
		q.n = 0;
	}
	if (q.n && ask(&q, &a, NULL))
		return a.err;
	q.op = COMMIT;
	return ask(&q, &a, NULL);
}

void ask_note(enum note note, uint32_t number, int err)
{
	struct question q = { .op = NOTE, .n = note, .err = err };
	struct answer a;

	q.u.gone[0].at = number;
	ask(&q, &a, NULL);
}

/* ---- the monitor's side ---- */

enum stage { START, GREETED, KNOWN, OPENED, DONE };
static struct {
	enum stage stage;
	unsigned tries, notes;
	uint64_t since;
	struct account who;
	struct vault vault;
	int lock;               /* the session lock, -errno while there is none */
	struct gone *gone;
	size_t gones, gone_room;
	bool clear;
	const char *method;
	char addr[48], stamp[96];
} m;

/* RFC 1939, section 7.  Letters and digits: mpop refuses '='. */
static void make_stamp(const char *host)
{
	uint8_t r[20];
	size_t i;

	if (!ENABLE_APOP || !auth_apop_for_all() || random_bytes(r, sizeof r))
		return;
	*m.stamp = '<';
	for (i = 0; i < sizeof r; i++)
		m.stamp[1 + i] = "abcdefghijkmnpqrstuvwxyz23456789"[r[i] & 31];
	fmt(m.stamp + 1 + i, sizeof m.stamp - 1 - i, "@%s>", host);
}

static void answer_hello(struct answer *a)
{
	struct hello *h = &a->u.hello;
	struct utsname u;

	fmt(h->host, sizeof h->host, "%s",
	    uname(&u) == 0 && *u.nodename ? u.nodename : "localhost");
	make_stamp(h->host);
	memcpy(h->stamp, m.stamp, sizeof m.stamp);
	h->clear = m.clear;
	m.stage = GREETED;
}

/* The mailbox's session lock and the user's rights: what only root can get, before it stops being
 * root. */
static int take_identity(void)
{
	struct stat spool;
	int err;

	m.vault.spool = open_dir(AT_FDCWD, conf.spool);
	err = m.vault.spool < 0 ? m.vault.spool : stat_fd(m.vault.spool, &spool) < 0 ? -errno : 0;
	if (err) {
		log_line(L_ERROR, "spool %s: %s; make it, or name another with -d", conf.spool,
		    reason(err));
		return -EPERM;
	}
	if (ENABLE_MBOX)
		journal_prepare(m.vault.spool);
	m.lock = session_lock(&spool, m.who.box, m.who.uid);
	err = become(m.who.uid, m.who.gid);
	if (err)
		log_line(L_ERROR, "user %s: cannot become him: %s", m.who.name, reason(err));
	return err;
}

static void count(uint32_t *counter, uint32_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

static int answer_login(struct question *q)
{
	bool apop = q->op == APOP;
	uint64_t start = now();
	char name[200];
	size_t n = q->n;
	int err = -EACCES;

	if (q->u.login.name[MAX_NAME] || name_fault(q->u.login.name) ||
	    n > sizeof q->u.login.secret || (apop && n != MD5_SIZE))
		return -EINVAL;
	m.tries++;
	m.method = apop ? "APOP" : "PASS";
	if (ENABLE_APOP && apop && *m.stamp)
		err =
		    auth_apop(q->u.login.name, m.stamp, (const uint8_t *)q->u.login.secret, &m.who);
	else if (!apop && m.clear)
		err = auth_password(q->u.login.name, q->u.login.secret, n, &m.who);
	wipe(q->u.login.secret, sizeof q->u.login.secret);
	if (!err) {
		count(&counters->logins, 1);
		err = take_identity();
		m.stage = err ? DONE : KNOWN;
		return err;
	}
	count(&counters->failures, 1);
	log_line(L_NOTE, "auth fail user=%s rip=%s method=%s",
	    escape(name, sizeof name, q->u.login.name, strlen(q->u.login.name)), m.addr, m.method);
	start += FAIL_DELAY * m.tries;
	if (now() < start)
		nap((unsigned)(start - now()));
	return err;
}

static int answer_open(struct answer *a, int *fd)
{
	int err;

	if (m.lock < 0 && m.lock != -ENOLCK)
		return m.lock;
	memcpy(m.vault.box, m.who.box, sizeof m.vault.box);
	err = vault_open(&m.vault);
	if (err)
		return err;
	m.stage = OPENED;
	a->maildir = m.vault.maildir;
	a->size = m.vault.maildir ? m.vault.count : (uint64_t)m.vault.seen.st_size;
	a->u.seen = m.vault.seen;
	if (m.vault.fd < 0)
		return -ENOENT;
	if (!m.vault.maildir)
		*fd = m.vault.fd;
	return 0;
}

static int answer_gone(const struct question *q)
{
	size_t room = m.gone_room ? m.gone_room * 2 : 4096 / sizeof *m.gone;

	if (q->n > GONES || m.gones + q->n > MAX_MESSAGES)
		return -EINVAL;
	if (m.gones + q->n > m.gone_room) {
		if (!map_grow(&m.gone, m.gone_room * sizeof *m.gone, room * sizeof *m.gone))
			return -ENOMEM;
		m.gone_room = room;
	}
	memcpy(m.gone + m.gones, q->u.gone, q->n * sizeof *m.gone);
	m.gones += q->n;
	return 0;
}

static int commit(void)
{
	if (ENABLE_MAILDIR && m.vault.maildir)
		return maildir_commit(&m.vault, m.gone, m.gones);
	if (ENABLE_MBOX && !m.vault.maildir)
		return mbox_commit(&m.vault, m.gone, m.gones);
	return -EINVAL;
}

/* Whatever comes of it, the session is over: who comes next need not wait until the line is closed.
 */
static int answer_commit(void)
{
	static const int all[] = { SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGXFSZ, 0 };
	int err;

	if (!ENABLE_PRIVSEP)
		signal_open(all);       /* nothing ends us in the middle */
	err = m.gones ? commit() : 0;
	m.stage = DONE;
	if (m.lock >= 0)
		close(m.lock);
	m.lock = -ENOLCK;
	if (err)
		log_line(L_ERROR, "commit user=%s rip=%s: %s", m.who.name, m.addr, reason(err));
	return err;
}

static int answer_note(const struct question *q)
{
	static const char *const text[NOTE_COUNT] = {
		"bad name or line refused",
		"password in clear refused; allow the network with -n",
		"another program changed the mailbox",
		"mail unreadable",
		"more than MAX_MESSAGES in the mailbox",
	};

	if (q->n >= NOTE_COUNT || ++m.notes > MAX_NOTES)
		return -EINVAL;
	log_line(L_WARN, "note user=%s rip=%s: %s msg=%u err=%d", *m.who.name ? m.who.name : "-",
	    m.addr, text[q->n], (unsigned)q->u.gone[0].at, q->err);
	return 0;
}

/* A question out of its turn is answered -EPROTO; nothing happens. */
static int answer(struct question *q, struct answer *a, int *fd)
{
	static const uint8_t stage_of[] = {START, GREETED, GREETED, KNOWN, OPENED, OPENED, OPENED};

	memset(a, 0, sizeof *a);
	if (q->op == NOTE)
		return answer_note(q);
	if (q->op > NOTE || m.stage != stage_of[q->op])
		return q->op == COMMIT && m.stage == KNOWN ? 0 : -EPROTO;
	switch (q->op) {
	case HELLO:
		answer_hello(a);
		return 0;
	case PASS:
	case APOP:
		return m.tries < MAX_TRIES ? answer_login(q) : -EPROTO;
	case OPEN:
		return answer_open(a, fd);
	case FETCH:
		if (!ENABLE_MAILDIR || !m.vault.maildir)
			return -EPROTO;
		*fd = maildir_fetch(&m.vault, q->n);
		return *fd < 0 ? *fd : 0;
	case GONE:
		return answer_gone(q);
	case COMMIT:
		return answer_commit();
	default:
		return -EPROTO;
	}
}

/* ---- the mailbox, from outside ---- */

int open_quiet(int dir, const char *path)
{
	const int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK;
	int fd = open_at(dir, path, flags | O_NOATIME);

	return fd == -EPERM ? open_at(dir, path, flags) : fd;
}

bool hollow(const struct stat *st)
{
	return st->st_size - (int64_t)st->st_blocks * 512 > MAX_HOLE;
}

static int vault_refuse(const struct vault *v, const char *why)
{
	log_line(L_ERROR, "mailbox %s refused: %s; see `almond check`", v->box, why);
	return -EPERM;
}

static int vault_maildir(struct vault *v)
{
	int err;

	v->maildir = true;
	if (!ENABLE_MAILDIR)
		return vault_refuse(v, "it is a directory, and ENABLE_MAILDIR is off");
	err = maildir_snapshot(v);
	return err == -ENOTDIR ? vault_refuse(v, "no Maildir: cur or new is missing") : err;
}

static int vault_mbox(struct vault *v)
{
	int err;

	if (!ENABLE_MBOX)
		return vault_refuse(v, "it is a file, and ENABLE_MBOX is off");
	err = lock_snapshot(v->spool, v->box, v->fd, &v->seen);
	if (err == -ESTALE) {
		err = mbox_commit(v, NULL, 0);
		if (!err)
			err = lock_snapshot(v->spool, v->box, v->fd, &v->seen);
	}
	return err == -ESTALE ? -EAGAIN : err ? err : v->seen.st_nlink != 1 ? -EAGAIN : 0;
}

int vault_open(struct vault *v)
{
	struct stat st;

	v->fd = open_quiet(v->spool, v->box);
	if (v->fd == -ENOENT) {
		v->fd = -1;
		return 0;
	}
	if (v->fd == -ELOOP)
		return vault_refuse(v, "a symbolic link");
	if (v->fd == -ENXIO)
		return vault_refuse(v, "no file");
	if (v->fd == -EACCES)
		return vault_refuse(v, "its user may not read it");
	if (v->fd < 0 || stat_fd(v->fd, &st) < 0)
		return v->fd < 0 ? v->fd : -errno;
	if (st.st_uid != geteuid())
		return vault_refuse(v, "it is another user's");
	if (S_ISDIR(st.st_mode))
		return vault_maildir(v);
	if (!S_ISREG(st.st_mode))
		return vault_refuse(v, "no file");
	if (st.st_nlink != 1)
		return vault_refuse(v, "a second hard link");
	if (hollow(&st))
		return vault_refuse(v, "far larger than what is on the disk");
	return vault_mbox(v);
}

/* ---- two processes, or one ---- */

static struct wire wire;

static void ended(void)
{
	static const char *const why[WHY_COUNT] = {
	    "lost", "quit", "idle", "errors", "store", "taken over", "stopped"};
	uint32_t w = page->why;

	count(&counters->retrieved, page->retr);
	count(&counters->deleted, m.gones ? page->dele : 0);
	if (m.stage < KNOWN)
		return;
	log_line(L_INFO,
	    "end user=%s rip=%s method=%s tls=no retr=%u top=%u dele=%u left=%u "
	    "bytes=%llu secs=%llu why=%s",
	    m.who.name, m.addr, m.method, page->retr, page->top, page->dele, page->left,
	    (unsigned long long)page->bytes, (unsigned long long)(now() - m.since) / 1000,
	    why[w < WHY_COUNT ? w : WHY_LOST]);
}

static bool asked(void)
{
	uint64_t silent = now() - (uint64_t)page->pulse * 1000;

	if (!session_asked(m.lock, m.who.uid, silent))
		return false;
	m.lock = -ENOLCK;
	m.stage = DONE;         /* no COMMIT any more */
	page->why = WHY_TAKEN;
	return true;
}

static int serve(int in, int out)
{
	int on = 1, stall = SEND_STALL, rest = 32;
	struct stat st;
	mode_t mode = stat_fd(out, &st) < 0 ? 0 : st.st_mode;

	wire.in = in;
	wire.out = out;
	wire.pulse = &page->pulse;
	*wire.pulse = (uint32_t)(now() / 1000);
	setsockopt(out, 6, 1, &on, sizeof on); /* IPPROTO_TCP, TCP_NODELAY: replies are whole */
	setsockopt(out, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
	setsockopt(out, 6, 18, &stall, sizeof stall); /* TCP_USER_TIMEOUT: ends a vanished peer */
	if (S_ISSOCK(mode) || S_ISFIFO(mode))
		control(out, F_SETFL, control(out, F_GETFL, 0) | O_NONBLOCK);
	pop3(&wire);
	while (S_ISSOCK(mode) && rest-- && read(in, wire.in_buffer, sizeof wire.in_buffer) > 0)
		;               /* what was not heard would reset the line */
	return 0;
}

#if ENABLE_PRIVSEP

#ifdef SYS_close_range
enum { CALL_CLOSE_RANGE = SYS_close_range };
#else
enum { CALL_CLOSE_RANGE = -1 };
#endif

static int channel = -1;

/* One message of n octets, and a descriptor with it where fd >= 0. */
static bool message_send(const void *p, size_t n, int fd)
{
	union { struct cmsghdr h; char room[CMSG_SPACE(sizeof fd)]; } c = { .room = "" };
	struct iovec v = { .iov_len = n };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1 };

	memcpy(&v.iov_base, &p, sizeof p);
	if (fd >= 0) {
		h.msg_control = c.room;
		h.msg_controllen = sizeof c.room;
		c.h.cmsg_level = SOL_SOCKET;
		c.h.cmsg_type = SCM_RIGHTS;
		c.h.cmsg_len = CMSG_LEN(sizeof fd);
		memcpy(CMSG_DATA(&c.h), &fd, sizeof fd);
	}
	return sendmsg(channel, &h, MSG_NOSIGNAL) == (ssize_t)n;
}

/* The next one, of exactly n octets; *fd, where fd is not NULL, gets a descriptor that came with
 * it. */
static bool message_receive(void *p, size_t n, int *fd)
{
	union { struct cmsghdr h; char room[CMSG_SPACE(sizeof *fd)]; } c = { .room = "" };
	struct iovec v = { .iov_base = p, .iov_len = n };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1 };
	ssize_t k;

	if (fd) {
		h.msg_control = c.room;
		h.msg_controllen = sizeof c.room;
	}
	do
		k = recvmsg(channel, &h, MSG_CMSG_CLOEXEC);
	while (k < 0 && errno == EINTR);
	if (k != (ssize_t)n || h.msg_flags & MSG_TRUNC)
		return false;
	if (fd && h.msg_controllen >= CMSG_LEN(sizeof *fd) && c.h.cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(&c.h), sizeof *fd);
	return true;
}

static int ask(struct question *q, struct answer *a, int *fd)
{
	if (!message_send(q, sizeof *q, -1) || !message_receive(a, sizeof *a, fd))
		_exit(EX_TEMP);         /* the monitor ended the session */
	return a->err;
}

static bool hung_up(void)
{
	return true;
}

/* Linux 5.9 has a call for it; before that, no process here has more than a few. */
static void close_from(int fd)
{
	if (syscall(CALL_CLOSE_RANGE, fd, ~0U, 0) < 0)
		for (; fd < 64; fd++)
			close(fd);
}

/* The session's descriptors: 0 and 1 the client, 2 for a last word, 3 the monitor; nothing else. */
static int session(int in, int out, int chan)
{
	static const int blocked[] = { SIGPIPE, SIGHUP, SIGUSR1, SIGINT, SIGTERM, 0 };
	int null = open_at(AT_FDCWD, "/dev/null", O_RDWR);

	become_session();
	chan = control(chan, F_DUPFD, 4);
	in = control(in, F_DUPFD, 4);
	out = control(out, F_DUPFD, 4);
	if (!log_open_stderr())
		dup2(null, 2);
	if (in < 0 || out < 0 || chan < 0 || dup2(in, 0) < 0 || dup2(out, 1) < 0 ||
	    dup2(chan, 3) < 0)
		return EX_OS;
	close_from(4);
	close(signal_open(blocked));
	channel = wire.watch = 3;
	wire.woken = hung_up;
	return serve(0, 1);
}

/* Answer until the session ends, someone takes over, or we are told to stop; a stop waits until an
 * answer is given. */
static void answer_all(int signals)
{
	struct pollfd p[3] = {{.fd = channel, .events = POLLIN}, {.events = POLLIN},
	    {.fd = signals, .events = POLLIN}};
	struct question q;
	struct answer a;
	int fd, n;

	for (;;) {
		p[1].fd = m.lock;
		poll(p, 3, -1);
		if (p[2].revents) {
			n = signal_next(signals);
			if (n == SIGTERM || n == SIGINT) {
				if (page->why == WHY_LOST)
					page->why = WHY_STOP;
				return;
			}
		}
		if (p[1].revents && asked())
			return;
		if (!p[0].revents)
			continue;
		if (!message_receive(&q, sizeof q, NULL))
			return;
		fd = -1;
		n = answer(&q, &a, &fd);
		a.err = n;
		wipe(&q, sizeof q);
		if (!message_send(&a, sizeof a, fd))
			return;
		if (fd >= 0 && m.vault.maildir)
			close(fd);
	}
}

static int run(int in, int out)
{
	static const int signals[] = { SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGPIPE, SIGXFSZ, 0 };
	int pair[2], status = 0, null, signal_fd = signal_open(signals);
	pid_t child;

	if (signal_fd < 0 || channel_pair(pair) < 0)
		return EX_OS;
	child = branch();
	if (child < 0)
		return EX_OS;
	if (child == 0)
		_exit(session(in, out, pair[1]));
	close(pair[1]);
	channel = pair[0];
	close(in); /* the line is the session's: when it ends, the client must see it */
	close(out);
	null = open_at(AT_FDCWD, "/dev/null", O_RDWR);
	dup2(null, 0);
	dup2(null, 1);
	if (!log_open_stderr())
		dup2(null, 2);
	if (null > 2)
		close(null);
	answer_all(signal_fd);
	close(channel);
	if (m.lock >= 0)
		close(m.lock);
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	if (status && page->why != WHY_TAKEN && page->why != WHY_STOP)
		log_line(L_ERROR,
		    "session user=%s rip=%s died, status %d: please report; the mail is as it was",
		    *m.who.name ? m.who.name : "-", m.addr, status);
	return 0;
}

#else

static int ask(struct question *q, struct answer *a, int *fd)
{
	int none = -1, err = answer(q, a, fd ? fd : &none);

	a->err = err;
	wire.watch = m.lock;
	return err;
}

static int run(int in, int out)
{
	static const int signals[] = { SIGPIPE, 0 };

	close(signal_open(signals));
	wire.watch = -1;
	wire.woken = asked;
	return serve(in, out);
}
#endif

int monitor(int in, int out)
{
	int err;

	page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		return EX_OS;
	m.since = now();
	m.lock = -ENOLCK;
	m.clear = peer_trusted(in, m.addr);
	err = run(in, out);
	ended();
	return err;
}
