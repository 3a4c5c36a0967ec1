/* store.c: owns what the stores share: the index's memory, lines out of a file, TOP's extent,
 * unique-ids.  Runs in the session. */
#include "almond.h"

#include <sys/mman.h>
#include <sys/syscall.h>

void *map(size_t n)
{
	void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

static void *remap(void *p, size_t old, size_t size)
{
	return (void *)syscall(SYS_mremap, p, old, size, MREMAP_MAYMOVE);
}

bool map_grow(void *p_, size_t old, size_t size)
{
	void **p = p_, *q = old ? remap(*p, old, size) : map(size);

	if (!q || q == MAP_FAILED)
		return false;
	*p = q;
	return true;
}

struct dirent_head {
	uint64_t inode;
	int64_t next;
	unsigned short size;
	unsigned char type;
	char name[];
};

/* libc's opendir wants malloc. */
const char *next_name(struct listing *l)
{
	const struct dirent_head *d;

	do {
		if (l->at >= l->len) {
			l->at = 0;
			l->len = syscall(SYS_getdents64, l->fd, l->buffer, sizeof l->buffer);
			if (l->len <= 0)
				return NULL;
		}
		d = (const struct dirent_head *)(const void *)(l->buffer + l->at);
		l->at += d->size;
		l->type = d->type;
	} while (*d->name == '.');
	return d->name;
}

struct msg *box_add(struct box *b)
{
	uint32_t room = b->room ? b->room * 2 : 128;

	if (b->count == MAX_MESSAGES)
		return NULL;
	if (b->count == b->room) {
		if (!map_grow(&b->msg, b->room * sizeof *b->msg, room * sizeof *b->msg))
			return NULL;
		b->room = room;
	}
	return memset(&b->msg[b->count++], 0, sizeof *b->msg);
}

static uint64_t base(const struct box *b, uint32_t i)
{
	return b->store->extents ? b->msg[i].at : 0;
}

ssize_t box_read(struct box *b, uint32_t i, uint64_t at, void *to, size_t n)
{
	const struct msg *m = &b->msg[i];
	ssize_t k;

	if (n > m->stored - at)
		n = (size_t)(m->stored - at);
	k = read_at(b->fd, to, n, base(b, i) + at);
	return k || !n ? k : -EAGAIN;
}

int piece_open(struct pieces *s)
{
	s->buffer = map(SCAN_BUFFER);
	s->step = SCAN_BUFFER;
	return s->buffer ? 0 : -ENOMEM;
}

void piece_from(struct pieces *s, int fd, uint64_t at, uint64_t end)
{
	s->fd = fd;
	s->at = at;
	s->end = end;
	s->n = s->from = s->to = 0;
	s->eol = true;
}

void piece_close(struct pieces *s)
{
	munmap(s->buffer, SCAN_BUFFER);
}

static int piece_fill(struct pieces *s)
{
	size_t room;
	ssize_t n;

	memmove(s->buffer, s->buffer + s->from, s->to - s->from);
	s->to -= s->from;
	s->from = 0;
	room = SCAN_BUFFER - s->to;
	if (room > s->step)
		room = s->step;
	if (room > s->end - s->at)
		room = (size_t)(s->end - s->at);
	n = read_at(s->fd, s->buffer + s->to, room, s->at);
	if (n <= 0)
		return n ? (int)n : -EAGAIN;
	s->to += (size_t)n;
	s->at += (size_t)n;
	if (page)
		page->pulse = (uint32_t)(now() / 1000); /* a long scan is no silence */
	return 0;
}

int piece_next(struct pieces *s)
{
	const char *nl;
	int err;

	s->from += s->n;
	s->n = 0;
	s->bol = s->eol;
	for (;;) {
		s->p = s->buffer + s->from;
		nl = memchr(s->p, '\n', s->to - s->from);
		s->eol = nl != NULL;
		s->n = nl ? (size_t)(nl + 1 - s->p) : s->to - s->from;
		if (nl || s->at == s->end)
			return s->n > 0;
		if (s->n >= SCAN_BUFFER / 2) {
			s->n -= s->p[s->n - 1] == '\r';
			return 1;
		}
		err = piece_fill(s);
		if (err) {
			s->n = 0;
			return err;
		}
	}
}

bool piece_bare(const struct pieces *s)
{
	return s->eol && (s->n < 2 || s->p[s->n - 2] != '\r');
}

bool piece_blank(const struct pieces *s)
{
	return s->bol && s->eol && (s->n == 1 || (s->n == 2 && *s->p == '\r'));
}

bool field_is(const char *p, size_t n, const char *name)
{
	for (; *name; p++, name++)
		if (!n-- || (*p | 0x20) != (*name | 0x20))
			return false;
	return n && *p == ':';
}

int box_top(struct box *b, uint32_t i, uint64_t lines, uint64_t *stored, bool *open)
{
	uint64_t start = base(b, i);
	struct pieces s;
	bool header = true;
	int more = piece_open(&s);

	*stored = 0;
	*open = false;
	if (more < 0)
		return more;
	piece_from(&s, b->fd, start, start + b->msg[i].stored);
	while ((more = piece_next(&s)) > 0) {
		if (!header && s.bol && !lines--)
			break;
		header = header && !piece_blank(&s);
		*stored += s.n;
		*open = !s.eol;
	}
	piece_close(&s);
	return more < 0 ? more : 0;
}

/* ---- unique-ids ---- */

struct uid { uint8_t id[16]; uint32_t nth; };

/* Fields that programs which share the mailbox rewrite: they must not change a message's id. */
static bool rewritten(const char *p, size_t n)
{
	static const char fields[][18] = {"Status", "X-Status", "X-Keywords", "X-UID", "X-UIDL",
	    "X-IMAP", "X-IMAPbase", "Content-Length", "Lines", "X-Mozilla-Status",
	    "X-Mozilla-Status2", "X-Mozilla-Keys"};
	size_t i;

	for (i = 0; i < LEN(fields); i++)
		if (field_is(p, n, fields[i]))
			return true;
	return false;
}

/* All '>' of From_ quoting go: mboxrd quotes what mboxo does not, and a Maildir quotes nothing. */
static size_t quoting(const char *p, size_t n)
{
	size_t k = 0;

	while (k < n && p[k] == '>')
		k++;
	return n - k >= 5 && !memcmp(p + k, "From ", 5) ? k : 0;
}

/* Message i in a form that is the same in every store: LF, no quoting, no rewritten field, no blank
 * lines at the end; SHA-256 over its header, and over a checksum of its body, which is too long for
 * a slow hash. */
static int uid_make(struct box *b, struct pieces *s, uint32_t i, uint8_t id[16])
{
	uint64_t start = base(b, i), body;
	uint8_t digest[SHA256_SIZE];
	bool header = true, skip = false;
	size_t q, n, blanks = 0;
	struct hash h;
	struct sum sum;
	int more;

	hash_init(&h, SHA256);
	sum_init(&sum);
	piece_from(s, b->fd, start, start + b->msg[i].stored);
	while ((more = piece_next(s)) > 0) {
		if (piece_blank(s)) {
			blanks += !header;
			header = false;
			continue;
		}
		for (; blanks; blanks--)
			sum_add(&sum, "\n", 1);
		q = s->bol ? quoting(s->p, s->n) : 0;
		n = s->n - q - s->eol;
		n -= n && s->eol && s->p[q + n - 1] == '\r';
		if (!header) {
			sum_add(&sum, s->p + q, n);
			sum_add(&sum, "\n", s->eol || s->at == s->end);
			continue;
		}
		if (s->bol && *s->p != ' ' && *s->p != '\t')
			skip = rewritten(s->p, s->n);
		if (skip)
			continue;
		hash_add(&h, s->p + q, n);
		hash_add(&h, "\n", s->eol || s->at == s->end);
	}
	if (more < 0)
		return more;
	body = sum_end(&sum);
	for (n = 0; n < 8; n++)
		digest[n] = (uint8_t)(body >> 8 * n);
	hash_add(&h, digest, 8);
	hash_end(&h, digest);
	memcpy(id, digest, 16);
	return 0;
}

static int uid_order(const void *context, uint32_t a, uint32_t b)
{
	const struct uid *u = context;
	int order = memcmp(u[a].id, u[b].id, sizeof u->id);

	return order ? order : a < b ? -1 : 1;
}

/* Equal messages get an occurrence counter, in the order of their numbers. */
static int uid_count(struct uid *u, uint32_t n)
{
	uint32_t *order = map(n * sizeof *order), i;

	if (!order)
		return -ENOMEM;
	for (i = 0; i < n; i++)
		order[i] = i;
	sort_numbers(order, n, uid_order, u);
	for (i = 1; i < n; i++)
		if (!memcmp(u[order[i]].id, u[order[i - 1]].id, sizeof u->id))
			u[order[i]].nth = u[order[i - 1]].nth + 1;
	munmap(order, n * sizeof *order);
	return 0;
}

static int uid_all(struct box *b)
{
	struct uid *u = map(b->count * sizeof *u);
	struct pieces s;
	uint32_t i;
	int err;

	if (!u)
		return -ENOMEM;
	err = piece_open(&s);
	if (err)
		return err;
	for (i = 0; i < b->count && !err; i++) {
		err = b->store->look(b, i);
		if (!err)
			err = uid_make(b, &s, i, u[i].id);
		if (err == -ENOENT) {
			b->msg[i].flags |= VANISHED;
			err = 0;
		}
	}
	piece_close(&s);
	if (!err)
		err = uid_count(u, b->count);
	if (!err)
		b->uid = u;
	else
		munmap(u, b->count * sizeof *u);
	return err;
}

int box_uid(struct box *b, uint32_t i, char to[UID_SIZE])
{
	static const char digits[] =
	    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
	unsigned bits = 0, have = 0, k = 0;
	int err = b->uid ? 0 : uid_all(b);
	const struct uid *u;

	if (err)
		return err;
	u = &b->uid[i];
	while (k < 16) {
		bits = bits << 8 | u->id[k++];
		for (have += 8; have >= 6; have -= 6)
			*to++ = digits[bits >> (have - 6) & 63];
	}
	*to++ = digits[bits << (6 - have) & 63];
	*to = 0;
	if (u->nth)
		fmt(to, 12, ".%u", u->nth + 1);
	return 0;
}

/* Heapsort: no memory, no worst case, few octets. */
void sort_numbers(uint32_t *v, uint32_t n, int (*order)(const void *, uint32_t, uint32_t),
	const void *context)
{
	uint32_t start = n / 2, end = n, root, child, x;

	while (end > 1) {
		if (start) {
			x = v[--start];
		} else {
			x = v[--end];
			v[end] = v[0];
		}
		for (root = start; (child = 2 * root + 1) < end; root = child) {
			if (child + 1 < end && order(context, v[child], v[child + 1]) < 0)
				child++;
			if (order(context, x, v[child]) >= 0)
				break;
			v[root] = v[child];
		}
		v[root] = x;
	}
}
