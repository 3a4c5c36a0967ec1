/* faults.c: runs a program and lets its n-th system call fail, as a full or broken disk does, a
 * signal, or a transfer that stops half-way.  By ptrace, so that a static binary is reached as well
 * as any other, and the program that becomes another user, where we are root.
 *
 *   faults -r REPORT -t NAME [-t NAME] [-k CALL,CALL] [-x] [-a WHAT [-a WHAT]] PROGRAM ARGUMENT...
 *
 * -t  counting begins with the first openat of NAME or of a file below it (rw:NAME: for writing),
 *     that call included, and goes on in the process that made it: the monitor or the tool, whose
 *     calls always come in the same order
 * -k  calls that count; without it all that calls[] names
 * -x  but not those of the locks: flock, fcntl, and whatever is done to a file NAME.lock
 * -a  N=ENOSPC and other errors: the n-th counted call is not made, and says so;
 *     N=half N=one: only transfers of more than one octet count, and the n-th is asked for half of
 *     it, or for one octet;
 *     N=kill: SIGKILL to all processes in place of the n-th call;
 *     N+=... the n-th and all that follow, N/=... the n-th and every second one.
 *     A second -a counts from the call behind the first one's hit.
 * REPORT gets a line for each counted call: number, name, file, and the fault where there was one.
 *
 * Exit code: the program's, 128 + signal, or 124 if it ran for a minute: a hang. */
#define _GNU_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#if !defined __x86_64__ || defined __ILP32__
#error "faults.c knows the registers of x86_64 only"
#endif

enum { MAX_PIDS = 64, PATH = 1, FD = 2, TRANSFER = 4 };

/* PATH: the first argument is a directory's descriptor, the second a path; FD: the first is the
 * file's descriptor; TRANSFER: the third is a length. */
static const struct call { long number; const char *name; int kind; } calls[] = {
	{ SYS_openat, "openat", PATH }, { SYS_mkdirat, "mkdirat", PATH },
	{ SYS_unlinkat, "unlinkat", PATH }, { SYS_newfstatat, "newfstatat", PATH },
	{ SYS_renameat, "renameat", PATH }, { SYS_renameat2, "renameat2", PATH },
	{ SYS_linkat, "linkat", PATH }, { SYS_fchownat, "fchownat", PATH },
	{ SYS_fchmodat, "fchmodat", PATH }, { SYS_utimensat, "utimensat", PATH },
	{ SYS_statx, "statx", PATH }, { SYS_faccessat, "faccessat", PATH },
	{ SYS_readlinkat, "readlinkat", PATH },
	{ SYS_read, "read", FD | TRANSFER }, { SYS_pread64, "pread64", FD | TRANSFER },
	{ SYS_write, "write", FD | TRANSFER }, { SYS_pwrite64, "pwrite64", FD | TRANSFER },
	{ SYS_readv, "readv", FD }, { SYS_preadv, "preadv", FD }, { SYS_writev, "writev", FD },
	{ SYS_pwritev, "pwritev", FD }, { SYS_ftruncate, "ftruncate", FD },
	{ SYS_fallocate, "fallocate", FD }, { SYS_fsync, "fsync", FD },
	{ SYS_fdatasync, "fdatasync", FD }, { SYS_sync_file_range, "sync_file_range", FD },
	{ SYS_fstat, "fstat", FD }, { SYS_fstatfs, "fstatfs", FD }, { SYS_fcntl, "fcntl", FD },
	{ SYS_flock, "flock", FD }, { SYS_lseek, "lseek", FD }, { SYS_fchmod, "fchmod", FD },
	{ SYS_fchown, "fchown", FD }, { SYS_getdents64, "getdents64", FD },
	{ SYS_copy_file_range, "copy_file_range", FD }, { SYS_sendfile, "sendfile", FD },
	{ SYS_mmap, "mmap", 0 }, { SYS_mremap, "mremap", 0 },
	/* almond calls none of these; a call that we did not know would not be tried */
	{ SYS_open, "open", 0 }, { SYS_creat, "creat", 0 }, { SYS_unlink, "unlink", 0 },
	{ SYS_rename, "rename", 0 }, { SYS_mkdir, "mkdir", 0 }, { SYS_rmdir, "rmdir", 0 },
	{ SYS_link, "link", 0 }, { SYS_symlink, "symlink", 0 }, { SYS_truncate, "truncate", 0 },
	{ SYS_stat, "stat", 0 }, { SYS_lstat, "lstat", 0 }, { SYS_chmod, "chmod", 0 },
	{ SYS_chown, "chown", 0 },
};

enum { HALF = -1, ONE = -2, KILL = -3 };
static const struct { const char *name; int fault; } faults[] = {
	{ "ENOSPC", ENOSPC }, { "EIO", EIO }, { "EINTR", EINTR }, { "EDQUOT", EDQUOT },
	{ "EFBIG", EFBIG }, { "EROFS", EROFS }, { "EACCES", EACCES }, { "ENOMEM", ENOMEM },
	{ "half", HALF }, { "one", ONE }, { "kill", KILL },
};

struct action { unsigned long n; char repeat; int fault; const char *name; };
static struct action action[2];
static int actions, current;
static bool no_locks;
static unsigned long counted, base;     /* base: counted as the current action began */
static const char *names[8], *only;
static int names_count;
static FILE *report;
static pid_t subject;                   /* whose calls count; 0 before the trigger */
static struct { pid_t pid; bool inside; int err; } pids[MAX_PIDS];

static void fail(const char *what)
{
	perror(what);
	_exit(125);
}

static int slot(pid_t pid)
{
	int i, free_one = -1;

	for (i = 0; i < MAX_PIDS; i++) {
		if (pids[i].pid == pid)
			return i;
		if (!pids[i].pid && free_one < 0)
			free_one = i;
	}
	if (free_one < 0)
		fail("too many processes");
	pids[free_one].pid = pid;
	pids[free_one].inside = false;
	pids[free_one].err = 0;
	return free_one;
}

/* A string of the program's, as far as its page goes. */
static void peek(pid_t pid, unsigned long at, char *to, size_t room)
{
	size_t n = 4096 - at % 4096 < room - 1 ? 4096 - at % 4096 : room - 1;
	struct iovec here = { .iov_base = to, .iov_len = n };
	struct iovec there = { .iov_len = n };
	ssize_t k;

	memcpy(&there.iov_base, &at, sizeof at);
	k = process_vm_readv(pid, &here, 1, &there, 1, 0);
	to[k < 0 ? 0 : k] = 0;
}

/* What the call is about: the path as it was given, or what the descriptor is. */
static void target(pid_t pid, const struct call *c, const struct user_regs_struct *r, char *to,
	size_t room)
{
	char link[64];
	ssize_t n;

	*to = 0;
	if (c->kind & PATH)
		peek(pid, r->rsi, to, room);
	if (*to || !(c->kind & (PATH | FD)))
		return;
	snprintf(link, sizeof link, "/proc/%d/fd/%d", (int)pid, (int)r->rdi);
	n = readlink(link, to, room - 1);
	to[n < 0 ? 0 : n] = 0;
}

static bool triggers(const char *path, unsigned long flags)
{
	int i;

	for (i = 0; i < names_count; i++) {
		const char *name = names[i];
		size_t n;

		if (!strncmp(name, "rw:", 3)) {
			name += 3;
			if ((flags & O_ACCMODE) != O_RDWR)
				continue;
		}
		n = strlen(name);
		if (!strncmp(path, name, n) && (!path[n] || path[n] == '/'))
			return true;
	}
	return false;
}

/* Is the word among those of the list, with commas between? */
static bool listed(const char *list, const char *word)
{
	size_t n = strlen(word);
	const char *p;

	for (p = list; (p = strstr(p, word)); p += n)
		if ((p == list || p[-1] == ',') && (!p[n] || p[n] == ','))
			return true;
	return false;
}

/* The fault that the call just counted gets; NULL for none. */
static const struct action *due(void)
{
	const struct action *a = &action[current];
	unsigned long k = counted - base;

	if (current >= actions || k < a->n)
		return NULL;
	if (k > a->n && a->repeat != '+' && !(a->repeat == '/' && (k - a->n) % 2 == 0))
		return NULL;
	if (current + 1 < actions) {
		current++;
		base = counted;
	}
	return a;
}

/* Does it only lock, or let go? */
static bool locks(const struct call *c, const char *path)
{
	size_t n = strlen(path);

	return c->number == SYS_flock || c->number == SYS_fcntl ||
	    (n > 5 && !strcmp(path + n - 5, ".lock"));
}

static bool counts(const struct call *c, const struct user_regs_struct *r, const char *path)
{
	int fault = current < actions ? action[current].fault : 0;

	if ((only && !listed(only, c->name)) || (no_locks && locks(c, path)))
		return false;
	if (c->kind & FD && (int)r->rdi == 2)
		return false;   /* the log */
	return (fault != HALF && fault != ONE) || (c->kind & TRANSFER && r->rdx > 1);
}

static void kill_all(void)
{
	int i;

	for (i = 0; i < MAX_PIDS; i++)
		if (pids[i].pid)
			kill(pids[i].pid, SIGKILL);
}

static void enter(int i)
{
	pid_t pid = pids[i].pid;
	struct user_regs_struct r;
	const struct action *a;
	const struct call *c = NULL;
	char path[512];
	size_t k;

	if (ptrace(PTRACE_GETREGS, pid, NULL, &r) < 0)
		return;
	for (k = 0; k < sizeof calls / sizeof *calls && !c; k++)
		if ((long)r.orig_rax == calls[k].number)
			c = &calls[k];
	if (!c)
		return;
	target(pid, c, &r, path, sizeof path);
	if (!subject && c->number == SYS_openat && triggers(path, r.rdx))
		subject = pid;
	if (pid != subject || !counts(c, &r, path))
		return;
	counted++;
	a = due();
	fprintf(report, "%lu %s %s%s%s\n", counted, c->name, *path ? path : "-",
	    a ? " <- " : "", a ? a->name : "");
	fflush(report);
	if (!a)
		return;
	if (a->fault == HALF || a->fault == ONE) {
		r.rdx = a->fault == ONE ? 1 : r.rdx / 2;
	} else {
		r.orig_rax = (unsigned long)-1;
		pids[i].err = a->fault > 0 ? a->fault : 0;
	}
	if (ptrace(PTRACE_SETREGS, pid, NULL, &r) < 0)
		fail("PTRACE_SETREGS");
	if (a->fault == KILL)
		kill_all();
}

static void leave(int i)
{
	struct user_regs_struct r;

	if (!pids[i].err)
		return;
	if (ptrace(PTRACE_GETREGS, pids[i].pid, NULL, &r) < 0)
		return;
	r.rax = (unsigned long)-pids[i].err;
	pids[i].err = 0;
	if (ptrace(PTRACE_SETREGS, pids[i].pid, NULL, &r) < 0)
		fail("PTRACE_SETREGS");
}

/* Until the last of its processes is gone; the code of the first. */
static int follow(pid_t first)
{
	int status, code = 125, i, sig;
	pid_t pid;

	while ((pid = waitpid(-1, &status, __WALL)) > 0) {
		if (WIFEXITED(status) || WIFSIGNALED(status)) {
			pids[slot(pid)].pid = 0;
			if (pid == first)
				code = WIFEXITED(status) ? WEXITSTATUS(status)
							 : 128 + WTERMSIG(status);
			continue;
		}
		for (i = 0; i < MAX_PIDS && pids[i].pid != pid; i++)
			;
		sig = WSTOPSIG(status);
		if (i == MAX_PIDS) {
			i = slot(pid);                  /* a new one: stopped for us */
			sig = sig == SIGSTOP ? 0 : sig;
		} else if (sig == (SIGTRAP | 0x80)) {
			pids[i].inside = !pids[i].inside;
			if (pids[i].inside)
				enter(i);
			else
				leave(i);
			sig = 0;
		} else if (status >> 16) {
			sig = 0;                        /* an event */
		}
		ptrace(PTRACE_SYSCALL, pid, NULL, sig);
	}
	return code;
}

static void parse(char *what)
{
	struct action *a = &action[actions];
	char *p;
	size_t i;

	if (actions == 2)
		fail("-a");
	a->n = strtoul(what, &p, 10);
	if (*p == '+' || *p == '/')
		a->repeat = *p++;
	if (*p++ != '=' || !a->n)
		fail("-a: no N=FAULT");
	for (i = 0; i < sizeof faults / sizeof *faults; i++)
		if (!strcmp(p, faults[i].name)) {
			a->fault = faults[i].fault;
			a->name = faults[i].name;
		}
	if (!a->name)
		fail("-a: no such fault");
	actions++;
}

static void late(int sig)
{
	(void)sig;
	_exit(124);             /* PTRACE_O_EXITKILL ends the rest */
}

int main(int argc, char **argv)
{
	const char *file = NULL;
	int c, status, null;
	pid_t child;

	while ((c = getopt(argc, argv, "+r:t:k:xa:")) >= 0)
		if (c == 'r')
			file = optarg;
		else if (c == 't' && names_count < 8)
			names[names_count++] = optarg;
		else if (c == 'k')
			only = optarg;
		else if (c == 'x')
			no_locks = true;
		else if (c == 'a')
			parse(optarg);
		else
			return 64;
	if (!file || !names_count || optind == argc)
		return 64;
	report = fopen(file, "we");
	if (!report)
		fail(file);
	child = fork();
	if (child < 0)
		fail("fork");
	if (!child) {
		if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
			fail("PTRACE_TRACEME");
		raise(SIGSTOP);
		execvp(argv[optind], argv + optind);
		fail(argv[optind]);
	}
	if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
		fail("waitpid");
	if (ptrace(PTRACE_SETOPTIONS, child, NULL, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEFORK |
	    PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC |
	    PTRACE_O_EXITKILL) < 0)
		fail("PTRACE_SETOPTIONS");
	slot(child);
	null = open("/dev/null", O_RDWR | O_CLOEXEC);   /* the line's end is the program's alone */
	dup2(null, 0);
	dup2(null, 1);
	signal(SIGALRM, late);
	alarm(60);
	ptrace(PTRACE_SYSCALL, child, NULL, 0);
	return follow(child);
}
