/* test_wire.c: proves wire.c: stuffing in place, against the plainest way to say it, for texts cut
 * in all places; and lines in.
 * Links: text.c */
#include "../../wire.c"
#include "unit.h"
#include <sys/socket.h>

struct page *page;
static struct wire w;
static uint8_t sent[1 << 20];
static int pair[2];

static bool never(void)
{
	return false;
}

static void begin(void)
{
	memset(&w, 0, sizeof w);
	check(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	w.in = w.out = pair[0];
	w.watch = -1;
	w.woken = never;
}

static size_t drain(void)
{
	size_t n = 0;
	ssize_t k;

	wire_flush(&w);
	shutdown(pair[0], SHUT_WR);
	while ((k = read(pair[1], sent + n, sizeof sent - n)) > 0)
		n += (size_t)k;
	close(pair[0]);
	close(pair[1]);
	return n;
}

/* What must be sent for a text: RFC 1939, section 3. */
static size_t plainly(const char *text, size_t n, uint8_t *to)
{
	uint8_t *o = to;
	size_t i;

	for (i = 0; i < n; i++) {
		if (text[i] == '.' && (i == 0 || text[i - 1] == '\n'))
			*o++ = '.';
		if (text[i] == '\n' && (i == 0 || text[i - 1] != '\r'))
			*o++ = '\r';
		*o++ = (uint8_t)text[i];
	}
	if (n && text[n - 1] != '\n')
		o += sprintf((char *)o, "\r\n");
	o += sprintf((char *)o, ".\r\n");
	return (size_t)(o - to);
}

/* The text goes out in pieces of `step` octets, 0 for as much as there is room. */
static bool stuffed(const char *text, size_t n, size_t step)
{
	static uint8_t want[1 << 20];
	size_t k, at = 0, room, count = plainly(text, n, want);

	begin();
	wire_begin(&w);
	while (at < n) {
		char *p = wire_room(&w, &room);

		if (room < 1024)
			return false;
		k = step && step < room ? step : room;
		k = k < n - at ? k : n - at;
		memcpy(p, text + at, k);
		at += k;
		wire_stuff(&w, k);
	}
	wire_end(&w, n && text[n - 1] != '\n');
	return drain() == count && !memcmp(sent, want, count);
}

static void texts(void)
{
	static const char *const some[] = {"", ".", "..", "\n", "\r", "\r\n", ".\n.\n",
	    "a\n.b\n..c", "a\r\n.b\rc\r\n", "x\r\r\n.y", "\n\n.\n", ".\r\n", "no end",
	    "a\n\r\n.\n"};
	static char text[100000];
	uint32_t r = 1;
	size_t i, k;

	for (i = 0; i < LEN(some); i++)
		for (k = 0; k < 5; k++)
			check(stuffed(some[i], strlen(some[i]), k));
	for (k = 0; k < 40; k++) {
		for (i = 0; i < sizeof text; i++) {
			r = r * 1664525 + 1013904223;
			text[i] = "\n\n..\r\rab\0x"[r >> 24 & 7] + (char)(k % 4 == 3 ? r >> 31 : 0);
		}
		check(stuffed(text, 20000 + k * 1000, k % 3 ? 1 + (r >> 20) % 5000 : 0));
	}
	memset(text, '\n', sizeof text);
	check(stuffed(text, 70000, 0));
	for (i = 0; i < sizeof text; i += 2)
		text[i] = '.';
	check(stuffed(text, 70000, 0));
}

static void lines(void)
{
	static char in[3000];
	char *line;
	size_t n = 0;

	begin();
	n += (size_t)sprintf(in + n, "ONE\r\nTWO\n\r\nNU%cL\n", 0);
	memset(in + n, 'x', 253);
	n += 253;
	n += (size_t)sprintf(in + n, "\r\n");           /* 255 octets */
	memset(in + n, 'y', 254);
	n += 254;
	n += (size_t)sprintf(in + n, "\r\n");           /* 256 */
	memset(in + n, 'z', 2000);
	n += 2000;
	n += (size_t)sprintf(in + n, "\nLAST\nhalf");
	check(write(pair[1], in, n) == (ssize_t)n);
	shutdown(pair[1], SHUT_WR);
	check(wire_line(&w, &line) == 3 && !strcmp(line, "ONE"));
	check(wire_line(&w, &line) == 3 && !strcmp(line, "TWO"));
	check(wire_line(&w, &line) == 0 && !*line);
	check(wire_line(&w, &line) == LINE_NUL);
	check(wire_line(&w, &line) == 253 && *line == 'x');
	check(wire_line(&w, &line) == LINE_LONG);
	check(wire_line(&w, &line) == LINE_LONG);
	check(wire_line(&w, &line) == 4 && !strcmp(line, "LAST"));
	check(wire_line(&w, &line) == LINE_GONE && w.err == -EPIPE);    /* half a line is none */
	check(wire_line(&w, &line) == LINE_GONE);
	close(pair[0]);
	close(pair[1]);
}

/* Behind an error nothing is heard and nothing is sent. */
static void sticky(void)
{
	char *line;

	begin();
	check(write(pair[1], "QUIT\r\n", 6) == 6);
	check(wire_line(&w, &line) == 4);
	check(write(pair[1], "QUIT\r\nQUIT\r\n", 12) == 12);
	check(wire_line(&w, &line) == 4);
	w.err = -EIO;
	check(wire_line(&w, &line) == LINE_GONE);
	wire_say(&w, "+OK");
	check(drain() == 0);
}

int main(void)
{
	texts();
	lines();
	sticky();
	return unit_end();
}
