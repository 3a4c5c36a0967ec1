/* unit.h: what the unit tests share: counting, and octets written as hexadecimal digits. */
#ifndef UNIT_H
#define UNIT_H
#include <stdio.h>
#include <stdlib.h>

static unsigned passed, failed;

#define check(x) check_at((x), #x, __FILE__, __LINE__)

static inline void check_at(bool right, const char *what, const char *file, int line)
{
	if (right) {
		passed++;
		return;
	}
	failed++;
	printf("%s:%d: not so: %s\n", file, line, what);
}

static inline int unit_end(void)
{
	printf("%u passed, %u failed\n", passed, failed);
	return failed != 0;
}

/* Octets as lower-case digits; borrowed until the next call. */
static inline const char *hex(const void *p, size_t n)
{
	static char text[2 * 64 + 1];
	const uint8_t *o = p;
	size_t i;

	for (i = 0; i < n && i < 64; i++) {
		text[2 * i] = "0123456789abcdef"[o[i] >> 4];
		text[2 * i + 1] = "0123456789abcdef"[o[i] & 15];
	}
	text[2 * i] = 0;
	return text;
}

/* The octets of hexadecimal digits; how many. */
static inline size_t unhex(uint8_t *to, const char *text)
{
	size_t n = 0;
	char two[3] = { 0 };

	for (; text[0] && text[1]; text += 2) {
		two[0] = text[0];
		two[1] = text[1];
		to[n++] = (uint8_t)strtoul(two, NULL, 16);
	}
	return n;
}
#endif
