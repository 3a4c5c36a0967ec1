/* wire.c: owns the octets to and from the client: a line in, one buffer out, one sticky error. Runs
 * in the session. */
#include "almond.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { SLICE = 5000 };          /* how often a wait looks whether the client still takes octets */

/* Sent octets that the client's host has not yet confirmed; 0 where that cannot be known. */
static int unconfirmed(int fd)
{
	int n = 0;

	return ioctl(fd, TIOCOUTQ, &n) < 0 ? 0 : n;
}

static void beat(struct wire *w)
{
	if (w->pulse)
		*w->pulse = (uint32_t)(now() / 1000);
}

/* Wait until fd is ready.  The time that counts is the client's silence: octets that it takes out
 * of the kernel's queue are a sign of life, so that a slow line has all the time it needs.
 * `silence` is how long it may last, `deadline` is absolute (0: none) and nothing moves it. */
static int wire_wait(struct wire *w, int fd, short events, uint64_t silence, uint64_t deadline)
{
	struct pollfd p[2] = {{.fd = fd, .events = events}, {.fd = w->watch, .events = POLLIN}};
	uint64_t t = now(), end = t + silence;
	int queued = 0, q, n;

	while (t < end && (!deadline || t < deadline)) {
		q = (int)((deadline && deadline < end ? deadline : end) - t);
		n = poll(p, 2, q < SLICE ? q : SLICE);
		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0 && p[1].revents && w->woken())
			return -ECANCELED;
		if (n > 0 && p[0].revents)
			return 0;
		t = now();
		q = unconfirmed(w->out);
		if (q < queued) {
			end = t + silence;
			beat(w);
		}
		queued = q;
	}
	return -ETIMEDOUT;
}

/* Fill in_buffer behind what it holds; false when nothing more will come. */
static bool wire_fill(struct wire *w)
{
	ssize_t n;

	memmove(w->in_buffer, w->in_buffer + w->in_at, w->in_len);
	w->in_at = 0;
	wire_flush(w);
	while (!w->err) {
		w->err = wire_wait(w, w->in, POLLIN, IDLE_TIMEOUT, w->deadline);
		if (w->err)
			break;
		n = read(w->in, w->in_buffer + w->in_len, sizeof w->in_buffer - w->in_len);
		if (n > 0) {
			w->in_len += (size_t)n;
			beat(w);
			return true;
		}
		if (!n)
			w->err = -EPIPE;
		else if (errno != EINTR && errno != EAGAIN)
			w->err = -errno;
	}
	return false;
}

int wire_line(struct wire *w, char **line)
{
	bool too_long = false, nul;
	char *start, *end;
	size_t n;

	for (;;) {
		if (w->err)
			return LINE_GONE;
		start = w->in_buffer + w->in_at;
		end = memchr(start, '\n', w->in_len);
		if (end)
			break;
		if (w->in_len > MAX_LINE) {     /* swallow it: only whole lines are commands */
			too_long = true;
			w->in_len = 0;
		}
		if (!wire_fill(w))
			return LINE_GONE;
	}
	n = (size_t)(end - start) + 1;
	w->in_at += n;
	w->in_len -= n;
	nul = memchr(start, 0, n) != NULL;
	if (too_long || n > MAX_LINE)
		return LINE_LONG;
	if (end > start && end[-1] == '\r')
		end--;
	*end = 0;
	*line = start;
	return nul ? LINE_NUL : (int)(end - start);
}

void wire_forget(struct wire *w)
{
	wipe(w->in_buffer, w->in_at);
	wipe(w->in_buffer + w->in_at + w->in_len, sizeof w->in_buffer - w->in_at - w->in_len);
}

void wire_flush(struct wire *w)
{
	size_t at = 0;
	ssize_t n;

	while (at < w->out_len && !w->err) {
		n = write(w->out, w->out_buffer + at, w->out_len - at);
		if (n > 0) {
			at += (size_t)n;
			w->sent += (uint64_t)n;
			beat(w);
		} else if (n < 0 && errno == EAGAIN) {
			w->err = wire_wait(w, w->out, POLLOUT, SEND_STALL, w->deadline);
		} else if (n < 0 && errno != EINTR) {
			w->err = -errno;
		}
	}
	w->out_len = 0;
}

void wire_put(struct wire *w, const void *p, size_t n)
{
	if (n > sizeof w->out_buffer - w->out_len)
		wire_flush(w);
	must(n <= sizeof w->out_buffer);
	memcpy(w->out_buffer + w->out_len, p, n);
	w->out_len += n;
}

void wire_say(struct wire *w, const char *format, ...)
{
	char line[512];
	size_t n;
	va_list ap;

	va_start(ap, format);
	n = vfmt(line, sizeof line - 2, format, ap);
	va_end(ap);
	memcpy(line + n, "\r\n", 2);
	wire_put(w, line, n + 2);
}

/* n message octets need 2n + 8 at worst: the text, a line end that was missing, the final dot. */
char *wire_room(struct wire *w, size_t *n)
{
	size_t room = sizeof w->out_buffer - w->out_len;

	if (room < sizeof w->out_buffer / 2) {
		wire_flush(w);
		room = sizeof w->out_buffer;
	}
	*n = (room - 8) / 2;
	w->tail = w->out_buffer + sizeof w->out_buffer - *n;
	return w->tail;
}

void wire_begin(struct wire *w)
{
	w->last = '\n';
}

/* Invariant: `last` is the octet in front of p in the message; o <= p, since o moves at most two
 * for one of p, and at the start the way from o to p is no less than what is left. */
void wire_stuff(struct wire *w, size_t n)
{
	const char *p = w->tail, *end = p + n, *nl;
	char *o = w->out_buffer + w->out_len, last = w->last;
	size_t k;

	while (p < end) {
		if (*p == '.' && last == '\n')
			*o++ = '.';
		nl = memchr(p, '\n', (size_t)(end - p));
		k = (size_t)((nl ? nl : end) - p);
		if (k) {
			last = p[k - 1];
			memmove(o, p, k);
			o += k;
		}
		if (!nl)
			break;
		if (last != '\r')
			*o++ = '\r';
		*o++ = '\n';
		last = '\n';
		p = nl + 1;
	}
	w->last = last;
	w->out_len = (size_t)(o - w->out_buffer);
}

void wire_end(struct wire *w, bool open_end)
{
	wire_put(w, open_end ? "\r\n.\r\n" : ".\r\n", open_end ? 5 : 3);
}
