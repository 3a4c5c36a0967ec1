/* test_hash.c: proves hash.c with the published vectors, with every length and with every split. */
#include "../../text.c"
#include "../../hash.c"
#include "unit.h"

#define TEXT_448 "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"
#define TEXT_896 "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmno" \
	"ijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu"

/* The n octets that the vectors over all lengths are made of; borrowed until the next call but
 * three. */
static const uint8_t *pattern(size_t n)
{
	static uint8_t text[4][320];
	static unsigned turn;
	size_t i;

	turn = (turn + 1) % 4;
	for (i = 0; i < n; i++)
		text[turn][i] = (uint8_t)(i * 7 + n);
	return text[turn];
}

static const char *digest(enum hash_kind kind, const void *text, size_t n)
{
	uint8_t out[64];
	struct hash h;

	hash_init(&h, kind);
	hash_add(&h, text, n);
	n = hash_end(&h, out);
	return hex(out, n);
}

static bool digests(enum hash_kind kind, const char *text, const char *want)
{
	return !strcmp(digest(kind, text, strlen(text)), want);
}

static const char *million(enum hash_kind kind)
{
	uint8_t out[64], text[1000];
	struct hash h;
	int i;

	memset(text, 'a', sizeof text);
	hash_init(&h, kind);
	for (i = 0; i < 1000; i++)
		hash_add(&h, text, sizeof text);
	return hex(out, hash_end(&h, out));
}

/* The digest of the digests of 0 to 300 octets, each added in two parts. */
static const char *lengths(enum hash_kind kind)
{
	uint8_t out[64];
	struct hash h, all;
	size_t n, cut;

	hash_init(&all, SHA256);
	for (n = 0; n <= 300; n++) {
		cut = n * 5 % (n + 1);
		hash_init(&h, kind);
		hash_add(&h, pattern(n), cut);
		hash_add(&h, pattern(n) + cut, n - cut);
		hash_add(&all, out, hash_end(&h, out));
	}
	return hex(out, hash_end(&all, out));
}

static bool splits(enum hash_kind kind)
{
	char want[129];
	uint8_t out[64];
	struct hash h;
	size_t i, k;

	strcpy(want, digest(kind, pattern(270), 270));
	for (i = 0; i <= 270; i++) {
		hash_init(&h, kind);
		hash_add(&h, pattern(270), i);
		hash_add(&h, pattern(270) + i, 270 - i);
		if (strcmp(want, hex(out, hash_end(&h, out))))
			return false;
	}
	for (k = 1; k < 140; k++) {
		hash_init(&h, kind);
		for (i = 0; i < 270; i += k)
			hash_add(&h, pattern(270) + i, k < 270 - i ? k : 270 - i);
		if (strcmp(want, hex(out, hash_end(&h, out))))
			return false;
	}
	return true;
}

/* hash_end leaves nothing behind. */
static bool wiped(enum hash_kind kind)
{
	static const struct hash zero;
	uint8_t out[64];
	struct hash h;

	memset(&h, 0xff, sizeof h);
	hash_init(&h, kind);
	hash_add(&h, "secret", 6);
	hash_end(&h, out);
	return !memcmp(&h, &zero, sizeof h);
}

/* FIPS 180-4's examples. */
static void test_sha256(void)
{
	check(digests(SHA256, "",
		"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
	check(digests(SHA256, "abc",
		"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
	check(digests(SHA256, TEXT_448,
		"248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"));
	check(digests(SHA256, TEXT_896,
		"cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"));
	check(!strcmp(million(SHA256),
		"cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"));
	check(!strcmp(lengths(SHA256),
		"60d63ff40b5558727a9b786ac0be9300f7ca58fd9ddd3b2f3681b369018a87dc"));
	check(splits(SHA256));
	check(wiped(SHA256));
}

#if ENABLE_SHA_CRYPT
static void test_sha512(void)
{
	check(digests(SHA512, "", "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce"
		"47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e"));
	check(digests(SHA512, "abc",
		"ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
		"2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"));
	check(digests(SHA512, TEXT_448,
		"204a8fc6dda82f0a0ced7beb8e08a41657c16ef468b228a8279be331a703c335"
		"96fd15c13b1b07f9aa1d3bea57789ca031ad85c7a71dd70354ec631238ca3445"));
	check(digests(SHA512, TEXT_896,
		"8e959b75dae313da8cf4f72814fc143f8f7779c6eb9f7fa17299aeadb6889018"
		"501d289e4900f7e4331b99dec4b5433ac7d329eeb6dd26545e96e55b874be909"));
	check(!strcmp(million(SHA512),
		"e718483d0ce769644e2e42c7bc15b4638e1f98b13b2044285632a803afa973eb"
		"de0ff244877ea60a4cb0432ce577c31beb009c5c2c49aa2e4eadb217ad8cc09b"));
	check(!strcmp(lengths(SHA512),
		"f3a878b16610912d9a238688c52fc5f29f8fe30d2c5656e7e77dcf747171648d"));
	check(splits(SHA512));
	check(wiped(SHA512));
}
#else
#define test_sha512() ((void)0)
#endif

#if ENABLE_MD5
/* RFC 1321, A.5. */
static void test_md5(void)
{
	check(digests(MD5, "", "d41d8cd98f00b204e9800998ecf8427e"));
	check(digests(MD5, "a", "0cc175b9c0f1b6a831c399e269772661"));
	check(digests(MD5, "abc", "900150983cd24fb0d6963f7d28e17f72"));
	check(digests(MD5, "message digest", "f96b697d7cb7938d525a2f31aaf161d0"));
	check(digests(MD5, "abcdefghijklmnopqrstuvwxyz", "c3fcd3d76192e4007dfb496cca67e13b"));
	check(digests(MD5, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789",
		"d174ab98d277d9f5a5611c2c9f419d9f"));
	check(digests(MD5,
		"12345678901234567890123456789012345678901234567890123456789012345678901234567890",
		"57edf4a22be3c955ac49da2e2107b67a"));
	check(!strcmp(million(MD5), "7707d6ae4e027c70eea2a935c2296f21"));
	check(!strcmp(lengths(MD5),
		"01f484cef341ddb5881905712187a8264e23e0a8882da88890874d86f771b102"));
	check(splits(MD5));
	check(wiped(MD5));
	/* RFC 1939, section 7: APOP's example. */
	check(digests(MD5, "<1896.697170952@dbc.mtview.ca.us>tanstaaf",
		"c4c9334bac560ecc979e58001b3e22fb"));
}
#else
#define test_md5() ((void)0)
#endif

static bool hmac_is(const char *key, const char *text, const char *want)
{
	uint8_t k[140], t[160], out[SHA256_SIZE];
	size_t nk = unhex(k, key), n = unhex(t, text);

	hmac_sha256(k, nk, t, n, out);
	return !strncmp(hex(out, sizeof out), want, strlen(want));
}

#define AA10 "aaaaaaaaaaaaaaaaaaaa"
#define AA20 AA10 AA10
#define AA131 AA20 AA20 AA20 AA20 AA20 AA20 AA10 "aa"

/* RFC 4231, section 4. */
static void test_hmac(void)
{
	uint8_t out[SHA256_SIZE];
	struct hash all;
	size_t n;

	check(hmac_is("0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b", "4869205468657265",
		"b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"));
	check(hmac_is("4a656665", "7768617420646f2079612077616e7420666f72206e6f7468696e673f",
		"5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"));
	check(hmac_is(AA20, "dddddddddddddddddddddddddddddddddddddddddddddddddd"
		"dddddddddddddddddddddddddddddddddddddddddddddddddd",
		"773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"));
	check(hmac_is("0102030405060708090a0b0c0d0e0f10111213141516171819",
		"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"
		"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
		"82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"));
	check(hmac_is("0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c",
		"546573742057697468205472756e636174696f6e",
		"a3b6167473100ee06e0c796c2955552b"));
	check(hmac_is(AA131, "54657374205573696e67204c6172676572205468616e20426c6f636b2d53697a"
		"65204b6579202d2048617368204b6579204669727374",
		"60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"));
	check(hmac_is(AA131, "5468697320697320612074657374207573696e672061206c6172676572207468"
		"616e20626c6f636b2d73697a65206b657920616e642061206c61726765722074"
		"68616e20626c6f636b2d73697a6520646174612e20546865206b6579206e6565"
		"647320746f20626520686173686564206265666f7265206265696e6720757365"
		"642062792074686520484d414320616c676f726974686d2e",
		"9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"));

	hash_init(&all, SHA256);
	for (n = 0; n <= 300; n++) {
		hmac_sha256(pattern(n), n, pattern(300 - n), 300 - n, out);
		hash_add(&all, out, sizeof out);
	}
	hash_end(&all, out);
	check(!strcmp(hex(out, 32),
		"829697780116da2255f34107a2102b155f638d2596fb23f56e11baff5c2f01b4"));
}

static bool pbkdf2_is(const char *secret, const char *salt, uint32_t rounds, const char *want)
{
	uint8_t out[SHA256_SIZE];

	pbkdf2_sha256(secret, strlen(secret), salt, strlen(salt), rounds, out);
	return !strcmp(hex(out, sizeof out), want);
}

/* RFC 7914, section 11 (the first 32 of its 64 octets), and what is the same for RFC 6070's input.
 * */
static void test_pbkdf2(void)
{
	uint8_t out[SHA256_SIZE];
	struct hash all;
	uint32_t n;

	check(pbkdf2_is("passwd", "salt", 1,
		"55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"));
	check(pbkdf2_is("Password", "NaCl", 80000,
		"4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56"));
	check(pbkdf2_is("password", "salt", 1,
		"120fb6cffcf8b32c43e7225256c4f837a86548c92ccc35480805987cb70be17b"));
	check(pbkdf2_is("password", "salt", 2,
		"ae4d0c95af6b46d32d0adff928f06dd02a303f8ef3c251dfd6e2d85a95474c43"));
	check(pbkdf2_is("password", "salt", 4096,
		"c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a"));
	check(pbkdf2_is("passwordPASSWORDpassword", "saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096,
		"348c89dbcbd32b2f32d814b8116e84cf2b17347ebc1800181c4e2a1fb8dd53e1"));

	hash_init(&all, SHA256);
	for (n = 0; n <= 300; n++) {
		pbkdf2_sha256(pattern(n), n, pattern(n % 70), n % 70, 1 + n % 5, out);
		hash_add(&all, out, sizeof out);
	}
	hash_end(&all, out);
	check(!strcmp(hex(out, 32),
		"9618684bc5943b5485d8bf216d269039a3349f97eca8369fdf051a6b64e38e93"));
}

static bool base64_is(const char *plain, const char *code)
{
	size_t n = strlen(plain), i;
	uint8_t back[64];
	char to[100];

	base64_encode(to, plain, n);
	if (strcmp(to, code))
		return false;
	for (i = 0; i < n; i++)         /* too little room */
		if (base64_decode(back, i, code, strlen(code)) != -1)
			return false;
	return base64_decode(back, n, code, strlen(code)) == (ssize_t)n && !memcmp(back, plain, n);
}

static void test_base64(void)
{
	static const char *const bad[] = {
		"Z", "Zg", "Zg=", "Zg==Zg==", "Z===", "====", "=", "==", "===", "Zh==", "Zm9=",
		"Zg= =", " Zg==", "Zg==\n", "Zm\n9", "Zm9v=", "Zm-_", "Z=9v", "Zm=v", "=m9v",
		"Zg=g",
		"Zm9\x80", "Zm9v====", "Zm9vZg", "Zm9vZ===", "Z\xff==",
	};
	uint8_t out[SHA256_SIZE], back[320];
	char code[420];
	struct hash all;
	bool right = true;
	size_t i, n;

	/* RFC 4648, section 10 */
	check(base64_is("", ""));
	check(base64_is("f", "Zg=="));
	check(base64_is("fo", "Zm8="));
	check(base64_is("foo", "Zm9v"));
	check(base64_is("foob", "Zm9vYg=="));
	check(base64_is("fooba", "Zm9vYmE="));
	check(base64_is("foobar", "Zm9vYmFy"));
	check(base64_is("\xfb\xff\xbf", "+/+/"));
	for (i = 0; i < LEN(bad); i++)
		check(base64_decode(back, sizeof back, bad[i], strlen(bad[i])) == -1);
	check(base64_decode(back, sizeof back, "Zm\0v", 4) == -1);
	check(base64_decode(back, sizeof back, "Zm9vZ", 4) == 3);

	hash_init(&all, SHA256);
	for (n = 0; n <= 300; n++) {
		base64_encode(code, pattern(n), n);
		hash_add(&all, code, strlen(code));
		right &= strlen(code) == 4 * ((n + 2) / 3);
		right &= base64_decode(back, n, code, strlen(code)) == (ssize_t)n;
		right &= !memcmp(back, pattern(n), n);
	}
	hash_end(&all, out);
	check(right);
	check(!strcmp(hex(out, 32),
		"eefa83aefbdf8e097eb67335f2272872106be4248a6ce772b5d8aa03c6364308"));
}

static void test_same(void)
{
	char a[40], b[40];
	bool right = true;
	unsigned i, bit;

	memset(a, 'x', sizeof a);
	memset(b, 'x', sizeof b);
	check(same(a, b, 0));
	check(same(a, b, sizeof a));
	for (i = 0; i < sizeof b; i++)
		for (bit = 1; bit < 256; bit <<= 1) {
			b[i] = (char)(b[i] ^ (char)bit);
			right &= !same(a, b, sizeof a) && same(a, b, i);
			b[i] = 'x';
		}
	check(right);
}

static uint64_t sum_of(const void *p, size_t n)
{
	struct sum s;

	sum_init(&s);
	sum_add(&s, p, n);
	return sum_end(&s);
}

/* The values hold on every host: octet order and alignment do not count. */
static void test_sum(void)
{
	static const char text[] = "Neither snow nor rain nor heat nor gloom";
	static const uint8_t zeros[256];
	uint64_t seen[257];
	size_t i, k, n = sizeof text - 1;
	bool right = true, differ = true;
	char copy[60];
	struct sum s;

	check(sum_of("", 0) == 0x8f77f3de2aa21ccc);
	check(sum_of("a", 1) == 0xcc7e7974d7121069);
	check(sum_of(text, n) == 0x9074371f6e6b9bc3);
	check(sum_of(pattern(40), 40) == 0x5144d8af4879302e);
	for (i = 0; i <= n; i++)
		for (k = i; k <= n; k++) {
			sum_init(&s);
			sum_add(&s, text, i);
			(void)sum_end(&s);      /* changes nothing */
			sum_add(&s, text + i, k - i);
			sum_add(&s, text + k, n - k);
			right &= sum_end(&s) == 0x9074371f6e6b9bc3;
		}
	sum_init(&s);
	for (i = 0; i < n; i++)
		sum_add(&s, text + i, 1);
	right &= sum_end(&s) == 0x9074371f6e6b9bc3;
	for (i = 0; i < 16; i++) {
		memcpy(copy + i, text, n);
		right &= sum_of(copy + i, n) == 0x9074371f6e6b9bc3;
	}
	check(right);
	for (i = 0; i <= 256; i++)
		for (seen[i] = sum_of(zeros, i), k = 0; k < i; k++)
			differ &= seen[i] != seen[k];
	check(differ);
	for (i = 0, differ = true; i < n * 8; i++) {
		memcpy(copy, text, n);
		copy[i / 8] = (char)(copy[i / 8] ^ 1 << i % 8);
		differ &= sum_of(copy, n) != 0x9074371f6e6b9bc3;
	}
	check(differ);
	for (i = 0, differ = true; i < 5; i++)          /* words that change places */
		for (k = 0; k < i; k++) {
			memcpy(copy, text, n);
			memcpy(copy + i * 8, text + k * 8, 8);
			memcpy(copy + k * 8, text + i * 8, 8);
			differ &= sum_of(copy, n) != 0x9074371f6e6b9bc3;
		}
	check(differ);
}

int main(void)
{
	test_sha256();
	test_sha512();
	test_md5();
	test_hmac();
	test_pbkdf2();
	test_base64();
	test_same();
	test_sum();
	return unit_end();
}
