/* test_verify.c: proves verify.c with published vectors, and with verifiers wrong in every place.
 * An argument names a file of lines "verifier secret-in-hex wanted" that other programs made; "-"
 * is the empty secret. */
#include "../../text.c"
#include "../../hash.c"
#include "../../verify.c"
#include "unit.h"

enum { FOREIGN = 200000 };      /* what verify_cost says of formats that crypt(3) has */

#define PENCIL_KEYS "$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=" \
	":wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
#define PENCIL_SALT "W22ZaJ0SNY7soEsUEjb6gQ=="
#define PENCIL "SCRAM-SHA-256$4096:" PENCIL_SALT PENCIL_KEYS

/* The text stands in a block of just its size, so that a sanitizer sees each octet that is read
 * behind it. */
static int fits(const char *text, const char *secret)
{
	size_t n = strlen(text) + 1, k = strlen(secret);
	char *t = malloc(n), *s = malloc(k + !k);
	int r;

	memcpy(t, text, n);
	memcpy(s, secret, k);
	r = verify(t, s, k);
	verify_cost(t);
	verify_scheme(t);
	free(t);
	free(s);
	return r;
}

/* Right; wrong for other secrets; -1 wherever it is cut.  crypt(3) takes what is cut for another
 * salt: wrong will do. */
static void known(const char *text, const char *secret, bool foreign)
{
	char copy[2100];
	size_t i, n = strlen(text);
	bool right = true;

	check(fits(text, secret) == 1);
	snprintf(copy, sizeof copy, "%sx", secret);
	check(fits(text, copy) == 0);
	copy[0] ^= 1;
	check(fits(text, copy) == 0);
	check(fits(text, "") == (*secret ? 0 : 1));
	strcpy(copy, text);
	for (i = n; i--; ) {
		copy[i] = 0;
		right &= foreign ? fits(copy, secret) < 1 : fits(copy, secret) == (i ? -1 : 0);
	}
	check(right);
	strcpy(copy, text);
	i = n - (*text == 'S' ? 50 : 3);        /* of SCRAM's two keys StoredKey decides */
	copy[i] = copy[i] == 'A' ? 'B' : 'A';
	right = fits(copy, secret) == 0;
	snprintf(copy, sizeof copy, "%sA", text);
	right &= foreign ? fits(copy, secret) < 1 : fits(copy, secret) == -1;
	snprintf(copy, sizeof copy, "!%s", text);
	right &= fits(copy, secret) == 0;
	check(right);
}

static void known_unix(const char *text, const char *secret)
{
	char copy[400];

	known(text, secret, verify_cost(text) == FOREIGN);
	snprintf(copy, sizeof copy, "%s:19000:0:99999:7:::", text);
	check(fits(copy, secret) == 1);
}

/* RFC 7677, section 3. */
static void test_scram(void)
{
	static const char auth[] = "n=user,r=rOprNGfwEbeRWgbNEkqO,"
		"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
		"s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,"
		"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
	static const char proof[] = "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
	static const char *const bad[] = {
		"SCRAM-SHA-256", "SCRAM-SHA-256$", "SCRAM-SHA-256$:",
		"SCRAM-SHA-1$1:AA==$AA==:AA==",
		"SCRAM-SHA-256$0:" PENCIL_SALT PENCIL_KEYS,
		"SCRAM-SHA-256$10000001:" PENCIL_SALT PENCIL_KEYS,
		"SCRAM-SHA-256$18446744073709555712:" PENCIL_SALT PENCIL_KEYS,
		"SCRAM-SHA-256$4294971392:" PENCIL_SALT PENCIL_KEYS,
		"SCRAM-SHA-256$-4096:" PENCIL_SALT PENCIL_KEYS,
		"SCRAM-SHA-256$:" PENCIL_SALT PENCIL_KEYS,
		"SCRAM-SHA-256$4096:" PENCIL_KEYS,
		"SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ=" PENCIL_KEYS,
		"SCRAM-SHA-256$4096:" PENCIL_SALT "$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT:AAAA",
		PENCIL " ", PENCIL ":", PENCIL "AAAA",
	};
	uint8_t stored[SHA256_SIZE], client[SHA256_SIZE], out[SHA256_SIZE];
	struct scram v;
	struct hash h;
	char code[60];
	size_t i;

	known(PENCIL, "pencil", false);
	check(verify_cost(PENCIL) == 8192);
	check(!strcmp(verify_scheme(PENCIL), "SCRAM-SHA-256"));
	for (i = 0; i < LEN(bad); i++) {
		check(fits(bad[i], "pencil") == -1);
		check(verify_cost(bad[i]) == 0);
	}

	check(scram_parse(strchr(PENCIL, '$') + 1, &v));
	memcpy(stored, v.keys, sizeof stored);
	hmac_sha256(v.keys + SHA256_SIZE, SHA256_SIZE, auth, sizeof auth - 1, out);
	base64_encode(code, out, sizeof out);
	check(!strcmp(code, "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="));
	/* the RFC's ClientProof gives back a ClientKey whose digest is StoredKey */
	hmac_sha256(stored, sizeof stored, auth, sizeof auth - 1, out);
	check(base64_decode(client, sizeof client, proof, 44) == 32);
	for (i = 0; i < SHA256_SIZE; i++)
		client[i] ^= out[i];
	hash_init(&h, SHA256);
	hash_add(&h, client, sizeof client);
	hash_end(&h, out);
	check(same(out, stored, sizeof out));
}

static void test_salt_bounds(void)
{
	char text[400], salt[140], octets[80] = { 1 };
	unsigned i;

	for (i = 63; i <= 66; i++) {
		base64_encode(salt, octets, i);
		snprintf(text, sizeof text, "SCRAM-SHA-256$1:%s%s", salt, PENCIL_KEYS);
		check(fits(text, "pencil") == (i > 64 ? -1 : 0));
	}
}

static void test_make(void)
{
	char a[MAX_VERIFIER], b[MAX_VERIFIER], secret[257];
	size_t n;

	for (n = 0; n <= 256; n += n < 4 ? 1 : 63) {
		memset(secret, 'k', n);
		secret[n] = 0;
		check(verify_make(a, secret, n, 64) == 0);
		check(verify_make(b, secret, n, 64) == 0);
		check(strcmp(a, b) != 0);
		check(!strncmp(a, "SCRAM-SHA-256$64:", 17));
		check(strlen(a) == 17 + 24 + 1 + 44 + 1 + 44);
		check(fits(a, secret) == 1 && fits(b, secret) == 1);
		check(fits(a, "other") == 0);
	}
	check(verify_make(a, "x", 1, 0) == -EINVAL);
	check(verify_make(a, "x", 1, 10000001) == -EINVAL);
	check(verify_rounds(0) == 4096);
	check(verify_rounds(4000000) == 4000000);
	n = verify_rounds(100);
	check(n >= 4096 && n <= 4000000);
}

static void test_plain(void)
{
	check(fits("{PLAIN}tanstaaf", "tanstaaf") == 1);
	check(fits("{PLAIN}tanstaaf", "tanstaa") == 0);
	check(fits("{PLAIN}tanstaaf", "tanstaaff") == 0);
	check(fits("{PLAIN}a:b c", "a:b c") == 1);
	check(fits("{PLAIN}a:b c", "a") == 0);
	check(fits("{PLAIN}", "") == 0);
	check(fits("{PLAIN}x", "") == 0);
	check(fits("{PLAIN}{PLAIN}", "{PLAIN}") == 1);
	check(fits("{PLAIN}!", "!") == 1);
	check(verify_cost("{PLAIN}x") == 1);
	check(!strcmp(verify_scheme("{PLAIN}x"), "{PLAIN}"));
}

static void test_locked(void)
{
	static const char *const locked[] = { "", "!", "!!", "*", "x", "x:", ":",
		":19000:0:99999:7:::", "!:19000", "*LK*",
		"!$6$saltstring"
		"$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uB"
		"nIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1",
		"!{PLAIN}x", "!" PENCIL };
	static const char *const secrets[] = { "", "!", "*", "x", "pencil", "Hello world!", "!!",
		":" };
	size_t i, k;

	for (i = 0; i < LEN(locked); i++) {
		for (k = 0; k < LEN(secrets); k++)
			check(fits(locked[i], secrets[k]) == 0);
		check(verify_cost(locked[i]) == 0);
		check(!strcmp(verify_scheme(locked[i]), "locked"));
	}
}

#define LONG_KEY \
	"a very much longer text to encrypt.  This one even stretches over morethan one line."

/* The vectors of the specification of SHA-crypt. */
static void test_sha_crypt(void)
{
	static const char *const bad[] = { "$5$", "$6$", "$5$$", "$5$salt", "$5$salt$",
		"$5$salt$short", "$5$rounds=$salt$",
		"$5$salt:string$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5", "$5$rounds=5000",
		"$5$rounds=5000$", "$5$rounds=5000$s",
		"$5$rounds=x$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5",
		"$5$rounds=-1$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5",
		"$6$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5" };
	char text[2100];
	size_t i;

	known_unix("$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5", "Hello world!");
	known_unix("$5$rounds=10000$saltstringsaltst$3xv.VbSHBb41AL9AvLeujZkZRBAwqFMz2.opqey6IcA",
		"Hello world!");
	known_unix("$5$rounds=10000$saltstringsaltstring"
		"$3xv.VbSHBb41AL9AvLeujZkZRBAwqFMz2.opqey6IcA",
		"Hello world!");
	known_unix("$5$rounds=5000$toolongsaltstring$Un/5jzAHMgOGZ5.mWJpuVolil07guHPvOW8mGRcvxa5",
		"This is just a test");
	known_unix("$5$rounds=1400$anotherlongsalts$Rx.j8H.h8HjEDGomFU8bDkXm3XIUnzyxf12oP84Bnq1",
		LONG_KEY);
	known_unix("$5$rounds=77777$short$JiO1O3ZpDAxGJeaDIuqCoEFysAe1mZNJRs3pw0KQRd/",
		"we have a short salt string but not a short password");
	known_unix("$5$rounds=123456$asaltof16chars..$gP3VQ/6X7UUEW3HkBn2w1/Ptq2jxPyzV/cZKmF/wJvD",
		"a short string");
	known_unix("$5$rounds=10$roundstoolow$yfvwcWrQ8l/K0DAWyuPMDNHpIVlTQebY9l/gL972bIC",
		"the minimum number is still observed");
	known_unix("$6$saltstring"
		"$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uB"
		"nIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1",
		"Hello world!");
	known_unix("$6$rounds=10000$saltstringsaltstring"
		"$OW1/O6BYHV6BcXZu8QVeXbDWra3Oeqh0sbHbbMCVNSnC"
		"M/UrjmM0Dp8vOuZeHBy/YTBmSK6H9qs/y3RnOaw5v.", "Hello world!");
	known_unix("$6$rounds=5000$toolongsaltstring"
		"$lQ8jolhgVRVhY4b5pZKaysCLi0QBxGoNeKQzQ3glMhwl"
		"lF7oGDZxUhx1yxdYcz/e1JSbq3y6JMxxl8audkUEm0", "This is just a test");
	known_unix("$6$rounds=1400$anotherlongsaltstring"
		"$POfYwTEok97VWcjxIiSOjiykti.o/pQs.wPvMxQ6Fm7I"
		"6IoYN3CmLs66x9t0oSwbtEW7o7UmJEiDwGqd8p4ur1", LONG_KEY);
	known_unix("$6$rounds=77777$short"
		"$WuQyW2YR.hBNpjjRhpYD/ifIw05xdfeEyQoMxIXbkvr0"
		"gge1a1x3yRULJ5CCaUeOxFmtlcGZelFl5CxtgfiAc0",
		"we have a short salt string but not a short password");
	known_unix("$6$rounds=123456$asaltof16chars.."
		"$BtCwjqMJGx5hrJhZywWvt0RLE8uZ4oPwcelCjmw2kSYu"
		".Ec6ycULevoBK25fs2xXgMNrCzIMVcgEJAstJeonj1", "a short string");
	known_unix("$6$rounds=10$roundstoolow"
		"$kUMsbe306n21p9R.FRkW3IGn.S9NPN0x50YhH1xhLsPu"
		"WGsUSklZt58jaTfF4ZEQpyUNGc0dqbpBYYBaHHrsX.",
		"the minimum number is still observed");
	for (i = 0; i < LEN(bad); i++)
		check(fits(bad[i], "Hello world!") == -1 && !verify_cost(bad[i]));
	memset(text, 'a', sizeof text);         /* long lines */
	memcpy(text, "$6$", 3);
	text[2000] = 0;
	check(fits(text, "x") == -1);
	text[1000] = '$';
	check(fits(text, "x") == -1);

	/* clamped at both ends; the cost follows the rounds */
	check(verify_cost("$5$rounds=1$s$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5") == 1500);
	check(verify_cost("$5$s$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5") == 7500);
	check(verify_cost("$5$rounds=10000$s$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5")
		== 15000);
	check(verify_cost("$5$rounds=99999999999999999999$s$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBG"
		"WEc5") == 1499999998);
	check(!strcmp(verify_scheme("$5$s$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5"), "$5$"));
}

/* Made by `openssl passwd -1` and `-apr1`; the second $apr1$ is htpasswd's documentation's. */
static void test_md5_crypt(void)
{
	known_unix("$1$saltstri$qQY4WxjABChYG1ccLpfkz/", "password");
	known_unix("$1$ab$rn6aQS/o7141mj179E/zA.", "");
	known_unix("$1$abcdefgh$jLVhq7LNbDH9FNZN3tXB80", "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy");
	known_unix("$1$saltstring$qQY4WxjABChYG1ccLpfkz/", "password");
	known_unix("$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/", "myPassword");
	known_unix("$apr1$abcdefgh$oapz5WFasUEWpjPw3yv9X1",
		"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
	check(verify_cost("$1$ab$rn6aQS/o7141mj179E/zA.") == 500);
	check(fits("$1$rounds=5000$saltstri$qQY4WxjABChYG1ccLpfkz/", "password") == -1);
	check(fits("$1$", "") == -1 && fits("$1$$", "") == -1 && fits("$apr1$", "") == -1);
	check(!strcmp(verify_scheme("$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/"), "$apr1$"));
}

static void test_scheme(void)
{
	static const struct { const char *text, *name; } names[] = {
		{ "$y$j9T$abc$def", "$y$" }, { "$2b$10$abcdefg", "$2b$" }, { "$gy$j9T$", "$gy$" },
		{ "{SHA}2jmj7l5rSw0yVb/vlWAYkK/YBwk=", "{SHA}" }, { "{CRYPT}$6$x", "{CRYPT}" },
		{ "{SHA256-CRYPT}x", "{SHA256-CRYPT}" }, { "$1$x", "$1$" }, { "{plain}x",
		"{plain}" },
		{ "$abcdefghijklm$", "$abcdefghijklm$" }, { "$abcdefghijklmn$", "unknown" },
		{ "$abcdefghijklmnop$", "unknown" }, { "password", "unknown" }, { "$", "unknown" },
		{ "{", "unknown" }, { "$$", "unknown" }, { "{}", "unknown" }, { "$a:b$",
		"unknown" },
		{ "$secret", "unknown" }, { "{secret", "unknown" }, { "$a}", "unknown" },
		{ "{a$", "unknown" }, { "$a\nb$", "unknown" }, { "abNANd1rDfiNc", "unknown" },
		{ "SCRAM-SHA-1$4096:x", "unknown" }, { "scram-sha-256$", "unknown" },
	};
	size_t i;

	for (i = 0; i < LEN(names); i++) {
		check(!strcmp(verify_scheme(names[i].text), names[i].name));
		check(fits(names[i].text, names[i].text) < ENABLE_CRYPT);
		check(fits(names[i].text, "") < ENABLE_CRYPT);
	}
}

/* Formats that are the C library's, where they are handed to it (Debian's crypt(3) knows all of
 * these). */
static void test_crypt(void)
{
	static const struct { const char *text, *secret; } theirs[] = {
		{ "abNANd1rDfiNc", "secret" },
		{ "$y$j9T$F5Jx5fExrKuPp53xLKQ..1$y8e1eitiNDaQsFFW6d.9KbSTlk5zV3R3coZQtfcNAO5",
		"correct horse battery staple" },
		{ "$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a", "secret" },
	};
	size_t i;
	int r;

	for (i = 0; i < LEN(theirs); i++) {
		if (!ENABLE_CRYPT) {
			check(verify_cost(theirs[i].text) == 0);
			check(fits(theirs[i].text, theirs[i].secret) == -1);
			continue;
		}
		check(verify_cost(theirs[i].text) > 0);
		r = fits(theirs[i].text, theirs[i].secret);
		if (r < 0) {
			printf("crypt(3) does not know %s\n", verify_scheme(theirs[i].text));
			continue;
		}
		known_unix(theirs[i].text, theirs[i].secret);
	}
	if (ENABLE_CRYPT && !ENABLE_SHA_CRYPT)
		known_unix("$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5",
			"Hello world!");
	if (ENABLE_CRYPT && !ENABLE_MD5_CRYPT)
		known_unix("$1$saltstri$qQY4WxjABChYG1ccLpfkz/", "password");
}

static void test_file(const char *path)
{
	char text[600], secret[1400], octets[700];
	FILE *f = fopen(path, "r");
	int want, got;
	size_t n;

	check(f != NULL);
	while (f && fscanf(f, "%599s %1399s %d", text, secret, &want) == 3) {
		n = unhex((uint8_t *)octets, *secret == '-' ? "" : secret);
		got = verify(text, octets, n);
		if (got != want)
			printf("%s: %d, not %d, for %s\n", text, got, want, secret);
		check(got == want);
	}
	if (f)
		fclose(f);
}

int main(int argc, char **argv)
{
	test_scram();
	test_salt_bounds();
	test_make();
	test_plain();
	test_locked();
	if (ENABLE_SHA_CRYPT)
		test_sha_crypt();
	if (ENABLE_MD5_CRYPT)
		test_md5_crypt();
	test_scheme();
	test_crypt();
	if (argc > 1)
		test_file(argv[1]);
	return unit_end();
}
