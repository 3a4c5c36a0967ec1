/* journal.c: owns the change of an mbox that is all or nothing: the undo file of a commit, the
 * intent of a delivery, and what is made of them after a crash.  Runs in the monitor and in `almond
 * deliver`, as the mailbox's owner, under the delivery locks.
 *
 * A commit takes the extents g out of the mailbox's octets [a, S), which leaves [a, N):
 *   1. the mailbox, whose agents may not have synced it;                     fsync
 *      the journal gets the old octets [a, S), the extents, a random mark;   fsync
 *   2. the mark goes over octets at the mailbox's end, but not its last,
 *      by which agents see whether an empty line is there;                   fsync
 *   3. [a, N) gets its new octets;                                           fsync
 *   4. the mailbox is cut at N;                                              fsync
 *   5. the journal is emptied;                                               fsync
 * Whoever takes the locks next and finds a journal judges by content, since mail can be appended at
 * any time by programs that know nothing of it, and clocks and inode numbers say nothing.  The mark
 * stands there from before the first octet moves until the cut, and no mail can look like it; so
 * with the mark the old octets are written back, and without it nothing was begun or all is done.
 * A cut inside a block zeroes the rest of the block, and these zeros may reach the disk before the
 * new size: they are a mark too.  So a mere cut at the end leaves a note like a delivery's: what
 * lies between these offsets is void if some of its first octets are zeros, and its last ones are
 * no other mail's.
 *
 * A name that was made is not trusted until its directory was synced; since who made it may have
 * been stopped in between, a mode bit tells that: .almond is 1700, BOX too, a file is 0700. */
#include "almond.h"

#if ENABLE_MBOX
#include <stdio.h>              /* renameat alone */
#include <sys/mman.h>
#include <sys/syscall.h>

#define HOME ".almond"

/* PIECE: fsync after so many octets, so that the dot-lock is touched in time on slow flash too.
 * PART: a buffer's share where three are compared. */
enum { PIECE = 4 << 20, PART = SCAN_BUFFER / 4, LAST = 4 };

struct head {
	char magic[8];
	uint64_t sum;           /* of all that follows it in the file */
	uint64_t at, left, end; /* a, N, S; of a note: its begin twice, its end */
	uint64_t count;         /* extents; none: a note */
	char mark[MARK];        /* of a note: the first octets */
	char last[MARK];        /* of a note */
};
static const char magic[8] = "almond1\n";

/* A journal or note at work.  Its file: head, the mailbox's old octets [at, end), extents. */
struct work {
	struct lock *l;
	int err;                /* sticky: nothing more is done from then on */
	int dir, fd;            /* its directory and file */
	bool made;              /* the file is new */
	uint64_t size;          /* of the file, when it was opened */
	struct sum sum;
	struct head h;
	struct gone *g;
};

static char buffer[SCAN_BUFFER];

/* ---- octets ---- */

static void sync_file(struct work *w, int fd)
{
	if (!w->err)
		w->err = sync_fd(fd);
}

static void cut(struct work *w, int fd, uint64_t size)
{
	if (!w->err && ftruncate(fd, (off_t)size) < 0)
		w->err = -errno;
	sync_file(w, fd);
}

static void put(struct work *w, int fd, const void *p, size_t n, uint64_t at)
{
	if (!w->err)
		w->err = write_at(fd, p, n, at);
}

static void get(struct work *w, int fd, void *p, size_t n, uint64_t at)
{
	ssize_t k = w->err ? w->err : read_at(fd, p, n, at);

	if (k != (ssize_t)n)
		w->err = k < 0 ? (int)k : -EIO;
}

/* Where the mailbox's old octets from `at` on lie in the journal. */
static uint64_t old(const struct work *w, uint64_t at)
{
	return sizeof w->h + at - w->h.at;
}

/* n old octets from `at` on: into the journal, and its sum; or out of it, into the mailbox at `to`.
 */
static void copy(struct work *w, bool save, uint64_t at, uint64_t to, uint64_t n)
{
	int in = save ? w->l->fd : w->fd, out = save ? w->fd : w->l->fd;
	size_t k;

	if (save)
		to = old(w, at);
	else
		at = old(w, at);
	for (; n && !w->err; n -= k, at += k, to += k) {
		k = n < SCAN_BUFFER ? (size_t)n : SCAN_BUFFER;
		get(w, in, buffer, k, at);
		sum_add(&w->sum, buffer, k);
		put(w, out, buffer, k, to);
		if ((to + k) / PIECE != to / PIECE)
			sync_file(w, out);
		lock_touch(w->l);
	}
}

/* What stays behind extent i: its size, and *from is where it lay. */
static uint64_t kept(const struct work *w, uint64_t i, uint64_t *from)
{
	*from = w->g[i].at + w->g[i].size;
	return (i + 1 < w->h.count ? w->g[i + 1].at : w->h.end) - *from;
}

/* The mark's size, and *at is where it lies: LAST octets or more in front of S, if N is not too
 * near, and in one sector, which is written as a whole. */
static size_t mark_place(const struct work *w, uint64_t *at)
{
	uint64_t n = w->h.end - w->h.left, last = n > LAST ? LAST : 0;
	size_t k = n - last < MARK ? (size_t)(n - last) : MARK;

	*at = w->h.end - last - k;
	if ((*at & ~(MARK - 1ULL)) >= w->h.left)
		*at &= ~(MARK - 1ULL);
	return k;
}

/* ---- where it lies: SPOOL/.almond/BOX ---- */

/* fd, or -errno where it is one, if it is of this type and nobody else can change it: -EPERM, and
 * closed, if not. */
static int own(int fd, mode_t type, struct stat *st)
{
	int err = fd < 0 ? fd : stat_fd(fd, st) < 0 ? -errno : 0;

	if (!err && (st->st_mode & (S_IFMT | S_IWGRP | S_IWOTH)) == type &&
	    st->st_uid == geteuid() && (type == S_IFDIR || st->st_nlink == 1))
		return fd;
	close(fd);
	return err ? err : -EPERM;
}

static void trouble(const char *box, const char *what)
{
	log_line(L_WARN, "mailbox %s: %s; see THE JOURNAL in almond(8)", box, what);
}

int give_group(int fd, const struct stat *spool, unsigned mode, unsigned otherwise)
{
	bool group = spool->st_mode & S_IWGRP && spool->st_gid != 0 &&
	    fchownat(fd, "", (uid_t)-1, spool->st_gid, AT_EMPTY_PATH) == 0;

	/* libc's knows a detour that nobody needs here */
	return syscall(SYS_fchmod, fd, group ? mode : otherwise) < 0 ? -errno : 0;
}

bool journal_prepare(int spool)
{
	struct stat st, made;
	int fd;

	made.st_mode = 0;
	/* 1700: someone was stopped between the next calls */
	if ((stat_at(spool, HOME, &made, AT_SYMLINK_NOFOLLOW) < 0 ||
	    (made.st_mode & 07777) == 01700) && stat_fd(spool, &st) == 0 &&
	    (geteuid() == 0 || geteuid() == st.st_uid)) {
		mkdirat(spool, HOME, 01700);
		fd = own(open_dir(spool, HOME), S_IFDIR, &made);
		if (fd >= 0 && !sync_fd(spool))
			give_group(fd, &st, 03775, 01777);
		close(fd);
	}
	return S_ISDIR(made.st_mode) && (made.st_uid == 0 || made.st_uid == geteuid());
}

/* The mailbox's own directory.  -ENOENT: there is none. */
static int home(int spool, const char *box, bool make)
{
	int fd = -EPERM, dir;
	struct stat st;

	if (make)
		journal_prepare(spool);
	dir = open_dir(spool, HOME);
	if (dir < 0)
		return dir;
	if (stat_fd(dir, &st) < 0)
		fd = -errno;
	else if (st.st_uid == 0 || st.st_uid == geteuid()) {
		fd = make && mkdirat(dir, box, 01700) < 0 && errno != EEXIST ? -errno :
		    own(open_dir(dir, box), S_IFDIR, &st);
		if (fd >= 0 && make && st.st_mode & S_ISVTX &&
		    (sync_fd(dir) || syscall(SYS_fchmod, fd, 0700) < 0))
			fd = -EIO;
	}
	close(dir);
	return fd;
}

static void open_work(struct work *w, const char *name, bool make)
{
	struct stat st = { .st_size = 0 };

	w->dir = w->fd = home(w->l->dir, w->l->box, make);
	if (w->dir >= 0) {
		w->fd = openat(w->dir, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC |
		    (make ? O_CREAT : 0), 0700);
		w->fd = own(w->fd < 0 ? -errno : w->fd, S_IFREG, &st);
		w->size = (uint64_t)st.st_size;
		w->made = st.st_mode & S_IXUSR;
		if (w->fd < 0) {
			close(w->dir);
			w->dir = -1;
		}
	}
	w->err = w->fd < 0 ? w->fd : 0;
}

static void leave(struct work *w)
{
	close(w->fd);
	close(w->dir);
}

/* ---- reading one ---- */

/* Is it what was written? */
static bool whole(struct work *w)
{
	const struct head *h = &w->h;
	uint64_t octets = h->count ? h->end - h->at : 0, at = offsetof(struct head, at);
	size_t n = (size_t)h->count * sizeof *w->g, k;

	if (w->err || memcmp(h->magic, magic, sizeof magic) != 0 || h->count > MAX_MESSAGES ||
	    w->size != sizeof *h + octets + n)
		return false;
	w->g = map(n + 1);
	if (!w->g)
		w->err = -ENOMEM;
	sum_init(&w->sum);
	for (; at < w->size && !w->err; at += k) {
		k = w->size - at < SCAN_BUFFER ? (size_t)(w->size - at) : SCAN_BUFFER;
		get(w, w->fd, buffer, k, at);
		sum_add(&w->sum, buffer, k);
		lock_touch(w->l);
	}
	get(w, w->fd, w->g, n, sizeof *h + octets);
	return sum_end(&w->sum) == h->sum;
}

/* Nothing there, or nothing that is ours alone: not believed. */
static bool none(int err)
{
	return err == -ENOENT || err == -ENOTDIR || err == -EPERM || err == -EACCES ||
	    err == -ELOOP;
}

/* The file `name` of the lock's mailbox.  True, and without err: it is at work, and leave() ends
 * that.  False: there is none, or it is empty, or was torn while it was written: then nothing was
 * begun, and it is emptied. */
static bool load(struct work *w, struct lock *l, const char *name)
{
	*w = (struct work){ .l = l };
	open_work(w, name, false);
	if (none(w->err))
		w->err = w->fd = 0;
	else if (w->size >= sizeof w->h)
		get(w, w->fd, &w->h, sizeof w->h, 0);
	if (!w->fd || (w->size && whole(w)))
		return w->fd;
	if (w->size)
		cut(w, w->fd, 0);
	leave(w);
	return false;
}

/* ---- writing one ---- */

/* On an error the mailbox is untouched, and the file is empty. */
static void write_down(struct work *w, const char *name)
{
	uint64_t octets = w->g ? w->h.end - w->h.at : 0;
	size_t n = (size_t)w->h.count * sizeof *w->g;
	int err;

	open_work(w, name, true);
	if (!w->err && w->size)         /* what could not be mended, or emptied */
		w->err = -EBUSY;
	if (w->err)
		return;
	memcpy(w->h.magic, magic, sizeof magic);
	sum_init(&w->sum);
	sum_add(&w->sum, &w->h.at, sizeof w->h - offsetof(struct head, at));
	copy(w, true, w->h.at, 0, octets);
	sum_add(&w->sum, w->g, n);
	w->h.sum = sum_end(&w->sum);
	put(w, w->fd, w->g, n, sizeof w->h + octets);
	put(w, w->fd, &w->h, sizeof w->h, 0);
	sync_file(w, w->fd);
	if (w->made) {
		sync_file(w, w->dir);
		if (!w->err && syscall(SYS_fchmod, w->fd, 0600) < 0)
			w->err = -errno;
	}
	err = w->err;
	if (!err)
		return;
	w->err = 0;
	cut(w, w->fd, 0);
	leave(w);
	w->err = err;
}

/* ---- after a crash ---- */

enum { OLD = 1, NEW = 2, EITHER = 4 };
enum done { UNDONE, DONE, KEPT, UNDO };

static unsigned likeness(const char *file, const char *o, const char *n, size_t size, unsigned is)
{
	size_t i;

	for (i = 0; i < size; i++)
		is &= (file[i] == o[i] ? OLD | EITHER : 0U) | (file[i] == n[i] ? NEW | EITHER : 0U);
	return is;
}

/* Are the mailbox's n octets at `to` still the old ones, or those that lay at `from` (0: zeros), or
 * some of either?  The bits of `is` that stay. */
static unsigned compare(struct work *w, uint64_t to, uint64_t from, uint64_t n, unsigned is)
{
	char *p = buffer;
	size_t k;

	for (; n && is && !w->err; n -= k, from += from ? k : 0, to += k) {
		k = n < PART ? (size_t)n : PART;
		get(w, w->l->fd, p, k, to);
		get(w, w->fd, p + PART, k, old(w, to));
		if (from)
			get(w, w->fd, p + 2 * PART, k, old(w, from));
		else
			memset(p + 2 * PART, 0, k);
		is = likeness(p, p + PART, p + 2 * PART, k, is);
		lock_touch(w->l);
	}
	return is;
}

static uint64_t mailbox_size(struct work *w)
{
	struct stat st = { .st_size = 0 };

	if (!w->err && stat_fd(w->l->fd, &st) < 0)
		w->err = -errno;
	return (uint64_t)st.st_size;
}

/* What was done, by what is there of [a, N) and of the mark. */
static enum done judge(struct work *w)
{
	uint64_t n, from, at, to = w->h.at, size = mailbox_size(w);
	unsigned is = OLD | NEW | EITHER, mark, zeros;
	char there[MARK], was[MARK], first = 0;
	size_t i, k = mark_place(w, &at);

	if (size < w->h.left)
		return KEPT;
	for (i = 0; i < w->h.count; i++, to += n) {
		n = kept(w, i, &from);
		is = compare(w, to, from, n, is);
	}
	if (size > to)
		get(w, w->l->fd, &first, 1, to);
	/* done, and no mail begins at N: what another program left there is none of ours */
	if (first && first != 'F' && first != '\n' && first != '\r')
		is &= ~(unsigned)NEW;
	if (size < w->h.end)
		return is & NEW ? DONE : KEPT;
	/* zeros of a cut, not of a mail: nothing else lies between N and them */
	zeros = compare(w, to, 0, at - to, EITHER);
	get(w, w->l->fd, there, k, at);
	get(w, w->fd, was, k, old(w, at));
	for (i = 0; i < k && zeros; i++)
		if (!there[i])
			there[i] = w->h.mark[i];
	mark = likeness(there, was, w->h.mark, k, OLD | NEW | EITHER);
	if (mark & NEW)
		return is & EITHER ? UNDO : KEPT;
	if (mark & OLD && is & (OLD | NEW))
		return UNDONE;
	/* a mark in part, which lay in two sectors, was being written: nothing has moved */
	if (mark & EITHER && is & OLD && at % MARK)
		return UNDO;
	return is & NEW ? DONE : KEPT;
}

/* The mark last: as long as it stands, this can be begun again. */
static void undo(struct work *w)
{
	uint64_t from = w->h.at, at;
	size_t k = mark_place(w, &at);

	sync_file(w, w->fd);
	put(w, w->l->fd, w->h.mark, k, at);
	sync_file(w, w->l->fd);
	copy(w, false, from, from, at - from);
	copy(w, false, at + k, at + k, w->h.end - at - k);
	sync_file(w, w->l->fd);
	copy(w, false, at, at, k);
	sync_file(w, w->l->fd);
	if (!w->err)
		trouble(w->l->box, "undone, what a crash cut short");
}

/* Another program rewrote the mailbox after a crash: what the journal holds may be the only copy.
 */
static void keep(struct work *w)
{
	char name[32];

	fmt(name, sizeof name, "kept-%llx", (unsigned long long)w->h.sum);
	if (renameat(w->dir, "journal", w->dir, name) < 0)
		w->err = -errno;
	trouble(w->l->box, name);
}

/* Nothing was begun, as far as one sees; but if a sync failed, it is not so on the disk: what may
 * be the mark there is written anew, if there is room. */
static enum done settle(struct work *w)
{
	enum done done = judge(w);
	uint64_t at;
	size_t k = mark_place(w, &at);

	if (w->err)             /* it could not be read: nothing is known, and nothing emptied */
		return KEPT;
	if (done == KEPT)
		keep(w);
	if (done == UNDO)
		undo(w);
	if (done == UNDONE) {
		copy(w, false, at, at, k);
		if (w->err == -ENOSPC || w->err == -EDQUOT || w->err == -EFBIG)
			w->err = 0;
	}
	sync_file(w, w->l->fd);
	return done;
}

/* Is what the note speaks of void: have some of its first octets not come, or gone?  Its last ones
 * are its own, or zeros: else other mail has come in its place.  An empty line in front of a
 * delivery stays where mail has come behind it, whose agent saw one. */
static void settle_note(struct work *w)
{
	struct gone g = { .at = w->h.at, .size = w->h.end - w->h.at };
	uint64_t size = mailbox_size(w);
	char zeros[MARK] = "", there[MARK];
	size_t n = g.size < MARK ? (size_t)g.size : MARK;

	if (size >= w->h.end) {
		get(w, w->l->fd, there, n, g.at);
		if (likeness(there, w->h.mark, zeros, n, OLD | EITHER) != EITHER)
			size = 0;
		get(w, w->l->fd, there, n, w->h.end - n);
		if (!likeness(there, w->h.last + MARK - n, zeros, n, EITHER))
			size = 0;
		for (n = 0; n < MARK && (w->h.mark[n] == '\n' || w->h.mark[n] == '\r'); n++)
			;
		if (size == w->h.end)
			cut(w, w->l->fd, g.at);
		else if (size && !w->err) {
			put(w, w->l->fd, w->h.mark, n, g.at);
			g.at += n;
			g.size -= n;
			w->err = w->err ? w->err : journal_take_out(w->l, &g, 1, size);
		}
	}
	sync_file(w, w->l->fd);
}

static const char *const names[] = { "journal", "note" };

bool journal_waits(int spool, const char *box)
{
	struct lock l = { .dir = spool, .box = box };
	struct work w = { .l = &l };
	char path[MAX_NAME + 32];
	struct stat st;
	size_t i;

	for (i = 0; i < LEN(names); i++) {
		fmt(path, sizeof path, HOME "/%s/%s", box, names[i]);
		w.err = stat_at(spool, path, &st, AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
		if (!w.err && !st.st_size)
			continue;
		if (!w.err) {           /* the path may lead astray */
			open_work(&w, names[i], false);
			leave(&w);
		}
		if (!none(w.err))
			return true;
	}
	return false;
}

int journal_mend(struct lock *l)
{
	struct work w = { .err = 0 };
	enum done done;
	size_t i;

	for (i = 0; i < LEN(names) && !w.err && journal_waits(l->dir, l->box); i++) {
		if (!load(&w, l, names[i]))
			continue;
		done = DONE;
		if (i)
			settle_note(&w);
		else
			done = settle(&w);
		if (done != KEPT)
			cut(&w, w.fd, 0);
		leave(&w);
	}
	return w.err;
}

/* ---- a commit ---- */

/* The end of it.  An agent that takes none of our locks may have been there.  Where there is no
 * room at all, btrfs refuses to cut inside a block when it has zeroed the rest in memory, not on
 * the disk: that memory is forgotten. */
static void cut_mailbox(struct work *w)
{
	if (mailbox_size(w) != w->h.end && !w->err)
		w->err = -EAGAIN;
	cut(w, w->l->fd, w->h.left);
	if (w->err)
		posix_fadvise(w->l->fd, 0, 0, POSIX_FADV_DONTNEED);
}

/* Steps 2 to 4.  What moves comes from the journal: the mark lies on the end of it. */
static void move(struct work *w)
{
	uint64_t i, to = w->h.at, from, n;
	size_t k = mark_place(w, &from);
	int fd = w->l->fd;

	put(w, fd, w->h.mark, k, from);
	sync_file(w, fd);
	for (i = 0; i < w->h.count; i++, to += n) {
		n = kept(w, i, &from);
		copy(w, false, from, to, n);
	}
	sync_file(w, fd);
	cut_mailbox(w);
}

/* What must be moved goes through the journal.  False: the mailbox was not touched. */
static bool journaled(struct work *w)
{
	enum done done = DONE;
	int err;

	w->err = random_bytes(w->h.mark, MARK);
	sync_file(w, w->l->fd);
	if (!w->err)
		write_down(w, "journal");
	if (w->err) {
		trouble(w->l->box, reason(w->err));
		return false;
	}
	move(w);
	err = w->err;
	w->err = 0;
	if (err)
		done = settle(w);
	/* what fails here is done by whoever locks next */
	if (done != KEPT)
		cut(w, w->fd, 0);
	leave(w);
	w->err = done == DONE && !w->err ? 0 : err;
	return true;
}

/* What is only cut off.  Without room for a note it must do without, so that a full disk can be
 * emptied; at 0 there is nothing in front that a block could tear. */
static void noted(struct work *w, uint64_t size)
{
	uint64_t at = w->h.left;
	size_t k = size - at < MARK ? (size_t)(size - at) : MARK;
	char first[MARK] = "", last[MARK] = "";
	int note = -1;

	if (at) {
		sync_file(w, w->l->fd);
		get(w, w->l->fd, first, k, at);
		get(w, w->l->fd, last + MARK - k, k, size - k);
		note = journal_intend(w->l, at, size, first, last);
	}
	cut_mailbox(w);
	if (note >= 0 && !w->err && ftruncate(note, 0) == 0)
		close(note);
}

/* Neighbours become one extent; how many are left. */
static size_t join(struct gone *g, size_t n)
{
	size_t i, k = 0;

	for (i = 1; i < n; i++) {
		if (g[k].at + g[k].size == g[i].at)
			g[k].size += g[i].size;
		else
			g[++k] = g[i];
	}
	return k + 1;
}

int journal_take_out(struct lock *l, struct gone *g, size_t n, uint64_t size)
{
	struct work w = { .l = l, .g = g, .h = { .at = g->at } };
	size_t i;

	n = join(g, n);
	for (;;) {
		w.h.count = n;
		w.h.left = w.h.end = size;
		for (i = 0; i < n; i++)
			w.h.left -= g[i].size;
		if (w.h.left == g->at)
			noted(&w, size);
		else if (!journaled(&w) && (w.err == -ENOSPC || w.err == -EDQUOT) &&
		    g[n - 1].at + g[n - 1].size == size) {
			/* no room: what can go without a journal goes first, and makes some */
			w.h.left = g[--n].at;
			w.err = 0;
			noted(&w, size);
			size = w.h.left;
			if (!w.err)
				continue;
		}
		return w.err;
	}
}

/* ---- a note ---- */

int journal_intend(struct lock *l, uint64_t at, uint64_t end, const char first[MARK],
	const char last[MARK])
{
	struct work w = { .l = l, .h = { .at = at, .left = at, .end = end } };

	memcpy(w.h.mark, first, MARK);
	memcpy(w.h.last, last, MARK);
	write_down(&w, "note");
	if (w.err)
		return none(w.err) ? -EPERM : w.err;
	close(w.dir);
	return w.fd;
}
#endif
