/* pop3.c: owns the protocol (RFC 1939, 2449, 3206, 6856): states, command table, argument rules,
 * replies.  Runs in the session; no path, no socket call, no hash. */
#include "almond.h"

enum state { AUTHORIZATION = 1, TRANSACTION = 2, ANY = 3 };
enum arg { NONE, NAME, REST, MSG, MSG_OPT, MSG_LINES, WORD_OPT };
enum verdict { OK, SAID, ENTER, LEAVE, DROP };
/* OK: goes on.  SAID: an error was said, and counts.  ENTER: login done.  LEAVE: said good-bye.
 * DROP: cut the line. */

struct session {
	struct wire *w;
	enum state state;
	struct hello hello;
	char name[MAX_NAME + 1];        /* after USER, until the next command */
	bool named, utf8;
	unsigned errors, tries;
	struct box box;
	uint32_t last;                  /* RFC 1081's LAST */
};

struct args { char *text; uint32_t n; uint64_t lines; };

static enum verdict refuse(struct session *s, const char *why)
{
	wire_say(s->w, "-ERR %s", why);
	return SAID;
}

/* ---- the mailbox's arithmetic ---- */

static bool is_gone(const struct msg *m)
{
	return m->flags & (DELETED | VANISHED);
}

static uint32_t left(const struct session *s, uint64_t *octets)
{
	uint32_t i, n = 0;

	*octets = 0;
	for (i = 0; i < s->box.count; i++)
		if (!is_gone(&s->box.msg[i])) {
			*octets += wire_size(&s->box.msg[i]);
			n++;
		}
	return n;
}

/* ---- what stores may say ---- */

/* A store's failure in front of an answer.  Changed or unreadable: nothing was sent, so the session
 * may go on. */
static enum verdict store_failed(struct session *s, uint32_t i, int err)
{
	if (err == -ENOENT) {
		s->box.msg[i].flags |= VANISHED;
		return refuse(s, "[SYS/TEMP] another program removed it");
	}
	ask_note(err == -EAGAIN ? NOTE_CHANGED : NOTE_READ, i + 1, err);
	return refuse(s, err == -EAGAIN ? "[SYS/TEMP] the mailbox was changed, log in again" :
	    "[SYS/TEMP] cannot be read, try again later");
}

/* ---- AUTHORIZATION ---- */

static enum verdict no_clear(struct session *s)
{
	ask_note(NOTE_CLEAR, 0, 0);
	return refuse(s, "[AUTH] no password in clear on this network");
}

static enum verdict do_user(struct session *s, const struct args *a)
{
	const char *fault = name_fault(a->text);

	if (!s->hello.clear)
		return no_clear(s);
	if (fault) {
		ask_note(NOTE_NAME, 0, 0);
		wire_say(s->w, "-ERR [AUTH] %s", fault);
		return SAID;
	}
	memcpy(s->name, a->text, strlen(a->text) + 1);
	s->named = true;
	wire_say(s->w, "+OK password please");
	return OK;
}

static int store_index(struct box *b)
{
	return b->store ? b->store->index(b) : 0;
}

/* After a login was tried: the mailbox is opened, or the line ends. */
static enum verdict entered(struct session *s, int err)
{
	uint64_t octets;
	uint32_t n;

	if (err == -EACCES && ++s->tries < MAX_TRIES)
		return refuse(s, "[AUTH] wrong name or password");
	if (err == -EACCES)
		refuse(s, "[AUTH] wrong name or password");
	if (err == -EACCES)
		return LEAVE;
	if (!err)
		err = ask_open(&s->box);
	if (!err)
		err = store_index(&s->box);
	if (!err) {
		n = page->left = left(s, &octets);
		wire_say(s->w, "+OK %u messages (%llu octets)", n, (unsigned long long)octets);
		return ENTER;
	}
	page->why = WHY_STORE;
	if (err == -EMFILE || err == -EFBIG)
		ask_note(NOTE_FULL, MAX_MESSAGES, err);
	else if (err != -EBUSY && err != -EPERM)
		ask_note(err == -EAGAIN ? NOTE_CHANGED : NOTE_READ, 0, err);
	refuse(s, err == -EBUSY ? "[IN-USE] the mailbox is in use, try again soon" :
	    err == -EPERM || err == -EMFILE || err == -EFBIG ?
	    "[SYS/PERM] the mailbox cannot be served, ask its administrator" :
	    err == -EAGAIN ? "[SYS/TEMP] the mailbox was changed, log in again" :
	    "[SYS/TEMP] cannot be read, try again later");
	return LEAVE;
}

static enum verdict do_pass(struct session *s, const struct args *a)
{
	if (!s->named)
		return refuse(s, "say USER first");
	if (!s->hello.clear)
		return no_clear(s);
	return entered(s, ask_pass(s->name, a->text, strlen(a->text)));
}

#if ENABLE_APOP
/* RFC 1939, section 7: name, blank, 32 hexadecimal digits. */
static enum verdict do_apop(struct session *s, const struct args *a)
{
	char *digest = find_last(a->text, ' ');
	uint8_t d[MD5_SIZE];
	size_t i;
	int n;

	if (!*s->hello.stamp)
		return refuse(s, "[AUTH] no APOP here, use USER");
	if (!digest || strlen(digest) != 1 + 2 * MD5_SIZE)
		return refuse(s, "a name and 32 hexadecimal digits are wanted");
	*digest++ = 0;
	for (i = 0; i < MD5_SIZE; i++, digest += 2) {
		n = hex_digit(digest[0]) * 16 | hex_digit(digest[1]);
		if (n < 0)
			return refuse(s, "a name and 32 hexadecimal digits are wanted");
		d[i] = (uint8_t)n;
	}
	if (name_fault(a->text))
		return refuse(s, "[AUTH] bad name");
	return entered(s, ask_apop(a->text, d));
}
#endif

#if ENABLE_UTF8
static enum verdict do_utf8(struct session *s, const struct args *a)
{
	(void)a;
	s->utf8 = true;
	wire_say(s->w, "+OK headers come as they are");
	return OK;
}

static enum verdict do_lang(struct session *s, const struct args *a)
{
	if (!*a->text)
		wire_say(s->w, "+OK languages follow\r\nen English\r\n.");
	else if (!strcmp(a->text, "*") || same_word(a->text, "en") ||
	    same_word(a->text, "i-default"))
		wire_say(s->w, "+OK en English it is");
	else
		return refuse(s, "only en is spoken here");
	return OK;
}
#endif

/* ---- TRANSACTION ---- */

static enum verdict do_stat(struct session *s, const struct args *a)
{
	uint64_t octets;
	uint32_t n = left(s, &octets);

	(void)a;
	wire_say(s->w, "+OK %u %llu", n, (unsigned long long)octets);
	return OK;
}

static enum verdict do_list(struct session *s, const struct args *a)
{
	struct msg *m = s->box.msg;
	uint64_t octets;
	uint32_t i;

	if (a->n) {
		wire_say(s->w, "+OK %u %llu", a->n, (unsigned long long)wire_size(&m[a->n - 1]));
		return OK;
	}
	i = left(s, &octets);
	wire_say(s->w, "+OK %u messages (%llu octets)", i, (unsigned long long)octets);
	for (i = 0; i < s->box.count; i++)
		if (!is_gone(&m[i]))
			wire_say(s->w, "%u %llu", i + 1, (unsigned long long)wire_size(&m[i]));
	wire_say(s->w, ".");
	return OK;
}

static enum verdict do_uidl(struct session *s, const struct args *a)
{
	char uid[UID_SIZE];
	uint32_t i = a->n ? a->n - 1 : 0;
	int err = s->box.count ? box_uid(&s->box, i, uid) : 0;

	if (err)
		return store_failed(s, i, err);
	if (a->n) {
		if (is_gone(&s->box.msg[i]))
			return store_failed(s, i, -ENOENT);
		wire_say(s->w, "+OK %u %s", a->n, uid);
		return OK;
	}
	wire_say(s->w, "+OK unique-ids follow");
	for (; i < s->box.count; i++)
		if (!is_gone(&s->box.msg[i]) && !box_uid(&s->box, i, uid))
			wire_say(s->w, "%u %s", i + 1, uid);
	wire_say(s->w, ".");
	return OK;
}

/* RFC 6856, section 3: a header's octets above 127 are not for a client that did not say UTF8.  As
 * many octets go out, so LIST stays right.  *header: still in the header; it ends at the first
 * blank line. */
static void surrogate(char *p, size_t n, bool *header, char *last)
{
	for (; n && *header; p++, n--) {
		if (*p == '\n' && *last == '\n')
			*header = false;
		if (*p & 0x80)
			*p = '?';
		if (*p != '\r')
			*last = *p;
	}
}

/* Send the first `stored` octets of message i.  A failure in the middle withholds the final dot and
 * cuts the line: the client then knows that it has not got the message. */
static enum verdict send_message(struct session *s, uint32_t i, uint64_t stored, bool open_end)
{
	struct wire *w = s->w;
	bool header = true;
	char *room, last = '\n';
	uint64_t at = 0;
	ssize_t n = 1;
	size_t k;
	int err;

	wire_begin(w);
	while (at < stored && !w->err) {
		room = wire_room(w, &k);
		n = box_read(&s->box, i, at, room, k < stored - at ? k : (size_t)(stored - at));
		if (n <= 0)
			break;
		at += (uint64_t)n;
		if (ENABLE_UTF8 && !s->utf8)
			surrogate(room, (size_t)n, &header, &last);
		wire_stuff(w, (size_t)n);
	}
	err = n < 0 ? (int)n : s->box.store->look(&s->box, i);
	if (err) {
		ask_note(err == -EAGAIN ? NOTE_CHANGED : NOTE_READ, i + 1, err);
		page->why = WHY_STORE;
		return DROP;
	}
	wire_end(w, open_end);
	return OK;
}

static enum verdict do_retr(struct session *s, const struct args *a)
{
	uint32_t i = a->n - 1;
	const struct msg *m = &s->box.msg[i];
	int err = s->box.store->look(&s->box, i);

	if (err)
		return store_failed(s, i, err);
	page->retr++;
	s->last = a->n > s->last ? a->n : s->last;
	wire_say(s->w, "+OK %llu octets", (unsigned long long)wire_size(m));
	return send_message(s, i, m->stored, m->flags & OPEN_END);
}

static enum verdict do_top(struct session *s, const struct args *a)
{
	uint32_t i = a->n - 1;
	uint64_t stored;
	bool open_end;
	int err = s->box.store->look(&s->box, i);

	if (!err)
		err = box_top(&s->box, i, a->lines, &stored, &open_end);
	if (err)
		return store_failed(s, i, err);
	page->top++;
	wire_say(s->w, "+OK top of message follows");
	return send_message(s, i, stored, open_end);
}

static enum verdict do_dele(struct session *s, const struct args *a)
{
	int err = s->box.store->extents ? s->box.store->look(&s->box, a->n - 1) : 0;

	if (err)
		return store_failed(s, a->n - 1, err);
	s->box.msg[a->n - 1].flags |= DELETED;
	s->last = a->n > s->last ? a->n : s->last;
	wire_say(s->w, "+OK message %u deleted", a->n);
	return OK;
}

static enum verdict do_rset(struct session *s, const struct args *a)
{
	uint32_t i;

	for (i = 0; i < s->box.count; i++)
		s->box.msg[i].flags &= (uint16_t)~DELETED;
	s->last = 0;
	return do_stat(s, a);
}

#if ENABLE_LAST
static enum verdict do_last(struct session *s, const struct args *a)
{
	(void)a;
	wire_say(s->w, "+OK %u", s->last);
	return OK;
}
#endif

/* ---- either ---- */

static enum verdict do_noop(struct session *s, const struct args *a)
{
	(void)a;
	wire_say(s->w, "+OK");
	return OK;
}

static enum verdict do_quit(struct session *s, const struct args *a)
{
	uint64_t octets;
	int err = 0;

	(void)a;
	wire_flush(s->w);       /* what did not reach the client is not deleted */
	if (s->w->err)
		return DROP;
	if (s->state == TRANSACTION) {
		err = ask_commit(&s->box);
		page->left = left(s, &octets);
	}
	page->why = err ? WHY_STORE : WHY_QUIT;
	if (err)
		wire_say(s->w, err == -EBUSY ?
		    "-ERR [IN-USE] nothing was deleted, try again" :
		    "-ERR [SYS/TEMP] not all were deleted: %s; %s", reason(err),
		    err == -ENOSPC || err == -EDQUOT ? "delete from the end, or all, or make room" :
		    err == -EAGAIN ? "log in again" : "tell the administrator");
	else
		wire_say(s->w, "+OK POP3 %s server shutdown", s->hello.host);
	return LEAVE;
}

static enum verdict do_capa(struct session *s, const struct args *a);

static const struct command {
	char name[5];
	uint8_t legal, arg;
	const char *capa; /* the line that CAPA prints for it: it cannot disagree with the build */
	enum verdict (*run)(struct session *, const struct args *);
} commands[] = {
	/* name   legal          argument   CAPA     handler */
	{ "CAPA", ANY,           NONE,      NULL,    do_capa },
	{ "USER", AUTHORIZATION, NAME,      "USER",  do_user },
	{ "PASS", AUTHORIZATION, REST,      NULL,    do_pass },
#if ENABLE_APOP
	{ "APOP", AUTHORIZATION, NAME,      NULL,    do_apop },
#endif
#if ENABLE_UTF8
	{ "UTF8", AUTHORIZATION, NONE,      "UTF8",  do_utf8 },
	{ "LANG", ANY,           WORD_OPT,  "LANG",  do_lang },
#endif
	{ "STAT", TRANSACTION,   NONE,      NULL,    do_stat },
	{ "LIST", TRANSACTION,   MSG_OPT,   NULL,    do_list },
	{ "UIDL", TRANSACTION,   MSG_OPT,   "UIDL",  do_uidl },
	{ "RETR", TRANSACTION,   MSG,       NULL,    do_retr },
	{ "TOP",  TRANSACTION,   MSG_LINES, "TOP",   do_top },
	{ "DELE", TRANSACTION,   MSG,       NULL,    do_dele },
	{ "RSET", TRANSACTION,   NONE,      NULL,    do_rset },
#if ENABLE_LAST
	{ "LAST", TRANSACTION,   NONE,      NULL,    do_last },
#endif
	{ "NOOP", TRANSACTION,   NONE,      NULL,    do_noop },
	{ "QUIT", ANY,           NONE,      NULL,    do_quit },
};

/* The same in both states (RFC 2449, RFC 5034 section 3), and nothing that is not so. */
static enum verdict do_capa(struct session *s, const struct args *a)
{
	size_t i;

	(void)a;
	wire_say(s->w, "+OK capabilities follow");
	for (i = 0; i < LEN(commands); i++)
		if (commands[i].capa && (s->hello.clear || commands[i].run != do_user))
			wire_say(s->w, "%s", commands[i].capa);
	wire_say(s->w, "RESP-CODES\r\nAUTH-RESP-CODE\r\nPIPELINING\r\nEXPIRE NEVER\r\n"
	    "IMPLEMENTATION almond\r\n.");
	return OK;
}

/* ---- dispatch ---- */

static const char *message_argument(const struct session *s, const char *text, uint32_t *n)
{
	uint64_t v;

	if (number(text, UINT64_MAX, &v) < 0)
		return "a message number is wanted";
	if (!v || v > s->box.count)
		return "there is no such message";
	if (is_gone(&s->box.msg[v - 1]))
		return "this message is deleted";
	*n = (uint32_t)v;
	return NULL;
}

/* The rule of an argument, checked before a handler runs; NULL, or what is wrong. */
static const char *argument(const struct session *s, enum arg rule, char *text, struct args *a)
{
	size_t n = strlen(text);
	const char *fault;
	char *second;

	a->text = text;
	if (rule == REST)
		return NULL;
	while (n && text[n - 1] == ' ')         /* old clients leave blanks behind */
		text[--n] = 0;
	switch (rule) {
	case NONE:
		return n ? "this command takes no argument" : NULL;
	case NAME:
		return n ? NULL : "a name is missing";
	case MSG_OPT:
		return n ? message_argument(s, text, &a->n) : NULL;
	case MSG:
		return message_argument(s, text, &a->n);
	case MSG_LINES:
		second = find(text, ' ');
		if (!second)
			return "a number and a count of lines are wanted";
		*second++ = 0;
		fault = message_argument(s, text, &a->n);
		return fault                                    ? fault
		    : number(second, UINT64_MAX, &a->lines) < 0 ? "a count of lines is wanted"
								: NULL;
	default:
		return NULL;
	}
}

static enum verdict dispatch(struct session *s, char *line)
{
	char *text = find(line, ' ');
	struct args a = { .n = 0 };
	bool named = s->named;
	const char *fault;
	enum verdict v;
	size_t i;

	if (text)
		*text++ = 0;
	else
		text = line + strlen(line);
	for (i = 0; i < LEN(commands) && !same_word(line, commands[i].name); i++)
		;
	s->named = false;       /* PASS counts only straight after USER */
	if (i == LEN(commands))
		return refuse(s, "this command is not known here");
	if (!(commands[i].legal & s->state))
		return refuse(
		    s, s->state == AUTHORIZATION ? "log in first" : "you are logged in already");
	fault = argument(s, commands[i].arg, text, &a);
	if (fault) {
		if (commands[i].arg == NAME)
			ask_note(NOTE_NAME, 0, 0);
		return refuse(s, fault);
	}
	if (commands[i].run == do_pass)
		s->named = named;
	v = commands[i].run(s, &a);
	if (commands[i].run == do_pass)
		s->named = false;
	return v;
}

static enum verdict next(struct session *s)
{
	enum verdict v;
	char *line;
	int n = wire_line(s->w, &line);

	if (n == LINE_GONE) {
		if (s->w->err == -ETIMEDOUT)
			page->why = WHY_IDLE;
		return DROP;
	}
	if (n < 0) {
		s->named = false;
		if (s->state == AUTHORIZATION)
			ask_note(NOTE_NAME, 0, 0);
		return refuse(s, n == LINE_LONG ? "the line is too long, 255 octets are the limit" :
		    "the line holds a NUL");
	}
	v = dispatch(s, line);
	wipe(line, (size_t)n);
	return v;
}

void pop3(struct wire *w)
{
	static struct session s;
	enum verdict v = OK;

	s.w = w;
	s.state = AUTHORIZATION;
	w->deadline = now() + LOGIN_DEADLINE;
	if (ask_hello(&s.hello))
		return;
	wire_say(w, "+OK POP3 %s server ready%s%s", s.hello.host, *s.hello.stamp ? " " : "",
	    s.hello.stamp);
	while (v != LEAVE && v != DROP) {
		v = next(&s);
		s.errors = v == SAID ? s.errors + 1 : 0;
		if (s.errors >= MAX_ERRORS) {
			page->why = WHY_ERRORS;
			refuse(&s, "too many errors");
			v = LEAVE;
		}
		if (v == ENTER) {
			s.state = TRANSACTION;
			w->deadline = 0;
			wire_forget(w);
		}
	}
	if (v == LEAVE)
		wire_flush(w);
	page->bytes = w->sent;
}
