/* verify.c: owns what a stored password looks like: reading, checking, naming, making verifiers.
 * Runs in the monitor and in `almond passwd`. */
#include "almond.h"

enum { SCRAM_ROUNDS = 10000000, SCRAM_SALT = 64, KEYS = 2 * SHA256_SIZE };

/* What is left of s behind a text that it begins with, or NULL. */
static const char *behind(const char *s, const char *text)
{
	while (*text)
		if (*s++ != *text++)
			return NULL;
	return s;
}

/* The digits that s begins with; what follows them must be `end`.  What stands behind it, or NULL.
 * Huge numbers stay huge. */
static const char *digits(const char *s, uint64_t *n, char end)
{
	const char *start = s;

	for (*n = 0; *s >= '0' && *s <= '9'; s++)
		if (*n <= UINT32_MAX)
			*n = *n * 10 + (uint64_t)(*s - '0');
	return s > start && *s == end ? s + 1 : NULL;
}

#if ENABLE_SHA_CRYPT || ENABLE_MD5_CRYPT || ENABLE_CRYPT
/* How far it is to the first c, ':' or the end. */
static size_t up_to(const char *s, char c)
{
	size_t n = 0;

	while (s[n] && s[n] != c && s[n] != ':')
		n++;
	return n;
}
#endif

/* What formats are named with; without the '-', crypt's digits. */
static const char letters[] = "-./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

static size_t named(const char *s, const char *with)
{
	size_t n = 0;

	while (s[n] && find(with, s[n]))
		n++;
	return n;
}

/* ---- SCRAM-SHA-256$rounds:salt$StoredKey:ServerKey (RFC 5803, section 3) ---- */

struct scram {
	uint64_t rounds;
	size_t salted;
	uint8_t salt[SCRAM_SALT], keys[KEYS];   /* StoredKey, ServerKey */
};

/* Base64 up to `end`; what stands behind it, or NULL.  *n, the room at first, becomes the count of
 * octets. */
static const char *decode(uint8_t *to, size_t *n, const char *s, char end)
{
	const char *p = s;
	ssize_t k;

	while (*p && *p != end)
		p++;
	k = base64_decode(to, *n, s, (size_t)(p - s));
	*n = (size_t)k;
	return k < 0 || *p != end ? NULL : p + 1;
}

/* s stands behind the scheme's name. */
static bool scram_parse(const char *s, struct scram *v)
{
	size_t stored = SHA256_SIZE, server = SHA256_SIZE;

	v->salted = SCRAM_SALT;
	return (s = digits(s, &v->rounds, ':')) && v->rounds && v->rounds <= SCRAM_ROUNDS
		&& (s = decode(v->salt, &v->salted, s, '$')) && v->salted
		&& (s = decode(v->keys, &stored, s, ':')) && stored == SHA256_SIZE
		&& decode(v->keys + SHA256_SIZE, &server, s, 0) && server == SHA256_SIZE;
}

/* RFC 5802, section 3. */
static void scram_keys(const struct scram *v, const char *secret, size_t n, uint8_t keys[KEYS])
{
	uint8_t salted[SHA256_SIZE];
	struct hash h;

	pbkdf2_sha256(secret, n, v->salt, v->salted, (uint32_t)v->rounds, salted);
	hmac_sha256(salted, sizeof salted, "Client Key", 10, keys);
	hmac_sha256(salted, sizeof salted, "Server Key", 10, keys + SHA256_SIZE);
	wipe(salted, sizeof salted);
	hash_init(&h, SHA256);
	hash_add(&h, keys, SHA256_SIZE);
	hash_end(&h, keys);
}

static int scram_verify(const char *text, const char *secret, size_t n)
{
	uint8_t keys[KEYS];
	struct scram v;
	bool fits;

	if (!scram_parse(text, &v))
		return -1;
	scram_keys(&v, secret, n, keys);
	fits = same(keys, v.keys, SHA256_SIZE);
	wipe(keys, sizeof keys);
	return fits;
}

/* ---- {PLAIN}secret: compared by digests, so that time tells nothing of where they differ ---- */

static int plain_verify(const char *text, const char *secret, size_t n)
{
	uint8_t d[2 * SHA256_SIZE];
	bool fits;

	hmac_sha256("", 0, text, strlen(text), d);
	hmac_sha256("", 0, secret, n, d + SHA256_SIZE);
	fits = same(d, d + SHA256_SIZE, SHA256_SIZE);
	wipe(d, sizeof d);
	return fits;
}

/* ---- $5$ and $6$ (SHA-crypt), $1$ and $apr1$ (MD5-crypt): one scheme, two sets of details ---- */

#if ENABLE_SHA_CRYPT || ENABLE_MD5_CRYPT
static const struct format {
	char id[7];
	uint8_t kind, size;
	uint8_t salt;           /* octets of it that count */
	uint8_t third, turn;    /* the order in which digits take the digest: see unix_text */
	uint8_t weight;         /* of a round, in halves of a compression of SHA-256 */
} formats[] = {
#if ENABLE_SHA_CRYPT
	{ "$5$", SHA256, SHA256_SIZE, 16, 10, 2, 3 },
	{ "$6$", SHA512, SHA512_SIZE, 16, 21, 1, 4 },
#endif
#if ENABLE_MD5_CRYPT
	{ "$1$", MD5, MD5_SIZE, 8, 6, 0, 1 },
	{ "$apr1$", MD5, MD5_SIZE, 8, 6, 0, 1 },
#endif
};

/* A verifier taken apart, and a digest in the making.  At first key and salt are what they say;
 * SHA's rounds take, for each, a digest of it that is repeated to its length. */
struct mill {
	const struct format *f;
	const char *text;               /* the verifier's digits */
	const void *key, *salt;
	size_t length, n, unit, salted; /* of the text, the secret, what key points to, the salt */
	uint64_t rounds;
	struct hash h;
	uint8_t digest[SHA512_SIZE], p[SHA512_SIZE], s[SHA512_SIZE];
};

/* Rounds may be given for SHA only, and are clamped as its specification says. */
static const char *unix_rounds(const char *s, struct mill *m)
{
	const char *p = behind(s, "rounds=");

	m->rounds = m->f->kind == MD5 ? 1000 : 5000;
	if (!p || m->f->kind == MD5)
		return s;
	s = digits(p, &m->rounds, '$');
	if (m->rounds < 1000)
		m->rounds = 1000;
	if (m->rounds > 999999999)
		m->rounds = 999999999;
	return s;
}

/* 1 and *m, 0 for another format, -1 for a malformed one. */
static int unix_parse(const char *text, struct mill *m)
{
	const char *s = NULL;

	for (m->f = formats; !(s = behind(text, m->f->id)); )
		if (++m->f == formats + LEN(formats))
			return 0;
	s = unix_rounds(s, m);
	if (!s)
		return -1;
	m->salt = s;
	m->salted = up_to(s, '$');
	if (s[m->salted] != '$')
		return -1;
	m->text = s + m->salted + 1;
	if (m->salted > m->f->salt)
		m->salted = m->f->salt;
	m->length = (m->f->size * 8u + 5) / 6;
	return up_to(m->text, ':') == m->length ? 1 : -1;
}

static void begin(struct mill *m)
{
	hash_init(&m->h, m->f->kind);
}

/* n octets of p, over and over. */
static void repeat(struct mill *m, const void *p, size_t size, size_t n)
{
	for (; n > size; n -= size)
		hash_add(&m->h, p, size);
	hash_add(&m->h, p, n);
}

static void add_key(struct mill *m)
{
	repeat(m, m->key, m->unit, m->n);
}

static void add_salt(struct mill *m)
{
	hash_add(&m->h, m->salt, m->salted);
}

static void add_digest(struct mill *m, size_t n)
{
	repeat(m, m->digest, m->f->size, n);
}

/* The digest before the rounds.  What stands for a bit of n differs: SHA takes the whole digest or
 * secret, MD5 an octet. */
static void unix_start(struct mill *m)
{
	size_t i;

	begin(m);
	add_key(m);
	add_salt(m);
	add_key(m);
	hash_end(&m->h, m->digest);

	begin(m);
	add_key(m);
	if (m->f->kind == MD5)
		hash_add(&m->h, m->f->id, strlen(m->f->id));
	add_salt(m);
	add_digest(m, m->n);
	for (i = m->n; i; i >>= 1)
		if (m->f->kind == MD5)
			hash_add(&m->h, i & 1 ? "" : m->key, 1);
		else if (i & 1)
			add_digest(m, m->f->size);
		else
			add_key(m);
	hash_end(&m->h, m->digest);
}

static void sha_prepare(struct mill *m)
{
	size_t i;

	begin(m);
	for (i = 0; i < m->n; i++)
		add_key(m);
	hash_end(&m->h, m->p);
	begin(m);
	for (i = 0; i < 16u + m->digest[0]; i++)
		add_salt(m);
	hash_end(&m->h, m->s);
	m->key = m->p;
	m->unit = m->f->size;
	m->salt = m->s;
}

static void unix_round(struct mill *m, unsigned i)
{
	begin(m);
	if (i & 1)
		add_key(m);
	else
		add_digest(m, m->f->size);
	if (i % 3)
		add_salt(m);
	if (i % 7)
		add_key(m);
	if (i & 1)
		add_digest(m, m->f->size);
	else
		add_key(m);
	hash_end(&m->h, m->digest);
}

/* Digits, lowest first, of groups of three octets that stand a third of the digest apart; SHA turns
 * them from group to group.  The digest does not divide by three: MD5's last group takes octet 5
 * for the missing 16, and what is left over (of SHA-256 the last two octets, of SHA-512 the last,
 * of MD5 octet 11) makes a short group.  Writes whole groups. */
static void unix_text(char *to, uint8_t d[SHA512_SIZE], const struct format *f)
{
	unsigned group, groups = f->size / 3, i;
	uint32_t bits;

	if (f->kind == MD5)
		d[16] = d[5];
	for (group = 0; group <= groups; group++) {
		bits = f->kind == SHA256 ? (uint32_t)(d[31] << 8 | d[30])
			: d[f->kind == MD5 ? 11 : 63];
		for (i = 0; i < 3 && group < groups; i++)
			bits = bits << 8 | d[group + f->third * ((i + group * f->turn) % 3)];
		for (i = 0; i < 4; i++, bits >>= 6)
			*to++ = letters[1 + (bits & 63)];
	}
}

static int unix_verify(struct mill *m, const char *secret, size_t n)
{
	char text[22 * 4];
	unsigned i;
	bool fits;

	m->key = secret;
	m->n = m->unit = n;
	unix_start(m);
	if (m->f->kind != MD5)
		sha_prepare(m);
	for (i = 0; i < m->rounds; i++)
		unix_round(m, i);
	unix_text(text, m->digest, m->f);
	fits = same(text, m->text, m->length);
	wipe(text, sizeof text);
	wipe(m, sizeof *m);
	return fits;
}

static uint64_t unix_cost(const struct mill *m)
{
	return m->rounds * m->f->weight / 2;
}
#else
struct mill { uint64_t rounds; };
#define unix_parse(text, m) ((m)->rounds = 0, 0)
#define unix_verify(m, secret, n) (-1)
#define unix_cost(m) ((m)->rounds)
#endif

/* ---- the rest is crypt(3)'s ---- */

#if ENABLE_CRYPT
#include <crypt.h>

/* How many octets of a setting of n octets tell the format: "$id$", or the salt of the old DES; 0
 * for what cannot be one. */
static size_t foreign_id(const char *text, size_t n)
{
	const char *p = *text == '$' ? memchr(text + 1, '$', n - 1) : NULL;

	if (p)
		return (size_t)(p - text) + 1;
	return n == 13 && named(text, letters + 1) >= n ? 2 : 0;
}

/* What crypt gives must have the format that was asked for: the C library may fall back to one. */
static int foreign_verify(const char *text, const char *secret, size_t n)
{
	char setting[MAX_VERIFIER], key[MAX_SECRET];
	size_t k = up_to(text, ':'), id = k < sizeof setting ? foreign_id(text, k) : 0;
	char *got;
	bool fits;

	if (!id)
		return -1;
	if (n >= sizeof key)
		return 0;
	memcpy(setting, text, k);
	setting[k] = 0;
	memcpy(key, secret, n);
	key[n] = 0;
	got = crypt(key, setting);
	wipe(key, sizeof key);
	if (!got || *got == '*' || strlen(got) < id || memcmp(got, setting, id))
		return -1;
	n = strlen(got);
	fits = n == k && same(got, setting, k);
	wipe(got, n);
	return fits;
}

/* A guess, which is about yescrypt's and bcrypt's with their usual parameters. */
static uint64_t foreign_cost(const char *text)
{
	return *text && foreign_id(text, up_to(text, ':')) ? 200000 : 0;
}
#else
#define foreign_verify(text, secret, n) (-1)
#define foreign_cost(text) 0
#endif

/* ---- all of them ---- */

enum scheme { LOCKED, PLAIN, SCRAM, OTHER };

/* *text moves behind the name of those that have one.  What could be a password that nobody set is
 * locked, and an empty one too. */
static enum scheme scheme_of(const char **text)
{
	const char *s = *text, *p;

	if (!*s || find(":!*", *s) || (*s == 'x' && (!s[1] || s[1] == ':')))
		return LOCKED;
	if ((p = behind(s, "{PLAIN}")))
		return *text = p, *p ? PLAIN : LOCKED;
	if ((p = behind(s, "SCRAM-SHA-256$")))
		return *text = p, SCRAM;
	return OTHER;
}

int verify(const char *text, const char *secret, size_t n)
{
	struct mill m;
	int known;

	switch (scheme_of(&text)) {
	case LOCKED:
		return 0;
	case PLAIN:
		return plain_verify(text, secret, n);
	case SCRAM:
		return scram_verify(text, secret, n);
	case OTHER:
		break;
	}
	known = unix_parse(text, &m);
	if (known < 0)
		return -1;
	return known ? unix_verify(&m, secret, n) : foreign_verify(text, secret, n);
}

uint64_t verify_cost(const char *text)
{
	struct mill m;
	struct scram scram;
	int known;

	switch (scheme_of(&text)) {
	case LOCKED:
		return 0;
	case PLAIN:
		return 1;
	case SCRAM:
		return scram_parse(text, &scram) ? 2 * scram.rounds : 0;
	case OTHER:
		break;
	}
	known = unix_parse(text, &m);
	if (known < 0)
		return 0;
	return known ? unix_cost(&m) : foreign_cost(text);
}

/* Of "$id$..." and "{ID}..." the part that names the format, where it is short and plain. */
const char *verify_scheme(const char *text)
{
	static char name[16];
	const char *s = text;
	char end = *s == '{' ? '}' : '$';
	size_t n;

	switch (scheme_of(&s)) {
	case LOCKED:
		return "locked";
	case PLAIN:
		return "{PLAIN}";
	case SCRAM:
		return "SCRAM-SHA-256";
	case OTHER:
		break;
	}
	n = named(text + 1, letters) + 2;
	if ((*text != '$' && *text != '{') || n < 3 || n >= sizeof name || text[n - 1] != end)
		return "unknown";
	memcpy(name, text, n);
	name[n] = 0;
	return name;
}

int verify_make(char to[MAX_VERIFIER], const char *secret, size_t n, uint32_t rounds)
{
	struct scram v = { .rounds = rounds, .salted = 16 };
	int err = rounds && rounds <= SCRAM_ROUNDS ? random_bytes(v.salt, v.salted) : -EINVAL;

	if (err)
		return err;
	scram_keys(&v, secret, n, v.keys);
	to += fmt(to, MAX_VERIFIER, "SCRAM-SHA-256$%u:", rounds);
	base64_encode(to, v.salt, v.salted);
	to[24] = '$';
	base64_encode(to + 25, v.keys, SHA256_SIZE);
	to[25 + 44] = ':';
	base64_encode(to + 25 + 45, v.keys + SHA256_SIZE, SHA256_SIZE);
	return 0;
}

/* The clock ticks in milliseconds, so something that takes 20 is measured. */
uint32_t verify_rounds(unsigned ms)
{
	uint8_t out[SHA256_SIZE];
	uint64_t start, took, rounds = 1024;

	do {
		rounds *= 2;
		start = now();
		pbkdf2_sha256("", 0, "", 0, (uint32_t)rounds, out);
		took = now() - start;
	} while (took < 20 && rounds < 1 << 20);
	rounds = rounds * ms / (took ? took : 1);
	return rounds < 4096 ? 4096 : rounds > 4000000 ? 4000000 : (uint32_t)rounds;
}
