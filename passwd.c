/* passwd.c: owns `almond passwd`, which writes the users file: locked, the old file or the new one,
 * read back before it counts. Runs as whoever calls it. */
#include "almond.h"

#if ENABLE_PASSWD
#include <poll.h>
#include <signal.h>
#include <stdio.h>              /* renameat alone */
#include <sys/file.h>
#include <sys/syscall.h>
#include <termios.h>

/* The longest that a client can send: "PASS ", the password, CRLF. */
enum { MAX_PASS = MAX_LINE - 7, WRONG = 1 };

struct job {
	bool input, generate, plain, remove, check;
	uint64_t rounds;
	char *name, *box;               /* box: NULL where the operand names none */
	const char *path, *base;        /* of the users file: whole; behind the last slash */
	int dir;
	size_t n;
	char kept[MAX_NAME + 1], secret[MAX_SECRET], verifier[MAX_VERIFIER];
};

/* ---- the password ---- */

/* One line without its end.  A longer one is read whole; its length then is more than a password's.
 * */
static int read_secret(int fd, char to[MAX_SECRET], size_t *n)
{
	ssize_t k;
	char c = 0;

	*n = 0;
	while ((k = read(fd, &c, 1)) == 1 && c != '\n')
		if (*n < MAX_SECRET - 1)
			to[(*n)++] = c;
	if (c == '\n' && *n && to[*n - 1] == '\r')
		--*n;
	to[*n] = 0;
	return k < 0 ? -errno : 0;
}

/* A signal is taken between the looks at the terminal: echo is put back before it counts. */
static int ask(int tty, const char *prompt, char to[MAX_SECRET], size_t *n)
{
	static const int list[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, 0 };
	struct pollfd p[2] = { { .fd = tty, .events = POLLIN }, { .events = POLLIN } };
	struct termios loud, quiet;
	int err = 0, sig = 0;

	if (tcgetattr(tty, &loud) < 0)
		return -errno;
	quiet = loud;
	quiet.c_lflag = (quiet.c_lflag & ~(tcflag_t)ECHO) | ECHONL | ICANON | ISIG;
	p[1].fd = signal_open(list);
	tcsetattr(tty, TCSAFLUSH, &quiet);
	write_all(tty ? tty : 2, prompt, strlen(prompt));
	while (!sig && poll(p, 2, -1) >= 0 && !p[0].revents)
		sig = signal_next(p[1].fd);
	if (!sig)
		err = read_secret(tty, to, n);
	tcsetattr(tty, TCSANOW, &loud);
	close(p[1].fd);
	close(signal_open(list + LEN(list) - 1));       /* none of them: all come through again */
	if (sig)
		kill(getpid(), sig);
	return err;
}

static int ask_twice(struct job *j)
{
	int tty = open_at(AT_FDCWD, "/dev/tty", O_RDWR), err;
	char again[MAX_SECRET];
	size_t n = 0;

	tty = tty < 0 ? 0 : tty;
	err = ask(tty, "Password: ", j->secret, &j->n);
	if (err) {
		log_line(L_ERROR, "no terminal to ask at; give the password on stdin, with -s");
		return EX_DATA;
	}
	if (j->check)
		return 0;
	ask(tty, "Once more: ", again, &n);
	err = n == j->n && same(again, j->secret, n) ? 0 : EX_DATA;
	wipe(again, sizeof again);
	if (err)
		log_line(L_ERROR, "the two differ; nothing was changed");
	return err;
}

/* Five groups of four, 100 bits; no letter looks like another character. */
static int generate(struct job *j)
{
	uint8_t r[20];
	size_t i;

	if (random_bytes(r, sizeof r))
		return EX_TEMP;
	for (i = 0; i < sizeof r; i++) {
		if (i && i % 4 == 0)
			j->secret[j->n++] = '-';
		j->secret[j->n++] = "abcdefghijkmnpqrstuvwxyz23456789"[r[i] & 31];
	}
	wipe(r, sizeof r);
	return 0;
}

static const char *secret_fault(const struct job *j)
{
	bool wide = false;
	size_t i;

	if (!j->n)
		return "it is empty";
	if (j->n > MAX_PASS)
		return "it is longer than 248 octets, more than a client can send";
	for (i = 0; i < j->n; i++) {
		if ((unsigned char)j->secret[i] < ' ' || j->secret[i] == 0x7F)
			return "it holds a control character";
		wide |= (signed char)j->secret[i] < 0;
	}
	if (wide)
		log_line(L_WARN, "not all of it is ASCII: some clients will send it otherwise");
	if (j->secret[0] == ' ' || j->secret[j->n - 1] == ' ')
		log_line(L_WARN, "the password begins or ends with a blank, which belongs to it");
	return NULL;
}

static int secret(struct job *j)
{
	const char *fault;
	int code;

	if (j->generate)
		code = generate(j);
	else if (j->input)
		code = read_secret(0, j->secret, &j->n) ? EX_TEMP : 0;
	else
		code = ask_twice(j);
	fault = code ? NULL : secret_fault(j);
	if (fault) {
		log_line(L_ERROR, "no password: %s; nothing was changed", fault);
		code = EX_DATA;
	}
	return code;
}

/* ---- the file ---- */

/* Lock the users file, which a rename may replace while we wait: then it is another file's lock. */
static int users_lock(const struct job *j, struct stat *st, bool *made)
{
	uint64_t end = now() + LOCK_WAIT;
	struct stat there;
	int fd;

	*made = false;
	do {
		fd = open_at(j->dir, j->base, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
		if (fd == -ENOENT && !j->remove) {
			fd = openat(j->dir, j->base, O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
			*made = fd >= 0;
			if (fd < 0 && errno == EEXIST)
				continue;
			if (fd < 0)
				return -errno;
		}
		if (fd < 0)
			return fd;
		if (stat_fd(fd, st) < 0)
			return -errno;
		if (!S_ISREG(st->st_mode))
			return -EPERM;
		if (flock(fd, LOCK_EX | LOCK_NB) == 0 &&
		    stat_at(j->dir, j->base, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
		    there.st_ino == st->st_ino)
			return fd;
		close(fd);
		*made = false;
		nap(20);
	} while (now() < end);
	return -EBUSY;
}

/* Where the new file's text grows. */
struct text { char *p; size_t n; };

static void put(struct text *t, const char *p, size_t n)
{
	memcpy(t->p + t->n, p, n);
	t->n += n;
}

static void put_line(struct text *t, const struct job *j)
{
	t->n += fmt(t->p + t->n, 2 * MAX_NAME + MAX_VERIFIER + 4, "%s%s%s:%s\n", j->name,
	    j->box ? "/" : "", j->box ? j->box : "", j->verifier);
}

/* The key of the fake salts that an unknown user gets: random, and the same each time. */
static int put_salt(struct text *t)
{
	uint8_t r[16];
	char line[32];

	if (random_bytes(r, sizeof r))
		return -EIO;
	base64_encode(line, r, sizeof r);
	t->n += fmt(t->p + t->n, 64, "#salt:%s\n", line);
	return 0;
}

/* Is this line of n octets the user's?  *box of *nb octets is the mailbox that it names. */
static bool is_mine(const struct job *j, const char *p, size_t n, const char **box, size_t *nb)
{
	const char *end = p + n, *colon;
	size_t k = strlen(j->name);

	*nb = 0;
	while (p < end && (*p == ' ' || *p == '\t'))
		p++;
	if ((size_t)(end - p) <= k || memcmp(p, j->name, k) != 0 || (p[k] != ':' && p[k] != '/'))
		return false;
	colon = memchr(p, ':', (size_t)(end - p));
	*box = p + k + 1;
	if (colon && p[k] == '/')
		*nb = (size_t)(colon - *box);
	return colon != NULL;
}

/* Invariant: what stands before p is in the new text, octet for octet but for the user's own lines,
 * of which the first became the new one.  1: there was one. */
static int compose(struct job *j, struct text *t, const char *old, size_t n)
{
	const char *end = old + n, *p = old, *next, *box;
	int found = 0;
	size_t nb;

	if (!n)
		t->n += fmt(t->p, 64, "# almond's users: name[/mailbox]:password\n");
	while (p < end && (end - p < 6 || memcmp(p, "#salt:", 6) != 0))
		p = next_line(p, end);
	if (p == end && put_salt(t))
		return -EIO;
	for (p = old; p < end; p = next) {
		next = next_line(p, end);
		if (is_mine(j, p, (size_t)(next - p), &box, &nb)) {
			if (!found && !j->box && nb && nb <= MAX_NAME)
				j->box = memcpy(j->kept, box, nb);
			if (!found++ && !j->remove)
				put_line(t, j);
			continue;
		}
		put(t, p, (size_t)(next - p));
		if (next[-1] != '\n')
			put(t, "\n", 1);
	}
	if (!found && !j->remove)
		put_line(t, j);
	return found;
}

/* Does the file say what it shall?  Read as the server reads it. */
static bool reads_back(const struct job *j, int fd)
{
	struct lines l;
	struct user u;
	bool there = users_find(fd, j->name, &l, &u) > 0, right;

	right = j->remove ? !there : there && !strcmp(u.box, j->box ? j->box : j->name) &&
	    verify(u.verifier, j->secret, j->n) == 1;
	wipe(&l, sizeof l);
	return right;
}

/* Owner and group stay.  A group that could read it still can, if it is not the world. */
static int fill(const struct job *j, int fd, const struct stat *old, const struct text *t)
{
	int err = write_all(fd, t->p, t->n);

	if (err)
		return err;
	if (fchownat(fd, "", old->st_uid, old->st_gid, AT_EMPTY_PATH) < 0 ||
	    syscall(SYS_fchmod, fd, 0600 | (old->st_mode & 040)) < 0 || fsync(fd) < 0)
		return -errno;
	return reads_back(j, fd) ? 0 : -EIO;
}

/* One name for the new file is enough, since the old one is locked; so a crash leaves at most one
 * behind. */
static int replace(const struct job *j, const struct stat *old, const struct text *t)
{
	char temp[NAME_MAX + 1];
	int fd, err;

	if (fmt(temp, sizeof temp, "%s.new", j->base) == NAME_MAX)
		return -ENAMETOOLONG;
	unlinkat(j->dir, temp, 0);
	fd = openat(j->dir, temp, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	err = fill(j, fd, old, t);
	close(fd);
	if (!err && renameat(j->dir, temp, j->dir, j->base) < 0)
		err = -errno;
	if (err)
		unlinkat(j->dir, temp, 0);
	else if (fsync(j->dir) < 0 && errno != EINVAL)
		err = -errno;
	return err;
}

static int change(struct job *j)
{
	struct text t = { .n = 0 };
	size_t n;
	struct stat st;
	char *old;
	bool made;
	int fd = users_lock(j, &st, &made), err, found = 0;

	if (fd < 0)
		return fd;
	err = slurp(fd, &old, &n);
	t.p = err ? NULL : map(n + 1024);
	if (!err && !t.p)
		err = -ENOMEM;
	if (!err)
		found = compose(j, &t, old, n);
	if (!err && found < 0)
		err = found;
	if (!err && (found || !j->remove))
		err = replace(j, &st, &t);
	if (err && made)
		unlinkat(j->dir, j->base, 0);
	close(fd);
	return err ? err : j->remove && !found ? WRONG : 0;
}

/* ---- */

static int verifier(struct job *j)
{
	if (j->plain) {
		fmt(j->verifier, sizeof j->verifier, "{PLAIN}%s", j->secret);
		return 0;
	}
	if (!j->rounds)
		j->rounds = verify_rounds(PASSWD_TIME);
	return verify_make(j->verifier, j->secret, j->n, (uint32_t)j->rounds);
}

static int set(struct job *j)
{
	int code = j->remove ? 0 : secret(j), err;

	if (code)
		return code;
	err = j->remove ? 0 : verifier(j);
	if (!err)
		err = change(j);
	if (err == WRONG || (j->remove && err == -ENOENT)) {
		log_line(L_ERROR, "%s: no such user in %s", j->name, j->path);
		return WRONG;
	}
	if (err)
		return complain(err, j->path);
	if (j->generate)
		print("%s\n", j->secret);
	return 0;
}

static int check(struct job *j)
{
	int fd = open_at(j->dir, j->base, O_RDONLY | O_NONBLOCK), code, right = 0;
	struct lines l;
	struct user u;

	if (fd < 0)
		return complain(fd, j->path);
	code = secret(j);
	if (code)
		return code;
	if (users_find(fd, j->name, &l, &u) <= 0)
		log_line(L_ERROR, "%s: no such user in %s", j->name, j->path);
	else if ((right = verify(u.verifier, j->secret, j->n)) < 0)
		log_line(L_ERROR, "%s: the password format %s is not built in", j->name,
		    verify_scheme(u.verifier));
	else
		print(right ? "right\n" : "wrong\n");
	wipe(&l, sizeof l);
	return right > 0 ? 0 : WRONG;
}

static int names(struct job *j)
{
	static char dir[PATH_MAX];
	const char *fault, *slash = find_last(j->path, '/');
	size_t n = slash ? (size_t)(slash - j->path) + 2 : 3;

	j->box = find(j->name, '/');
	if (j->box)
		*j->box++ = 0;
	fault = name_fault(j->name);
	if (!fault && j->box)
		fault = name_fault(j->box);
	if (!fault && *j->name == '#')
		fault = "a line that begins with # is a comment";
	if (fault) {
		log_line(L_ERROR, "%s; choose another", fault);
		return EX_DATA;
	}
	j->base = slash ? slash + 1 : j->path;
	fmt(dir, n < sizeof dir ? n : sizeof dir, "%s", slash ? j->path : "./");
	j->dir = open_dir(AT_FDCWD, dir);
	return j->dir < 0 ? complain(j->dir, dir) : 0;
}

int tool_passwd(const struct wish *w)
{
	static struct job j;
	const char *rounds = w->value['r' & LETTER];
	int code;

	j = (struct job){ .name = w->operand, .path = w->value['u' & LETTER],
		.input = has_flag(w, 's'), .generate = has_flag(w, 'g'), .plain = has_flag(w, 'p'),
		.remove = has_flag(w, 'd'), .check = has_flag(w, 'c') };
	if (!w->operand || j.input + j.generate + j.remove > 1 ||
	    j.check + j.remove + j.generate > 1 ||
	    (rounds && (number(rounds, 4000000, &j.rounds) || j.rounds < 4096)))
		return EX_USAGE_;
	if (!j.path)
		j.path = USERS_FILE;
	code = names(&j);
	if (!code)
		code = j.check ? check(&j) : set(&j);
	wipe(&j, sizeof j);
	return code;
}
#endif
