/* hash.c: owns digests and codes: MD5, SHA-2, HMAC, PBKDF2, base64, a checksum.  Any process. */
#include "almond.h"

#define BIG (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__)

/* SHA-256's tables are the upper halves of SHA-512's (FIPS 180-4, 4.2.2 and 5.3.3: the same primes,
 * fewer bits). */
#if ENABLE_SHA_CRYPT
#define WORD uint64_t
#define W(hi, lo) 0x##hi##lo
#define UPPER(x) ((uint32_t)((x) >> 32))
#else
#define WORD uint32_t
#define W(hi, lo) 0x##hi
#define UPPER(x) (x)
#endif

static const WORD first[8] = {
	W(6a09e667, f3bcc908), W(bb67ae85, 84caa73b), W(3c6ef372, fe94f82b), W(a54ff53a, 5f1d36f1),
	W(510e527f, ade682d1), W(9b05688c, 2b3e6c1f), W(1f83d9ab, fb41bd6b), W(5be0cd19, 137e2179),
};

static const WORD K[] = {
	W(428a2f98, d728ae22), W(71374491, 23ef65cd), W(b5c0fbcf, ec4d3b2f), W(e9b5dba5, 8189dbbc),
	W(3956c25b, f348b538), W(59f111f1, b605d019), W(923f82a4, af194f9b), W(ab1c5ed5, da6d8118),
	W(d807aa98, a3030242), W(12835b01, 45706fbe), W(243185be, 4ee4b28c), W(550c7dc3, d5ffb4e2),
	W(72be5d74, f27b896f), W(80deb1fe, 3b1696b1), W(9bdc06a7, 25c71235), W(c19bf174, cf692694),
	W(e49b69c1, 9ef14ad2), W(efbe4786, 384f25e3), W(0fc19dc6, 8b8cd5b5), W(240ca1cc, 77ac9c65),
	W(2de92c6f, 592b0275), W(4a7484aa, 6ea6e483), W(5cb0a9dc, bd41fbd4), W(76f988da, 831153b5),
	W(983e5152, ee66dfab), W(a831c66d, 2db43210), W(b00327c8, 98fb213f), W(bf597fc7, beef0ee4),
	W(c6e00bf3, 3da88fc2), W(d5a79147, 930aa725), W(06ca6351, e003826f), W(14292967, 0a0e6e70),
	W(27b70a85, 46d22ffc), W(2e1b2138, 5c26c926), W(4d2c6dfc, 5ac42aed), W(53380d13, 9d95b3df),
	W(650a7354, 8baf63de), W(766a0abb, 3c77b2a8), W(81c2c92e, 47edaee6), W(92722c85, 1482353b),
	W(a2bfe8a1, 4cf10364), W(a81a664b, bc423001), W(c24b8b70, d0f89791), W(c76c51a3, 0654be30),
	W(d192e819, d6ef5218), W(d6990624, 5565a910), W(f40e3585, 5771202a), W(106aa070, 32bbd1b8),
	W(19a4c116, b8d2d0c8), W(1e376c08, 5141ab53), W(2748774c, df8eeb99), W(34b0bcb5, e19b48a8),
	W(391c0cb3, c5c95a63), W(4ed8aa4a, e3418acb), W(5b9cca4f, 7763e373), W(682e6ff3, d6b2b8a3),
	W(748f82ee, 5defb2fc), W(78a5636f, 43172f60), W(84c87814, a1f0ab72), W(8cc70208, 1a6439ec),
	W(90befffa, 23631e28), W(a4506ceb, de82bde9), W(bef9a3f7, b2c67915), W(c67178f2, e372532b),
#if ENABLE_SHA_CRYPT
	W(ca273ece, ea26619c), W(d186b8c7, 21c0c207), W(eada7dd6, cde0eb1e), W(f57d4f7f, ee6ed178),
	W(06f067aa, 72176fba), W(0a637dc5, a2c898a6), W(113f9804, bef90dae), W(1b710b35, 131c471b),
	W(28db77f5, 23047d84), W(32caab7b, 40c72493), W(3c9ebe0a, 15c9bebc), W(431d67c4, 9c100d4c),
	W(4cc5d4be, cb3e42b6), W(597f299c, fc657e2a), W(5fcb6fab, 3ad6faec), W(6c44198c, 4a475817),
#endif
};

static uint32_t ror(uint32_t x, unsigned n)
{
	return x >> n | x << (32 - n);
}

/* FIPS 180-4, 6.2.2.  p slides over its own history: p[0] to p[7] are a to h, and a round puts a
 * new a before them, so that nothing is moved. */
static void sha256_block(struct hash *h)
{
	struct { uint32_t w[64], v[64 + 8]; } m;
	uint32_t *w = m.w, *p = m.v + 64, t, x, y;
	unsigned i;

	memcpy(w, h->block, 64);
	memcpy(p, h->state.w, 32);
	for (i = 0; i < 48; i++) {
		x = w[i + 1];
		y = w[i + 14];
		w[i + 16] = w[i] + w[i + 9] + (ror(x, 7) ^ ror(x, 18) ^ x >> 3)
			+ (ror(y, 17) ^ ror(y, 19) ^ y >> 10);
	}
	for (i = 0; i < 64; i++) {
		x = p[4];
		t = w[i] + p[7] + UPPER(K[i]) + (ror(x, 6) ^ ror(x, 11) ^ ror(x, 25))
			+ (p[6] ^ (x & (p[5] ^ p[6])));
		p[3] += t;
		x = p[0];
		t += (ror(x, 2) ^ ror(x, 13) ^ ror(x, 22)) + ((x & p[1]) | (p[2] & (x | p[1])));
		*--p = t;
	}
	for (i = 0; i < 8; i++)
		h->state.w[i] += p[i];
	wipe(&m, sizeof m);
}

#if ENABLE_SHA_CRYPT
static uint64_t ror64(uint64_t x, unsigned n)
{
	return x >> n | x << (64 - n);
}

/* FIPS 180-4, 6.4.2, in the same way. */
static void sha512_block(struct hash *h)
{
	struct { uint64_t w[80], v[80 + 8]; } m;
	uint64_t *w = m.w, *p = m.v + 80, t, x, y;
	unsigned i;

	memcpy(w, h->block, 128);
	memcpy(p, h->state.d, 64);
	for (i = 0; i < 64; i++) {
		x = w[i + 1];
		y = w[i + 14];
		w[i + 16] = w[i] + w[i + 9] + (ror64(x, 1) ^ ror64(x, 8) ^ x >> 7)
			+ (ror64(y, 19) ^ ror64(y, 61) ^ y >> 6);
	}
	for (i = 0; i < 80; i++) {
		x = p[4];
		t = w[i] + p[7] + K[i] + (ror64(x, 14) ^ ror64(x, 18) ^ ror64(x, 41))
			+ (p[6] ^ (x & (p[5] ^ p[6])));
		p[3] += t;
		x = p[0];
		t += (ror64(x, 28) ^ ror64(x, 34) ^ ror64(x, 39))
			+ ((x & p[1]) | (p[2] & (x | p[1])));
		*--p = t;
	}
	for (i = 0; i < 8; i++)
		h->state.d[i] += p[i];
	wipe(&m, sizeof m);
}
#endif

#if ENABLE_MD5
/* RFC 1321, 3.4: the integer part of 2^32 times |sin(i + 1)|. */
static const uint32_t sines[64] = {
	0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a,
	0xa8304613, 0xfd469501, 0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be,
	0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821, 0xf61e2562, 0xc040b340,
	0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
	0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8,
	0x676f02d9, 0x8d2a4c8a, 0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c,
	0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70, 0x289b7ec6, 0xeaa127fa,
	0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
	0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92,
	0xffeff47d, 0x85845dd1, 0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1,
	0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391,
};

/* RFC 1321, 3.4; its rotations to the left are 32 less these. */
static void md5_block(struct hash *h)
{
	static const uint8_t right[16] = {
		25, 20, 15, 10, 27, 23, 18, 12, 28, 21, 16, 9, 26, 22, 17, 11
	};
	uint32_t *s = h->state.w, a = s[0], b = s[1], c = s[2], d = s[3], w[16], t;
	unsigned i, k;

	memcpy(w, h->block, sizeof w);
	for (i = 0; i < 64; i++) {
		switch (i / 16) {
		case 0: t = d ^ (b & (c ^ d)), k = i; break;
		case 1: t = c ^ (d & (b ^ c)), k = i * 5 + 1; break;
		case 2: t = b ^ c ^ d, k = i * 3 + 5; break;
		default: t = c ^ (b | ~d), k = i * 7;
		}
		t += a + sines[i] + w[k & 15];
		a = d, d = c, c = b;
		b += ror(t, right[i / 16 * 4 + i % 4]);
	}
	s[0] += a, s[1] += b, s[2] += c, s[3] += d;
	wipe(w, sizeof w);
}
#endif

/* What differs between the kinds.  `flip` turns an octet's place in the message into its place in a
 * host's word: block and state are words of the host throughout, and no code swaps octets. */
static const struct kind {
	void (*run)(struct hash *);
	uint8_t block, size, flip;
} kinds[] = {
	[SHA256] = { sha256_block, 64, SHA256_SIZE, BIG ? 0 : 3 },
#if ENABLE_SHA_CRYPT
	[SHA512] = { sha512_block, 128, SHA512_SIZE, BIG ? 0 : 7 },
#endif
#if ENABLE_MD5
	[MD5] = { md5_block, 64, MD5_SIZE, BIG ? 3 : 0 },
#endif
};

void hash_init(struct hash *h, enum hash_kind kind)
{
	static const uint32_t md5[4] = { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476 };
	unsigned i;

	h->kind = kind;
	h->count = 0;
	for (i = 0; i < 8; i++)
		if (ENABLE_SHA_CRYPT && kind == SHA512)
			h->state.d[i] = first[i];
		else
			h->state.w[i] = ENABLE_MD5 && kind == MD5 ? md5[i & 3] : UPPER(first[i]);
}

void hash_add(struct hash *h, const void *text, size_t n)
{
	const struct kind *k = &kinds[h->kind];
	unsigned at = (unsigned)h->count & (k->block - 1u);
	const uint8_t *p = text;

	for (h->count += n; n; n--) {
		h->block[at++ ^ k->flip] = *p++;
		if (at == k->block) {
			k->run(h);
			at = 0;
		}
	}
}

/* Padding: a one bit, zeros, the count of bits in the last 8 octets (of SHA-512's 16, whose upper
 * half is zero). */
static void finish(struct hash *h)
{
	unsigned block = kinds[h->kind].block, tail = block / 8, i, zeros;
	uint64_t bits = h->count << 3;
	uint8_t pad[1 + 127 + 16] = { 0x80 }, *p;

	zeros = ~(tail + (unsigned)h->count) & (block - 1);
	p = pad + 1 + zeros + tail - 8;
	for (i = 0; i < 8; i++)
		*p++ = ((uint8_t *)&bits)[i ^ ((h->kind == MD5) == BIG ? 7 : 0)];
	hash_add(h, pad, (size_t)(p - pad));
}

size_t hash_end(struct hash *h, uint8_t *out)
{
	const struct kind *k = &kinds[h->kind];
	size_t i;

	finish(h);
	for (i = 0; i < k->size; i++)
		out[i] = ((const uint8_t *)&h->state)[i ^ k->flip];
	wipe(h, sizeof *h);
	return i;
}

/* h takes one block: the key, not longer, in which each octet is x-ored.  A copy of its state stays
 * in s. */
static void keyed(uint32_t s[8], struct hash *h, const uint8_t *key, size_t n, uint8_t x)
{
	uint8_t pad[64];

	memset(pad, x, sizeof pad);
	while (n--)
		pad[n] ^= key[n];
	hash_init(h, SHA256);
	hash_add(h, pad, sizeof pad);
	memcpy(s, h->state.w, 32);
	wipe(pad, sizeof pad);
}

/* The digest in h becomes that of itself behind a keyed block; the padding stands in h's block. */
static void chain(struct hash *h, const uint32_t key[8])
{
	memcpy(h->block, h->state.w, 32);
	memcpy(h->state.w, key, 32);
	sha256_block(h);
}

/* HMAC of the text and the first `tail` octets of a block number, then rounds - 1 more of the
 * digest, x-ored: HMAC and PBKDF2 (RFC 8018, 5.2; one block is enough for 32 octets).  What the key
 * does is worked out once, so that a round is two compressions. */
static void prf(const void *key, size_t nk, const void *text, size_t n, size_t tail,
	uint32_t rounds, uint8_t *out)
{
	static const uint32_t padding[8] = { 0x80000000, [7] = (64 + 32) * 8 };
	struct { uint32_t in[8], out[8]; uint8_t key[32]; struct hash h; } v;
	unsigned i;

	if (nk > 64) {
		hash_init(&v.h, SHA256);
		hash_add(&v.h, key, nk);
		nk = hash_end(&v.h, v.key);
		key = v.key;
	}
	keyed(v.out, &v.h, key, nk, 0x5c);
	keyed(v.in, &v.h, key, nk, 0x36);
	hash_add(&v.h, text, n);
	hash_add(&v.h, "\0\0\0\1", tail);
	finish(&v.h);
	memcpy(v.h.block + 32, padding, 32);
	memset(out, 0, SHA256_SIZE);
	for (;;) {
		chain(&v.h, v.out);
		for (i = 0; i < SHA256_SIZE; i++)
			out[i] ^= ((const uint8_t *)&v.h.state)[i ^ kinds[SHA256].flip];
		if (!--rounds)
			break;
		chain(&v.h, v.in);
	}
	wipe(&v, sizeof v);
}

void hmac_sha256(const void *key, size_t nk, const void *text, size_t n, uint8_t out[SHA256_SIZE])
{
	prf(key, nk, text, n, 0, 1, out);
}

void pbkdf2_sha256(const void *secret, size_t n, const void *salt, size_t ns, uint32_t rounds,
	uint8_t out[SHA256_SIZE])
{
	prf(secret, n, salt, ns, 4, rounds, out);
}

static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

void base64_encode(char *to, const void *from, size_t n)
{
	const uint8_t *p = from;
	size_t i, take;
	uint32_t v;

	for (; n; n -= take) {
		take = n < 3 ? n : 3;
		for (v = 0, i = 0; i < 3; i++)
			v = v << 8 | (i < take ? *p++ : 0u);
		for (i = 0; i < 4; i++, v <<= 6)
			*to++ = i <= take ? alphabet[v >> 18 & 63] : '=';
	}
	*to = 0;
}

ssize_t base64_decode(void *to, size_t room, const char *s, size_t n)
{
	const char *end = s + n;
	uint8_t *p = to;
	uint32_t v = 0, c, bits = 0;

	if (n % 4)
		return -1;
	if (n && end[-1] == '=')
		end -= end[-2] == '=' ? 2 : 1;
	for (; s < end; s++) {
		for (c = 0; alphabet[c] != *s; c++)
			if (c == 63)
				return -1;
		v = v << 6 | c;
		bits += 6;
		if (bits < 8)
			continue;
		if (!room--)
			return -1;
		bits -= 8;
		*p++ = (uint8_t)(v >> bits);
	}
	return v & ((1u << bits) - 1) ? -1 : p - (uint8_t *)to;
}

/* volatile: each octet is looked at, whatever the compiler thinks of it. */
bool same(const void *a, const void *b, size_t n)
{
	const volatile uint8_t *p = a, *q = b;
	uint8_t differ = 0;

	while (n--)
		differ |= *p++ ^ *q++;
	return !differ;
}

/* One word into the sum: a bijection of h, and of w.  What waits for the last h is short (xor,
 * rotate, times 5); the long multiplication does not wait.  `odd` keeps zero words from meeting a
 * zero h for good. */
static uint64_t mix(uint64_t h, uint64_t w)
{
	const uint64_t odd = 0x9e3779b97f4a7c15;

	w = (w + odd) * odd;
	h ^= w ^ w >> 32;
	return (h << 27 | h >> 37) * 5;
}

void sum_init(struct sum *s)
{
	memset(s, 0, sizeof *s);
}

/* Octets wait in `word`, the first lowest, until there are eight. */
void sum_add(struct sum *s, const void *text, size_t n)
{
	unsigned at = s->count & 7, k;
	const uint8_t *p = text;
	uint64_t h = s->h, w;

	for (s->count += n; n; n -= k, p += k) {
		if (at || n < 8) {
			w = s->word | (uint64_t)*p << at * 8;
			k = 1;
		} else {
			memcpy(&w, p, 8);
			w = BIG ? __builtin_bswap64(w) : w;
			k = 8;
		}
		s->word = w;
		at = (at + k) & 7;
		if (at)
			continue;
		h = mix(h, w);
		s->word = 0;
	}
	s->h = h;
}

/* The sum goes in as a word, so that all of its bits meet all of the result's. */
uint64_t sum_end(const struct sum *s)
{
	return mix(s->count, mix(s->h, s->word));
}
