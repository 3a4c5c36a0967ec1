/* check.c: owns `almond check`: looks the installation over and says what to do; it changes no
 * mail.  Runs as whoever calls it; a mailbox is read as its owner. */
#include "almond.h"

#if ENABLE_CHECK
#include <sys/wait.h>

static bool found;              /* something to do */

static void todo(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void todo(const char *format, ...)
{
	char text[512];
	va_list ap;

	found = true;
	va_start(ap, format);
	vfmt(text, sizeof text, format, ap);
	va_end(ap);
	print("  ! %s\n", text);
}

/* ---- one mailbox ---- */

static void check_maildir(int spool, const char *name)
{
	static const char dirs[][4] = { "new", "cur", "tmp" };
	struct listing l = { .at = 0 };
	unsigned count[3] = { 0, 0, 0 }, odd = 0, i;
	int dir = open_dir(spool, name);
	unsigned long long octets = 0;
	const char *entry;
	struct stat st;

	for (i = 0; i < LEN(dirs); i++) {
		l = (struct listing){ .fd = open_dir(dir, dirs[i]) };
		if (l.fd < 0)
			todo("%s/%s: %s; make or chown it", name, dirs[i], reason(l.fd));
		while (l.fd >= 0 && (entry = next_name(&l))) {
			if (stat_at(l.fd, entry, &st, AT_SYMLINK_NOFOLLOW) < 0 ||
			    !S_ISREG(st.st_mode)) {
				odd++;
				continue;
			}
			octets += i < 2 ? (unsigned long long)st.st_size : 0;
			count[i]++;
		}
		close(l.fd);
	}
	close(dir);
	print("%s: Maildir, %u new, %u seen, %llu octets\n", name, count[0], count[1], octets);
	if (odd)
		todo("%u entries are no plain files: not served; remove them", odd);
}

/* What a scan counts.  hidden: separators behind no blank line; shape: "From " lines behind one
 * that are no separators. */
struct scan { unsigned long long messages, junk, nul, hidden, shape; bool open; };

static uint64_t count_nul(const char *p, size_t n)
{
	uint64_t k = 0;

	for (; n--; p++)
		k += !*p;
	return k;
}

static int scan(struct scan *s, int fd, uint64_t size)
{
	struct pieces in;
	bool blank = true;
	uint64_t at = 0;
	int more = piece_open(&in);

	if (more)
		return more;
	piece_from(&in, fd, 0, size);
	while ((more = piece_next(&in)) > 0) {
		if (in.bol && in.n > 5 && !memcmp(in.p, "From ", 5)) {
			if (!mbox_separator(in.p, in.n))
				s->shape += blank;
			else if (!blank)
				s->hidden++;
			else if (!s->messages++)
				s->junk = at;
		}
		blank = piece_blank(&in);
		s->nul += count_nul(in.p, in.n);
		s->open = !in.eol;
		at += in.n;
	}
	piece_close(&in);
	return more;
}

/* What no journal could mend. */
static void check_kept(int spool, const char *name)
{
	struct listing l = { .at = 0 };
	char path[MAX_NAME + 16];
	const char *entry;
	bool kept = false;

	fmt(path, sizeof path, ".almond/%s", name);
	l.fd = open_dir(spool, path);
	while (l.fd >= 0 && (entry = next_name(&l)))
		kept |= *entry == 'k';
	close(l.fd);
	if (kept)
		todo("%s: see THE JOURNAL in almond(8)", path);
}

static void check_mbox(int spool, const char *name)
{
	int fd = open_quiet(spool, name), err;
	struct scan s = { .open = false };
	struct stat st = { .st_size = 0 };

	err = fd < 0 ? fd : stat_fd(fd, &st) < 0 ? -errno : scan(&s, fd, (uint64_t)st.st_size);
	close(fd);
	if (err) {
		todo("%s: %s; make it readable for its user", name, reason(err));
		return;
	}
	print("%s: mbox, %llu messages, %llu octets\n", name, s.messages,
	    (unsigned long long)st.st_size);
	check_kept(spool, name);
	if (!s.messages && st.st_size)
		todo("no message begins in it: restore it");
	if (s.junk)
		todo("%llu octets in front of the first message: not served; look at them", s.junk);
	if (s.nul)
		todo("%llu NUL octets, as after a power cut; look at them", s.nul);
	if (s.open)
		todo("the last line has no end: look whether its mail is whole");
	if (s.hidden)
		todo("%llu separators behind no blank line: mail may hide there; put one in front",
		    s.hidden);
	if (s.shape)
		print("  %llu lines \"From ...\" are taken for text (FROM_SHAPE)\n", s.shape);
}

/* As the owner, in a process of its own where we are root: no root process reads mail. */
static void read_as_owner(int spool, const char *name, const struct stat *st)
{
	bool root = geteuid() == 0;
	pid_t pid = root ? branch() : 0;
	int status = 1;

	if (pid) {
		waitpid(pid, &status, 0);
		found |= status != 0;
		return;
	}
	if (root && become(st->st_uid, st->st_gid ? st->st_gid : conf.session_gid))
		_exit(1);
	if (ENABLE_MAILDIR && S_ISDIR(st->st_mode))
		check_maildir(spool, name);
	else if (ENABLE_MBOX && S_ISREG(st->st_mode))
		check_mbox(spool, name);
	if (root)
		_exit(found);
}

/* NAME.lock: does the process that made it live? */
static void check_lock(int spool, const char *name)
{
	if (ENABLE_MBOX && lock_owner(spool, name) == OWNER_LIVES)
		print("%s: a living process holds it\n", name);
	else
		todo("%s: a lock of no living process; remove it if it stays", name);
}

static void check_box(int spool, const char *name)
{
	size_t n = strlen(name);
	struct account who;
	struct stat st;

	if (n > 5 && !strcmp(name + n - 5, ".lock")) {
		check_lock(spool, name);
		return;
	}
	if (stat_at(spool, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return;
	if (name_fault(name) ||
	    !(S_ISDIR(st.st_mode) || (S_ISREG(st.st_mode) && st.st_nlink == 1))) {
		todo("%s: a link, no file, or no user's name: not served; remove it", name);
		return;
	}
	if (st.st_uid == 0) {
		todo("%s belongs to root; chown it to its user", name);
		return;
	}
	if (conf.system && system_account(name, &who) == 0 && who.uid != st.st_uid)
		todo("%s belongs to uid %u, not to its user; chown it", name, st.st_uid);
	if (st.st_mode & S_IWOTH)
		todo("%s: everybody may change it; chmod o-w it", name);
	read_as_owner(spool, name, &st);
}

/* ---- the spool ---- */

/* Can almond make dot-locks in it? */
static bool check_spool_mode(int spool)
{
	struct stat st;

	if (stat_fd(spool, &st) < 0)
		return false;
	print("spool %s: uid %u, gid %u, mode %u%u%u%u\n", conf.spool, st.st_uid, st.st_gid,
	    st.st_mode >> 9 & 7, st.st_mode >> 6 & 7, st.st_mode >> 3 & 7, st.st_mode & 7);
	found |= fs_warning(spool) != NULL;
	if ((st.st_mode & S_IWOTH) && !(st.st_mode & S_ISVTX))
		todo("everybody may remove everybody's mail; chmod +t it");
	if (st.st_mode & S_IWOTH && conf.users)
		todo(
		    "anybody can put a mailbox there in another's name; chmod 2775 it, group mail");
	if (!(st.st_mode & (S_IWOTH | S_IWGRP)))
		print("  only its owner can make mailboxes and dot-locks in it\n");
	return st.st_mode & (S_IWOTH | S_IWGRP) || st.st_uid;
}

/* ---- who else locks, and how ---- */

static const uint8_t ours[] = { LOCK_ORDER };

/* The locks that a program takes where nobody told it otherwise, as the sum of their numbers, and
 * where it lies below /usr. */
static const char agents[] = "3lib/postfix/sbin/local\0" "3libexec/postfix/local\0" "3sbin/exim4\0"
	"3sbin/exim\0" "3bin/procmail\0" "3bin/maildrop\0" "4sbin/dma\0" "6sbin/smtpd\0"
	"4bin/fdm\0" "3bin/mutt_dotlock\0" "3sbin/dovecot\0" "1bin/mpop\0";

static void print_locks(const char *who, unsigned locks)
{
	print("%s locks by%s%s%s\n", who, locks & LOCK_FCNTL ? " fcntl" : "",
	    locks & LOCK_DOT ? " dot-lock" : "", locks & LOCK_FLOCK ? " flock" : "");
}

static void check_agents(bool dot)
{
	unsigned mine = 0, locks, i;
	const char *p = agents;
	char path[40];

	for (i = 0; i < LEN(ours); i++)
		mine |= ours[i];
	if (!dot)
		mine &= ~(unsigned)LOCK_DOT;
	print_locks("almond", mine);
	for (; *p; p += strlen(p) + 1) {
		fmt(path, sizeof path, "/usr/%s", p + 1);
		locks = *p & 7;
		if (access(path, F_OK) < 0)
			continue;
		print_locks(path, locks);
		if (!(locks & mine))
			todo("no lock in common: %s", dot ? "set its locks, or LOCK_ORDER" :
			    "chgrp mail and chmod 2775 the spool, for dot-locks");
	}
}

int tool_check(const struct wish *w)
{
	struct listing l = { .at = 0 };
	const char *name;
	bool dot;

	if (w->operand)
		return EX_USAGE_;
	tool_conf(w);
	found = check_conf(false) != 0;
	l.fd = open_dir(AT_FDCWD, conf.spool);
	if (l.fd < 0)
		return 1;
	dot = check_spool_mode(l.fd);
	while ((name = next_name(&l)))
		check_box(l.fd, name);
	if (ENABLE_MBOX)
		check_agents(dot);
	print(found ? "there is something to do: see above\n" : "nothing is wrong\n");
	return found;
}
#endif
