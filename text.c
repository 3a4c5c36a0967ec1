/* text.c: owns text without stdio: formatting, numbers, names, lines of small files, the log; and
 * the clock.  Any process. */
#include "almond.h"

#include <poll.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

size_t vfmt(char *to, size_t room, const char *f, va_list ap)
{
	char digits[24], *d;
	const char *s;
	size_t n = 0;
	unsigned base;
	uint64_t u;
	bool negative, wide;

	for (; *f; f++) {
		d = digits + sizeof digits - 1;
		*d = 0;
		s = d;
		if (*f != '%') {
			*--d = *f;
			s = d;
		} else {
			wide = false;
			while (*++f == 'l' || *f == 'z')
				wide |= f[1] == 'l' || sizeof (long) == 8;
			base = *f == 'x' ? 16 : 10;
			negative = false;
			switch (*f) {
			case 's':
				s = va_arg(ap, const char *);
				break;
			case 'd':
			case 'u':
			case 'x':
				u = wide ? va_arg(ap, uint64_t) : va_arg(ap, unsigned);
				if (*f == 'd' && !wide)
					u = (uint64_t)(int64_t)(int)u;
				if (*f == 'd' && (int64_t)u < 0) {
					negative = true;
					u = -u;
				}
				do
					*--d = "0123456789abcdef"[u % base];
				while (u /= base);
				if (negative)
					*--d = '-';
				s = d;
				break;
			default:        /* %c, %% */
				*--d = *f == 'c' ? (char)va_arg(ap, int) : *f;
				s = d;
			}
		}
		for (; *s && n + 1 < room; s++)
			to[n++] = *s;
	}
	to[n] = 0;
	return n;
}

size_t fmt(char *to, size_t room, const char *format, ...)
{
	va_list ap;
	size_t n;

	va_start(ap, format);
	n = vfmt(to, room, format, ap);
	va_end(ap);
	return n;
}

int number(const char *s, uint64_t max, uint64_t *n)
{
	uint64_t v = 0;
	unsigned digit;

	if (!*s)
		return -1;
	for (; *s; s++) {
		digit = (unsigned)(unsigned char)*s - '0';
		if (digit > 9 || v > max / 10 || (v == max / 10 && digit > max % 10))
			return -1;
		v = v * 10 + digit;
	}
	*n = v;
	return 0;
}

char *find(const char *s, char c)
{
	return memchr(s, c, strlen(s));
}

char *find_last(const char *s, char c)
{
	return memrchr(s, c, strlen(s));
}

int hex_digit(char c)
{
	return c >= '0' && c <= '9'                  ? c - '0'
	    : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
						     : -1;
}

bool same_word(const char *a, const char *b)
{
	for (; *a; a++, b++)
		if (*a != *b && ((*a ^ *b) != 0x20 || (*a | 0x20) < 'a' || (*a | 0x20) > 'z'))
			return false;
	return !*b;
}

const char *escape(char *to, size_t room, const char *s, size_t n)
{
	static const char hex[] = "0123456789ABCDEF";
	size_t i, k = 0;
	unsigned char c;

	for (i = 0; i < n && k + 5 < room; i++) {
		c = (unsigned char)s[i];
		if (c > 0x20 && c < 0x7F && c != '\\' && c != '=') {
			to[k++] = (char)c;
			continue;
		}
		to[k++] = '\\';
		to[k++] = 'x';
		to[k++] = hex[c >> 4];
		to[k++] = hex[c & 15];
	}
	to[k] = 0;
	return to;
}

const char *name_fault(const char *name)
{
	size_t n = strlen(name);
	const char *p;

	if (!n)
		return "a name is missing";
	if (n > MAX_NAME)
		return "the name is too long";
	if (*name == '.' || (n > 5 && !memcmp(name + n - 5, ".lock", 5)))
		return "a name must not begin with . or end in .lock";
	for (p = name; *p; p++)
		if ((unsigned char)*p <= ' ' || *p == 0x7F || *p == '/' || *p == ':')
			return "the name holds a bad character";
	return NULL;
}

char *text_next(struct lines *l)
{
	char *start, *end;
	bool skip = false;
	ssize_t n;

	for (;;) {
		start = l->buffer + l->at;
		end = memchr(start, '\n', l->len - l->at);
		if (end)
			break;
		if (l->at == 0 && l->len == sizeof l->buffer - 1) {
			skip = true;
			l->len = 0;
		}
		memmove(l->buffer, l->buffer + l->at, l->len - l->at);
		l->len -= l->at;
		l->at = 0;
		do
			n = read(l->fd, l->buffer + l->len, sizeof l->buffer - 1 - l->len);
		while (n < 0 && errno == EINTR);
		if (n <= 0) {
			if (!l->len)
				return NULL;
			l->buffer[l->len++] = '\n';
		} else {
			l->len += (size_t)n;
		}
	}
	l->at += (size_t)(end - start) + 1;
	l->number++;
	if (end > start && end[-1] == '\r')
		end--;
	*end = 0;
	if (skip || memchr(start, 0, (size_t)(end - start)))
		*start = 0;
	return start;
}

static int log_fd = -1;
static bool log_stderr;

static int log_connect(void)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX, .sun_path = "/dev/log" };
	int fd = open_socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK);

	if (fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) < 0) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* Under inetd standard error is the client: it must never see a log line. */
static bool is_client(void)
{
	struct stat in, err;

	return stat_fd(2, &err) < 0 ||
	    (stat_fd(0, &in) == 0 && S_ISSOCK(in.st_mode) && in.st_dev == err.st_dev &&
		in.st_ino == err.st_ino);
}

void log_open(bool to_stderr)
{
	bool may = !is_client();

	if (!to_stderr || !may)
		log_fd = log_connect();
	log_stderr = may && log_fd < 0;
}

bool log_open_stderr(void)
{
	return log_stderr;
}

void log_line(int level, const char *format, ...)
{
	char line[512];
	size_t head, n;
	va_list ap;

	head = fmt(line, sizeof line, "<%d>almond[%d]: ", 2 << 3 | level, (int)getpid());
	va_start(ap, format);
	n = head + vfmt(line + head, sizeof line - head - 1, format, ap);
	va_end(ap);
	if (log_stderr) {
		line[n++] = '\n';
		write_all(2, line + 4, n - 4);
		return;
	}
	if (log_fd >= 0 && (send(log_fd, line, n, MSG_NOSIGNAL) >= 0 || errno == EAGAIN))
		return;
	if (log_fd >= 0)        /* the log's daemon was started anew */
		close(log_fd);
	log_fd = log_connect();
	if (log_fd >= 0)
		send(log_fd, line, n, MSG_NOSIGNAL);
}

const char *reason(int err)
{
	static const uint16_t known[] = {EACCES, EPERM, ENOENT, ENOSPC, EDQUOT, EIO, EROFS, EBUSY,
	    EADDRINUSE, EAGAIN, ENOMEM, ENOTDIR, ELOOP, EADDRNOTAVAIL};
	static const char texts[] =
		"permission denied\0not permitted\0not there\0disk full\0quota used up\0"
		"input/output error\0read-only file system\0in use\0port in use\0"
		"changed by another program\0out of memory\0no directory\0a symbolic link\0"
		"no such address here";
	static char other[24];
	const char *t = texts;
	size_t i;

	err = err < 0 ? -err : err;
	for (i = 0; i < LEN(known); i++, t += strlen(t) + 1)
		if (known[i] == err)
			return t;
	fmt(other, sizeof other, "error %d", err);
	return other;
}

/* The kernel's clock without libc's way there, which is 1 kB; 32-bit kernels have a newer call
 * since 5.1. */
#ifdef SYS_clock_gettime32
enum { CALL_CLOCK_OLD = SYS_clock_gettime32 };
#elif defined SYS_clock_gettime
enum { CALL_CLOCK_OLD = SYS_clock_gettime };
#else
enum { CALL_CLOCK_OLD = SYS_clock_gettime64 };
#endif

#ifdef SYS_clock_gettime64
static uint64_t clock_ms(int id)
{
	int64_t t[2];
	long old[2];

	if (syscall(SYS_clock_gettime64, id, t) == 0)
		return (uint64_t)t[0] * 1000 + (uint64_t)t[1] / 1000000;
	syscall(CALL_CLOCK_OLD, id, old);
	return (uint64_t)old[0] * 1000 + (uint64_t)old[1] / 1000000;
}
#else
static uint64_t clock_ms(int id)
{
	long t[2];

	syscall(CALL_CLOCK_OLD, id, t);
	return (uint64_t)t[0] * 1000 + (uint64_t)t[1] / 1000000;
}
#endif

uint64_t now(void)
{
	return clock_ms(CLOCK_MONOTONIC);
}

uint64_t wall_clock(void)
{
	return clock_ms(CLOCK_REALTIME);
}

/* glibc's fork is kept, since its malloc and the sanitizers want to know. */
#if defined __GLIBC__
pid_t branch(void)
{
	return fork();
}
#elif defined SYS_fork
pid_t branch(void)
{
	return (pid_t)syscall(SYS_fork);
}
#else
pid_t branch(void)
{
	return (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}
#endif

int signal_open(const int *signals)
{
	sigset_t set;

	sigemptyset(&set);
	while (*signals)
		sigaddset(&set, *signals++);
	sigprocmask(SIG_SETMASK, &set, NULL);
	return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

int signal_next(int fd)
{
	struct signalfd_siginfo s;

	return read(fd, &s, sizeof s) == sizeof s ? (int)s.ssi_signo : 0;
}

int open_at(int dir, const char *path, int flags)
{
	int fd = openat(dir, path, flags | O_NOCTTY | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

/* libc's way to these is 1 kB: its struct need not be the kernel's, and a kernel may be older than
 * Linux 2.6.27.  Here neither is so. */
#if defined __x86_64__ && defined __LP64__
_Static_assert(offsetof(struct stat, st_mode) == 24, "not the kernel's");
_Static_assert(offsetof(struct stat, st_size) == 48, "not the kernel's");
_Static_assert(offsetof(struct stat, st_ctim) == 104, "not the kernel's");
_Static_assert(sizeof (struct stat) == 144, "not the kernel's");

int stat_at(int dir, const char *path, struct stat *st, int flags)
{
	return (int)syscall(SYS_newfstatat, dir, path, st, flags);
}

int stat_fd(int fd, struct stat *st)
{
	return (int)syscall(SYS_fstat, fd, st);
}

int channel_pair(int pair[2])
{
	return (int)syscall(SYS_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair);
}

int open_socket(int domain, int type)
{
	return (int)syscall(SYS_socket, domain, type | SOCK_CLOEXEC, 0);
}
#else
int stat_at(int dir, const char *path, struct stat *st, int flags)
{
	return fstatat(dir, path, st, flags);
}

int stat_fd(int fd, struct stat *st)
{
	return fstat(fd, st);
}

int channel_pair(int pair[2])
{
	return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair);
}

int open_socket(int domain, int type)
{
	return socket(domain, type | SOCK_CLOEXEC, 0);
}
#endif

int open_dir(int dir, const char *path)
{
	return open_at(dir, path, O_RDONLY | O_DIRECTORY | (dir < 0 ? 0 : O_NOFOLLOW));
}

#ifdef SYS_fcntl64
enum { CALL_FCNTL = SYS_fcntl64 };
#else
enum { CALL_FCNTL = SYS_fcntl };
#endif

int control(int fd, int command, long argument)
{
	return (int)syscall(CALL_FCNTL, fd, command, argument);
}

void nap(unsigned ms)
{
	poll(NULL, 0, (int)ms);
}

void wipe(void *p, size_t n)
{
	memset(p, 0, n);
	__asm__ volatile ("" : : "r" (p) : "memory");
}

int random_bytes(void *p, size_t n)
{
	ssize_t k = getrandom(p, n, 0);
	int fd;

	if (k == (ssize_t)n)
		return 0;
	fd = open_at(AT_FDCWD, "/dev/urandom", O_RDONLY);       /* before Linux 3.17 */
	if (fd < 0)
		return fd;
	k = read(fd, p, n);
	close(fd);
	return k == (ssize_t)n ? 0 : -EIO;
}

int write_all(int fd, const void *p, size_t n)
{
	const char *c = p;
	ssize_t k;

	while (n) {
		k = write(fd, c, n);
		if (k < 0 && errno == EINTR)
			continue;
		if (k < 0)
			return -errno;
		c += k;
		n -= (size_t)k;
	}
	return 0;
}

/* One loop for both ways. */
static ssize_t transfer(bool out, int fd, char *p, size_t n, uint64_t at)
{
	size_t done = 0;
	ssize_t k = 1;

	for (; done < n && k; done += k > 0 ? (size_t)k : 0) {
		k = out ? pwrite(fd, p + done, n - done, (off_t)(at + done)) :
		    pread(fd, p + done, n - done, (off_t)(at + done));
		if (k < 0 && errno != EINTR)
			return -errno;
	}
	return (ssize_t)done;
}

int sync_fd(int fd)
{
	return fsync(fd) < 0 && errno != EINVAL ? -errno : 0;
}

ssize_t read_at(int fd, void *p, size_t n, uint64_t at)
{
	return transfer(false, fd, p, n, at);
}

int write_at(int fd, const void *p, size_t n, uint64_t at)
{
	ssize_t k = transfer(true, fd, (char *)(uintptr_t)p, n, at);

	return k < 0 ? (int)k : k == (ssize_t)n ? 0 : -EIO;
}

void broken(const char *file, int line)
{
	log_line(L_ERROR, "broken at %s:%d: please report; the mail is as it was", file, line);
	_exit(EX_BROKEN);
}
