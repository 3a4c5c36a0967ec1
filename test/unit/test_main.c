/* test_main.c: proves what main.c makes of addresses and networks.
 * Links: text.c tools.c auth.c verify.c hash.c lock.c mbox.c maildir.c store.c monitor.c pop3.c
 * Links: wire.c passwd.c deliver.c check.c journal.c */
#define main almond_main
#include "../../main.c"
#undef main
#include "unit.h"
#include <arpa/inet.h>

/* Does it mean the same as for the C library? */
static bool v6(const char *text)
{
	uint8_t a[16], b[16];
	char to[48], again[48];
	bool ours = parse_v6(text, a), theirs = inet_pton(AF_INET6, text, b) == 1;

	if (ours != theirs || (ours && memcmp(a, b, 16)))
		return false;
	if (!ours)
		return true;
	write_v6(to, a);
	return inet_pton(AF_INET6, to, b) == 1 && !memcmp(a, b, 16) &&
	    (inet_ntop(AF_INET6, a, again, sizeof again) || 1);
}

static bool v4(const char *text, bool good)
{
	uint8_t a[16], b[4];
	bool ours = parse_v4(text, a);

	return ours == good &&
	    (!good || (inet_pton(AF_INET, text, b) == 1 && !memcmp(a + 12, b, 4)));
}

static bool within(const char *address, const char *net)
{
	char text[64];
	uint8_t a[16];
	bool four;

	net_count = 0;
	fmt(text, sizeof text, "%s", net);
	return add_net(text) && parse_address(address, a, &four) && in_net(a, &nets[0]);
}

static bool no_net(const char *net)
{
	char text[64];

	net_count = 0;
	fmt(text, sizeof text, "%s", net);
	return !add_net(text);
}

static bool written(const char *text, const char *want)
{
	uint8_t a[16];
	char to[48];

	if (inet_pton(AF_INET6, text, a) != 1)
		return false;
	write_v6(to, a);
	return !strcmp(to, want);
}

int main(void)
{
	static const char *const sixes[] = {"::", "::1", "1::", "fe80::1", "2001:db8::ff00:42:8329",
	    "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1::8", "a:B:c::D",
	    "0:0:0:0:0:0:0:0", "fd00:1:0:0:2::", ":", ":1", "1:", "1:2", ":::", "1:::2", "1::2::3",
	    "12345::", "g::", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7:", "", "::1 ", " ::1"};
	size_t i;

	for (i = 0; i < LEN(sixes); i++)
		check(v6(sixes[i]));
	check(v4("127.0.0.1", true) && v4("0.0.0.0", true) && v4("255.255.255.255", true) &&
	    v4("10.0.20.30", true));
	check(v4("1.2.3", false) && v4("1.2.3.4.5", false) && v4("256.1.1.1", false) &&
	    v4("", false) && v4("a.b.c.d", false));
	check(v4("1..2.3", false) && v4("1.2.3.", false) && v4(" 1.2.3.4", false) &&
	    v4("1.2.3.4 ", false) && v4("-1.2.3.4", false));
	check(within("192.168.7.9", "192.168.0.0/16") && !within("192.169.7.9", "192.168.0.0/16"));
	check(within("10.1.2.3", "10.1.2.3") && !within("10.1.2.4", "10.1.2.3") &&
	    within("10.1.2.3", "0.0.0.0/0"));
	check(within("10.1.2.127", "10.1.2.0/25") && !within("10.1.2.128", "10.1.2.0/25"));
	check(within("fd00::7", "fd00::/8") && !within("fe00::7", "fd00::/8") &&
	    within("::1", "::/0"));
	check(!within("::1", "0.0.0.0/0"));
	check(no_net("10.0.0.0/33") && no_net("fd00::/129") && no_net("10.0.0.0/") &&
	    no_net("10.0.0.0/x") && no_net("x/8"));
	check(
	    written("::1", "::1") && written("::", "::") && written("fe80::1:0:2", "fe80::1:0:2"));
	check(written("1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7:8") && written("1::", "1::") &&
	    written("1:0:0:2::", "1::2:0:0:0:0"));
	return unit_end();
}
