/* test_text.c: proves text.c: numbers, names, log lines, formatting, lines of small files. */
#include "../../text.c"
#include "unit.h"
#include <sys/mman.h>

struct page *page;

static bool num(const char *s, uint64_t max, uint64_t want)
{
	uint64_t n = 77;

	return number(s, max, &n) == 0 && n == want;
}

static bool no_num(const char *s, uint64_t max)
{
	uint64_t n = 77;

	return number(s, max, &n) < 0 && n == 77;
}

static void numbers(void)
{
	check(num("0", 10, 0) && num("007", 10, 7) && num("10", 10, 10) && num("9", 9, 9));
	check(num("18446744073709551615", UINT64_MAX, UINT64_MAX));
	check(num("000000000000000000000000000000001", 5, 1));
	check(no_num("18446744073709551616", UINT64_MAX) &&
	    no_num("99999999999999999999", UINT64_MAX));
	check(no_num("11", 10) && no_num("4", 3) && no_num("10", 9) && no_num("1", 0));
	check(no_num("", 10) && no_num("-1", 10) && no_num("+1", 10) && no_num(" 1", 10));
	check(no_num("1 ", 10) && no_num("1x", 10) && no_num("0x1", 10) && no_num("1\n", 10));
}

static void names(void)
{
	char longest[MAX_NAME + 2];

	memset(longest, 'x', sizeof longest);
	longest[MAX_NAME + 1] = 0;
	check(name_fault(longest) != NULL);
	longest[MAX_NAME] = 0;
	check(!name_fault(longest));
	check(!name_fault("a") && !name_fault("a.b@c-d_e+f") && !name_fault("\xc3\xa4") &&
	    !name_fault("lock"));
	check(name_fault("") && name_fault(".") && name_fault("..") && name_fault(".x") &&
	    name_fault("../x"));
	check(name_fault("a/b") && name_fault("a:b") && name_fault("a b") && name_fault("a\n") &&
	    name_fault("\x7f"));
	check(name_fault("a.lock") && !name_fault("a.lock2"));
}

static void words(void)
{
	char to[40], small[8];

	check(!strcmp(escape(to, sizeof to, "a b\\=\n\xff", 7), "a\\x20b\\x5C\\x3D\\x0A\\xFF"));
	check(strlen(escape(small, sizeof small, "\n\n\n\n", 4)) < sizeof small);
	check(fmt(to, sizeof to, "%s|%c|%d|%u|%x|%%", "s", 'c', -5, 7u, 255u) == 13 &&
	    !strcmp(to, "s|c|-5|7|ff|%"));
	check(fmt(to, sizeof to, "%llu %lld", 18446744073709551615ull,
		  -9223372036854775807ll - 1) == 41 - 2 ||
	    strlen(to) == sizeof to - 1);
	check(fmt(to, sizeof to, "%zu %lu %ld", (size_t)12, 34ul, -56l) == 9 &&
	    !strcmp(to, "12 34 -56"));
	check(fmt(small, sizeof small, "%s", "longer than it") == 7 && !strcmp(small, "longer "));
	check(fmt(small, 1, "x") == 0 && !*small);
	check(same_word("QUIT", "quit") && same_word("", "") && !same_word("quit", "qui") &&
	    !same_word("qui", "quit"));
	check(!same_word("@", "`") && !same_word("[", "{"));
	check(hex_digit('0') == 0 && hex_digit('f') == 15 && hex_digit('F') == 15 &&
	    hex_digit('g') < 0 && hex_digit('/') < 0);
	check(!strcmp(reason(-ENOSPC), "disk full") &&
	    !strcmp(reason(EADDRNOTAVAIL), "no such address here"));
	check(!strncmp(reason(9999), "error 9999", 10));
}

/* Every line of a file, whatever its length and its end. */
static void file_lines(void)
{
	static char text[9000];
	struct lines l = { .at = 0 };
	size_t i, n = 0;
	char *s;

	for (i = 0; i < 5000; i++)
		text[n++] = 'x';
	n += (size_t)sprintf(text + n, "\nshort\r\n\nnul%cin\nlast", 0);
	l.fd = memfd_create("lines", 0);
	check(write(l.fd, text, n) == (ssize_t)n && lseek(l.fd, 0, SEEK_SET) == 0);
	s = text_next(&l);
	check(s && !*s && l.number == 1);               /* over-long: empty, but counted */
	s = text_next(&l);
	check(s && !strcmp(s, "short"));
	s = text_next(&l);
	check(s && !*s);
	s = text_next(&l);
	check(s && !*s && l.number == 4);               /* a NUL: empty */
	s = text_next(&l);
	check(s && !strcmp(s, "last") && l.number == 5);
	check(!text_next(&l));
	close(l.fd);
}

int main(void)
{
	numbers();
	names();
	words();
	file_lines();
	return unit_end();
}
