/* tools.h: what the tools share with each other; almond.h's last section wants it. */
#ifndef TOOLS_H
#define TOOLS_H

/* A tool's options and its one operand, in any order. */
struct wish { uint32_t flags; char *operand, *value[32]; };
enum { LETTER = 31 };           /* c & LETTER: an option's bit in flags and place in value */
static inline bool has_flag(const struct wish *w, char c) { return w->flags >> (c & LETTER) & 1; }

/* The exit code; after EX_USAGE_ the tool's help is printed. */
int tool_passwd(const struct wish *);
int tool_deliver(const struct wish *);
int tool_check(const struct wish *);

/* conf, as -d, -u and -s say, and else as main fills it. */
void tool_conf(const struct wish *);
/* Say that `what` failed, why, and what to do; the exit code that fits. */
int complain(int err, const char *what);
/* The rest of descriptor fd, in a map. */
int slurp(int fd, char **p, size_t *n);
const char *next_line(const char *p, const char *end);  /* behind the line that begins at p */
/* name's line in the users file that fd is open on: 1 and *u points into *l; 0: there is none. */
int users_find(int fd, const char *name, struct lines *l, struct user *u);
/* What a spool on fd's file system means, as a warning; NULL: nothing. */
const char *fs_warning(int fd);
#endif
