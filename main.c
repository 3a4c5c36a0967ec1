/* main.c: owns options, listening, limits, signals and roles.  The only file that changes identity.
 * As root it parses its command line and addresses, and nothing that comes from the net. */
#include "almond.h"

#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

struct conf conf = { .spool = SPOOL_DIR };

static struct counters own_counters;
struct counters *counters = &own_counters;

/* ---- identity ---- */

/* The bare calls: libc's tell every thread, of which there are none. */
#ifdef SYS_setresuid32
enum { CALL_UID = SYS_setresuid32, CALL_GID = SYS_setresgid32, CALL_GROUPS = SYS_setgroups32 };
#else
enum { CALL_UID = SYS_setresuid, CALL_GID = SYS_setresgid, CALL_GROUPS = SYS_setgroups };
#endif

static int take(uid_t uid, gid_t gid, size_t groups, const gid_t *group)
{
	if (syscall(CALL_GROUPS, groups, group) < 0 || syscall(CALL_GID, gid, gid, gid) < 0 ||
	    syscall(CALL_UID, uid, uid, uid) < 0)
		return -errno;
	must(getuid() == uid && geteuid() == uid && syscall(CALL_UID, 0, 0, 0) < 0);
	return 0;
}

int become(uid_t uid, gid_t gid)
{
	struct stat st;
	bool with;

	if (geteuid() != 0)
		return geteuid() == uid ? 0 : -EPERM;
	if (uid == 0 || gid == 0 || stat_at(AT_FDCWD, conf.spool, &st, 0) < 0)
		return -EPERM;
	with = st.st_mode & S_IWGRP && st.st_gid != 0;
	return take(uid, gid, with, &st.st_gid);
}

bool make_empty_root(void)
{
	return (mkdir(RUN_DIR, 0700) == 0 || errno == EEXIST) &&
	    (mkdir(RUN_DIR "/empty", 0555) == 0 || errno == EEXIST);
}

static bool empty_root(void)
{
	return chroot(RUN_DIR "/empty") == 0 ||
	    (make_empty_root() && chroot(RUN_DIR "/empty") == 0);
}

void become_session(void)
{
	if (geteuid() != 0)
		return;
	if (!empty_root() || chdir("/") < 0 ||
	    take(conf.session_uid, conf.session_gid, 0, NULL) < 0) {
		log_line(L_ERROR, "no session: cannot be %s in " RUN_DIR "/empty; make it possible",
		    conf.session);
		_exit(EX_OS);
	}
}

/* -U, else SESSION_USER, else nobody. */
static int session_user(void)
{
	struct account who = { .uid = 0 };
	bool given = conf.session != NULL;
	int err;

	conf.session_uid = geteuid();
	conf.session_gid = getegid();
	if (!given)
		conf.session = SESSION_USER;
	if (geteuid() != 0)
		return 0;
	err = system_account(conf.session, &who);
	if (err && !given) {
		conf.session = "nobody";
		if (system_account(conf.session, &who))
			who.uid = who.gid = 65534;
	} else if (err || who.uid == 0 || who.gid == 0) {
		log_line(L_ERROR, "-U %s: %s; name an account without rights", conf.session,
		    err ? reason(err) : "it is root");
		return EX_CONF;
	}
	conf.session_uid = who.uid;
	conf.session_gid = who.gid;
	return 0;
}

/* ---- addresses: all as IPv6, IPv4 mapped into it ---- */

struct net { uint8_t addr[16]; unsigned bits; };
static const struct net loopback4 = {.addr = {[10] = 0xFF, [11] = 0xFF, [12] = 127}, .bits = 104},
			loopback6 = {.addr = {[15] = 1}, .bits = 128};
static struct net nets[MAX_NETS];
static unsigned net_count;

static void map_v4(uint8_t to[16], const void *v4)
{
	memset(to, 0, 10);
	memset(to + 10, 0xFF, 2);
	memcpy(to + 12, v4, 4);
}

static bool parse_v4(const char *s, uint8_t to[16])
{
	unsigned v, i, k;

	map_v4(to, "\0\0\0");
	for (i = 12; i < 16; i++, s++) {
		for (v = k = 0; *s >= '0' && *s <= '9' && k < 4; k++)
			v = v * 10 + (unsigned)(*s++ - '0');
		if (!k || v > 255 || *s != (i < 15 ? '.' : 0))
			return false;
		to[i] = (uint8_t)v;
	}
	return true;
}

/* Groups of hexadecimal digits; `gap` is where "::" stands for as many zeros as are missing. */
static bool parse_v6(const char *s, uint8_t to[16])
{
	unsigned n = 0, gap = 8, v, k;

	memset(to, 0, 16);
	if (*s == ':' && *++s != ':')
		return false;
	for (; *s && n < 8; n++) {
		if (*s == ':') {
			if (gap < 8)
				return false;
			gap = n;
			if (!*++s)
				break;
		}
		for (v = k = 0; hex_digit(*s) >= 0 && k < 5; k++)
			v = v << 4 | (unsigned)hex_digit(*s++);
		if (!k || k > 4 || (*s && *s++ != ':') || (s[-1] == ':' && !*s))
			return false;
		to[2 * n] = (uint8_t)(v >> 8);
		to[2 * n + 1] = (uint8_t)v;
	}
	if (*s || (gap == 8 && n != 8))
		return false;
	if (gap < 8) {
		memmove(to + 16 - 2 * (n - gap), to + 2 * gap, 2 * (n - gap));
		memset(to + 2 * gap, 0, 16 - 2 * n);
	}
	return true;
}

static bool parse_address(const char *text, uint8_t to[16], bool *v4)
{
	*v4 = parse_v4(text, to);
	return *v4 || parse_v6(text, to);
}

/* -n NET/LEN */
static bool add_net(char *text)
{
	char *slash = find(text, '/');
	struct net *n = &nets[net_count];
	uint64_t bits = 0;
	bool v4;

	if (slash)
		*slash++ = 0;
	if (net_count == MAX_NETS || !parse_address(text, n->addr, &v4))
		return false;
	if (slash && number(slash, v4 ? 32 : 128, &bits) < 0)
		return false;
	n->bits = (unsigned)((slash ? bits : v4 ? 32 : 128) + (v4 ? 96 : 0));
	net_count++;
	return true;
}

static bool in_net(const uint8_t a[16], const struct net *n)
{
	unsigned whole = n->bits / 8, rest = n->bits % 8;

	return !memcmp(a, n->addr, whole) &&
	    (!rest || (a[whole] ^ n->addr[whole]) >> (8 - rest) == 0);
}

static bool is_loopback(const uint8_t a[16])
{
	return in_net(a, &loopback4) || in_net(a, &loopback6);
}

static bool peer_address(int fd, uint8_t to[16])
{
	struct sockaddr_storage s;
	socklen_t n = sizeof s;

	if (getpeername(fd, (struct sockaddr *)&s, &n) < 0)
		return false;
	if (s.ss_family == AF_INET)
		map_v4(to, &((const struct sockaddr_in *)&s)->sin_addr);
	else if (s.ss_family == AF_INET6)
		memcpy(to, &((const struct sockaddr_in6 *)&s)->sin6_addr, 16);
	return s.ss_family == AF_INET || s.ss_family == AF_INET6;
}

/* As text, the first run of zero groups as "::". */
static void write_v6(char *to, const uint8_t a[16])
{
	unsigned i, group;
	bool zeros = false, open = false;
	size_t n = 0;

	for (i = 0; i < 16; i += 2) {
		group = (unsigned)a[i] << 8 | a[i + 1];
		if (!group && (open || !zeros)) {
			zeros = open = true;
			continue;
		}
		n += fmt(to + n, 48 - n, open ? "::%x" : i ? ":%x" : "%x", group);
		open = false;
	}
	if (open)
		fmt(to + n, 48 - n, "::");
}

bool peer_trusted(int fd, char *addr)
{
	static const struct net mapped = { .addr = { [10] = 0xFF, [11] = 0xFF }, .bits = 96 };
	uint8_t a[16];
	unsigned i;

	memcpy(addr, "local", 6);
	if (!peer_address(fd, a))
		return true;
	if (in_net(a, &mapped))
		fmt(addr, 48, "%u.%u.%u.%u", a[12], a[13], a[14], a[15]);
	else
		write_v6(addr, a);
	for (i = 0; i < net_count; i++)
		if (in_net(a, &nets[i]))
			return true;
	return is_loopback(a);
}

/* ---- sockets that we were started with ---- */

static int socket_option(int fd, int option)
{
	int v = 0;
	socklen_t n = sizeof v;

	return getsockopt(fd, SOL_SOCKET, option, &v, &n) < 0 ? -1 : v;
}

#if ENABLE_ALONE

static int listening[MAX_LISTEN], listen_count;

static int listen_on(const struct sockaddr *a, socklen_t n, bool both)
{
	int fd = open_socket(a->sa_family, SOCK_STREAM | SOCK_NONBLOCK), on = 1,
	    off = 0, err = 0;

	if (fd < 0)
		return -errno;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (a->sa_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, both ? &off : &on, sizeof on);
	if (bind(fd, a, n) < 0 || listen(fd, 128) < 0) {
		err = -errno;
		close(fd);
		return err;
	}
	listening[listen_count++] = fd;
	return 0;
}

/* -l [ADDR:]PORT; an IPv6 address stands in brackets.  A lone port means all addresses, of both
 * families where there are both. */
static int add_listener(const char *option)
{
	struct sockaddr_in6 s6 = { .sin6_family = AF_INET6 };
	struct sockaddr_in s4 = { .sin_family = AF_INET };
	char text[64], *port, *addr = NULL;
	bool v4 = false;
	uint64_t n;
	int err;

	fmt(text, sizeof text, "%s", option);
	port = find_last(text, ':');
	if (port) {
		*port++ = 0;
		addr = text;
		if (*addr == '[' && port[-2] == ']') {
			port[-2] = 0;
			addr++;
		}
	} else {
		port = text;
	}
	if (number(port, 65535, &n) < 0 || !n || listen_count == MAX_LISTEN ||
	    (addr && !parse_address(addr, s6.sin6_addr.s6_addr, &v4))) {
		log_line(L_ERROR, "-l %s: give PORT, ADDR:PORT or [ADDR]:PORT, %d times at most",
		    option, MAX_LISTEN);
		return EX_USAGE_;
	}
	s6.sin6_port = s4.sin_port = htons((uint16_t)n);
	if (v4)
		memcpy(&s4.sin_addr, s6.sin6_addr.s6_addr + 12, 4);
	err = v4 ? -EAFNOSUPPORT : listen_on((struct sockaddr *)&s6, sizeof s6, true);
	if (v4 || (!addr && (err == -EAFNOSUPPORT || err == -EADDRNOTAVAIL)))
		err = listen_on((struct sockaddr *)&s4, sizeof s4, false);
	if (err)
		log_line(L_ERROR, "cannot listen on %s: %s%s", option, reason(err),
		    err == -EACCES ? "; ports below 1024 need root" : "");
	return err == -EACCES ? EX_PERM : err ? EX_UNAVAIL : 0;
}

/* ---- the listener ---- */

struct slot { pid_t pid; uint8_t addr[16]; };
static struct slot slots[MAX_SESSIONS];
static unsigned session_count, refused;
/* Sessions from the same address, or IPv6 /64; those of loopback are not counted. */
static unsigned from_same(const uint8_t addr[16])
{
	struct net n = { .bits = 128 };
	unsigned i, k = 0;

	memcpy(n.addr, addr, 16);
	for (i = 0; i < 10 && !addr[i]; i++)
		;
	if (i < 10)
		n.bits = 64;
	if (is_loopback(addr))
		return 0;
	for (i = 0; i < MAX_SESSIONS; i++)
		k += slots[i].pid && in_net(slots[i].addr, &n);
	return k;
}

static struct slot *free_slot(void)
{
	unsigned i;

	for (i = 0; i < MAX_SESSIONS; i++)
		if (!slots[i].pid)
			return &slots[i];
	return NULL;
}

static void accept_one(int from, int signals)
{
	static const char full[] = "-ERR [SYS/TEMP] too many sessions, try again later\r\n";
	int fd = accept(from, NULL, NULL), i;
	struct slot *slot = free_slot();
	uint8_t addr[16] = { 0 };
	pid_t pid;

	if (fd < 0) {
		if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
			nap(100);
		return;
	}
	peer_address(fd, addr);
	pid = slot && from_same(addr) < MAX_PER_ADDRESS ? branch() : -1;
	if (pid == 0) {
		for (i = 0; i < listen_count; i++)
			close(listening[i]);
		close(signals);
		_exit(monitor(fd, fd));
	}
	if (pid > 0) {
		slot->pid = pid;
		memcpy(slot->addr, addr, sizeof addr);
		session_count++;
	} else {
		refused++;
		send(fd, full, sizeof full - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
	}
	close(fd);
}

static void reap(void)
{
	unsigned i;
	pid_t pid;

	while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
		for (i = 0; i < MAX_SESSIONS; i++)
			if (slots[i].pid == pid) {
				slots[i].pid = 0;
				session_count--;
			}
}

static void reload(void)
{
	unsigned faults = 0;
	int n = 0;

	if (ENABLE_USERS && conf.users)
		n = users_check(conf.users, &faults);
	log_line(L_NOTE, "reload: %d accounts in the users file, %u faults", n < 0 ? 0 : n, faults);
}

/* Let sessions that commit finish; the others end at once. */
static int stop_all(void)
{
	uint64_t end = now() + 60000;
	unsigned i;

	for (i = 0; i < (unsigned)listen_count; i++)
		close(listening[i]);
	for (i = 0; i < MAX_SESSIONS; i++)
		if (slots[i].pid)
			kill(slots[i].pid, SIGTERM);
	while (session_count && now() < end) {
		reap();
		if (session_count)
			nap(20);
	}
	log_line(L_NOTE, "stopped");
	return 0;
}

/* False: stop. */
static bool obey(int signal)
{
	if (signal == SIGHUP)
		reload();
	if (signal == SIGUSR1)
		log_line(L_NOTE,
		    "counters: sessions=%u refused=%u logins=%u failures=%u retr=%u dele=%u",
		    session_count, refused, counters->logins, counters->failures,
		    counters->retrieved, counters->deleted);
	if (signal == SIGCHLD)
		reap();
	return signal != SIGTERM && signal != SIGINT;
}

static int listen_for_ever(void)
{
	static const int signals[] = { SIGHUP, SIGUSR1, SIGTERM, SIGINT, SIGCHLD, SIGPIPE, 0 };
	struct pollfd p[MAX_LISTEN + 1];
	int i, signal = 0;

	p[0] = (struct pollfd){ .fd = signal_open(signals), .events = POLLIN };
	for (i = 0; i < listen_count; i++)
		p[i + 1] = (struct pollfd){ .fd = listening[i], .events = POLLIN };
	counters =
	    mmap(NULL, sizeof *counters, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (counters == MAP_FAILED || p[0].fd < 0)
		return EX_OS;
	log_line(L_NOTE, "started: spool %s, sessions as uid %u", conf.spool,
	    (unsigned)conf.session_uid);
	while (obey(signal)) {
		poll(p, (nfds_t)listen_count + 1, -1);
		for (i = 0; i < listen_count; i++)
			if (p[i + 1].revents)
				accept_one(listening[i], p[0].fd);
		signal = signal_next(p[0].fd);
	}
	return stop_all();
}

/* Into the background, after all that can fail: who started us sees the exit code. */
static int background(void)
{
	int null;
	pid_t pid = branch();

	if (pid)
		_exit(pid < 0 ? EX_OS : 0);
	setsid();
	null = open_at(AT_FDCWD, "/dev/null", O_RDWR);
	if (null < 0 ||
	    (*conf.spool == '/' && (!conf.users || *conf.users == '/') && chdir("/") < 0))
		return EX_OS;
	dup2(null, 0);
	dup2(null, 1);
	if (!log_open_stderr())
		dup2(null, 2);
	close(null);
	return 0;
}

static const char *environment(const char *name)
{
	size_t n = strlen(name);
	char **e;

	for (e = environ; *e; e++)
		if (strlen(*e) > n && !memcmp(*e, name, n))
			return *e + n;
	return NULL;
}

/* systemd's protocol: LISTEN_FDS sockets from descriptor 3 on.  A listening one (Accept=no) is
 * listened on; a connected one (Accept=yes) is the client.  Returns that client, or -1. */
static int take_sockets(void)
{
	const char *pid = environment("LISTEN_PID="), *count = environment("LISTEN_FDS=");
	uint64_t p, n, fd;

	if (!pid || !count || number(pid, INT32_MAX, &p) < 0 || (pid_t)p != getpid() ||
	    number(count, MAX_LISTEN, &n) < 0)
		return -1;
	for (fd = 3; fd < 3 + n; fd++) {
		control((int)fd, F_SETFD, FD_CLOEXEC);
		if (socket_option((int)fd, SO_ACCEPTCONN) == 0)
			return (int)fd;
		if (listen_count < MAX_LISTEN) {
			control((int)fd, F_SETFL, control((int)fd, F_GETFL, 0) | O_NONBLOCK);
			listening[listen_count++] = (int)fd;
		}
	}
	return -1;
}

static int alone(char *const listeners[], unsigned n, bool foreground)
{
	unsigned i;
	int err = check_conf(true);

	for (i = 0; i < n && !err; i++)
		err = add_listener(listeners[i]);
	if (!err && !listen_count)
		err = add_listener("110");
	if (!err && !foreground)
		err = background();
	return err ? err : listen_for_ever();
}

/* What standard input is decides, where no option does: a listening socket is listened on, a
 * connected one is a client, as inetd gives it.  -1: serve standard input. */
static int start_alone(char *const listeners[], unsigned n, bool foreground)
{
	int client = take_sockets();

	if (client >= 0)
		return monitor(client, client);
	if (!listen_count && !n && socket_option(0, SO_ACCEPTCONN) > 0) {
		control(0, F_SETFL, control(0, F_GETFL, 0) | O_NONBLOCK);
		listening[listen_count++] = 0;
	}
	if (!listen_count && !n && !foreground && socket_option(0, SO_TYPE) >= 0)
		return -1;
	return alone(listeners, n, foreground || listen_count);
}
#else
static int start_alone(char *const listeners[], unsigned n, bool foreground)
{
	(void)listeners;
	(void)n;
	(void)foreground;
	return -1;
}
#endif

/* ---- the command line ---- */

static const char usage[] =
	"usage: almond [-d SPOOL] [-u USERS] [-s] [-n NET/LEN] [-U USER]\n"
	"              [-l [ADDR:]PORT] [-FEiTVh]\n"
	"       almond passwd|deliver|check ...\n"
	" -d spool (" SPOOL_DIR ")\n"
	" -u users file, -s system accounts (neither: " USERS_FILE ", else -s)\n"
	" -n network where a password may cross in clear\n"
	" -U identity of sessions (" SESSION_USER ")\n"
	" -l listen here (110), -F in the foreground, -E log to standard error\n"
	" -i serve standard input (inetd)\n"
	" -T check the configuration, -V version and switches\n";

#define WORDS(x) #x
#define SWITCH_(name, x) "ENABLE_" name " " WORDS(x) "\n"
#define SWITCH(x) SWITCH_(#x, ENABLE_##x)
static void print_version(void)
{
	print("almond " VERSION "\n"
	    SWITCH(MBOX) SWITCH(MAILDIR) SWITCH(CONTENT_LENGTH) SWITCH(USERS) SWITCH(SYSTEM)
	    SWITCH(SHA_CRYPT) SWITCH(MD5_CRYPT) SWITCH(CRYPT) SWITCH(APOP) SWITCH(LAST)
	    SWITCH(UTF8) SWITCH(ALONE) SWITCH(PRIVSEP) SWITCH(PASSWD) SWITCH(DELIVER)
	    SWITCH(CHECK) "session: at most %u bytes, and %u a message\n",
	    (unsigned)(sizeof(struct wire) + SCAN_BUFFER), (unsigned)(sizeof(struct msg) + 24));
}

static int bad_usage(void)
{
	write_all(2, usage, sizeof usage - 1);
	return EX_USAGE_;
}

int conf_fill(void)
{
	if (!conf.users && !conf.system) {
		if (ENABLE_USERS && (!ENABLE_SYSTEM || access(USERS_FILE, F_OK) == 0))
			conf.users = USERS_FILE;
		else
			conf.system = true;
	}
	if ((conf.users && !ENABLE_USERS) || (conf.system && !ENABLE_SYSTEM)) {
		log_line(L_ERROR, "this build knows no %s: see `almond -V`",
		    conf.system ? "-s" : "-u");
		return EX_CONF;
	}
	return session_user();
}

int main(int argc, char **argv)
{
	bool inetd = false, foreground = false, to_stderr = false, test = false;
	char *listeners[MAX_LISTEN], *value = NULL;
	unsigned n = 0;
	int at = 1, c;

	while ((c = open_at(AT_FDCWD, "/dev/null", O_RDWR)) >= 0 && c < 3)
		;               /* no socket of ours may be taken for standard input */
	close(c);
	umask(077);
	if (argc > 1 && (c = tool(argc - 1, argv + 1)) >= 0)
		return c;
	if (argc > 1 && !strcmp(argv[1], "--version"))
		return print("almond " VERSION "\n"), 0;
	if (argc > 1 && !strcmp(argv[1], "--help"))
		return print("%s", usage), 0;
	while ((c = option(argc, argv, &at, "d:u:sl:n:U:FEiTVh", &value)) >= 0) {
		switch (c) {
		case 'd': conf.spool = value; break;
		case 'u': conf.users = value; break;
		case 's': conf.system = true; break;
		case 'l':
			if (n == MAX_LISTEN)
				return bad_usage();
			listeners[n++] = value;
			break;
		case 'n':
			if (!add_net(value))
				return bad_usage();
			break;
		case 'U': conf.session = value; break;
		case 'F': foreground = true; break;
		case 'E': to_stderr = true; break;
		case 'i': inetd = true; break;
		case 'T': test = true; break;
		case 'V': print_version(); return 0;
		case 'h': print("%s", usage); return 0;
		default: return bad_usage();
		}
	}
	if (at < argc || (!ENABLE_ALONE && n))
		return bad_usage();
	log_open(to_stderr || test);
	c = conf_fill();
	if (c)
		return c;
	if (test)
		return check_conf(true);
	c = inetd ? -1 : start_alone(listeners, n, foreground);
	return c >= 0 ? c : monitor(0, socket_option(0, SO_TYPE) >= 0 ? 0 : 1);
}
