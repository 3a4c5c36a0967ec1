/* journal.pml: the change of an mbox that is all or nothing, as journal.c makes it, for spin to try in every order.
 * almond deletes, delivers and mends; an agent that knows nothing of journals appends; a process is killed or the power
 * is cut, at any step.  A cell stands for octets that reach the medium together; each goes there for itself, which
 * allows more than pages do.  Names are journal.c's: a, S, N, mark; undo, done, never begun, kept.
 * MUTANT_x leaves out what is needed, and must be rejected. */
#ifndef SIZE
#define SIZE 3                          /* cells of the mailbox at first */
#endif
#ifndef COMMITS
#define COMMITS 1
#endif
#ifndef APPENDS
#define APPENDS 1
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifdef NOTE
#define ROOM (SIZE + APPENDS + 3 * COMMITS)
#else
#define ROOM (SIZE + APPENDS)
#endif
/* What a cell holds: zeros; old mails, each its own, or twins; appended ones, fresh and last; octets of no mail. */
#define ZERO 0
#define TWIN 7
#define FRESH 8
#define LAST 9
#define MARK 10
#define M 4                             /* the first of the three cells of a mail that almond delivers */
#define SOFT 16                         /* flag: the power went before the fsync of who appended it had returned */
#define bit(v) (1 << (v))
#define EACH(i, from, to, what) i = from; do :: i < to -> what; i++ :: else -> break od

byte lock; bool dead, agent_dead;       /* who holds the delivery locks; who was killed under them, which frees them */
#define FREE 0
#define ALMOND 1
#define AGENT 2
byte n, t, got; short set;              /* scratch: zero between two steps */

/* ---- the mailbox: what processes see, and what the medium may hold ---- */

byte file[ROOM], size = SIZE;
short may[ROOM], sizes;                 /* sets: each value written since the last fsync may be the one that survives */
short after[ROOM], sizes_after;         /* the same, should a truncation that is not yet synced survive */
bool cutting, border; byte edge;        /* there is one; at a block's border; where */

inline put(x, v) {
	file[x] = v;
	if :: cutting -> after[x] = after[x] | bit(v) :: else fi;
	if :: cutting && x >= edge :: else -> may[x] = may[x] | bit(v) fi
}
inline grow(to) {
	size = to;
	if :: cutting -> sizes_after = sizes_after | bit(size) :: else -> sizes = sizes | bit(size) fi
}
inline sync() { d_step {
	EACH(n, 0, ROOM, may[n] = bit(file[n]); after[n] = 0);
	sizes = bit(size); sizes_after = 0; cutting = false; border = false; edge = 0; n = 0 }
}
inline truncate(to, whole) { d_step {
	EACH(n, 0, to, after[n] = (cutting -> after[n] : may[n]));
	EACH(n, to, ROOM, after[n] = (cutting -> after[n] : 0) | bit(ZERO); file[n] = ZERO);
	edge = (cutting && edge < to -> edge : to); border = whole;
	sizes_after = sizes_after | bit(to); size = to; cutting = true; n = 0 }
}
#define ONE(v) :: set & bit(v) -> got = v
inline pick(s) { set = s; if ONE(0) ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) fi }

/* The power is cut.  A truncation inside a block zeroes the rest of that block, in place, before the size is on the
 * medium: the old size may be there with these zeros, or with what was appended to them.  TORN_BLOCKS: some of them. */
inline survive() {
	if
	:: cutting -> sizes = sizes_after; EACH(n, 0, ROOM, may[n] = after[n])
	:: skip
	:: cutting && !border -> n = edge; do :: n < ROOM -> may[n] = bit(ZERO); n++ :: n > edge -> break od
#ifndef NOTE    /* no note tells this: what was to go stays, in part, behind what nobody synced */
	:: cutting && !border -> n = edge; do :: n < ROOM -> may[n] = bit(file[n]); n++ :: n > edge -> break od
#endif
#ifdef TORN_BLOCKS
	:: cutting && !border -> EACH(n, edge, ROOM, may[n] = may[n] | bit(ZERO))
#endif
	fi;
	pick(sizes); size = got;
	EACH(n, 0, size, pick(may[n]); file[n] = got);
	EACH(n, size, ROOM, file[n] = ZERO);
	sync()
}

/* ---- the journal: none, torn, or whole; an older one may come back while the next is not synced ---- */

#define NONE 0
#define TORN 1
#define WHOLE 2
typedef journal { byte o[ROOM], w[ROOM], mark[2], a, S, N, k, m }
journal J[2]; bit id;
#define j J[id]
byte jfile; short jmay = bit(NONE);
inline jput(v) { jfile = v; jmay = jmay | bit(v) }
inline forget(x) {                      /* one that cannot come back tells no two states apart */
	if
	:: jfile != WHOLE + x -> EACH(n, 0, ROOM, J[x].o[n] = 0; J[x].w[n] = 0);
		J[x].mark[0] = 0; J[x].mark[1] = 0; J[x].a = 0; J[x].S = 0; J[x].N = 0; J[x].k = 0; J[x].m = 0; n = 0
	:: else
	fi
}
inline jsync() { d_step { jmay = bit(jfile); forget(0); forget(1) } }

/* ---- what must hold ---- */

typedef list { byte cell[ROOM], n }
list L[2];
#define was L[0].cell
#define nwas L[0].n
#define want L[1].cell
#define nwant L[1].n
byte tail[APPENDS], ntail; bool answered, unsynced, is_old, is_new;
#define RUBBISH(v) (v == ZERO || v == FRESH || v == MARK || v == M + 1 || v == M + 2)

/* The mailbox is that list and what was appended, once each, in order; what its agent had not synced may be torn. */
inline like(x, yes) {
	n = 0; yes = size >= L[x].n;
	do :: yes && n < L[x].n -> yes = file[n] == L[x].cell[n]; n++ :: else -> break od;
	t = 0; do
	:: yes && t < ntail && tail[t] < SOFT -> yes = n < size && file[n] == tail[t]; n++; t++
	:: yes && t < ntail && tail[t] >= SOFT -> t++;
		if :: n < size && file[n] == tail[t - 1] - SOFT -> n++ :: else fi;
		do :: n < size && RUBBISH(file[n]) -> n++ :: else -> break od
	:: else -> break od;
	yes = yes && n == size; n = 0; t = 0
}
/* Whenever there is no journal that waits: new, or old as long as nobody was told +OK. */
inline look() {
	if
	:: jfile < WHOLE -> d_step { like(0, is_old); like(1, is_new); assert(is_new || (is_old && !answered));
		is_old = false; is_new = false }
	:: else
	fi
}

/* ---- almond ---- */

#define STEP(x) atomic { if :: dead -> dead = false; goto start :: else -> x fi }
#define STEPS(from, to, x) STEP(i = from); do :: i < to -> STEP(x; i++) :: else -> break od
#define ALL(yes, from, to, cond) n = from; yes = true; \
	do :: n < to && yes -> yes = (cond); n++ :: else -> break od; n = 0
#define old_at(n) (file[n] == j.o[n])
#define mark_at(n) (file[n] == j.mark[n - j.m] || (file[n] == ZERO && zeros))
#ifdef MUTANT_undo_whatever_the_size
#define LONG_ENOUGH true
#else
#define LONG_ENOUGH (size >= j.S)
#endif
#define UNDO 1
#define DONE 2
#define NEVER 3
#define KEPT 4
#ifdef MUTANT_no_sync_of_the_emptied
#define jsync_5() skip
#else
#define jsync_5() jsync()
#endif

#ifndef NOTE
/* A deletion: the cells [0, S) that stay become [0, N). */
proctype almond() {
	byte i, verdict, commits = COMMITS;
	bool either, olds, news, zeros, marked, mixed, none;

start:	atomic { (lock == FREE && !agent_dead && (jfile != NONE || commits > 0)) -> lock = ALMOND;
		i = 0; verdict = 0 };
	if
	:: jfile == TORN -> STEP(jput(NONE)); STEP(jsync())     /* nothing was begun */
	:: jfile >= WHOLE ->                                    /* replay: judge by content */
		STEP(d_step {
			id = jfile - WHOLE;
			ALL(either, j.a, j.N, n < size && (old_at(n) || file[n] == j.w[n]));
			ALL(olds, j.a, j.N, n < size && old_at(n));
			ALL(news, j.a, j.N, n < size && file[n] == j.w[n]);
			/* a truncation's zeros are a mark too, unless there is anything new between N and the mark */
			ALL(zeros, j.N, j.m, old_at(n) || file[n] == ZERO);
#ifdef MUTANT_zeros_of_a_torn_append
			zeros = (size == j.S || file[j.N] == ZERO);
#endif
#ifdef MUTANT_zeros_are_no_mark
			zeros = false;
#endif
			ALL(marked, j.m, j.m + j.k, mark_at(n));
			ALL(mixed, j.m, j.m + j.k, mark_at(n) || old_at(n));
			ALL(none, j.m, j.m + j.k, old_at(n));
#ifdef MUTANT_part_of_a_mark_will_do
			olds = either;
#endif
			if
#ifdef MUTANT_judged_by_size
			:: size >= j.S -> verdict = UNDO
			:: else -> verdict = DONE
#else
			:: LONG_ENOUGH && marked -> verdict = (either -> UNDO : KEPT)
			:: LONG_ENOUGH && !marked && none && (olds || news) -> verdict = NEVER
			:: LONG_ENOUGH && !marked && !none && mixed && olds -> verdict = UNDO
			:: else -> verdict = (news -> DONE : KEPT)
#endif
			fi;
			either = 0; olds = 0; news = 0; marked = 0; mixed = 0; none = 0; zeros = 0
		});
		assert(verdict != KEPT);                        /* nobody but us wrote below S */
#ifdef MUTANT_redo
		if
		:: verdict == UNDO -> STEP(verdict = size - j.S);
			STEPS(j.a, j.N, put(i, j.w[i]));
			STEPS(j.N, j.N + verdict, put(i, file[i + j.S - j.N]));
			STEP(sync()); STEP(truncate(j.N + verdict, false))
		:: else
		fi;
#else
		if
		:: verdict == UNDO ->
#ifndef MUTANT_undo_with_a_journal_not_synced
			STEP(jsync());                          /* who wrote it may have been killed before that */
#endif
			STEPS(j.m, j.m + j.k, put(i, j.mark[i - j.m]));
			STEP(sync());
			STEPS(j.a, j.m, put(i, j.o[i]));
#ifndef MUTANT_undo_in_one
			STEP(sync());                           /* the mark stands until this is safe */
#endif
			STEPS(j.m, j.S, put(i, j.o[i]))
		:: else
		fi;
#endif
		STEP(sync(); i = 0; verdict = 0);
		STEP(jput(NONE));
		STEP(jsync_5())
	:: else ->                                              /* a commit; what is there is the old now */
		STEP(look(); sync(); commits--; assert(jmay != bit(WHOLE) + bit(WHOLE + 1));
			id = (jmay & bit(WHOLE) -> 1 : 0); nwas = size; nwant = 0; ntail = 0; answered = false;
			EACH(n, 0, nwas, was[n] = file[n]; if :: want[nwant] = file[n]; nwant++ :: skip fi);
			EACH(n, nwant, ROOM, want[n] = 0);
			EACH(n, 0, APPENDS, tail[n] = 0);
			/* a: what comes before it stays as it is, twins and all */
			i = 0; do :: i < nwant && was[i] == want[i] -> i++ :: else -> break od;
#ifdef MUTANT_a_is_the_first_deletion
			i = (i > 0 -> i - 1 : 0);
#endif
			n = 0);
		if
		:: i == nwant -> /* 0: nothing moves.  At a block's border; else with a note, below */
#ifndef MUTANT_old_journal_left
			/* journal.c saves this one: without it a journal may be put aside for nothing, no mail is lost */
			STEP(jsync());
#endif
#ifdef MUTANT_plain_truncation_inside_a_block
			STEP(truncate(i, false));
#else
			STEP(truncate(i, true));
#endif
			STEP(sync())
		:: else ->                                      /* 1: the journal */
			STEP(jput(TORN);
				j.a = i; j.S = nwas; j.N = nwant; j.k = (j.S - j.N > 2 -> 2 : 1); j.m = j.S - j.k;
#ifdef MUTANT_mark_at_N
				j.m = j.N;
#endif
				EACH(n, 0, ROOM, j.o[n] = was[n]; j.w[n] = want[n]); n = 0; i = 0;
				j.mark[0] = MARK; j.mark[1] = MARK;  /* random: a mail may have some of it, not all */
				if :: skip :: j.k == 2 && j.o[j.m + 1] != FRESH -> j.mark[1] = FRESH fi);
			STEP(jput(WHOLE + id));
#ifndef MUTANT_no_sync_of_the_journal
			STEP(jsync());
#endif
#ifndef MUTANT_no_mark
			STEPS(j.m, j.m + j.k, put(i, j.mark[i - j.m])); /* 2: the mark */
#endif
#ifndef MUTANT_no_sync_of_the_mark
			STEP(sync());
#endif
			STEPS(j.a, j.N, put(i, j.w[i]));                /* 3: the move */
#ifndef MUTANT_no_sync_of_the_move
			STEP(sync());
#endif
			STEP(truncate(j.N, false));                     /* 4: the truncation */
#ifndef MUTANT_no_sync_of_the_truncation
			STEP(sync());
#endif
			STEP(jput(NONE));                               /* 5: the journal is emptied */
			STEP(jsync_5())
		fi;
		STEP(i = 0; answered = true; nwas = 0; EACH(n, 0, ROOM, was[n] = 0); n = 0)
	fi;
	STEP(look(); lock = FREE);
	goto start
}
#else
/* A note: between a and S all is void if some of its first cells are zeros, and the last is what it should be or zeros,
 * so that no other mail lies there.  It tells of a delivery, M's three cells, or of what is cut off. */
proctype almond() {
	byte i, gone, commits = COMMITS; bool mixed, whole;

start:	atomic { (lock == FREE && !agent_dead && (jfile != NONE || commits > 0)) -> lock = ALMOND;
		i = 0; gone = 0 };
	if
	:: jfile == TORN -> STEP(jput(NONE)); STEP(jsync())
	:: jfile >= WHOLE ->
		STEP(d_step {
			id = jfile - WHOLE;
			ALL(mixed, j.a, j.a + j.k, size >= j.S && (file[n] == ZERO || file[n] == j.mark[n - j.a]));
			ALL(whole, j.a, j.a + j.k, file[n] == j.mark[n - j.a]);
#ifndef MUTANT_a_note_of_the_first_octets_only
			mixed = mixed && (file[j.S - 1] == ZERO || file[j.S - 1] == j.o[0]);
#endif
			gone = j.S - j.a
		});
		if
		:: mixed && !whole && size == j.S -> STEP(truncate(j.a, false))
		:: mixed && !whole && size > j.S ->             /* by a commit, as above */
			STEP(EACH(n, j.a, size - gone, file[n] = file[n + gone]); size = size - gone;
				EACH(n, size, size + gone, file[n] = ZERO); sync())
		:: else
		fi;
#ifndef MUTANT_no_sync_of_what_was_taken_back
		STEP(sync());
#endif
		STEP(jput(NONE); mixed = false; whole = false);
		STEP(jsync_5())
	:: else ->
		STEP(look(); sync(); commits--; id = (jmay & bit(WHOLE) -> 1 : 0);
			EACH(n, 0, ROOM, was[n] = file[n]; want[n] = file[n]);
			nwas = size; nwant = size;
			EACH(n, 0, APPENDS, tail[n] = 0); n = 0; ntail = 0; answered = false);
		STEP(jput(TORN));
		if
		:: size + 3 <= ROOM ->                          /* deliver */
			STEP(j.a = size; j.S = size + 3; j.k = 2; j.mark[0] = M; j.mark[1] = M + 1; j.o[0] = M + 2;
				EACH(n, 0, 3, want[nwant] = M + n; nwant++); n = 0; jput(WHOLE + id));
#ifndef MUTANT_no_sync_of_the_note
			STEP(jsync());
#endif
			STEP(grow(j.S));                        /* zeros */
			STEP(put(j.a + 2, M + 2));
#ifndef MUTANT_first_octets_before_the_rest_is_synced
			STEP(sync());
#endif
			STEPS(0, 2, put(j.a + i, M + i))
		:: size > 0 ->                                  /* cut off the last ones */
			STEP(if :: gone = 1 :: size > 1 -> gone = 2 :: size > 2 -> gone = 3 fi;
				do :: gone < size && file[size - gone] == ZERO -> gone++ :: else -> break od;
				j.a = size - gone; j.S = size; j.k = (gone > 2 -> 2 : 1);
				nwant = j.a;
				j.o[0] = file[j.S - 1]; j.mark[0] = file[j.a];
				if :: j.k > 1 -> j.mark[1] = file[j.a + 1] :: else fi;
				EACH(n, nwant, ROOM, want[n] = 0); n = 0; gone = 0; jput(WHOLE + id));
			STEP(jsync());
			STEP(truncate(j.a, j.a == 0))
		fi;
		STEP(sync());
		STEP(jput(NONE));
		STEP(jsync_5());
		STEP(i = 0; answered = true)
	fi;
	STEP(look(); lock = FREE);
	goto start
}
#endif

/* ---- who appends: a mail of its own, a twin, or what stood there before ---- */

proctype agent() {
	byte mail, appends = APPENDS;

start:	do
	:: atomic { (appends > 0 && size < ROOM && lock == FREE && !dead) -> lock = AGENT;
		appends--; look();
		if
		:: ntail && tail[0] >= SOFT -> mail = LAST
#ifdef NOTE                             /* a mail is longer than a note's first octets: no twin of half of them */
		:: else -> mail = FRESH
#else
		:: else -> if :: mail = FRESH :: mail = TWIN :: mail = J[0].o[size] :: mail = J[1].o[size] fi;
			if :: mail == ZERO -> mail = FRESH :: else fi
#endif
		fi;
		put(size, mail); grow(size + 1); tail[ntail] = mail; ntail++; unsynced = true; mail = 0 };
		atomic { if :: agent_dead -> agent_dead = false; goto start :: else -> 
			sync(); unsynced = false; look(); lock = FREE fi }
	od
}

/* ---- what comes between ---- */

proctype crash() {
	byte crashes = CRASHES;

	do
	:: atomic { (crashes > 0 && lock == ALMOND) -> crashes--; dead = true; lock = FREE; look() }    /* killed */
	:: atomic { (crashes > 0 && !dead && !agent_dead) -> crashes--;         /* the power is cut */
		dead = lock == ALMOND; agent_dead = lock == AGENT; lock = FREE;
		/* left out, for nothing could tell: zeros of a torn append behind a mail that equals, octet for octet,
		 * what stood there */
		if
		:: unsynced && ntail > 1 && tail[0] != FRESH ->
			may[size - 1] = bit(file[size - 1]); after[size - 1] = may[size - 1]
		:: else
		fi;
		if :: unsynced -> tail[ntail - 1] = tail[ntail - 1] + SOFT; unsynced = false :: else fi;
		survive();
		pick(jmay); jfile = got; jsync(); got = 0; set = 0;
		look() }
	od
}

init {
	atomic {
		EACH(n, 0, SIZE, if :: file[n] = n + 1 :: file[n] = TWIN fi; was[n] = file[n]; want[n] = file[n]);
		n = 0; nwas = SIZE; nwant = SIZE; sync();
		run almond(); run agent(); run crash()
	}
}
