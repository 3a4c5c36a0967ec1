/* mbox.c: owns the mbox store: where messages begin and end, and which may be taken out.  The first
 * half runs in the session over a read-only descriptor, the second in the monitor with the user's
 * rights.  Nothing here writes; journal.c does. */
#include "almond.h"

#include <sys/mman.h>

#if ENABLE_MBOX

/* ---- what a separator looks like ---- */

/* Is the token a date's word: one of names, three letters each? */
static bool word_is(const char *p, size_t n, const char *names)
{
	if (n != 3)
		return false;
	for (; *names; names += 3)
		if (!memcmp(p, names, 3))
			return true;
	return false;
}

static bool digits(const char *p, size_t n)
{
	while (n && *p >= '0' && *p <= '9')
		p++, n--;
	return !n;
}

/* "From addr Sat Jan  3 01:05:34 1996", with or without seconds and a zone, in any order of the
 * tokens behind the address: mail programs have written them all. */
bool mbox_separator(const char *p, size_t n)
{
	const char *end = p + n, *start;
	unsigned seen = 0, want = FROM_SHAPE == 2 ? 15 : FROM_SHAPE == 1 ? 14 : 0;
	size_t k;

	if (n < 6 || n > MAX_SEPARATOR || memcmp(p, "From ", 5))
		return false;
	for (p += 5; p < end; p += k + 1) {
		for (start = p;
		     p < end && *p != ' ' && *p != '\t' && *p != '\r' && *p != '\n' && *p != ',';
		     p++)
			;
		k = 0;
		n = (size_t)(p - start);
		if (word_is(start, n, "SunMonTueWedThuFriSat"))
			seen |= 1;
		else if (word_is(start, n, "JanFebMarAprMayJunJulAugSepOctNovDec"))
			seen |= 2;
		else if (n >= 4 && start[n - 3] == ':' && digits(start + n - 2, 2))
			seen |= 4;
		else if (n == 4 && (*start == '1' || *start == '2') && digits(start, 4))
			seen |= 8;
	}
	return (seen & want) == want;
}

/* ---- the session's side ---- */

struct scan {
	struct pieces s;
	uint64_t at;            /* where the piece begins */
	uint64_t text_until;    /* Content-Length says so: no separator before */
	uint64_t length;        /* Content-Length; 0 for none */
	struct sum sum;
	uint64_t bare;          /* line ends of the message that RETR makes longer by one */
	uint32_t tail;          /* octets of a blank line that may turn out to be the separator's */
	bool header, blank, tail_bare;
};

/* The message ends where a separator begins, or the snapshot.  The blank line in front belongs to
 * the separator, unless it is the one that ends the header: such a message keeps it, since clients
 * hang on a header without an end. */
static int scan_close(struct scan *c, struct msg *m)
{
	m->stored = c->at - m->at - c->tail;
	c->bare -= c->tail && c->tail_bare;
	if (c->bare > UINT32_MAX - 2)
		return -EFBIG;
	m->extra = (uint32_t)c->bare;
	if (c->header)
		m->sum = sum_end(&c->sum);
	return 0;
}

static void scan_begin(struct scan *c, struct msg *m)
{
	m->at = c->at + c->s.n;
	m->lead = (uint16_t)c->s.n;
	sum_init(&c->sum);
	sum_add(&c->sum, c->s.p, c->s.n);
	c->bare = c->length = c->tail = 0;
	c->header = true;
}

/* Content-Length is believed where it leads to the snapshot's end, or to a blank line and the next
 * separator. */
static void scan_skip(struct scan *c, const struct box *b)
{
	uint64_t to = c->at + c->s.n + c->length;
	char next[8] = "";
	const char *p = next;
	ssize_t n;

	if (c->length > b->size || to > b->size)
		return;
	n = read_at(b->fd, next, 7, to);
	if (n < 0)
		return;
	p += *p == '\r';
	p += *p == '\n';
	if (to == b->size || to + (uint64_t)(p - next) == b->size ||
	    (p > next && !memcmp(p, "From ", 5)))
		c->text_until = to;
}

static void scan_header(struct scan *c, struct msg *m, const struct box *b)
{
	char value[24];
	size_t k = 15, n = 0;

	sum_add(&c->sum, c->s.p, c->s.n);
	if (c->blank) {
		c->header = false;
		m->sum = sum_end(&c->sum);
		if (ENABLE_CONTENT_LENGTH && c->length)
			scan_skip(c, b);
	} else if (ENABLE_CONTENT_LENGTH && c->s.bol &&
	    field_is(c->s.p, c->s.n, "Content-Length")) {
		while (k < c->s.n && c->s.p[k] == ' ')
			k++;
		while (k < c->s.n && n < sizeof value - 1 && c->s.p[k] >= '0' && c->s.p[k] <= '9')
			value[n++] = c->s.p[k++];
		value[n] = 0;
		if (number(value, INT64_MAX, &c->length) < 0)
			c->length = 0;
	}
}

/* The message that UW's programs keep their own data in is none. */
static bool pseudo(struct box *b, struct pieces *s)
{
	static const char mark[] = "Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA";
	const struct msg *m = b->msg;
	bool subject = false, imap = false;

	piece_from(s, b->fd, m->at - m->lead, m->at + m->stored);
	if (piece_next(s) <= 0 || s->n < 19 || memcmp(s->p, "From MAILER-DAEMON ", 19))
		return false;
	while (piece_next(s) > 0 && !piece_blank(s)) {
		subject |= s->n > sizeof mark - 1 && !memcmp(s->p, mark, sizeof mark - 1);
		imap |= field_is(s->p, s->n, "X-IMAP");
	}
	return subject && imap;
}

/* Invariant: before each piece, m is the message that it belongs to, NULL in front of the first
 * separator, and b->msg[] is right for all before m; c.blank says that a separator may come now. */
static int scan_all(struct box *b, struct scan *c)
{
	struct msg *m = NULL;
	bool was_blank, in_header, open = false;
	int more, err;

	c->blank = true;
	while ((more = piece_next(&c->s)) > 0) {
		open = !c->s.eol;
		was_blank = c->blank;
		c->blank = piece_blank(&c->s);
		if (was_blank && c->s.bol && c->at >= c->text_until &&
		    mbox_separator(c->s.p, c->s.n)) {
			err = m ? scan_close(c, m) : 0;
			if (err)
				return err;
			m = box_add(b);
			if (!m)
				return -EMFILE;
			scan_begin(c, m);
		} else if (m) {
			in_header = c->header;
			if (in_header)
				scan_header(c, m, b);
			c->tail = c->blank && !in_header ? (uint32_t)c->s.n : 0;
			c->tail_bare = piece_bare(&c->s);
			c->bare += c->tail_bare;
		}
		c->at += c->s.n;
	}
	if (more < 0 || !m)
		return more;
	err = scan_close(c, m);
	if (open && m->stored) {
		m->flags |= OPEN_END;
		m->extra += 2;
	}
	return err;
}

static void mbox_gone(const struct box *b, uint32_t i, struct gone *g)
{
	const struct msg *m = &b->msg[i];
	uint64_t end = i + 1 < b->count ? m[1].at - m[1].lead : b->size;

	g->at = m->at - m->lead;
	g->size = end - g->at;
	g->sum = m->sum;
}

static bool unchanged(const struct stat *a, const struct stat *b)
{
	return a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
	    a->st_mtim.tv_nsec == b->st_mtim.tv_nsec && a->st_ctim.tv_sec == b->st_ctim.tv_sec &&
	    a->st_ctim.tv_nsec == b->st_ctim.tv_nsec;
}

/* Any change since the snapshot may be an append, which is no matter, or a rewrite: then the
 * message itself is looked at. */
static int mbox_look(struct box *b, uint32_t i)
{
	struct pieces s;
	struct stat st;
	struct gone g;
	int err;

	if (stat_fd(b->fd, &st) < 0)
		return -errno;
	if (unchanged(&st, &b->seen))
		return 0;
	err = piece_open(&s);
	if (err)
		return err;
	mbox_gone(b, i, &g);
	err = mbox_fits(&s, b->fd, &g, b->size);
	piece_close(&s);
	return err;
}

static int mbox_index(struct box *b)
{
	struct scan c = { .at = 0 };
	struct stat st;
	uint32_t i;
	int err;

	err = piece_open(&c.s);
	if (err)
		return err;
	piece_from(&c.s, b->fd, 0, b->size);
	err = scan_all(b, &c);
	if (!err && b->count && pseudo(b, &c.s))
		memmove(b->msg, b->msg + 1, --b->count * sizeof *b->msg);
	piece_close(&c.s);
	if (!err && stat_fd(b->fd, &st) < 0)
		err = -errno;
	for (i = 0; !err && i < b->count && !unchanged(&st, &b->seen); i++)
		err = mbox_look(b, i);
	return err;
}

const struct store mbox_store = { true, mbox_index, mbox_look, mbox_gone };

/* ---- what both sides check ---- */

int mbox_fits(struct pieces *s, int fd, const struct gone *g, uint64_t size)
{
	uint64_t end = g->at + g->size;
	char next[9];
	const char *p = next;
	struct sum sum;
	ssize_t n;
	int more;

	sum_init(&sum);
	s->step = 2048;
	piece_from(s, fd, g->at, end);
	more = piece_next(s);
	if (more > 0 && (s->n < 5 || memcmp(s->p, "From ", 5)))
		return -EAGAIN;
	while (more > 0) {
		sum_add(&sum, s->p, s->n);
		if (piece_blank(s))
			break;
		more = piece_next(s);
	}
	if (more < 0)
		return more;
	if (sum_end(&sum) != g->sum)
		return -EAGAIN;
	n = read_at(fd, next, sizeof next, end);
	if (n < 0)
		return (int)n;
	if (end < size)
		return n < 5 || memcmp(p, "From ", 5) ? -EAGAIN : 0;
	/* What a delivery has put behind the snapshot since then, if only the first octet of it
	 * yet, or, as `almond deliver` does, the zeros that hold its place. */
	while (n && (!*p || *p == '\n' || *p == '\r'))
		p++, n--;
	return memcmp(p, "From ", n < 5 ? (size_t)n : 5) ? -EAGAIN : 0;
}

/* ---- the monitor's side ---- */

/* Is this what may go?  Ascending, disjoint, inside the snapshot, each a message that was indexed.
 */
static int all_fit(int fd, const struct gone *g, size_t n, uint64_t size)
{
	struct pieces s;
	uint64_t last = 0;
	size_t i;
	int err = piece_open(&s);

	if (err)
		return err;
	for (i = 0; i < n && !err; i++) {
		if (g[i].at < last || g[i].at > size || !g[i].size || g[i].size > size - g[i].at)
			err = -EINVAL;
		else
			err = mbox_fits(&s, fd, &g[i], size);
		last = g[i].at + g[i].size;
	}
	piece_close(&s);
	return err;
}

/* Under the locks: what was seen must still be there. */
static int take_out(struct vault *v, struct lock *l, struct gone *g, size_t n)
{
	uint64_t seen = (uint64_t)v->seen.st_size;
	struct stat st;
	int err;

	if (stat_fd(l->fd, &st) < 0)
		return -errno;
	if (st.st_dev != v->seen.st_dev || st.st_ino != v->seen.st_ino ||
	    (uint64_t)st.st_size < seen)
		return -EAGAIN;
	err = all_fit(l->fd, g, n, seen);
	return err ? err : journal_take_out(l, g, n, (uint64_t)st.st_size);
}

int mbox_commit(struct vault *v, struct gone *g, size_t n)
{
	int fd = open_at(v->spool, v->box, O_RDWR | O_NOFOLLOW | O_NONBLOCK), err;
	struct lock lock;

	if (fd < 0)
		return fd;
	err = lock_take(&lock, v->spool, v->box, fd);
	if (!err && n)
		err = take_out(v, &lock, g, n);
	lock_drop(&lock);
	close(fd);
	return err == -ESTALE ? -EAGAIN : err;
}
#endif
