/* lock.c: owns the delivery locks of an mbox, which keep other programs out for a moment, and the
 * lock of a session, which keeps a second one out for long.  Runs in the monitor and the tools. */
#include "almond.h"

#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/un.h>

#if ENABLE_MBOX

static const uint8_t order[] = { LOCK_ORDER };

static bool has(uint8_t k)
{
	size_t i;

	for (i = 0; i < LEN(order); i++)
		if (order[i] == k)
			return true;
	return false;
}

/* ABSENT: this kind of lock is not to be had here, and is left out. */
enum { ABSENT = 1 };

static int missing(int err)
{
	return err == -ENOLCK || err == -EINVAL || err == -EOPNOTSUPP ? ABSENT : err;
}

/* An open file description's lock where the kernel has them (3.15): it is not lost when another
 * descriptor of the file is closed, and conflicts with the classic ones that delivery agents take.
 */
static int lock_fcntl(int fd, short type)
{
	struct flock f = { .l_type = type, .l_whence = SEEK_SET };
	int r = control(fd, F_OFD_SETLK, (long)&f);

	if (r < 0 && errno == EINVAL)
		r = control(fd, F_SETLK, (long)&f);
	return r < 0 ? missing(-errno) : 0;
}

/* On NFS flock is an fcntl lock in disguise, and would wait for our own. */
static int lock_flock(int fd, int how)
{
	struct statfs fs;

	if (fstatfs(fd, &fs) == 0 && fs.f_type == 0x6969)
		return ABSENT;
	return flock(fd, how | LOCK_NB) < 0 ? missing(-errno) : 0;
}

/* ---- dot-locks ---- */

static void boot_id(char *to, size_t room)
{
	int fd = open_at(AT_FDCWD, "/proc/sys/kernel/random/boot_id", O_RDONLY);
	ssize_t n = fd < 0 ? 0 : read(fd, to, room - 1);

	to[n < 0 ? 0 : n] = 0;
	if (fd >= 0)
		close(fd);
}

/* Ours names the boot too: after a reboot its pid means nothing.  0 and no number (procmail, mutt)
 * say nothing. */
int lock_owner(int dir, const char *file)
{
	int fd = open_quiet(dir, file), pid = 0;
	char text[80], id[40], *p = text;
	ssize_t n;

	if (fd < 0)
		return OWNER_UNKNOWN;
	n = read(fd, text, sizeof text - 1);
	close(fd);
	text[n < 0 ? 0 : n] = 0;
	while (*p >= '0' && *p <= '9' && pid < 100000000)
		pid = pid * 10 + *p++ - '0';
	boot_id(id, sizeof id);
	if (*p == '\n' && p[1] && *id && strcmp(p + 1, id) != 0)
		return OWNER_DEAD;
	return !pid                               ? OWNER_UNKNOWN
	    : kill(pid, 0) == 0 || errno == EPERM ? OWNER_LIVES
						  : OWNER_DEAD;
}

static int dot_make(struct lock *l)
{
	char text[64];
	size_t n;

	l->dot =
	    openat(l->dir, l->file, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0444);
	if (l->dot < 0)
		return errno == EEXIST ? -EBUSY
		    : errno == EACCES || errno == EPERM || errno == ENOSPC || errno == EDQUOT
		    ? ABSENT
		    : -errno;
	l->touched = now();
	n = fmt(text, sizeof text, "%d\n", (int)getpid());
	boot_id(text + n, sizeof text - n);
	n = strlen(text);
	l->end = (off_t)n - 1;
	write_all(l->dot, text, n); /* on a full disk it stays empty, and is a lock all the same */
	return 0;
}

/* A foreign dot-lock, watched while the kernel's locks are ours: stale when it stayed the same for
 * LOCK_STALE, and, where nobody knows whose it is, has the age that other programs wait for (or a
 * time that is no time). */
struct watch { ino_t inode; struct timespec time; uint64_t since; };

static bool in_use(int dir, const char *file, int64_t age)
{
	int owner = lock_owner(dir, file);

	return owner == OWNER_LIVES || (owner == OWNER_UNKNOWN && age >= 0 && age < LOCK_OLD);
}

static void dot_watch(struct watch *w, int dir, const char *file)
{
	struct stat st;

	if (stat_at(dir, file, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return;
	if (!w->since || st.st_ino != w->inode || st.st_mtim.tv_sec != w->time.tv_sec ||
	    st.st_mtim.tv_nsec != w->time.tv_nsec ||
	    in_use(dir, file, (int64_t)(wall_clock() / 1000) - st.st_mtim.tv_sec)) {
		w->inode = st.st_ino;
		w->time = st.st_mtim;
		w->since = now();
	} else if (now() - w->since >= LOCK_STALE) {
		w->since = 0;
		if (unlinkat(dir, file, 0) == 0)
			log_line(L_WARN, "lock: removed %s, which nobody held for %u s", file,
			    LOCK_STALE / 1000);
	}
}

/* ---- all of them ---- */

/* One try.  What cannot be had here (a dot-lock in a directory that we may not write) is left out,
 * but not all of them. */
static int lock_try(struct lock *l, struct watch *w)
{
	bool any = false;
	size_t i;
	int err = 0;

	for (i = 0; i < LEN(order) && err >= 0; i++) {
		if (order[i] == LOCK_FCNTL)
			err = lock_fcntl(l->fd, F_WRLCK);
		else if (order[i] == LOCK_FLOCK)
			err = lock_flock(l->fd, LOCK_EX);
		else
			err = dot_make(l);
		any |= !err;
	}
	err = err < 0 ? err : any ? 0 : -ENOLCK;
	l->held = true;
	if (err == -EBUSY)
		dot_watch(w, l->dir, l->file);
	if (err)
		lock_drop(l);
	return err;
}

static bool dot_held(const struct lock *l)
{
	struct stat st;

	return has(LOCK_DOT) && stat_at(l->dir, l->file, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

/* A dot-lock cannot be made without a write, so it is looked for before and after: one who locked
 * in between either still holds it, or has changed what the second fstat sees.  -ESTALE: something
 * is to be mended first. */
static int snapshot_try(struct lock *l, struct stat *st, struct watch *w)
{
	struct stat before;
	int err = has(LOCK_FCNTL) ? lock_fcntl(l->fd, F_RDLCK) : 0;

	if (err >= 0 && has(LOCK_FLOCK))
		err = lock_flock(l->fd, LOCK_SH);
	err = err < 0 ? err : 0;
	if (!err && dot_held(l)) {
		dot_watch(w, l->dir, l->file);
		err = -EBUSY;
	}
	if (!err && stat_fd(l->fd, &before) < 0)
		err = -errno;
	if (!err && journal_waits(l->dir, l->box))
		err = -ESTALE;
	if (!err && (dot_held(l) || stat_fd(l->fd, st) < 0 || before.st_size != st->st_size))
		err = -EBUSY;
	l->held = true;
	lock_drop(l);
	return err;
}

static bool again(int err)
{
	return err == -EAGAIN || err == -EACCES || err == -EBUSY;
}

/* Wait a little longer each time; a bit at random, so that two who wait for each other's locks do
 * not meet for ever. */
static bool wait_more(unsigned *pause, uint64_t end)
{
	uint64_t t = now();

	if (t >= end)
		return false;
	nap(*pause + (unsigned)(t ^ (unsigned)getpid()) % (*pause + 1));
	*pause = *pause < 250 ? *pause * 2 : 250;
	return true;
}

/* Try until it works, fails for good, or LOCK_WAIT is over; st is NULL for a lock to hold. */
static int lock_wait(struct lock *l, struct stat *st)
{
	struct watch w = { .since = 0 };
	uint64_t end = now() + LOCK_WAIT;
	unsigned pause = 5;
	int err;

	do
		err = st ? snapshot_try(l, st, &w) : lock_try(l, &w);
	while (again(err) && wait_more(&pause, end));
	return again(err) ? -EBUSY : err;
}

static void lock_name(struct lock *l, int dir, const char *box, int fd)
{
	*l = (struct lock){ .dir = dir, .fd = fd, .dot = -1, .box = box };
	fmt(l->file, sizeof l->file, "%s.lock", box);
}

/* Is it still what lies there?  Another program may have put a new file in its place. */
static bool same_file(const struct lock *l)
{
	struct stat mine, there;

	return stat_fd(l->fd, &mine) == 0 &&
	    stat_at(l->dir, l->box, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
	    mine.st_ino == there.st_ino && mine.st_dev == there.st_dev;
}

int lock_take(struct lock *l, int dir, const char *box, int fd)
{
	int err;

	lock_name(l, dir, box, fd);
	err = lock_wait(l, NULL);
	if (!err)
		err = same_file(l) ? journal_mend(l) : -ESTALE;
	if (err)
		lock_drop(l);
	return err;
}

/* Others break a dot-lock that nobody touches (maildrop: after 60 s). */
void lock_touch(struct lock *l)
{
	if (l->dot < 0 || now() - l->touched < 10000)
		return;
	if (pwrite(l->dot, "\n", 1, l->end) == 1)
		l->touched = now();
}

void lock_drop(struct lock *l)
{
	struct stat mine, there;

	if (!l->held)
		return;
	if (has(LOCK_FLOCK))
		flock(l->fd, LOCK_UN);
	if (l->dot >= 0) {
		if (stat_fd(l->dot, &mine) == 0 &&
		    stat_at(l->dir, l->file, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
		    mine.st_ino == there.st_ino) /* else someone broke it, and holds his own */
			unlinkat(l->dir, l->file, 0);
		close(l->dot);
	}
	if (has(LOCK_FCNTL))
		lock_fcntl(l->fd, F_UNLCK);
	l->held = false;
	l->dot = -1;
}

int lock_snapshot(int dir, const char *box, int fd, struct stat *st)
{
	struct lock l;

	lock_name(&l, dir, box, fd);
	return lock_wait(&l, st);
}
#endif

/* ---- the lock of a session: a listening socket in the abstract name space ---- */

/* It leaves nothing behind, whoever dies how.  Anybody may take the name first, so the holder's uid
 * is looked at; one who does takes the comfort of [IN-USE] away, no more: a commit is safe by the
 * delivery lock and by what it checks. */
static socklen_t session_address(struct sockaddr_un *a, const struct stat *spool, const char *box)
{
	struct sum sum;

	sum_init(&sum);
	sum_add(&sum, &spool->st_dev, sizeof spool->st_dev);
	sum_add(&sum, &spool->st_ino, sizeof spool->st_ino);
	sum_add(&sum, box, strlen(box));
	memset(a, 0, sizeof *a);
	a->sun_family = AF_UNIX;
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 +
	    fmt(a->sun_path + 1, sizeof a->sun_path - 1, "almond/%llx",
		(unsigned long long)sum_end(&sum)));
}

static bool peer_is(int fd, uid_t uid)
{
	struct ucred c;
	socklen_t n = sizeof c;

	return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &n) == 0 &&
	    (c.uid == 0 || c.uid == uid || c.uid == geteuid());
}

/* Ask the holder to give way.  0: it did, or is gone; -EBUSY: it will not, or is committing;
 * -EPERM: it is none of us. */
static int session_ask(const struct sockaddr_un *a, socklen_t n, uid_t uid)
{
	int fd = open_socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK), err = -EPERM;
	struct pollfd p = { .fd = fd, .events = POLLIN };
	char c;

	if (connect(fd, (const struct sockaddr *)a, n) < 0)
		err = errno == EAGAIN ? -EBUSY : 0;
	else if (peer_is(fd, uid))
		err = poll(&p, 1, 2000) == 1 && read(fd, &c, 1) <= 0 ? 0 : -EBUSY;
	close(fd);
	return err;
}

int session_lock(const struct stat *spool, const char *box, uid_t uid)
{
	int fd = open_socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK), err = 0, tries = 3;
	struct sockaddr_un a;
	socklen_t n = session_address(&a, spool, box);
	uint64_t end =
	    now() + 500; /* for who comes back at once: the old monitor is on its way out */

	while (!err && bind(fd, (struct sockaddr *)&a, n) < 0) {
		err = errno != EADDRINUSE ? -errno : tries-- ? session_ask(&a, n, uid) : -EBUSY;
		if (err == -EBUSY && now() < end) {
			nap(50);
			err = 0;
			tries = 3;
		}
	}
	if (!err && listen(fd, 4) == 0)
		return fd;
	close(fd);
	if (err == -EBUSY)
		return err;
	log_line(L_WARN, "lock: no session lock for %s: %s; going on without", box,
	    err == -EPERM ? "another program took its name" : reason(err));
	return -ENOLCK;
}

bool session_asked(int lock, uid_t uid, uint64_t silent)
{
	int fd = accept(lock, NULL, NULL);
	bool give = fd >= 0 && peer_is(fd, uid) && silent >= TAKEOVER_IDLE;

	if (give)
		close(lock);
	else if (fd >= 0)
		send(fd, "B", 1, MSG_NOSIGNAL);
	if (fd >= 0)
		close(fd);
	return give;
}
