/* pop.c: in the guest, a client and the inetd that starts almond for it.
 *
 *     pop SPOOL [N...]
 *
 * logs in, deletes the messages N, says QUIT, and prints the answer to the first command that was
 * not answered +OK, or to QUIT. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static FILE *in;
static int line;
static char answer[600];

static void say(const char *word, const char *operand)
{
	dprintf(line, "%s%s\r\n", word, operand);
	if (!fgets(answer, sizeof answer, in))
		strcpy(answer, "-ERR the line ended\n");
}

static int good(void)
{
	return !strncmp(answer, "+OK", 3);
}

int main(int argc, char **argv)
{
	int pair[2], i;
	pid_t child;

	if (argc < 2 || socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
		return 64;
	child = fork();
	if (child == 0) {
		dup2(pair[1], 0);
		dup2(pair[1], 1);
		close(pair[0]);
		close(pair[1]);
		execl("/almond", "almond", "-i", "-E", "-d", argv[1], "-u", "/users", (char *)NULL);
		_exit(127);
	}
	close(pair[1]);
	line = pair[0];
	in = fdopen(line, "r");
	if (child < 0 || !in || !fgets(answer, sizeof answer, in))
		return 71;
	if (good())
		say("USER user", "");
	if (good())
		say("PASS secret", "");
	for (i = 2; i < argc && good(); i++)
		say("DELE ", argv[i]);
	if (good())
		say("QUIT", "");
	answer[strcspn(answer, "\r\n")] = 0;
	puts(answer);
	fclose(in);
	waitpid(child, NULL, 0);
	return !good();
}
