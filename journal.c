/* journal.c: owns the change of an mbox that is all or nothing: the undo file of a commit, the
 * intent of a delivery, and what is made of them after a crash.  Runs in the monitor and in `almond
 * deliver`, as the mailbox's owner, under the delivery locks.
 *
 * A commit takes the extents g out of the mailbox's octets [a, S), which leaves [a, N):
 *   1. the journal gets the old octets [a, S), the extents, a random mark;   fsync
 *   2. the mark goes over the mailbox's octets at N, which are to go;        fsync
 *   3. [a, N) gets its new octets;                                           fsync
 *   4. the mailbox is cut at N;                                              fsync
 *   5. the journal is emptied;                                               fsync
 * Whoever takes the locks next and finds a journal judges by content, since mail can be appended at
 * any time by programs that know nothing of it, and clocks and inode numbers say nothing.  The mark stands there from before the first octet moves until the
 * cut, and no mail can look like it; so with the mark the old octets are written back, and without
 * it nothing was begun or all is done.  What lies behind N and the mark is never written. */
#include "almond.h"

#if ENABLE_MBOX
#include <stdio.h>              /* renameat alone */
#include <sys/mman.h>
#include <sys/syscall.h>

#define HOME ".almond"

/* PIECE: fsync after so many octets, so that the dot-lock is touched in time on slow flash too.
 * PART: a buffer's share where three are compared. */
enum { PIECE = 4 << 20, PART = SCAN_BUFFER / 4 };

struct head {
	char magic[8];
	uint64_t sum;           /* of all that follows it in the file */
	uint64_t at, left, end; /* a, N, S; of a delivery: its begin twice, its end */
	uint64_t count;         /* extents */
	uint8_t mark[MARK];     /* of a delivery: its first octets */
};
static const char magic[8] = "almond1\n";

/* A journal at work.  The file: head, the mailbox's old octets [at, end), extents. */
struct work {
	struct lock *l;
	int spool;
	const char *box;
	int dir, fd;            /* its directory and file */
	uint64_t size;          /* of the file, when it was opened */
	struct head h;
	struct gone *g;
	struct sum sum;
	char *buffer;           /* SCAN_BUFFER */
};

/* EINVAL: a directory of a file system that knows no sync for those. */
static int sync_file(int fd)
{
	return fsync(fd) < 0 && errno != EINVAL ? -errno : 0;
}

static int cut(int fd, uint64_t size)
{
	return ftruncate(fd, (off_t)size) < 0 ? -errno : sync_file(fd);
}

/* ---- where it lies: SPOOL/.almond/BOX ---- */

int give_group(int fd, const struct stat *spool, unsigned mode, unsigned otherwise)
{
	bool group = spool->st_mode & S_IWGRP && spool->st_gid != 0 &&
	    fchownat(fd, "", (uid_t)-1, spool->st_gid, AT_EMPTY_PATH) == 0;

	/* libc's knows a detour that nobody needs here */
	return syscall(SYS_fchmod, fd, group ? mode : otherwise) < 0 ? -errno : 0;
}

/* fd, or -errno where it is one, if it is of this type and nobody else can change it: -EPERM, and
 * closed, if not. */
static int own(int fd, mode_t type, uint64_t *size)
{
	struct stat st;

	if (fd < 0)
		return fd;
	if (fstat(fd, &st) == 0 && (st.st_mode & (S_IFMT | S_IWGRP | S_IWOTH)) == type &&
	    st.st_uid == geteuid() && (type == S_IFDIR || st.st_nlink == 1)) {
		*size = (uint64_t)st.st_size;
		return fd;
	}
	close(fd);
	return -EPERM;
}

static int trouble(const char *box, int err)
{
	log_line(L_WARN, HOME "/%s: %s; see THE JOURNAL in almond(8)", box, reason(err));
	return err;
}

void journal_prepare(int spool)
{
	struct stat st;
	uint64_t size;
	int fd, err;

	if (fstatat(spool, HOME, &st, AT_SYMLINK_NOFOLLOW) == 0 || fstat(spool, &st) < 0)
		return;
	err = geteuid() != 0 && geteuid() != st.st_uid ? -EACCES :
	    mkdirat(spool, HOME, 0700) < 0 ? -errno : 0;
	if (!err) {
		fd = own(open_dir(spool, HOME), S_IFDIR, &size);
		err = give_group(fd, &st, 03771, 01777);
		close(fd);
		sync_file(spool);
	}
	if (err && err != -EEXIST)
		trouble("", err);
}

/* The mailbox's own directory.  -ENOENT: there is none. */
static int home(int spool, const char *box, bool make)
{
	char path[MAX_NAME + 16];
	struct stat st, top;
	uint64_t size;
	int dir;

	fmt(path, sizeof path, HOME "/%s", box);
	if (make)
		journal_prepare(spool);
	if (fstatat(spool, HOME, &st, AT_SYMLINK_NOFOLLOW) < 0 || fstat(spool, &top) < 0)
		return -errno;
	if (!S_ISDIR(st.st_mode) || (st.st_uid != 0 && st.st_uid != top.st_uid))
		return -EPERM;
	if (make && mkdirat(spool, path, 0700) == 0) {
		dir = open_dir(spool, HOME);
		if (dir < 0 || fsync(dir) < 0)
			return -errno;
		close(dir);
	}
	return own(open_dir(spool, path), S_IFDIR, &size);
}

/* The file `name` in it; *made, where make is set: it is new.  0, or -errno. */
static int open_work(struct work *w, const char *name, bool make, bool *made)
{
	const int flags = O_RDWR | O_NOFOLLOW | O_NONBLOCK;
	int fd;

	*made = false;
	w->dir = home(w->spool, w->box, make);
	if (w->dir < 0)
		return w->dir;
	fd = open_at(w->dir, name, flags);
	if (make && fd == -ENOENT) {
		fd = openat(w->dir, name, flags | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		fd = fd < 0 ? -errno : fd;
		*made = true;
	}
	w->fd = own(fd, S_IFREG, &w->size);
	if (w->fd < 0)
		close(w->dir);
	return w->fd < 0 ? w->fd : 0;
}

static void leave(struct work *w)
{
	if (w->g)
		munmap(w->g, w->h.count * sizeof *w->g);
	if (w->buffer)
		munmap(w->buffer, SCAN_BUFFER);
	close(w->fd);
	close(w->dir);
}

/* ---- octets ---- */

/* Where the mailbox's old octets from `at` on lie in the journal. */
static uint64_t old(const struct work *w, uint64_t at)
{
	return sizeof w->h + at - w->h.at;
}

/* n old octets from `at` on: into the journal, and its sum; or out of it, into the mailbox at `to`.
 */
static int copy(struct work *w, bool save, uint64_t at, uint64_t to, uint64_t n)
{
	int in = save ? w->l->fd : w->fd, out = save ? w->fd : w->l->fd, err = 0;
	ssize_t k = 1;

	if (save)
		to = old(w, at);
	else
		at = old(w, at);
	for (; n && !err; n -= (uint64_t)k, at += (uint64_t)k, to += (uint64_t)k) {
		k = read_at(in, w->buffer, n < SCAN_BUFFER ? (size_t)n : SCAN_BUFFER, at);
		if (k <= 0)
			return k ? (int)k : -EAGAIN;
		sum_add(&w->sum, w->buffer, (size_t)k);
		err = write_at(out, w->buffer, (size_t)k, to);
		if (!err && (to + (uint64_t)k) / PIECE != to / PIECE)
			err = sync_file(out);
		lock_touch(w->l);
	}
	return err;
}

/* What stays behind extent i: its size, and *from is where it lay. */
static uint64_t kept(const struct work *w, uint64_t i, uint64_t *from)
{
	*from = w->g[i].at + w->g[i].size;
	return (i + 1 < w->h.count ? w->g[i + 1].at : w->h.end) - *from;
}

static size_t mark_size(const struct work *w)
{
	return w->h.end - w->h.left < MARK ? (size_t)(w->h.end - w->h.left) : MARK;
}

/* ---- reading one ---- */

/* 1: it is what was written; 0: it is not. */
static int whole(struct work *w)
{
	const struct head *h = &w->h;
	uint64_t octets = h->count ? h->end - h->at : 0, at = offsetof(struct head, at);
	size_t n = (size_t)h->count * sizeof *w->g;
	ssize_t k;

	if (memcmp(h->magic, magic, sizeof magic) != 0 || h->count > MAX_MESSAGES ||
	    h->at > h->left || h->left > h->end || w->size != sizeof *h + octets + n)
		return 0;
	w->buffer = map(SCAN_BUFFER);
	w->g = map(n + 1);
	if (!w->buffer || !w->g)
		return -ENOMEM;
	sum_init(&w->sum);
	for (; (k = read_at(w->fd, w->buffer, SCAN_BUFFER, at)) > 0; at += (uint64_t)k) {
		sum_add(&w->sum, w->buffer, (size_t)k);
		lock_touch(w->l);
	}
	if (k == 0)
		k = read_at(w->fd, w->g, n, sizeof *h + octets);
	return k < 0 ? (int)k : sum_end(&w->sum) == h->sum;
}

/* The file `name` of the lock's mailbox.  1: it is at work, and leave() ends that; 0: there is
 * none, or it is empty, or was torn while it was written: then nothing was begun, and it is
 * emptied. */
static int load(struct work *w, struct lock *l, const char *name)
{
	bool made;
	int err;

	*w = (struct work){ .l = l, .spool = l->dir, .box = l->box };
	err = open_work(w, name, false, &made);
	if (err) {
		if (err != -ENOENT)
			trouble(l->box, err);
		return 0;
	}
	err = (int)read_at(w->fd, &w->h, sizeof w->h, 0);
	if (err >= 0)
		err = whole(w);
	if (err > 0)
		return err;
	if (!err)
		err = cut(w->fd, 0);
	leave(w);
	return err;
}

/* ---- writing one ---- */

/* On an error the mailbox is untouched, and the file is empty. */
static int write_down(struct work *w, const char *name)
{
	uint64_t octets = w->g ? w->h.end - w->h.at : 0;
	size_t n = (size_t)w->h.count * sizeof *w->g;
	bool made;
	int err;

	err = open_work(w, name, true, &made);
	if (err)
		return err;
	memcpy(w->h.magic, magic, sizeof magic);
	sum_init(&w->sum);
	sum_add(&w->sum, &w->h.at, sizeof w->h - offsetof(struct head, at));
	err = copy(w, true, w->h.at, 0, octets);
	sum_add(&w->sum, w->g, n);
	w->h.sum = sum_end(&w->sum);
	if (!err)
		err = write_at(w->fd, w->g, n, sizeof w->h + octets);
	if (!err)
		err = write_at(w->fd, &w->h, sizeof w->h, 0);
	if (!err)
		err = sync_file(w->fd);
	if (!err && made)
		err = sync_file(w->dir);
	if (err) {
		cut(w->fd, 0);
		close(w->fd);
		close(w->dir);
	}
	return err;
}

/* ---- after a crash ---- */

enum { OLD = 1, NEW = 2, EITHER = 4, MARKED = 8, KEPT = 1 };

static unsigned likeness(const char *file, const char *o, const char *n, size_t size, unsigned is)
{
	size_t i;

	for (i = 0; i < size; i++)
		is &= (file[i] == o[i] ? OLD | EITHER : 0U) | (file[i] == n[i] ? NEW | EITHER : 0U);
	return is;
}

/* Are the mailbox's n octets at `to` still the old ones, or those that lie at `from` in the
 * journal, or some of either?  The bits of `is` that stay; or -errno. */
static int compare(struct work *w, uint64_t to, uint64_t from, uint64_t n, int is)
{
	char *p = w->buffer;
	ssize_t k;

	for (; n && is > 0; n -= (uint64_t)k, from += (uint64_t)k, to += (uint64_t)k) {
		k = read_at(w->l->fd, p, n < PART ? (size_t)n : PART, to);
		if (k <= 0 || read_at(w->fd, p + PART, (size_t)k, old(w, to)) != k ||
		    read_at(w->fd, p + 2 * PART, (size_t)k, from) != k)
			return k < 0 ? (int)k : -EIO;
		is = (int)likeness(p, p + PART, p + 2 * PART, (size_t)k, (unsigned)is);
		lock_touch(w->l);
	}
	return is;
}

/* What of [a, N) and of the mark is there; or -errno. */
static int judge(struct work *w)
{
	uint64_t i, n, from, to = w->h.at, area;
	int is = OLD | NEW | EITHER, mark = OLD | EITHER;
	struct stat st;

	if (fstat(w->l->fd, &st) < 0)
		return -errno;
	if ((uint64_t)st.st_size < w->h.left)
		return 0;
	for (i = 0; i < w->h.count; i++, to += n) {
		n = kept(w, i, &from);
		is = compare(w, to, old(w, from), n, is);
	}
	n = mark_size(w);
	area = (uint64_t)st.st_size - to;
	mark = compare(w, to, offsetof(struct head, mark), area < n ? area : n, mark);
	if (is < 0 || mark < 0)
		return is < 0 ? is : mark;
	if (mark == EITHER)
		return is | MARKED;
	return mark && (uint64_t)st.st_size >= w->h.end ? is : is & ~OLD;
}

/* [a, N) first: as long as the mark stands, this can be begun again. */
static int undo(struct work *w)
{
	const struct head *h = &w->h;
	int err = copy(w, false, h->at, h->at, h->left - h->at);

	if (!err)
		err = sync_file(w->l->fd);
	if (!err)
		err = copy(w, false, h->left, h->left, mark_size(w));
	if (!err)
		err = sync_file(w->l->fd);
	if (!err)
		log_line(L_NOTE, "mailbox %s: a deletion that was cut short is undone", w->l->box);
	return err;
}

/* Another program rewrote the mailbox after a crash: what the journal holds may be the only copy.
 */
static int keep(struct work *w)
{
	char name[32];

	fmt(name, sizeof name, "kept-%llx", (unsigned long long)w->h.sum);
	if (renameat(w->dir, "journal", w->dir, name) < 0)
		return -errno;
	log_line(L_WARN, "mailbox %s: another program changed it after a crash; " HOME "/%s/%s "
	    "has what it had", w->l->box, w->l->box, name);
	return KEPT;
}

/* Nothing begun, as far as one sees: undone too, for the case that a sync failed; where that has no
 * room, as on a full disk that never writes in place, it is good as it is. */
static int settle(struct work *w)
{
	int is = judge(w), err;

	if (is < 0)
		return is;
	if ((is & (MARKED | NEW)) == NEW)
		return sync_file(w->l->fd);
	if (!(is & (is & MARKED ? EITHER : OLD)))
		return keep(w);
	err = undo(w);
	return err && !(is & MARKED) ? sync_file(w->l->fd) : err;
}

/* A delivery that has not got its first octets is none. */
static int settle_delivery(struct work *w)
{
	struct gone g = { .at = w->h.at, .size = w->h.end - w->h.at };
	char zeros[MARK] = "", there[MARK];
	size_t n = mark_size(w);
	struct stat st;
	int err = fstat(w->l->fd, &st) < 0 ? -errno : 0;

	if (!err && (uint64_t)st.st_size >= w->h.end &&
	    read_at(w->l->fd, there, n, g.at) == (ssize_t)n &&
	    likeness(there, (const char *)w->h.mark, zeros, n, OLD | EITHER) == EITHER)
		err = journal_take_out(w->l, &g, 1, (uint64_t)st.st_size);
	return err ? err : sync_file(w->l->fd);
}

static const char *const names[] = { "journal", "delivery" };

bool journal_waits(int spool, const char *box)
{
	struct work w = { .spool = spool, .box = box };
	char path[MAX_NAME + 32];
	struct stat st;
	bool made;
	size_t i;

	for (i = 0; i < LEN(names); i++) {
		fmt(path, sizeof path, HOME "/%s/%s", box, names[i]);
		if (fstatat(spool, path, &st, AT_SYMLINK_NOFOLLOW) < 0 || !st.st_size ||
		    open_work(&w, names[i], false, &made) < 0)
			continue;
		leave(&w);
		return true;
	}
	return false;
}

int journal_mend(struct lock *l)
{
	struct work w;
	size_t i;
	int err = 0;

	for (i = 0; i < LEN(names) && !err && journal_waits(l->dir, l->box); i++) {
		err = load(&w, l, names[i]);
		if (err <= 0)
			continue;
		err = i ? settle_delivery(&w) : settle(&w);
		if (!err)
			err = cut(w.fd, 0);
		if (err == KEPT)
			err = 0;
		leave(&w);
	}
	return err;
}

/* ---- a commit ---- */

/* Steps 2 to 4.  What moves comes from the journal: the mark lies on the end of it. */
static int move(struct work *w)
{
	int fd = w->l->fd, err = write_at(fd, w->h.mark, mark_size(w), w->h.left);
	uint64_t i, to = w->h.at, from, n;

	if (!err)
		err = sync_file(fd);
	for (i = 0; i < w->h.count && !err; i++, to += n) {
		n = kept(w, i, &from);
		err = copy(w, false, from, to, n);
	}
	if (!err)
		err = sync_file(fd);
	return err ? err : cut(fd, w->h.left);
}

/* What must be moved goes through the journal. */
static int journaled(struct work *w)
{
	int err = w->buffer ? random_bytes(w->h.mark, MARK) : -ENOMEM;

	if (!err)
		err = write_down(w, "journal");
	if (err)
		return trouble(w->box, err);
	err = move(w);
	/* what fails here is done by whoever locks next */
	if (!err || !settle(w))
		cut(w->fd, 0);
	close(w->fd);
	close(w->dir);
	return err;
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
	struct work w = { .l = l, .spool = l->dir, .box = l->box, .g = g, .h = { .at = g->at } };
	int err = 0;
	size_t i;

	n = join(g, n);
	w.buffer = map(SCAN_BUFFER);
	while (!err) {
		w.h.count = n;
		w.h.left = w.h.end = size;
		for (i = 0; i < n; i++)
			w.h.left -= g[i].size;
		err = w.h.left == g->at ? cut(l->fd, g->at) : journaled(&w);
		if (w.h.left == g->at || (err != -ENOSPC && err != -EDQUOT) ||
		    g[n - 1].at + g[n - 1].size != size || journal_waits(l->dir, l->box))
			break;
		/* no room for a journal: what can go without one goes first, and makes some */
		size = g[--n].at;
		err = cut(l->fd, size);
	}
	if (w.buffer)
		munmap(w.buffer, SCAN_BUFFER);
	return err;
}

/* ---- a delivery ---- */

int journal_intend(struct lock *l, uint64_t at, uint64_t end, const char first[MARK])
{
	struct work w = { .l = l, .spool = l->dir, .box = l->box,
	    .h = { .at = at, .left = at, .end = end } };
	int err;

	memcpy(w.h.mark, first, MARK);
	err = write_down(&w, "delivery");
	if (err)
		return err;
	close(w.dir);
	return w.fd;
}
#endif
