"""Each system call failing once: a full disk, a quota, a broken medium, a signal, a transfer that stops half-way.  The n-th call
of a commit, a login, a replay or a delivery fails, n = 1, 2, 3 ... until none does (faults.c, by ptrace: the binary is the real
one).  The mailbox is old or new and the answer says which; what a second failure leaves torn, the next login mends."""
import concurrent.futures
import os
import pathlib
import re
import subprocess
import tempfile

import pytest

from conftest import ROOT, SECONDS, inetd_style, wire
from crash import ALMOND, BOX, K, SHAPE, SHAPES, Shape, body, make_spool, reopen, report, scale, verdict

FAULTS = ROOT / 'build/crash/faults'
ERRORS = ['ENOSPC', 'EIO', 'EINTR', 'EDQUOT']
SHORT = ['half', 'one']
FULL = ('ENOSPC', 'EDQUOT')
TRANSFERS = ('read', 'pread64', 'write', 'pwrite64')
CHANGES = 'write,pwrite64,ftruncate,fsync,fdatasync,mkdirat,renameat,unlinkat'
SPOT = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
MIDDLE_AND_TAIL = Shape('middle-and-tail', [900, 1100, 3 * K, 1300, 700, 5 * K], [2, 5, 6])
BOTH_ENDS = Shape('both-ends', [70 * K, 1100, 66 * K, 1300], [1, 4])
ALL_SHAPES = [*SHAPES, MIDDLE_AND_TAIL, BOTH_ENDS]
MAIL = body('delivered', 5 * K)
LIMIT = 400             # no commit of these mailboxes makes so many calls


def build():
    """Several runs may want it at once: made aside, then renamed."""
    FAULTS.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FAULTS.parent) as there:
        made = pathlib.Path(there) / 'faults'
        subprocess.run(['cc', '-std=c11', '-O1', '-Wall', '-Wextra', '-Werror', '-o', made,
                        pathlib.Path(__file__).with_name('faults.c')], check=True, timeout=SECONDS)
        made.rename(FAULTS)


@pytest.fixture(scope='module', autouse=True)
def tool_built():
    build()


# ---- one run with a fault, and what it hit ----

def under(spool, *actions, kinds=None, trigger=(BOX, '.almond')):
    """The beginning of a command whose calls fail; counting starts when one of these files is opened.  The locks' own calls have
    a test of their own: where they fail, almond waits for itself."""
    return [FAULTS, '-r', spool.base / 'calls', *(x for t in trigger for x in ('-t', t)), *(('-k', kinds) if kinds else ('-x',)),
            *(x for a in actions for x in ('-a', a))]


def hits(spool):
    """[(call, file, fault)] of the calls that failed."""
    text = (spool.base / 'calls').read_text()
    return [m.groups() for m in re.finditer(r'^\d+ (\S+) (.*) <- (\w+)$', text, re.M)]


def converse(spool, gone, prefix=()):
    """Log in, delete, QUIT.  The first answer that was none of +OK, or QUIT's; None where the line ended.  With it, what RETR gave
    where nothing is to be deleted."""
    pop, program = inetd_style(spool, almond=ALMOND, prefix=prefix)
    mails, reply = [], None
    with pop:
        try:
            pop.ok(f'USER {BOX}')
            reply = pop.cmd('PASS secret')
            if reply.startswith('+OK'):
                if gone is None:
                    mails = [pop.multi(f'RETR {i + 1}') for i in range(int(pop.ok('STAT').split()[1]))]
                for n in gone or ():
                    pop.ok(f'DELE {n}')
                quit_ = pop.cmd('QUIT')
                reply = quit_ if gone is not None or not quit_.startswith('+OK') else reply
        except (EOFError, ConnectionError, BrokenPipeError):
            reply = None
    assert program.wait() != 124, 'a hang'
    return reply, mails, program.log()


def hand_over(spool, mail, prefix=()):
    """almond deliver; its exit code."""
    done = subprocess.run([*map(str, prefix), ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, BOX], input=mail,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
    return done.returncode


def dirt(spool):
    """What an almond that has nothing left to mend would not leave: a lock, a journal that is not empty, one kept aside."""
    known = {BOX, '.almond', f'.almond/{BOX}', f'.almond/{BOX}/journal', f'.almond/{BOX}/note'}
    there = {str(p.relative_to(spool.path)): p for p in spool.path.rglob('*')}
    full = {name for name, p in there.items() if name.startswith('.almond/') and p.is_file() and p.stat().st_size}
    return sorted(set(there) - known | full)


def second_time(spool, shape):
    """The mailbox had a commit before: its directory and its journal are there."""
    other = SHAPE['two-runs']
    spool.mbox(BOX, other.old)
    reply, _, log = converse(spool, other.gone)
    assert reply.startswith('+OK'), log
    spool.mbox(BOX, shape.old)


def each(job, fault):
    """job(n) for n = 1, 2, 3 ... until nothing failed in it; it returns the hits and what was wrong.  Every wrong one is told."""
    points, wrong = 0, []
    for n in range(1, LIMIT):
        struck, why = job(n)
        if not struck:
            assert not why, f'without a fault: {why}'
            return points, wrong
        points += 1
        if why:
            wrong.append(f'{fault} n={n} {" then ".join(" ".join(h) for h in struck[:3])}: {why}')
    raise AssertionError(f'{LIMIT} calls and more')


def together(jobs):
    """Run them side by side; the points, and all that was wrong."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [f.result() for f in [pool.submit(*job) for job in jobs]]
    return sum(points for points, _ in results), [w for _, wrong in results for w in wrong]


def settle(what, points, wrong, least):
    report(what, points=points, wrong=len(wrong))
    assert points >= least, f'{points} points only'
    assert not wrong, f'{len(wrong)} of {points} wrong:\n' + '\n'.join(wrong[:40])


# ---- what must hold afterwards ----

def state(shape, data):
    """As verdict(); 'tail' is the old mailbox without the deleted mails at its very end, which need no space to go."""
    last = len(shape.stored)
    while last in shape.gone:
        last -= 1
    tail = data == shape.old[:len(shape.old) - sum(len(mail) for mail in shape.stored[last:])]
    seen = verdict(shape, data)
    return 'tail' if seen == 'wrong' and tail else seen


def wanted(shape, which):
    """What RETR gives of each mail."""
    last = max([i for i in range(1, len(shape.mails) + 1) if i not in shape.gone], default=0)
    return [wire(mail) for i, mail in enumerate(shape.mails, 1)
            if which == 'old' or (i not in shape.gone if which == 'new' else i <= last)]


def mended(spool, shape, may):
    """The next login, without a fault: it mends all, serves what is in the file, and leaves nothing behind."""
    reply, mails, log = reopen(spool)
    if not reply.startswith('+OK'):
        return f'the next login: {reply}\n{log}'
    seen = state(shape, spool.read(BOX))
    if seen not in may:
        return f'{seen}, not {" or ".join(may)}'
    if mails != wanted(shape, seen):
        return f'{seen}, but RETR differs'
    return f'left behind: {dirt(spool)}' if dirt(spool) else None


def judge_commit(spool, shape, reply, struck, once):
    """Did a commit with these failures do what its answer says?  once: it was one failure, which is undone on the spot."""
    at_once = state(shape, spool.read(BOX))
    if reply is None:
        return 'no answer'
    if reply.startswith('+OK'):
        may = ['new']
    elif not reply.startswith('-ERR [SYS/TEMP] '):
        return reply
    elif not once:
        may = ['old', 'new', 'tail']            # torn, perhaps: whole again, whichever
    else:
        may = ['old']
        if struck and struck[0][2] in FULL:
            may.append('tail')
        if shape.truncation and struck and struck[0][0] == 'fsync':
            may.append('new')                   # cut, and nobody knows whether the medium has it
    if struck and struck[0][0] in TRANSFERS and struck[0][2] in ('EINTR', *SHORT) and not reply.startswith('+OK'):
        return reply
    if once and at_once not in may:
        return f'{reply}: {at_once} on the spot, not {" or ".join(may)}'
    why = mended(spool, shape, may)
    return f'{reply}: {why}' if why else None


def commit_once(shape, fault, second, actions=('{n}={fault}',), kinds=None, once=True):
    def job(n):
        spool = make_spool(shape, SPOT)
        try:
            if second:
                second_time(spool, shape)
            prefix = under(spool, *(a.format(n=n, fault=fault) for a in actions), kinds=kinds)
            reply, _, log = converse(spool, shape.gone, prefix)
            struck = hits(spool)
            why = judge_commit(spool, shape, reply, struck, once)
            return struck, why and f'{shape}{", second" if second else ""}: {why}'
        finally:
            spool.remove()
    return each(job, fault)


# ---- the commit of an mbox ----

SOME = [MIDDLE_AND_TAIL, SHAPE['large-first'], SHAPE['last']]


@pytest.mark.parametrize('second', [False, True], ids=['first', 'second'])
def test_each_call_of_a_commit_fails_once(second):
    """From the login's look at the mailbox to the end of the process."""
    shapes = scale(SOME if second else SOME[:1], ALL_SHAPES)
    points, wrong = together([(commit_once, shape, fault, second) for shape in shapes for fault in ERRORS + SHORT])
    settle(f'faults: each call of a {"second" if second else "first"} commit, once', points, wrong, 200)


LOCKS = 'flock,fcntl,openat,newfstatat,unlinkat,write,fstat'


@pytest.mark.parametrize('name', ['last', 'middle'])
def test_each_call_of_the_locks_fails_once(name):
    """A lock that cannot be had or let go may make the mailbox busy for a while, and no more than that."""
    shape = SHAPE[name]

    def job(n):
        spool = make_spool(shape, SPOT)
        try:
            reply, _, log = converse(spool, shape.gone, under(spool, f'{n}=EIO', kinds=LOCKS))
            struck = hits(spool)
            seen = state(shape, spool.read(BOX))
            if struck and not struck[0][1].endswith((f'{BOX}.lock', f'/{BOX}')):
                return struck, None
            if not reply or not reply.startswith(('+OK', '-ERR [SYS/TEMP] ', '-ERR [IN-USE] ')):
                return struck, str(reply)
            if seen != ('new' if reply.startswith('+OK') else 'old'):
                return struck, f'{reply}: {seen}'
            return struck, mended(spool, shape, [seen])
        finally:
            spool.remove()

    def one(n):
        """As each() does, but for one n, so that they wait side by side."""
        struck, why = job(n)
        return len(struck), [f'n={n} {struck}: {why}'] if why else []

    points, wrong = together([(one, n) for n in range(1, 60)])
    settle(f'faults: each call of the locks, once ({name})', points, wrong, 20)


def test_what_is_said_of_a_full_disk():
    """-ERR [SYS/TEMP], and what to do."""
    said = set()

    def job(n):
        spool = make_spool(MIDDLE_AND_TAIL, SPOT)
        try:
            full = under(spool, f'{n}+=ENOSPC', kinds='write,pwrite64,mkdirat', trigger=[f'rw:{BOX}'])
            reply, _, log = converse(spool, [2], full)
            if hits(spool) and not reply.startswith('+OK'):
                said.add(reply)
                if not re.search('full|space|quota', reply):
                    return hits(spool), f'{reply} does not say why'
                if not re.search('delete|free|remove', reply.partition('not removed')[2] or reply):
                    return hits(spool), f'{reply} does not say what to do'
            return hits(spool), None
        finally:
            spool.remove()
    points, wrong = each(job, 'ENOSPC')
    assert said, 'a full disk was no matter'
    settle('faults: what is said of a full disk', points, wrong, 2)


def test_transfers_that_stop_again_and_again():
    """Every second one, from each on: nothing changes but the number of calls."""
    def run(shape, fault):
        def job(n):
            spool = make_spool(shape, SPOT)
            try:
                reply, _, log = converse(spool, shape.gone, under(spool, f'{n}/={fault}', kinds=','.join(TRANSFERS)))
                struck = hits(spool)
                if not reply or not reply.startswith('+OK'):
                    return struck, f'{shape}: {reply}'
                why = mended(spool, shape, ['new'])
                return struck, why and f'{shape}: {why}'
            finally:
                spool.remove()
        return each(job, f'every second {fault}')
    shapes = scale([SHAPE['small-before-large'], MIDDLE_AND_TAIL], ALL_SHAPES)
    points, wrong = together([(run, shape, fault) for shape in shapes for fault in ('half', 'EINTR')])
    settle('faults: every second transfer short or interrupted', points, wrong, 40)


def test_a_disk_that_stays_broken():
    """From the n-th change on none works any more, so that nothing can be undone: the next login does it."""
    shapes = scale(SOME, ALL_SHAPES)
    points, wrong = together([(commit_once, shape, fault, True, ('{n}+={fault}',), CHANGES, False)
                              for shape in shapes for fault in ('EIO', 'ENOSPC', 'EROFS')])
    settle('faults: from the n-th change on all fail', points, wrong, 40)


def test_two_failures():
    """The n-th change fails, and the m-th call behind it, which is the undo's."""
    def changes(shape):
        """How many calls of a commit count."""
        spool = make_spool(shape, SPOT)
        second_time(spool, shape)
        assert converse(spool, shape.gone, under(spool, kinds=kinds))[0].startswith('+OK')
        count = len((spool.base / 'calls').read_text().splitlines())
        spool.remove()
        return count

    def pair(shape, fault, n):
        def job(m):
            spool = make_spool(shape, SPOT)
            try:
                second_time(spool, shape)
                reply, _, log = converse(spool, shape.gone, under(spool, f'{n}={fault}', f'{m}={fault}', kinds=kinds))
                struck = hits(spool)
                why = judge_commit(spool, shape, reply, struck, False)
                return struck if len(struck) > 1 else [], why and f'{shape}: {why}'
            finally:
                spool.remove()
        return each(job, f'{fault} at {n} and')

    kinds = scale(CHANGES, CHANGES + ',pread64,read,openat,fstat,mmap')
    shapes = scale([MIDDLE_AND_TAIL], [MIDDLE_AND_TAIL, BOTH_ENDS, SHAPE['last']])
    points, wrong = together([(pair, shape, 'EIO', n) for shape in shapes for n in range(1, changes(shape) + 1)])
    settle('faults: two failures of one commit', points, wrong, 40)


# ---- a login that mends ----

def torn(shape, n):
    """A spool whose commit was killed before its n-th change; None: it has fewer."""
    spool = make_spool(shape, SPOT)
    converse(spool, shape.gone, under(spool, f'{n}=kill', kinds='pwrite64,write,ftruncate,fsync', trigger=[f'rw:{BOX}']))
    (spool.path / f'{BOX}.lock').unlink(missing_ok=True)        # stale: waiting for that is another proof's
    if hits(spool):
        return spool
    spool.remove()
    return None


def torn_points(shape):
    """The n of torn() that leave something to mend; and whether the mailbox itself is torn then."""
    points = []
    for n in range(1, LIMIT):
        spool = torn(shape, n)
        if not spool:
            return points
        if dirt(spool):
            points.append((n, state(shape, spool.read(BOX)) == 'wrong'))
        spool.remove()
    raise AssertionError('no end')


def replay_once(shape, torn_at, fault, action='{n}={fault}'):
    def job(n):
        spool = torn(shape, torn_at)
        try:
            reply, mails, log = converse(spool, None, under(spool, action.format(n=n, fault=fault)))
            struck = hits(spool)
            if reply is None:
                why = 'no answer'
            elif reply.startswith('+OK') and mails not in (wanted(shape, 'old'), wanted(shape, 'new')):
                why = 'a torn mailbox was served'
            elif not reply.startswith(('+OK', '-ERR [SYS/TEMP] ')):
                why = reply
            elif not reply.startswith('+OK') and struck and struck[0][0] in TRANSFERS and fault in ('EINTR', *SHORT):
                why = reply
            else:
                why = mended(spool, shape, ['old', 'new'])
            return struck, why and f'{shape} torn at {torn_at}: {why}'
        finally:
            spool.remove()
    return each(job, fault)


def test_a_replay_that_fails():
    """The login that finds a torn mailbox and cannot mend it refuses, and the next one mends it."""
    jobs = []
    for shape in scale([MIDDLE_AND_TAIL], [MIDDLE_AND_TAIL, BOTH_ENDS]):
        points = torn_points(shape)
        assert any(is_torn for _, is_torn in points), f'{shape}: no point of {points} tears the mailbox'
        if scale(True, False):
            points = [p for p in points if p[1]][:1] + points[-1:]
        jobs += [(replay_once, shape, n, fault) for n, _ in points for fault in ['ENOSPC', 'EIO', 'EINTR', 'half']]
        jobs += [(replay_once, shape, n, fault, '{n}+={fault}') for n, _ in points
                 for fault in scale(['EIO'], ['EIO', 'EROFS'])]
    points, wrong = together(jobs)
    settle('faults: each call of a login that mends, once', points, wrong, 100)


# ---- almond deliver ----

def delivered(old, data, mail=MAIL):
    """'whole' (once, behind what was there), 'absent' (as it was), or 'wrong'."""
    if data == old:
        return 'absent'
    if data is None or not data.startswith(old or b''):
        return 'wrong'
    line, _, rest = data[len(old or b''):].lstrip(b'\r\n').partition(b'\n')
    crlf = b'\r\n' if (old or b'').endswith(b'\r\n') else b'\n'
    return 'whole' if line.startswith(b'From ') and rest in (mail + b'\n', mail + crlf) else 'absent' if not line else 'wrong'


def content(spool):
    path = spool.path / BOX
    return path.read_bytes() if path.exists() else None


DELIVERIES = {'some': SHAPE['middle'].old, 'empty': b'', 'missing': None, 'open-end': SHAPE['no-last-newline'].old}


def delivery_once(name, fault, action='{n}={fault}', once=True):
    def job(n):
        spool = make_spool(SHAPE['middle'], SPOT)
        old = DELIVERIES[name]
        try:
            spool.mbox(BOX, old) if old is not None else (spool.path / BOX).unlink()
            code = hand_over(spool, MAIL, under(spool, action.format(n=n, fault=fault)))
            struck = hits(spool)
            seen = [delivered(old, content(spool))]
            reply, mails, log = reopen(spool)
            seen.append(delivered(old, content(spool)))
            may = ['whole'] if code == 0 else ['absent'] if code == 75 else []
            if not may or (code and struck and struck[0][0] in TRANSFERS and fault in ('EINTR', *SHORT)):
                why = f'exit code {code}'
            elif not reply.startswith('+OK'):
                why = f'the next login: {reply}'
            elif seen[-1] not in may or (once and seen[0] not in may):
                why = f'exit code {code}, mail {seen[0]}, after a login {seen[-1]}'
            elif mails.count(wire(MAIL)) != (seen[-1] == 'whole'):
                why = 'RETR differs'
            else:
                why = f'left behind: {dirt(spool)}' if dirt(spool) else None
            return struck, why and f'{name}: {why}'
        finally:
            spool.remove()
    return each(job, fault)


def test_each_call_of_a_delivery_fails_once():
    jobs = [(delivery_once, name, fault) for name in scale(['some', 'missing'], DELIVERIES) for fault in ERRORS + SHORT]
    points, wrong = together(jobs)
    settle('faults: each call of almond deliver, once', points, wrong, 100)


def test_a_delivery_on_a_disk_that_stays_broken():
    """Half a message may stay in the file, with the intent beside it: no login shows it, and the next one takes it out."""
    def run(fault):
        def job(n):
            spool = make_spool(SHAPE['middle'], SPOT)
            old = SHAPE['middle'].old
            try:
                code = hand_over(spool, MAIL, under(spool, f'{n}+={fault}', kinds=CHANGES))
                struck = hits(spool)
                reply, mails, log = reopen(spool)
                seen = delivered(old, content(spool))
                if code not in (0, 75) or not reply.startswith('+OK'):
                    return struck, f'exit code {code}, the next login {reply}'
                if seen == 'wrong' or (code == 0 and seen != 'whole'):
                    return struck, f'exit code {code}, mail {seen}'
                if len(mails) != len(SHAPE['middle'].mails) + (seen == 'whole'):
                    return struck, f'{len(mails)} mails, and the delivered one is {seen}'
                return struck, f'left behind: {dirt(spool)}' if dirt(spool) else None
            finally:
                spool.remove()
        return each(job, f'{fault} and on')
    points, wrong = together([(run, fault) for fault in ('EIO', 'ENOSPC', 'EROFS')])
    settle('faults: almond deliver, all fail from the n-th on', points, wrong, 15)


def test_a_delivery_that_was_killed_is_mended_in_spite_of_a_failure():
    """Killed before its m-th change; then a login whose n-th call fails; then one without a fault."""
    old = SHAPE['middle'].old

    def killed(m):
        spool = make_spool(SHAPE['middle'], SPOT)
        hand_over(spool, MAIL, under(spool, f'{m}=kill', kinds='pwrite64,write,ftruncate,fsync'))
        (spool.path / f'{BOX}.lock').unlink(missing_ok=True)
        if hits(spool):
            return spool
        spool.remove()
        return None

    def run(m, fault):
        def job(n):
            spool = killed(m)
            try:
                reply, mails, log = converse(spool, None, under(spool, f'{n}={fault}'))
                struck = hits(spool)
                if reply is None or not reply.startswith(('+OK', '-ERR [SYS/TEMP] ')):
                    return struck, f'killed at {m}: {reply}'
                few = wanted(SHAPE['middle'], 'old')
                if reply.startswith('+OK') and mails not in (few, few + [wire(MAIL)]):
                    return struck, f'killed at {m}: half a mail was served'
                reply, mails, log = reopen(spool)
                seen = delivered(old, content(spool))
                if not reply.startswith('+OK') or seen == 'wrong' or mails != few + [wire(MAIL)] * (seen == 'whole'):
                    return struck, f'killed at {m}: then {reply}, mail {seen}'
                return struck, f'killed at {m}: left behind: {dirt(spool)}' if dirt(spool) else None
            finally:
                spool.remove()
        return each(job, fault)

    places = []
    for m in range(1, LIMIT):
        spool = killed(m)
        if not spool:
            break
        if dirt(spool):
            places.append(m)
        spool.remove()
    assert places, 'no point leaves anything to mend'
    if scale(True, False):
        places = places[:1] + places[len(places) // 2:][:1] + places[-1:]
    points, wrong = together([(run, m, fault) for m in sorted(set(places)) for fault in scale(['EIO', 'half'], ERRORS + SHORT)])
    settle('faults: each call of a login after a killed delivery', points, wrong, 50)


def test_a_delivery_into_a_torn_mailbox():
    """It mends first, or says 75; the mail is there whole or not at all."""
    shape = MIDDLE_AND_TAIL
    places = [n for n, is_torn in torn_points(shape) if is_torn]
    assert places

    def run(torn_at, fault):
        def job(n):
            spool = torn(shape, torn_at)
            try:
                code = hand_over(spool, MAIL, under(spool, f'{n}={fault}'))
                struck = hits(spool)
                reply, mails, log = reopen(spool)
                data = content(spool)
                seen = [which for which, whole in (('old', shape.old), ('new', shape.new))
                        if delivered(whole, data) == ('whole' if code == 0 else 'absent')]
                if code not in (0, 75) or not reply.startswith('+OK') or not seen:
                    return struck, f'torn at {torn_at}: exit code {code}, then {reply}'
                return struck, f'torn at {torn_at}: left behind: {dirt(spool)}' if dirt(spool) else None
            finally:
                spool.remove()
        return each(job, fault)
    places = scale(places[len(places) // 2:][:1], places)
    points, wrong = together([(run, n, fault) for n in places for fault in scale(['EIO', 'ENOSPC', 'half'], ERRORS + SHORT)])
    settle('faults: each call of almond deliver into a torn mailbox', points, wrong, 60)


# ---- Maildir ----

FILES = {f'{"cur" if i % 2 else "new"}/{1000 + i}.{i}.host{":2,S" if i % 2 else ""}': body(f'file-{i}', 600 + 100 * i)
         for i in range(5)}
GONE = (0, 1, 3)


def make_maildir():
    spool = make_spool(SHAPE['middle'], SPOT)
    (spool.path / BOX).unlink()
    spool.maildir(BOX, FILES)
    return spool


def files(spool):
    """The mails in new and cur, in the order of their names."""
    there = [p for sub in ('new', 'cur') for p in (spool.path / BOX / sub).iterdir()]
    return [p.read_bytes() for p in sorted(there, key=lambda p: p.name)]


def delete_by_size(spool, sizes, prefix):
    """A mail that cannot be opened is left out of the list: delete what there is of these sizes.  The last answer, and the sizes
    that were asked for."""
    pop, program = inetd_style(spool, almond=ALMOND, prefix=prefix)
    asked, reply = set(), None
    with pop:
        try:
            pop.ok(f'USER {BOX}')
            reply = pop.cmd('PASS secret')
            if reply.startswith('+OK'):
                for n, size in pop.sizes().items():
                    if size in sizes and pop.cmd(f'DELE {n}').startswith('+OK'):
                        asked.add(size)
                reply = pop.cmd('QUIT')
        except (EOFError, ConnectionError, BrokenPipeError):
            reply = None
    assert program.wait() != 124, 'a hang'
    return reply, asked


def maildir_commit_once(fault, action='{n}={fault}'):
    mails = list(FILES.values())
    sizes = {len(wire(mails[i])): mails[i] for i in GONE}

    def job(n):
        spool = make_maildir()
        try:
            reply, asked = delete_by_size(spool, sizes, under(spool, action.format(n=n, fault=fault)))
            struck, left = hits(spool), files(spool)
            reply2, seen, log = reopen(spool)
            kept = [mail for i, mail in enumerate(mails) if i not in GONE or len(wire(mail)) not in asked]
            if reply is None or not reply.startswith(('+OK', '-ERR [SYS/TEMP] ')):
                return struck, str(reply)
            if [mail for mail in left if mail in kept] != kept or any(left.count(mail) > 1 or mail not in mails for mail in left):
                return struck, f'{reply}: a kept mail is lost, doubled or torn'
            if reply.startswith('+OK') and left != kept:
                return struck, f'{reply}: a deleted mail is there'
            if not struck and len(asked) != len(GONE):
                return struck, 'not all were there to delete'
            if not reply2.startswith('+OK') or seen != [wire(mail) for mail in left]:
                return struck, f'the next login: {reply2}'
            return struck, None
        finally:
            spool.remove()
    return each(job, fault)


def test_each_call_of_a_maildir_session_fails_once():
    jobs = [(maildir_commit_once, fault) for fault in ERRORS + SHORT] + [(maildir_commit_once, 'EIO', '{n}+={fault}')]
    points, wrong = together(jobs)
    settle('faults: each call of a Maildir session, once', points, wrong, 60)


def test_what_is_said_when_an_unlink_or_a_sync_fails():
    """-ERR, each; and all that was kept is there."""
    for call, least in (('unlinkat', len(GONE)), ('fsync', 1)):
        count = 0
        for n in range(1, LIMIT):
            spool = make_maildir()
            mails = list(FILES.values())
            reply, _ = delete_by_size(spool, {len(wire(mails[i])) for i in GONE}, under(spool, f'{n}=EIO', kinds=call))
            struck, left = hits(spool), files(spool)
            spool.remove()
            if not struck:
                break
            count += 1
            assert reply.startswith('-ERR [SYS/TEMP] '), (call, n, reply)
            assert [m for m in left if m in mails[2:3] + mails[4:]] == mails[2:3] + mails[4:]
        assert count >= least and reply.startswith('+OK')


def maildir_delivery_once(fault):
    def job(n):
        spool = make_maildir()
        try:
            code = hand_over(spool, MAIL, under(spool, f'{n}={fault}'))
            struck, left = hits(spool), files(spool)
            old = list(FILES.values())
            if code not in (0, 75) or (code and struck and struck[0][0] in TRANSFERS and fault in ('EINTR', *SHORT)):
                return struck, f'exit code {code}'
            if left != (old + [MAIL] if code == 0 else old):
                return struck, f'exit code {code}, and {len(left)} mails of {len(old)}'
            rest = list((spool.path / BOX / 'tmp').iterdir())
            return struck, f'left in tmp: {rest}' if rest else None
        finally:
            spool.remove()
    return each(job, fault)


def test_each_call_of_a_delivery_to_a_maildir_fails_once():
    points, wrong = together([(maildir_delivery_once, fault) for fault in ERRORS + SHORT])
    settle('faults: each call of almond deliver to a Maildir, once', points, wrong, 30)
