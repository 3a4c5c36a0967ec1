/* tools.c: owns what the tools share with each other and with main: options, plain output, the look
 * at the configuration.  Runs as whoever started the binary. */
#include "almond.h"

#include <sys/mman.h>
#include <sys/statfs.h>

int option(int argc, char **argv, int *at, const char *known, char **value)
{
	static char *cluster;
	const char *k;
	int c;

	if (!cluster || !*cluster) {
		if (*at >= argc || argv[*at][0] != '-' || !argv[*at][1])
			return -1;
		cluster = argv[(*at)++] + 1;
		if (!strcmp(cluster, "-")) {
			cluster = NULL;
			return -1;
		}
	}
	*value = argv[*at - 1];
	c = (unsigned char)*cluster++;
	k = c == ':' ? NULL : find(known, (char)c);
	if (k && k[1] != ':')
		return c;
	if (k && (*cluster || *at < argc))
		*value = *cluster ? cluster : argv[(*at)++];
	else
		c = '?';
	cluster = NULL;
	return c;
}

void print(const char *format, ...)
{
	char text[2048];
	va_list ap;
	size_t n;

	va_start(ap, format);
	n = vfmt(text, sizeof text, format, ap);
	va_end(ap);
	write_all(1, text, n);
}

/* ---- the configuration ---- */

/* Magic numbers: linux/magic.h; musl's headers know none. */
const char *fs_warning(int fd)
{
	struct statfs s;

	switch (fstatfs(fd, &s) < 0 ? 0 : (uint32_t)s.f_type) {
	case 0x01021994:
	case 0x858458f6:
		return "is on tmpfs: ALL MAIL IS LOST at reboot; put it on a disk (-d)";
	case 0x4d44:
	case 0x2011bab0:
		return "is on vfat or exfat: no owners, no ':' in names; use ext4 or f2fs";
	case 0x6969:
		return "is on NFS, where flock is left out; let this host alone write it";
	}
	return NULL;
}

/* Open what the configuration names.  A descriptor; or what is wrong is said, with what to do where
 * it is not a matter of rights, and it is minus the exit code. */
static int need(const char *path, int flags, const char *advice)
{
	int fd = open_at(AT_FDCWD, path, flags | O_NONBLOCK);
	struct stat st;

	/* "." is looked up in a directory: only who may search it gets an answer */
	if (fd >= 0 && flags & O_DIRECTORY && stat_at(fd, ".", &st, 0) < 0)
		fd = -errno;
	if (fd >= 0)
		return fd;
	log_line(L_ERROR, "%s: %s; %s", path, reason(fd),
	    fd == -EACCES ? "run as root or its owner" : advice);
	return fd == -EACCES ? -EX_PERM : -EX_CONF;
}

static int check_spool(bool prepare)
{
	int fd = need(conf.spool, O_RDONLY | O_DIRECTORY, "make it, or name another (-d)");
	const char *warning;

	if (fd < 0)
		return -fd;
	warning = fs_warning(fd);
	if (warning)
		log_line(L_WARN, "spool %s %s", conf.spool, warning);
	if (ENABLE_MBOX && prepare && !journal_prepare(fd))
		log_line(L_WARN, "%s: see THE JOURNAL in almond(8)", conf.spool);
	close(fd);
	return 0;
}

/* Accounts that only root's rights could serve: none of them can log in. */
static int check_owners(int fd)
{
	struct lines l = { .fd = fd };
	struct account who;
	struct user u;
	char *line;
	int code = 0;

	while ((line = text_next(&l))) {
		if (users_parse(line, &u) <= 0)
			continue;
		fmt(who.box, sizeof who.box, "%s", u.box);
		if (auth_owner(&who) != -EPERM)
			continue;
		log_line(L_ERROR, "user %s: mailbox %s and spool are root's; chown one to a user",
		    u.name, u.box);
		code = conf.system ? 0 : EX_CONF;
	}
	wipe(&l, sizeof l);
	return code;
}

static int check_users(void)
{
	int fd = need(conf.users, O_RDONLY, "`almond passwd -u FILE USER` makes it"), code = 0, n;
	struct stat st;
	unsigned faults;

	if (fd < 0)
		return -fd;
	if (stat_fd(fd, &st) == 0 && st.st_mode & (S_IWGRP | S_IRWXO))
		log_line(L_WARN, "%s: others may %s it; chmod 600 it", conf.users,
		    st.st_mode & (S_IWGRP | S_IWOTH) ? "change" : "read");
	n = users_check(conf.users, &faults);
	if (n == 0)
		log_line(L_WARN, "%s: no account; `almond passwd USER` adds one", conf.users);
	if (geteuid() == 0)
		code = check_owners(fd);
	close(fd);
	return n < 0 ? EX_CONF : code;
}

static int check_shadow(void)
{
	int fd = need("/etc/shadow", O_RDONLY, "use a users file (-u)");

	if (fd < 0)
		return -fd;
	close(fd);
	return 0;
}

int check_conf(bool prepare)
{
	int code = check_spool(prepare);

	if (!code && geteuid() == 0 && !make_empty_root()) {
		log_line(L_ERROR, RUN_DIR "/empty: %s; make it, sessions need it", reason(errno));
		code = EX_CONF;
	}
	if (ENABLE_USERS && !code && conf.users)
		code = check_users();
	if (ENABLE_SYSTEM && !code && conf.system)
		code = check_shadow();
	return code;
}

/* ---- the tools ---- */

#if ENABLE_USERS
int users_find(int fd, const char *name, struct lines *l, struct user *u)
{
	char *line;

	*l = (struct lines){ .fd = fd };
	lseek(fd, 0, SEEK_SET);
	while ((line = text_next(l)))
		if (users_parse(line, u) > 0 && !strcmp(u->name, name))
			return 1;
	return 0;
}
#endif

#if ENABLE_TOOLS
void tool_conf(const struct wish *w)
{
	if (w->value['d' & LETTER])
		conf.spool = w->value['d' & LETTER];
	conf.users = w->value['u' & LETTER];
	conf.system = has_flag(w, 's');
	if (conf_fill())
		_exit(EX_CONF);
}

int complain(int err, const char *what)
{
	const char *advice = "nothing was changed; try again";
	int code = EX_TEMP;

	switch (err = err < 0 ? -err : err) {
	case EACCES:
	case EPERM:
	case EROFS:
		code = EX_PERM;
		advice = "run it as root or as the owner";
		break;
	case ELOOP:
	case ENOENT:
	case ENOTDIR:
		code = EX_CANTCREAT_;
		advice = "make it, no link, or name another (-d, -u)";
		break;
	case ENOSPC:
	case EDQUOT:
	case EFBIG:
		advice = "nothing was changed; make room";
	}
	log_line(L_ERROR, "%s: %s; %s", what, reason(err), advice);
	return code;
}

int slurp(int fd, char **p, size_t *n)
{
	size_t room = *n = 0;
	ssize_t k;

	for (;;) {
		if (*n == room) {
			if (!map_grow(p, room, room * 2 + 65536))
				return -ENOMEM;
			room = room * 2 + 65536;
		}
		k = read(fd, *p + *n, room - *n);
		if (k < 0 && errno != EINTR)
			return -errno;
		if (k == 0)
			return 0;
		*n += k > 0 ? (size_t)k : 0;
	}
}

const char *next_line(const char *p, const char *end)
{
	const char *nl = memchr(p, '\n', (size_t)(end - p));

	return nl ? nl + 1 : end;
}

static bool wishes(struct wish *w, int argc, char **argv, const char *known)
{
	char *value;
	int at = 1, c;

	for (;;) {
		while ((c = option(argc, argv, &at, known, &value)) >= 0) {
			if (c == '?')
				return false;
			w->flags |= 1U << (c & LETTER);
			w->value[c & LETTER] = value;
		}
		if (at == argc)
			return true;
		if (w->operand)
			return false;
		w->operand = argv[at++];
	}
}

static const struct tool {
	char name[8], known[12];
	int (*run)(const struct wish *);
	const char *help;
} tools[] = {
#if ENABLE_PASSWD
	{ "passwd", "sgpdcr:u:", tool_passwd,
	    "[-s | -g] [-p] [-r ROUNDS] [-u FILE] USER[/MAILBOX]\n"
	    "       almond passwd -d | -c [-s] [-u FILE] USER\n"
	    "-s: password from stdin; -g: make one up; -p: store it readable, for APOP\n"
	    "-d: delete the user; -c: check a password\n" },
#endif
#if ENABLE_DELIVER
	{ "deliver", "d:u:f:", tool_deliver, "[-d SPOOL] [-u USERS] [-f SENDER] USER <MESSAGE\n" },
#endif
#if ENABLE_CHECK
	{ "check", "d:u:s", tool_check, "[-d SPOOL] [-u USERS] [-s]\n" },
#endif
};

int tool(int argc, char **argv)
{
	const struct tool *t = tools;
	struct wish w = { .flags = 0 };
	char help[512];
	size_t n;
	bool asked;
	int code;

	while (t < tools + LEN(tools) && strcmp(argv[0], t->name) != 0)
		t++;
	if (t == tools + LEN(tools))
		return -1;
	if (argc == 2 && !strcmp(argv[1], "--version")) {
		print("almond " VERSION "\n");
		return 0;
	}
	log_open(true);
	asked = argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"));
	code = !asked && wishes(&w, argc, argv, t->known) ? t->run(&w) : EX_USAGE_;
	if (code != EX_USAGE_)
		return code;
	n = fmt(help, sizeof help, "usage: almond %s %s", t->name, t->help);
	write_all(asked ? 1 : 2, help, n);
	return asked ? 0 : EX_USAGE_;
}
#else
int tool(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	return -1;
}
#endif
