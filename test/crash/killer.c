/* killer.c: runs a program and all that it forks under ptrace, and kills every process of it before
 * or after the n-th system call from a trigger on.
 *
 *   killer [-n N] [-a] [-w] [-b NAME | -c CALL] -o REPORT program argument...
 *
 * -n N     which call, from 1 on; 0: count them, kill nothing
 * -a       when the call has returned; else before the kernel has begun it
 * -w       whosever call it is; else only calls of the process that pulled the trigger
 * -b NAME  the trigger is the first open of NAME for reading and writing, or to make it
 * -c CALL  the trigger is the first call of this name; without -b and -c it is the exec
 *
 * The call that is the trigger is call 1.  REPORT gets one line of words, key=value.  The exit code
 * is 137 where it killed, else the program's own. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KILLED = 137, BAD = 99, HANG = 300, MAX_PROCESSES = 64 };

static struct { long n; bool after, whole; const char *box, *call, *report; } want;
static struct {
	pid_t first, trigger, armed;    /* armed: it is inside call n */
	long calls;
	char call[128], file[512], result[40];
	int exit;
} seen;
static pid_t process[MAX_PROCESSES];

#define NAME(x) { SYS_##x, #x }
static const struct { long number; const char *name; } names[] = {
	NAME(accept), NAME(bind), NAME(brk), NAME(chdir), NAME(chroot), NAME(clock_gettime),
	NAME(clone), NAME(close), NAME(connect), NAME(dup), NAME(exit), NAME(exit_group),
	NAME(execve), NAME(fchmod), NAME(fchmodat), NAME(fchown), NAME(fchownat), NAME(fcntl),
	NAME(fdatasync), NAME(flock), NAME(fsync), NAME(ftruncate), NAME(futex), NAME(getdents64),
	NAME(geteuid), NAME(getpid), NAME(getpeername), NAME(getsockopt), NAME(getuid), NAME(kill),
	NAME(listen), NAME(lseek), NAME(mkdirat), NAME(mmap), NAME(mprotect), NAME(munmap),
	NAME(nanosleep), NAME(clock_nanosleep), NAME(openat), NAME(ppoll), NAME(prctl),
	NAME(pread64), NAME(pwrite64), NAME(pwritev), NAME(read), NAME(readv), NAME(recvfrom),
	NAME(recvmsg), NAME(renameat), NAME(renameat2), NAME(sendmsg), NAME(sendto),
	NAME(setgroups), NAME(setresgid), NAME(setresuid), NAME(setsockopt), NAME(signalfd4),
	NAME(socket), NAME(socketpair), NAME(sync_file_range), NAME(uname), NAME(unlinkat),
	NAME(wait4), NAME(write), NAME(writev),
#ifdef SYS_newfstatat
	NAME(newfstatat),
#endif
#ifdef SYS_fstat
	NAME(fstat),
#endif
#ifdef SYS_fstatfs
	NAME(fstatfs),
#endif
#ifdef SYS_poll
	NAME(poll),
#endif
#ifdef SYS_open
	NAME(open),
#endif
#ifdef SYS_fork
	NAME(fork),
#endif
#ifdef SYS_rename
	NAME(rename),
#endif
#ifdef SYS_unlink
	NAME(unlink),
#endif
#ifdef SYS_ftruncate64
	NAME(ftruncate64),
#endif
#ifdef SYS_fcntl64
	NAME(fcntl64),
#endif
};

#ifdef SYS_open
enum { CALL_OPEN = SYS_open };
#else
enum { CALL_OPEN = -1 };
#endif

static const char *name_of(unsigned long number)
{
	static char text[24];
	size_t i;

	for (i = 0; i < sizeof names / sizeof *names; i++)
		if ((unsigned long)names[i].number == number)
			return names[i].name;
	snprintf(text, sizeof text, "call-%lu", number);
	return text;
}

static void fail(const char *what)
{
	fprintf(stderr, "killer: %s: %s\n", what, strerror(errno));
	exit(BAD);      /* and all that we trace dies too */
}

static void add(pid_t pid)
{
	int i, empty = -1;

	for (i = 0; i < MAX_PROCESSES && process[i] != pid; i++)
		if (!process[i] && empty < 0)
			empty = i;
	if (i < MAX_PROCESSES)
		return;
	if (empty < 0)
		fail("too many processes");
	process[empty] = pid;
}

static void drop(pid_t pid)
{
	int i;

	for (i = 0; i < MAX_PROCESSES; i++)
		if (process[i] == pid)
			process[i] = 0;
}

/* Until the last of them is dead and reaped: a zombie would still look alive to who asks for its
 * number. */
static void kill_all(void)
{
	int i, status;
	pid_t pid;

	for (i = 0; i < MAX_PROCESSES; i++)
		if (process[i])
			kill(process[i], SIGKILL);
	while ((pid = waitpid(-1, &status, __WALL)) > 0 || errno == EINTR)
		if (pid > 0 && WIFSTOPPED(status))
			kill(pid, SIGKILL);
}

static bool string_is(pid_t pid, unsigned long at, const char *s)
{
	size_t n = strlen(s) + 1, i;
	long word;

	for (i = 0; i < n; i += sizeof word) {
		errno = 0;
		word = ptrace(PTRACE_PEEKDATA, pid, at + i, NULL);
		if (errno || memcmp(&word, s + i, n - i < sizeof word ? n - i : sizeof word))
			return false;
	}
	return true;
}

static bool is_trigger(pid_t pid, const struct __ptrace_syscall_info *c)
{
	bool old = c->entry.nr == (unsigned long)CALL_OPEN;
	unsigned long path = c->entry.args[!old], flags = c->entry.args[2 - old];

	if (want.call)
		return !strcmp(name_of(c->entry.nr), want.call);
	return want.box && (old || c->entry.nr == SYS_openat) &&
	    ((flags & O_ACCMODE) == O_RDWR || flags & O_CREAT) && string_is(pid, path, want.box);
}

static void note(pid_t pid, const struct __ptrace_syscall_info *c)
{
	char link[64];
	ssize_t n;

	snprintf(seen.call, sizeof seen.call, "%s first=%lld", name_of(c->entry.nr),
	    (long long)c->entry.args[0]);
	snprintf(link, sizeof link, "/proc/%d/fd/%lld", (int)pid, (long long)c->entry.args[0]);
	n = readlink(link, seen.file, sizeof seen.file - 1);
	seen.file[n < 0 ? 0 : n] = 0;
}

/* A stop at a call's begin or end.  True: now. */
static bool is_time(pid_t pid)
{
	struct __ptrace_syscall_info c;

	if (ptrace(PTRACE_GET_SYSCALL_INFO, pid, sizeof c, &c) <= 0)
		return false;
	if (c.op == PTRACE_SYSCALL_INFO_EXIT && pid == seen.armed) {
		snprintf(seen.result, sizeof seen.result, "%lld", (long long)c.exit.rval);
		return true;
	}
	if (c.op != PTRACE_SYSCALL_INFO_ENTRY)
		return false;
	if (!seen.trigger && is_trigger(pid, &c))
		seen.trigger = pid;
	if (!seen.trigger || (!want.whole && pid != seen.trigger))
		return false;
	if (++seen.calls != want.n)
		return false;
	note(pid, &c);
	seen.armed = want.after ? pid : 0;
	return !want.after;
}

/* One stop of pid; the signal that it is to go on with. */
static int look(pid_t pid, int status)
{
	unsigned long child;
	int event = status >> 16;

	add(pid);
	if (event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK ||
	    event == PTRACE_EVENT_CLONE) {
		if (ptrace(PTRACE_GETEVENTMSG, pid, NULL, &child) == 0)
			add((pid_t)child);
	} else if (event == PTRACE_EVENT_EXEC && !want.box && !want.call && !seen.trigger)
		seen.trigger = pid;
	return event || WSTOPSIG(status) == (SIGTRAP | 0x80) ? 0 : WSTOPSIG(status);
}

/* True: it is done, all are dead by our hand. */
static bool watch(void)
{
	int status, signal;
	pid_t pid;

	while ((pid = waitpid(-1, &status, __WALL)) > 0 || errno == EINTR) {
		if (pid < 0)
			continue;
		if (WIFSTOPPED(status)) {
			signal = look(pid, status);
			if (WSTOPSIG(status) == (SIGTRAP | 0x80) && is_time(pid)) {
				kill_all();
				return true;
			}
			ptrace(PTRACE_SYSCALL, pid, NULL, (long)signal);
			continue;
		}
		drop(pid);
		if (pid == seen.first)
			seen.exit = WIFEXITED(status) ? WEXITSTATUS(status)
						      : 128 + WTERMSIG(status);
		if (pid == seen.armed) {        /* a call that does not return: exit */
			kill_all();
			return true;
		}
	}
	return false;
}

/* Two that take turns all the time are many times faster on one processor. */
static void stay(void)
{
	cpu_set_t here;
	int cpu = sched_getcpu();

	CPU_ZERO(&here);
	if (cpu < 0 || cpu >= CPU_SETSIZE)
		return;
	CPU_SET((size_t)cpu, &here);
	sched_setaffinity(0, sizeof here, &here);
}

/* The child waits until it is traced, and becomes the program. */
static void start(char **argv)
{
	const long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACEFORK |
	    PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC;
	int gate[2];
	char c = 0;

	if (pipe2(gate, O_CLOEXEC) < 0 || (seen.first = fork()) < 0)
		fail("cannot start");
	if (!seen.first) {
		close(gate[1]);
		if (read(gate[0], &c, 1) == 1)
			execvp(*argv, argv);
		fprintf(stderr, "killer: %s: %s\n", *argv, strerror(errno));
		_exit(BAD);
	}
	if (ptrace(PTRACE_SEIZE, seen.first, NULL, options) < 0 ||
	    ptrace(PTRACE_INTERRUPT, seen.first, NULL, NULL) < 0)
		fail("ptrace");
	if (write(gate[1], &c, 1) != 1)
		fail("cannot start");
	close(gate[0]);
	close(gate[1]);
	close(0);       /* the client's line is the program's alone */
	close(1);
}

static void tell(bool killed)
{
	FILE *f = fopen(want.report, "w");

	if (!f)
		fail(want.report);
	fprintf(f, "trigger=%d killed=%d calls=%ld exit=%d", seen.trigger > 0, killed, seen.calls,
	    seen.exit);
	if (*seen.call)
		fprintf(f, " call=%s", seen.call);
	if (*seen.result)
		fprintf(f, " result=%s", seen.result);
	if (*seen.file)
		fprintf(f, " file=%s", seen.file);
	fputc('\n', f);
	if (fclose(f))
		fail(want.report);
}

int main(int argc, char **argv)
{
	bool killed;
	int c;

	while ((c = getopt(argc, argv, "+n:awb:c:o:")) != -1)
		switch (c) {
		case 'n': want.n = atol(optarg); break;
		case 'a': want.after = true; break;
		case 'w': want.whole = true; break;
		case 'b': want.box = optarg; break;
		case 'c': want.call = optarg; break;
		case 'o': want.report = optarg; break;
		default: return BAD;
		}
	if (!want.report || optind == argc) {
		fprintf(stderr, "killer: no -o, or no program\n");
		return BAD;
	}
	stay();
	alarm(HANG);    /* its end is ours, and ours is theirs */
	prctl(PR_SET_CHILD_SUBREAPER, 1L);
	start(argv + optind);
	killed = watch();
	tell(killed);
	return killed ? KILLED : seen.exit;
}
