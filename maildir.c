/* maildir.c: owns the Maildir store: a message is a file.  The first part runs in the session,
 * which sees only descriptors; the second, which keeps the names, in the monitor with the user's
 * rights. */
#include "almond.h"

#include <sys/mman.h>

#if ENABLE_MAILDIR

/* ---- the session's side ---- */

/* b->fd becomes message i, as it was indexed. */
static int maildir_look(struct box *b, uint32_t i)
{
	const struct msg *m = &b->msg[i];
	struct stat st;

	if (b->fetched != i) {
		if (b->fd >= 0)
			close(b->fd);
		b->fetched = UINT32_MAX;
		b->fd = ask_fetch((uint32_t)m->at);
		if (b->fd < 0)
			return b->fd;
		b->fetched = i;
	}
	if (stat_fd(b->fd, &st) < 0)
		return -errno;
	return (uint64_t)st.st_size == m->stored ? 0 : -EAGAIN;
}

/* How much longer RETR makes it.  Sizes in a name (",W=") are not believed: a wrong one would be
 * seen on the wire. */
static int maildir_measure(struct msg *m, struct pieces *s, int fd)
{
	uint64_t bare = 0;
	struct stat st;
	int more;

	if (stat_fd(fd, &st) < 0)
		return -errno;
	m->stored = (uint64_t)st.st_size;
	piece_from(s, fd, 0, m->stored);
	while ((more = piece_next(s)) > 0) {
		bare += piece_bare(s);
		m->flags = s->eol ? 0 : OPEN_END;
	}
	if (m->flags)
		bare += 2;
	m->extra = (uint32_t)bare;
	return bare > UINT32_MAX ? -EFBIG : more;
}

static int maildir_index(struct box *b)
{
	uint32_t i, n = (uint32_t)b->size;
	struct pieces s;
	struct msg *m;
	int err = piece_open(&s), fd;

	if (err)
		return err;
	b->fetched = UINT32_MAX;
	for (i = 0; i < n && !err; i++) {
		fd = ask_fetch(i);
		if (fd == -ENOENT)      /* gone since it was listed: it was never there */
			continue;
		m = fd < 0 ? NULL : box_add(b);
		err = fd < 0 ? fd : !m ? -EMFILE : maildir_measure(m, &s, fd);
		if (m)
			m->at = i;
		if (fd >= 0)
			close(fd);
	}
	piece_close(&s);
	return err;
}

static void maildir_gone(const struct box *b, uint32_t i, struct gone *g)
{
	*g = (struct gone){ .at = b->msg[i].at };
}

const struct store maildir_store = { false, maildir_index, maildir_look, maildir_gone };

/* ---- the monitor's side ---- */

/* Names, one behind the other, each with its end; an entry says where, and in which of the two
 * directories. */
struct entry { uint32_t name : 31, cur : 1; };
struct list {
	char *names;
	size_t used, names_room;
	struct entry *entry;
	uint32_t count;
	size_t room;
};
static struct list list;
static const char *const dirs[] = { "new", "cur" };

/* Equal base names, up to ':' or ';' (as written where ':' cannot be), are the same message. */
static size_t base_length(const char *name)
{
	size_t n = 0;

	while (name[n] && name[n] != ':' && name[n] != ';')
		n++;
	return n;
}

static size_t digits(const char *p)
{
	size_t n = 0;

	while (p[n] >= '0' && p[n] <= '9')
		n++;
	return n;
}

/* Delivery's order: by the seconds that a name begins with, then by the base name. */
static int name_order(const char *a, const char *b)
{
	size_t na = base_length(a), nb = base_length(b), da = digits(a), db = digits(b);
	int order = da == db ? memcmp(a, b, na < nb ? na : nb) : da < db ? -1 : 1;

	return order ? order : na < nb ? -1 : na > nb;
}

static int entry_order(const void *context, uint32_t a, uint32_t b)
{
	const struct list *l = context;

	return name_order(l->names + l->entry[a].name, l->names + l->entry[b].name);
}

static int list_add(struct list *l, const char *name, unsigned cur)
{
	size_t n = strlen(name) + 1;

	if (l->count == MAX_MESSAGES || l->used + n > INT32_MAX)
		return -EMFILE;
	if (l->used + n > l->names_room) {
		if (!map_grow(&l->names, l->names_room, l->names_room * 2 + 65536))
			return -ENOMEM;
		l->names_room = l->names_room * 2 + 65536;
	}
	if (l->count == l->room) {
		if (!map_grow(&l->entry, l->room * sizeof *l->entry,
			(l->room * 2 + 1024) * sizeof *l->entry))
			return -ENOMEM;
		l->room = l->room * 2 + 1024;
	}
	memcpy(l->names + l->used, name, n);
	l->entry[l->count++] = (struct entry){ .name = l->used & INT32_MAX, .cur = cur & 1 };
	l->used += n;
	return 0;
}

static int list_dir(struct list *l, int maildir, unsigned cur)
{
	struct listing in = { .fd = open_quiet(maildir, dirs[cur]) };
	const char *name;
	int err = 0;

	if (in.fd < 0)
		return in.fd == -ENOENT || in.fd == -ELOOP ? -ENOTDIR : in.fd;
	while (!err && (name = next_name(&in)))
		if (in.type == 8 || in.type == 0)
			err = list_add(l, name, cur);
	if (!err && in.len < 0)
		err = -errno;
	close(in.fd);
	return err;
}

static void list_free(struct list *l)
{
	if (l->names)
		munmap(l->names, l->names_room);
	if (l->entry)
		munmap(l->entry, l->room * sizeof *l->entry);
	*l = (struct list){ .count = 0 };
}

/* What is in new and cur, sorted.  new comes first: a message that moves meanwhile is listed twice,
 * not missed; the second is dropped. */
static int list_all(struct list *l, int maildir)
{
	int err = list_dir(l, maildir, 0);
	struct entry *sorted, *e;
	uint32_t *order, i, n = 0;

	if (!err)
		err = list_dir(l, maildir, 1);
	if (err || !l->count)
		return err;
	order = map(l->count * sizeof *order);
	sorted = map(l->room * sizeof *sorted);
	if (!order || !sorted)
		return -ENOMEM;
	for (i = 0; i < l->count; i++)
		order[i] = i;
	sort_numbers(order, l->count, entry_order, l);
	for (i = 0; i < l->count; i++) {
		e = &l->entry[order[i]];
		if (!n || name_order(l->names + sorted[n - 1].name, l->names + e->name))
			sorted[n++] = *e;
		else if (e->cur)
			sorted[n - 1] = *e;
	}
	munmap(order, l->count * sizeof *order);
	munmap(l->entry, l->room * sizeof *l->entry);
	l->entry = sorted;
	l->count = n;
	return 0;
}

int maildir_snapshot(struct vault *v)
{
	int err = list_all(&list, v->fd);

	v->count = list.count;
	return err;
}

/* Names changed (new to cur, other flags): list again, and give every message that is still there
 * its new name.  One that is not gets an empty one, which sorts before all, so that it is looked
 * for once only. */
static int refresh(const struct vault *v)
{
	struct list fresh = { .count = 0 };
	int err = list_all(&fresh, v->fd), order;
	uint32_t i, j = 0;

	if (!err)
		err = list_add(&fresh, "", 0);
	if (err) {
		list_free(&fresh);
		return err;
	}
	fresh.count--;
	for (i = 0; i < list.count; i++) {
		order = 1;
		while (j < fresh.count && (order = name_order(fresh.names + fresh.entry[j].name,
		    list.names + list.entry[i].name)) < 0)
			j++;
		list.entry[i] = fresh.entry[order ? fresh.count : j];
	}
	munmap(list.names, list.names_room);
	list.names = fresh.names;
	list.names_room = fresh.names_room;
	list.used = fresh.used;
	munmap(fresh.entry, fresh.room * sizeof *fresh.entry);
	return 0;
}

/* "cur/name" of a message; false when it vanished. */
static bool path_of(uint32_t number, char *to, size_t room)
{
	const struct entry *e = &list.entry[number];
	const char *name = list.names + e->name;

	return *name && fmt(to, room, "%s/%s", dirs[e->cur], name) < room - 1;
}

int maildir_fetch(struct vault *v, uint32_t number)
{
	char path[NAME_MAX + 8];
	int fd, err, tries = 2;
	struct stat st;

	if (number >= list.count)
		return -EINVAL;
	while (tries-- && path_of(number, path, sizeof path)) {
		fd = open_quiet(v->fd, path);
		if (fd >= 0 && stat_fd(fd, &st) == 0 && S_ISREG(st.st_mode) && !hollow(&st))
			return fd;
		if (fd >= 0)
			close(fd);
		if (fd != -ENOENT) {
			log_line(L_WARN, "maildir: %s of %s left out: %s", path, v->box,
			    fd < 0 ? reason(fd) : "no plain file");
			return -ENOENT;
		}
		err = refresh(v);
		if (err)
			return err;
	}
	return -ENOENT;
}

/* *touched: the directories that lost a name, a bit each. */
static int remove_one(struct vault *v, uint32_t number, unsigned *touched)
{
	char path[NAME_MAX + 8];
	int err = 0, tries = 20;

	while (!err && path_of(number, path, sizeof path)) {
		if (unlinkat(v->fd, path, 0) == 0) {
			*touched |= 1U << list.entry[number].cur;
			return 0;
		}
		if (errno != ENOENT)
			return -errno;
		err = tries-- ? refresh(v) : -EAGAIN;
	}
	return err;     /* 0: another program was faster */
}

static int sync_dir(int maildir, const char *name)
{
	int fd = open_dir(maildir, name), err;

	if (fd < 0)
		return fd;
	err = sync_fd(fd);
	close(fd);
	return err;
}

/* What cannot be removed does not keep the others. */
int maildir_commit(struct vault *v, const struct gone *g, size_t n)
{
	unsigned touched = 0;
	int err = 0, e;
	size_t i;

	for (i = 0; i < n; i++)
		if (g[i].at >= list.count || (i && g[i].at <= g[i - 1].at))
			return -EINVAL;
	for (i = 0; i < n; i++) {
		e = remove_one(v, (uint32_t)g[i].at, &touched);
		err = err ? err : e;
	}
	for (i = 0; i < LEN(dirs); i++) {
		e = touched >> i & 1 ? sync_dir(v->fd, dirs[i]) : 0;
		err = err ? err : e;
	}
	return err;
}
#endif
