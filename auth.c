/* auth.c: owns who may log in: the users file and the system's accounts.  Runs in the monitor, with
 * the rights to read them; of what the client sent it sees a name that can be a file's and a secret
 * of bounded length. */
#include "almond.h"

/* What was found while all of a file was read: no early end, so that the time does not tell where a
 * name stands. */
struct search {
	const char *name;
	bool found, by_file;
	struct account who;
	char verifier[MAX_VERIFIER];
	uint64_t cost; /* of the dearest verifier, which is worked on for an unknown name */
	char dearest[MAX_VERIFIER];
};

static int lines_open(struct lines *l, const char *path)
{
	l->at = l->len = 0;
	l->number = 0;
	l->fd = open_at(AT_FDCWD, path, O_RDONLY);
	if (l->fd >= 0)
		return 0;
	log_line(L_ERROR, "%s: %s; accounts are read from it", path, reason(l->fd));
	return l->fd == -EACCES ? -EIO : l->fd;         /* -EACCES is a wrong password */
}

static void copy_name(char to[MAX_NAME + 1], const char *name)
{
	fmt(to, MAX_NAME + 1, "%s", name);
}

/* A verifier that was read belongs to this name. */
static void consider(struct search *s, const char *name, const char *box, const char *verifier)
{
	uint64_t cost = strlen(verifier) < MAX_VERIFIER ? verify_cost(verifier) : 0;

	if (cost > s->cost) {
		s->cost = cost;
		fmt(s->dearest, sizeof s->dearest, "%s", verifier);
	}
	if (s->found || strcmp(name, s->name) != 0)
		return;
	s->found = true;
	copy_name(s->who.name, name);
	copy_name(s->who.box, box);
	fmt(s->verifier, sizeof s->verifier, "%s", verifier);
}

/* ---- the users file ---- */

#if ENABLE_USERS
int users_parse(char *line, struct user *u)
{
	char *colon, *slash;

	while (*line == ' ' || *line == '\t')
		line++;
	if (!*line || *line == '#')
		return 0;
	colon = find(line, ':');
	u->fault = "no ':' behind the name";
	if (!colon)
		return -1;
	*colon = 0;
	u->name = u->box = line;
	u->verifier = colon + 1;
	slash = find(line, '/');
	if (slash) {
		*slash = 0;
		u->box = slash + 1;
	}
	u->fault = name_fault(u->name);
	if (!u->fault)
		u->fault = name_fault(u->box);
	if (!u->fault && !*u->verifier)
		u->fault = "no password behind the ':'";
	return u->fault ? -1 : 1;
}

static int users_search(struct search *s)
{
	struct lines l;
	struct user u;
	char *line;
	int err = lines_open(&l, conf.users);

	if (err)
		return err;
	while ((line = text_next(&l)))
		if (users_parse(line, &u) > 0)
			consider(s, u.name, u.box, u.verifier);
	close(l.fd);
	wipe(&l, sizeof l);
	s->by_file = s->found;
	return 0;
}

int users_check(const char *path, unsigned *faults)
{
	struct lines l;
	struct user u;
	char *line;
	int accounts = 0, r = lines_open(&l, path);

	*faults = 0;
	if (r)
		return r;
	while ((line = text_next(&l))) {
		r = users_parse(line, &u);
		if (r > 0 && !verify_cost(u.verifier)) {
			log_line(L_WARN, "%s line %u: the password format %s is not built in", path,
			    l.number, verify_scheme(u.verifier));
			++*faults;
		} else if (r < 0) {
			log_line(L_WARN, "%s line %u: %s; the line is passed over", path, l.number,
			    u.fault);
			++*faults;
		}
		accounts += r > 0;
	}
	close(l.fd);
	wipe(&l, sizeof l);
	return accounts;
}
#else
static int users_search(struct search *s)
{
	(void)s;
	return 0;
}
#endif

int auth_owner(struct account *who)
{
	char path[PATH_MAX];
	struct stat box, spool;
	bool there;

	who->uid = geteuid();
	who->gid = getegid();
	if (who->uid != 0)
		return 0;
	fmt(path, sizeof path, "%s/%s", conf.spool, who->box);
	there = stat_at(AT_FDCWD, path, &box, AT_SYMLINK_NOFOLLOW) == 0;
	if (stat_at(AT_FDCWD, conf.spool, &spool, 0) < 0)
		return -errno;
	if (!there || box.st_uid == 0)
		box = spool;
	who->uid = box.st_uid;
	who->gid = box.st_gid;
	if (who->uid == 0 && !there)
		who->uid = conf.session_uid;
	if (who->gid == 0)
		who->gid = conf.session_gid;
	return who->uid == 0 ? -EPERM : 0;
}

/* ---- the system's accounts ---- */

static char *field(char **p)
{
	char *start = *p, *end = find(start, ':');

	*p = end ? end + 1 : start + strlen(start);
	if (end)
		*end = 0;
	return start;
}

int system_account(const char *name, struct account *who)
{
	uint64_t uid = 0, gid = 0;
	int err = -ENOENT;
	struct lines l;
	char *line;

	if (lines_open(&l, "/etc/passwd"))
		return -EIO;
	while ((line = text_next(&l))) {
		if (strcmp(field(&line), name) != 0 || err != -ENOENT)
			continue;
		field(&line);
		err = number(field(&line), UINT32_MAX - 1, &uid) ||
			number(field(&line), UINT32_MAX - 1, &gid)
		    ? -EINVAL
		    : 0;
	}
	close(l.fd);
	who->uid = (uid_t)uid;
	who->gid = (gid_t)gid;
	return err;
}

#if ENABLE_SYSTEM
/* shadow(5): the day, counted from 1970, on which the account ends. */
static bool expired(char *rest)
{
	uint64_t day;
	int i;

	for (i = 0; i < 5; i++)
		field(&rest);
	return number(field(&rest), INT32_MAX, &day) == 0 && wall_clock() / 86400000 >= day;
}

static int shadow_search(struct search *s)
{
	struct lines l;
	char *line, *name, *verifier;
	bool had = s->found, over = false;
	int err = lines_open(&l, "/etc/shadow");

	if (err)
		return err;
	while ((line = text_next(&l))) {
		name = field(&line);
		verifier = field(&line);
		consider(s, name, name, verifier);
		if (!strcmp(name, s->name))
			over = expired(line);
	}
	close(l.fd);
	wipe(&l, sizeof l);
	if (had || !s->found)
		return 0;
	err = system_account(s->name, &s->who);
	if (err || s->who.uid == 0 || over) {
		log_line(L_NOTE, "user %s refused: %s", s->who.name,
		    over      ? "the account has expired"
			: err ? "no line in /etc/passwd"
			      : "root fetches no mail; give it an alias");
		s->found = false;
	}
	return 0;
}
#else
static int shadow_search(struct search *s)
{
	(void)s;
	return 0;
}
#endif

static int search(struct search *s, const char *name)
{
	int err = 0;

	memset(s, 0, sizeof *s);
	s->name = name;
	if (ENABLE_USERS && conf.users)
		err = users_search(s);
	if (ENABLE_SYSTEM && !err && conf.system)
		err = shadow_search(s);
	return err;
}

/* The end of a search: only who gave the right secret learns that his mailbox is nobody's. */
static int accepted(struct search *s, struct account *who, int err)
{
	if (!err && s->by_file)
		err = auth_owner(&s->who);
	if (err == -EPERM)
		log_line(L_ERROR, "mailbox %s and the spool belong to root; chown one to a user",
		    s->who.box);
	*who = s->who;
	wipe(s, sizeof *s);
	return err;
}

int auth_password(const char *name, const char *secret, size_t n, struct account *who)
{
	struct search s;
	int err = search(&s, name), right;

	if (!err) {
		right = verify(s.found ? s.verifier : s.dearest, secret, n);
		if (s.found && right < 0)
			log_line(L_WARN, "user %s: the password format %s is not built in",
			    s.who.name, verify_scheme(s.verifier));
		err = s.found && right > 0 && n ? 0 : -EACCES;
	}
	return accepted(&s, who, err);
}

#if ENABLE_APOP
int auth_apop(const char *name, const char *stamp, const uint8_t digest[MD5_SIZE],
	struct account *who)
{
	uint8_t want[MD5_SIZE];
	struct search s;
	struct hash h;
	int err = search(&s, name);
	bool plain = !memcmp(s.verifier, "{PLAIN}", 7) && s.verifier[7];

	hash_init(&h, MD5);
	hash_add(&h, stamp, strlen(stamp));
	hash_add(&h, s.verifier + (plain ? 7 : 0), strlen(s.verifier + (plain ? 7 : 0)));
	hash_end(&h, want);
	if (!err && (!same(want, digest, sizeof want) || !s.found || !plain))
		err = -EACCES;
	return accepted(&s, who, err);
}

/* Clients that see a stamp use APOP and fall back to nothing, so it must be right for everybody. */
bool auth_apop_for_all(void)
{
	struct lines l;
	struct user u;
	char *line;
	bool all = true, any = false;

	if (!conf.users || conf.system || lines_open(&l, conf.users))
		return false;
	while ((line = text_next(&l)))
		if (users_parse(line, &u) > 0) {
			any = true;
			all = all && !strcmp(verify_scheme(u.verifier), "{PLAIN}");
		}
	close(l.fd);
	wipe(&l, sizeof l);
	return all && any;
}
#endif
