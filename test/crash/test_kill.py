"""Every system call: the real program is killed, all its processes at once, before and after the n-th call of a commit, of
a mending and of a delivery, for every n; then the mailbox is opened again, and is old or new.  Mail may have arrived in
between, and the mending may have been killed too, any number of times.

killer.c does the killing: it stands at each call by ptrace.  A point is one such kill and one look afterwards.  `torn`
counts the points at which something was to be mended: without them nothing would be proved."""
import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import re
import socket
import subprocess
import threading

import pytest

from conftest import ROOT, SECONDS, SEPARATOR, Spool, switches
from crash import ALMOND, ARRIVED, BOX, LONG, SHAPE, arrived, body, deliver, home, make_spool, report, scale

SWITCHES = switches(ALMOND)
pytestmark = pytest.mark.skipif(not SWITCHES['ENABLE_USERS'] or not SWITCHES['ENABLE_MBOX'],
                                reason='a build without a users file or without mbox')
KILLER = ROOT / 'build/crash/killer'
SOURCE = ROOT / 'test/crash/killer.c'
# Where fsync costs nothing: what is proved here does not ask for a disk.
BASE = '/dev/shm' if os.access('/dev/shm', os.W_OK | os.X_OK) else None
KILLED = 137
# Two work at a time; the others wait for the lock of one that was killed to grow old.
THREADS = 12
MOST = 5000             # calls of one run
PATIENCE = 5 * SECONDS  # a gigabyte is moved
at_work = threading.Semaphore(2)


@pytest.fixture(scope='module', autouse=True)
def killer():
    if not KILLER.exists() or KILLER.stat().st_mtime < SOURCE.stat().st_mtime:
        KILLER.parent.mkdir(parents=True, exist_ok=True)
        new = KILLER.with_suffix(f'.{os.getpid()}')
        subprocess.run([os.environ.get('CC', 'cc'), '-std=c11', '-O2', '-Wall', '-Wextra', '-Werror', '-o', new, SOURCE],
                       check=True, timeout=SECONDS)
        new.rename(KILLER)


# ---- one run, killed or not ----

class End:
    """How it ended: what killer says, the octets that the client got, the exit code."""

    def __init__(self, code, text, log, words):
        self.code, self.text, self.log = code, text, log
        self.words = words
        self.killed = code == KILLED
        self.triggered = 'trigger=1' in words
        self.calls = int(re.search(r'calls=(\d+)|$', words).group(1) or 0)
        found = re.search(r' call=(.*)', words)
        self.call = found.group(1) if found else '-'


def talk(sock, steps):
    """Send what is octets, and wait for the answers before what is a function; all that came until the line ended."""
    got, due = b'', 1
    sock.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionError):
        for step in steps:
            if isinstance(step, bytes):
                sock.sendall(step)
                due += step.count(b'\r\n')
                continue
            while got.count(b'\r\n') < due:
                more = sock.recv(65536)
                if not more:
                    return got
                got += more
            step()
        while more := sock.recv(65536):
            got += more
    return got


class Kill:
    """Where it is to be killed.  Without n nowhere."""

    def __init__(self, n=0, after=False, whole=False, box=BOX, call=None):
        self.n, self.after = n, after
        self.argv = ['-n', str(n), *(['-a'] if after else []), *(['-w'] if whole else []),
                     *(['-c', call] if call else ['-b', box] if box else [])]

    def __repr__(self):
        return f'{"after" if self.after else "before"} call {self.n} ({" ".join(self.argv)})'


def started(spool, argv, kill, talk_to, **how):
    """The program, under killer where there is a kill; talk_to(process) is what goes on meanwhile."""
    words = spool.base / f'killer-{threading.get_ident()}'
    prefix = [str(KILLER), '-o', str(words), *kill.argv] if kill else []
    with at_work if kill else contextlib.nullcontext():
        with subprocess.Popen([*prefix, *(str(a) for a in argv)], stderr=subprocess.PIPE, **how) as process:
            try:
                text = talk_to(process)
                log = process.stderr.read().decode(errors='replace')
                code = process.wait(PATIENCE)
            except BaseException:
                process.kill()
                raise
    assert not kill or code in (KILLED, 0, 75), f'{kill}: exit code {code}\n{log}'
    return End(code, text, log, words.read_text() if kill else '')


def session(spool, steps, kill=None):
    """A session of almond as inetd starts it, its commands sent ahead."""
    ours, theirs = socket.socketpair()

    def talk_to(_):
        theirs.close()
        return talk(ours, steps)

    with ours, theirs:
        return started(spool, [ALMOND, '-i', '-E', '-d', spool.path, '-u', spool.users_file], kill, talk_to, stdin=theirs,
                       stdout=theirs)


def almond_deliver(spool, mail, kill=None):
    def talk_to(process):
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(mail)
            process.stdin.close()
        return b''

    return started(spool, [ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, BOX], kill, talk_to,
                   stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


LOGIN = f'USER {BOX}\r\nPASS secret\r\n'.encode()


def dele(gone):
    return b''.join(b'DELE %d\r\n' % n for n in gone)


def login(spool):
    """The next login, which mends: how many messages it finds, and the log."""
    end = session(spool, [LOGIN + b'STAT\r\nQUIT\r\n'])
    stat = re.search(rb'\+OK [^\r]*\r\n\+OK [^\r]*\r\n\+OK [^\r]*\r\n\+OK (\d+) \d+\r\n\+OK ', end.text)
    return int(stat.group(1)) if stat else None, end


# ---- what is killed, and what is right afterwards ----

class Case:
    """A shape and what is deleted; `early`: mail arrives between the login and QUIT."""

    def __init__(self, shape, early=False):
        self.shape, self.early, self.name = shape, early, shape.name + (' + mail meanwhile' if early else '')
        more = arrived(shape.old) if early else b''
        self.old, self.new = shape.old + more, shape.new + more
        self.many = len(shape.mails) + early

    def __repr__(self):
        return self.name

    def session(self, spool, kill):
        """The session that is killed; how it ended, and the case that it is: a kill may come before the mail."""
        came = []
        steps = [lambda: came.append(deliver(spool.path / BOX))] if self.early else []
        end = session(spool, [LOGIN + dele(self.shape.gone), *steps, b'QUIT\r\n'], kill)
        return end, self if came or not self.early else Case(self.shape)

    def after(self, late):
        """What a mailbox of the old octets, and mail behind them, is when the deletion is done: the last message takes all
        with it up to the next separator."""
        last = len(self.shape.mails) in self.shape.gone and not self.early
        return self.new + (late.lstrip(b'\r\n') if last else late)


class Tally:
    """Points, torn states and faults of one proof."""

    def __init__(self):
        self.points, self.torn, self.faults = {}, {}, {}
        self.lock = threading.Lock()

    def add(self, case, torn, faults, kill, end, came=b'', state=''):
        name = str(case)
        with self.lock:
            self.points[name] = self.points.get(name, 0) + 1
            self.torn[name] = self.torn.get(name, 0) + bool(torn)
            if faults:
                came = came if isinstance(came, str) else 'mail arrived' if came else ''
                self.faults.setdefault(name, []).append('; '.join([f'killed {kill} {end.call}', came, state, *faults]))

    def show(self, proof, torn=True):
        points, wrong = sum(self.points.values()), sum(len(f) for f in self.faults.values())
        report(proof, points=points, **({'torn': sum(self.torn.values())} if torn else {}), wrong=wrong)
        for name in self.faults:
            print(f'  {name}: {len(self.faults[name])} of {self.points[name]} wrong')
        assert not wrong, '\n'.join(f'{name}: {fault}' for name, faults in self.faults.items() for fault in faults[:5])
        return points


def on_all(function, cases):
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(function, *case) for case in cases]:
            future.result()


def leftovers(spool):
    """What must not be there when a mailbox is mended."""
    found = [str(p.relative_to(spool.path)) for p in spool.path.glob('*.lock')]
    for file in home(spool).iterdir() if home(spool).is_dir() else ():
        if file.name not in ('journal', 'note') or file.stat().st_size:
            found.append(f'{file.relative_to(spool.path)} of {file.stat().st_size}')
    return [f'left over: {", ".join(found)}'] if found else []


def likeness(case, data):
    """For a person: where a file is neither old nor new."""
    for name, right in (('old', case.old), ('new', case.new)):
        at = next((i for i, (a, b) in enumerate(zip(data, right)) if a != b), min(len(data), len(right)))
        yield f'{name} ({len(right)}) up to {at}'


def state_of(spool, case=None):
    """For a person: the mailbox and what lies beside it, before the mending."""
    data = spool.read(BOX) if (spool.path / BOX).exists() else b''
    files = {f.name: f.stat().st_size for f in home(spool).iterdir()} if home(spool).is_dir() else {}
    return f'{len(data)} octets{"".join(f", like {x}" for x in likeness(case, data)) if case else ""}; {files}'


def judge(spool, late, case):
    """What is wrong after the next login; old or new it must be, with what arrived behind it; and the deletion, where it was
    not done, can be done now."""
    many, end = login(spool)
    if many is None:
        return [f'no login: {end.text!r} {end.log}']
    data = spool.read(BOX)
    right = {case.old + late: case.many, case.new + late: case.many - len(case.shape.gone)}
    faults = leftovers(spool)
    if data not in right:
        return [*faults, f'{len(data)} octets, like {", ".join(likeness(case, data))}: {end.log}']
    if many != right[data] + bool(late):
        faults.append(f'{many} messages found')
    if data == case.old + late:
        end = session(spool, [LOGIN + dele(case.shape.gone) + b'QUIT\r\n'])
        if spool.read(BOX) != case.after(late):
            faults.append(f'and nothing can be deleted: {end.text!r} {end.log}')
        faults += leftovers(spool)
    return faults


# ---- a spool that was left by a crash, kept in memory ----

class Snapshot:
    """All of a spool but a dot-lock, whose waiting is another matter; what it says of `late` is what arrived since."""

    def __init__(self, spool, late=b''):
        self.late = late
        self.files = {}
        for top, dirs, files in os.walk(spool.path):
            for path in (pathlib.Path(top, name) for name in dirs + files):
                st = path.lstat()
                if not path.name.endswith('.lock'):
                    self.files[path.relative_to(spool.path)] = (st, path.read_bytes() if path.is_file() else None)

    def spool(self):
        spool = Spool(BASE)
        (spool.path / '.almond').rmdir()
        spool.lines(f'{BOX}:{{PLAIN}}secret')
        for name, (st, data) in self.files.items():
            path = spool.path / name
            if data is None:
                path.mkdir()
            else:
                path.write_bytes(data)
            os.chown(path, st.st_uid, st.st_gid)
            path.chmod(st.st_mode & 0o7777)
        return spool

    def waits(self):
        """Is something to be mended?"""
        return any(data for name, (_, data) in self.files.items() if len(name.parts) == 3)

    def key(self):
        """Equal for equal states.  The mark in a journal's head is random, and so is the mailbox where it stands."""
        journal = self.files.get(pathlib.Path('.almond', BOX, 'journal'), (None, b''))[1]
        hashed = hashlib.sha256(self.late)
        for name, (_, data) in sorted(self.files.items()):
            data = data or b''
            if name.parts[0] == '.almond':
                data = data[:8] + b'%d' % len(data) + data[128:]
            elif journal[:8].strip(b'\0'):
                data = data.replace(journal[48:64], b'the random mark.')
            hashed.update(f'{name} {len(data)} '.encode() + data)
        return hashed.digest()


# ---- the killer itself ----

def test_before_and_after(tmp_path):
    """A call that is killed before it begins has no effect; after it, it has its whole."""
    path, words = tmp_path / 'file', tmp_path / 'words'
    for n, after, size, code in ((1, False, 10, KILLED), (1, True, 4, KILLED), (2, False, 4, KILLED), (0, False, 4, 0),
                                 (99, True, 4, 0)):
        path.write_bytes(b'0123456789')
        argv = [KILLER, '-o', words, *Kill(n, after, call='ftruncate').argv, 'truncate', '-s', '4', path]
        assert subprocess.run(argv, timeout=SECONDS).returncode == code, words.read_text()
        assert path.stat().st_size == size, words.read_text()
        assert 'trigger=1' in words.read_text()


# ---- a commit ----

SHORT = ['small-first', 'borders-64k', 'crlf', 'alternate', 'all-alike', 'no-last-newline', 'junk-first', 'tail', 'all']
EARLY = scale(['last', 'no-last-newline'], ['last', 'tail', 'all', 'middle', 'all-alike', 'no-last-newline'])
CASES = [Case(SHAPE[name]) for name in scale(SHORT, SHAPE)] + [Case(SHAPE[name], True) for name in EARLY]


def each_point(run, step=1, first=1, least=1, **how):
    """run(kill) before and after each call, until it says that one was not reached."""
    for n in range(first, MOST, step):
        if not all([run(Kill(n, after, **how)) for after in (False, True)]):
            assert n > least, f'{n - 1} calls: no proof'
            return
    raise AssertionError(f'no end of calls: {MOST}')


@contextlib.contextmanager
def killed_commit(case, kill, bare=False):
    """A spool in which a session was killed; how it ended, and what it is a case of."""
    spool = make_spool(case.shape, BASE)
    try:
        if bare:
            (spool.path / '.almond').rmdir()
        end, here = case.session(spool, kill)
        assert end.triggered, (case, kill, end.log)
        if not end.killed:
            assert spool.read(BOX) == case.new, (case, end.text, end.log)
            assert end.text.count(b'+OK') == end.text.count(b'\r\n'), (case, end.text, end.log)
        yield spool, end, here
    finally:
        spool.remove()


def commit_points(tally, case, late, step=1, first=1, bare=False, **how):
    """A session is killed at each point, then comes a login; `late`: mail arrives in between."""
    def run(kill):
        with killed_commit(case, kill, bare) as (spool, end, here):
            if not end.killed:
                return False
            torn, state = spool.read(BOX) not in (here.old, here.new), state_of(spool, here)
            more = deliver(spool.path / BOX) if late else b''
            tally.add(case, torn, judge(spool, more, here), kill, end, more, state)
            return True

    each_point(run, step, first, **how)


def test_every_call_of_a_commit():
    """Of the process that commits: every call from the open of the mailbox on; then of all processes."""
    tally = Tally()
    step = scale(5, 1)
    on_all(commit_points, [(tally, case, late, step, 1 + (i + 2 * late) % step) for i, case in enumerate(CASES)
                           for late in (False, True)])
    on_all(functools.partial(commit_points, whole=True),
           [(tally, case, late, scale(11, 1)) for case in CASES[::scale(4, 1)]
            for late in scale((False,), (False, True))])
    assert tally.show('killed at each call of a commit') > scale(300, 10000)
    assert sum(tally.torn.values()) > scale(30, 1000)


def test_every_call_of_a_session():
    """From the exec on; also where the first session makes what all commits need."""
    tally = Tally()
    cases = [Case(SHAPE[name]) for name in scale(['middle'], ['middle', 'two-runs', 'last'])]
    for bare in (True, False):
        on_all(functools.partial(commit_points, whole=True, box=None, bare=bare),
               [(tally, case, False, scale(14, 1), first) for case in cases for first in scale((1, 6), (1,))])
    assert tally.show('killed at each call of a session, from its start', torn=False) > scale(60, 1000)


def test_a_marked_end():
    """What lies over the mailbox's end while a commit is at work is random.  An agent that appends must not see an end of a
    line there, or an empty one, that the mailbox has not: its mail would be no message behind the old end."""
    tally, case = Tally(), Case(SHAPE['no-last-newline'])
    marked = []

    def look(kill):
        with killed_commit(case, kill) as (spool, end, _):
            if end.killed and spool.read(BOX)[-40:] != case.old[-40:] and len(spool.read(BOX)) == len(case.old):
                marked.append(kill)
            return end.killed

    def again(kill):
        with killed_commit(case, kill) as (spool, end, _):
            state = state_of(spool)
            more = deliver(spool.path / BOX)
            short = more.index(b'From ') < arrived(case.old).index(b'From ')
            tally.add(case, True, short and judge(spool, more, case), kill, end, more, state)

    each_point(look)
    assert marked, 'no mark'
    on_all(again, [(marked[0],)] * scale(500, 3000))
    assert tally.show('mail arrives behind a marked end') >= 500


# ---- a mending ----

def come_between(spool):
    """Another agent, which makes the mailbox where there is none."""
    if not (spool.path / BOX).exists():
        spool.mbox(BOX, b'')
    return deliver(spool.path / BOX)


class Closure:
    """The states that a crash leaves, and those that a login which mends one of them leaves when it is killed too, until
    there is no new one.  Mail may arrive before each such login, once.  append(spool): what arrived.  verdict(spool, late):
    the faults after one login more."""

    def __init__(self, tally, name, append, verdict):
        self.tally, self.name, self.append, self.verdict = tally, name, append, verdict
        self.states, self.work, self.lock = set(), [], threading.Lock()

    def add(self, state):
        with self.lock:
            if state.waits() and state.key() not in self.states:
                self.states.add(state.key())
                self.work += [(state, False)] if state.late else [(state, False), (state, True)]
        assert len(self.states) < 500, f'{self.name}: no end of states'

    def mend(self, state, late, kill):
        spool = state.spool()
        try:
            more = self.append(spool) if late else state.late
            end = session(spool, [LOGIN + b'QUIT\r\n'], kill)
            assert end.triggered, (self.name, kill, end.log)
            left = Snapshot(spool, more)
            self.add(left)
            state = state_of(spool)
            self.tally.add(self.name, left.waits(), self.verdict(spool, more), kill, end, more, state)
            return end.killed
        finally:
            spool.remove()

    @staticmethod
    def run(closures, step):
        """All of them, by generations."""
        assert all(closure.work for closure in closures), 'nothing to mend'
        while any(closure.work for closure in closures):
            todo = [(closure, *work) for closure in closures for work in closure.work]
            for closure in closures:
                closure.work = []
            on_all(lambda i, closure, *work: each_point(functools.partial(closure.mend, *work), step, 1 + i % step),
                   [(i, *work) for i, work in enumerate(todo)])


def all_states(run_killed):
    """What the kills of something leave: run_killed(kill) is a context of a spool and how it ended."""
    states = []

    def run(kill):
        with run_killed(kill) as (spool, end, *_):
            if end.killed:
                states.append(Snapshot(spool))
            return end.killed

    each_point(run)
    return states


def test_every_call_of_a_mending():
    """Of a commit that was killed: the mending is killed at each of its calls, and the next one, until nothing new comes."""
    tally, closures = Tally(), []

    def begin(case):
        closures.append(Closure(tally, case, come_between, functools.partial(judge, case=case)))
        for state in all_states(functools.partial(killed_commit, case)):
            closures[-1].add(state)

    names = scale(['borders-64k', 'alternate', 'no-last-newline', 'tail', 'last'], SHAPE)
    for case in CASES:
        if case.shape.name in names and case.new:       # a cut to nothing needs no mending
            begin(case)
    Closure.run(closures, scale(43, 5))
    assert tally.show('killed at each call of a mending, and of the next') > scale(300, 10000)


# ---- a delivery ----

class Mailbox:
    """What a delivery finds; data None: no mailbox."""

    def __init__(self, name, data, many):
        self.name, self.data, self.many = name, data, many
        self.old = data or b''

    def __repr__(self):
        return self.name

    def spool(self):
        spool = Spool(BASE)
        spool.lines(f'{BOX}:{{PLAIN}}secret')
        if self.data is not None:
            spool.mbox(BOX, self.data)
        return spool


STORED = b''.join(SEPARATOR + body(f'stored-{i}', 900) + b'\n' for i in range(3))
MAILBOXES = [
    Mailbox('blank line behind', STORED, 3),
    Mailbox('no last newline', STORED.rstrip(b'\n'), 3),
    Mailbox('no blank line', STORED[:-1], 3),
    Mailbox('crlf', STORED.replace(b'\n', b'\r\n'), 3),
    Mailbox('crlf, no blank line', STORED.replace(b'\n', b'\r\n')[:-2], 3),
    Mailbox('empty', b'', 0),
    Mailbox('none', None, 0),
]
# One with its own separator, which says no time; one that has none, and a line that must be quoted.
MAIL = body('delivered', 3000)
QUOTED = body('quoted', 200) + b'\nFrom here on\n>From there\n'
LARGE = body('large', 3 << 20)
OTHER = body('other', 500)
BEHIND = re.compile(rb'(?:\r?\n)*(From \S+ \w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}\n)')


def stored_form(mail):
    return re.sub(rb'(?m)^(>*From )', rb'>\1', mail) + b'\n'


def found_behind(old, data, mails):
    """Which of these mails stand whole behind the old octets, in this order, each its own; None where there is anything
    else, but the line ends that the old ones lacked of a blank line."""
    found, at = [], len(old)
    if not data.startswith(old):
        return None
    for mail in mails:
        text, here = stored_form(mail), BEHIND.match(data, at)
        if here and data.startswith(text, here.end()) and (
                not here.start(1) or re.search(rb'\n\r?\n\Z', data[max(0, here.start(1) - 3):here.start(1)])):
            found.append(mail)
            at = here.end() + len(text)
    gap = data[at:] if old and not re.search(rb'\n\r?\n\Z', old[-3:]) else b''
    return found if at == len(data) or gap in (b'\n', b'\n\n', b'\r\n') else None


def judge_delivery(spool, late, mailbox, mail, other=b'', must=()):
    """What is wrong after the next login: the mail is there whole, or is not; the others are there."""
    many, end = login(spool)
    if many is None:
        return [f'no login: {end.text!r} {end.log}']
    data = spool.read(BOX) if (spool.path / BOX).exists() else b''
    faults = leftovers(spool)
    found = found_behind(mailbox.old, data, [mail, *([ARRIVED] if late else []), *([other] if other else [])])
    if found is None:
        return [*faults, f'{len(data)} octets; behind {len(mailbox.old)}: {data[len(mailbox.old):][:200]!r}']
    lost = [m for m in (*must, *([ARRIVED] if late else []), *([other] if other else [])) if m not in found]
    if lost:
        faults.append(f'lost: {[m[:60] for m in lost]}')
    if many != mailbox.many + len(found):
        faults.append(f'{many} messages found, {mailbox.many + len(found)} are there')
    return faults


@contextlib.contextmanager
def killed_delivery(mailbox, mail, kill, line=SEPARATOR):
    """A spool in which a delivery was killed; and how it ended."""
    spool = mailbox.spool()
    try:
        end = almond_deliver(spool, line + mail, kill)
        if not end.killed:
            assert end.code == 0, (mailbox, kill, end.log)
            assert found_behind(mailbox.old, spool.read(BOX), [mail]) == [mail], (mailbox, kill, end.log)
        yield spool, end
    finally:
        spool.remove()


def delivery_points(tally, mailbox, mail, what, step=1, first=1, line=SEPARATOR, **how):
    """A delivery is killed at each point; `what` comes before the login: nothing, another agent's mail, another delivery."""
    def run(kill):
        with killed_delivery(mailbox, mail, kill, line) as (spool, end):
            if not end.killed:
                return False
            state = state_of(spool)
            late = come_between(spool) if what == 'mail arrived' else b''
            other = OTHER if what == 'delivered again' else b''
            if other:
                code = almond_deliver(spool, OTHER).code
                assert code == 0, (mailbox, kill, code)
            done = [mail] if end.call.startswith('exit_group first=0') else []
            faults = judge_delivery(spool, late, mailbox, mail, other, done)
            if other and (spool.path / BOX).stat().st_mode & 0o111:
                faults.append('a mailbox that may be executed')
            tally.add(mailbox, False, faults, kill, end, what, state)
            return True

    each_point(run, step, first, **how)


WHAT = ('', 'mail arrived', 'delivered again')


def test_every_call_of_a_delivery():
    """`almond deliver`, into mailboxes of many ends."""
    tally = Tally()
    def each(mailboxes, mail, step, **how):
        on_all(functools.partial(delivery_points, **how), [(tally, mailbox, mail, what, step, 1 + i % step)
                                                           for i, mailbox in enumerate(mailboxes) for what in WHAT])

    each(MAILBOXES, MAIL, scale(6, 1))
    each(MAILBOXES, QUOTED, scale(13, 1), line=b'')
    each(MAILBOXES[:2], LARGE, scale(23, 1))
    each(MAILBOXES[::6], MAIL, scale(20, 1), box=None)
    assert tally.show('killed at each call of `almond deliver`', torn=False) > scale(300, 4000)


def test_every_call_of_the_mending_of_a_delivery():
    tally, closures = Tally(), []
    for mailbox in MAILBOXES[:scale(2, None)]:
        verdict = functools.partial(judge_delivery, mailbox=mailbox, mail=MAIL)
        closures.append(Closure(tally, mailbox, come_between, verdict))
        for state in all_states(functools.partial(killed_delivery, mailbox, MAIL)):
            closures[-1].add(state)
    Closure.run(closures, scale(37, 4))
    assert tally.show('killed at each call of the mending of a delivery') > scale(100, 1000)


def judge_both(spool, late, case):
    """A commit and a delivery were killed, one after the other: old or new, and the mail whole or absent."""
    many, end = login(spool)
    if many is None:
        return [f'no login: {end.text!r} {end.log}']
    data, faults = spool.read(BOX), leftovers(spool)
    for box, stay in ((case.old, case.many), (case.new, case.many - len(case.shape.gone))):
        found = found_behind(box + late, data, [OTHER])
        if found is not None and many == stay + bool(late) + len(found):
            return faults
    return [*faults, f'{many} messages, {len(data)} octets, like {", ".join(likeness(case, data))}: {end.log}']


def test_every_call_of_a_delivery_that_mends_a_commit():
    tally = Tally()

    def mend(i, case, state, late):
        def run(kill):
            spool = state.spool()
            try:
                more = deliver(spool.path / BOX) if late else b''
                end = almond_deliver(spool, SEPARATOR + OTHER, kill)
                assert end.triggered
                if end.code == 0:
                    assert spool.read(BOX).endswith(SEPARATOR + OTHER + b'\n'), (case, end.log)
                there = state_of(spool)
                tally.add(case, False, judge_both(spool, more, case), kill, end, more, there)
                return end.killed
            finally:
                spool.remove()

        each_point(run, scale(19, 1), 1 + i % scale(19, 1))

    work = []
    names = scale(['alternate'], ['alternate', 'borders-64k', 'no-last-newline', 'twins', 'tail'])
    for case in [Case(SHAPE[name]) for name in names]:
        states = {state.key(): state for state in all_states(functools.partial(killed_commit, case)) if state.waits()}
        work += [(case, state, late) for state in states.values() for late in (False, True)]
    on_all(mend, [(i, *item) for i, item in enumerate(work)])
    assert tally.show('killed at each call of a delivery that mends a commit', torn=False) > scale(50, 2000)


# ---- a Maildir ----

maildir = pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='a build without Maildir')
FILES = {f'{"cur" if i % 2 else "new"}/{1000 + i}.{i}.host{":2,S" if i % 2 else ""}': body(f'maildir-{i}', 700 * i)
         for i in range(1, 8)}
GONE = (1, 3, 4, 6)


def make_maildir():
    spool = Spool(BASE)
    spool.lines(f'{BOX}:{{PLAIN}}secret')
    spool.maildir(BOX, FILES)
    return spool


def judge_maildir(spool, may_go, more=()):
    """What stays is there whole, what was deleted is whole or gone; a mail of `more` is whole or nowhere.  How many of
    those there are.  tmp is nobody's."""
    many, end = login(spool)
    if many is None:
        return [f'no login: {end.text!r} {end.log}'], 0
    path, faults = spool.path / BOX, []
    there = {str(f.relative_to(path)): f.read_bytes() for sub in ('new', 'cur') for f in (path / sub).iterdir()}
    faults += [f'{name} is gone' for name in FILES if name not in there and name not in may_go]
    faults += [f'{name} is another' for name, data in FILES.items() if there.get(name, data) != data]
    new = [data for name, data in there.items() if name not in FILES]
    if len(new) > len(more) or any(data not in more for data in new):
        faults.append(f'beside them: {[data[:80] for data in new]}')
    if many != len(there):
        faults.append(f'{many} messages found, {len(there)} are there')
    return faults, len(new)


@maildir
def test_every_call_of_a_maildir_commit():
    """Between two unlinks too."""
    tally = Tally()
    names = sorted(FILES, key=lambda name: name[4:])
    may_go = [names[n - 1] for n in GONE]
    left = set()

    def run(kill):
        spool = make_maildir()
        try:
            end = session(spool, [LOGIN + dele(GONE) + b'QUIT\r\n'], kill)
            assert end.triggered
            faults, _ = judge_maildir(spool, may_go)
            left.add(len(list((spool.path / BOX).glob('[nc]*/*'))))
            tally.add('maildir', False, faults, kill, end)
            return end.killed
        finally:
            spool.remove()

    each_point(run, call='unlinkat', whole=True)
    each_point(run, scale(20, 1), box=None, whole=True)
    assert left == set(range(len(FILES) - len(GONE), len(FILES) + 1)), 'not every unlink was a last one'
    assert tally.show('killed at each call of a Maildir commit', torn=False) > scale(30, 200)


@maildir
def test_every_call_of_a_maildir_delivery():
    tally, ends = Tally(), set()

    def run(kill, mail):
        spool = make_maildir()
        try:
            end = almond_deliver(spool, mail, kill)
            faults, new = judge_maildir(spool, (), (mail,))
            ends.add((end.code, new))
            if not new and (end.code == 0 or end.call.startswith('exit_group first=0')):
                faults.append(f'exit code {end.code}, and no mail')
            tally.add('maildir', False, faults, kill, end)
            return end.killed
        finally:
            spool.remove()

    each_point(functools.partial(run, mail=MAIL), scale(3, 1), box=None)
    each_point(functools.partial(run, mail=LARGE), scale(9, 1), box=None)
    assert ends == {(KILLED, 0), (KILLED, 1), (0, 1)}
    assert tally.show('killed at each call of `almond deliver` to a Maildir', torn=False) > scale(30, 200)


# ---- a sparse gigabyte ----

HOLE = scale(8 << 20, 1 << 30)
ZEROS = bytes(1 << 20)


def digest(pieces):
    """Of octets and of counts of zeros."""
    hashed = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, bytes):
            hashed.update(piece)
            continue
        for at in range(0, piece, len(ZEROS)):
            hashed.update(memoryview(ZEROS)[:piece - at])
    return hashed.digest()


def file_digest(path):
    with path.open('rb') as f:
        return digest(iter(lambda: f.read(1 << 20), b''))


def test_a_sparse_mailbox():
    """The first of three goes, which is small; the second has a hole, which must move: killed at a sample of points."""
    first, second = SEPARATOR + body('first', 600) + b'\n', SEPARATOR + body('second', 300)
    last = b'\nbehind the hole\n\n' + SEPARATOR + body('last', 700) + b'\n'
    right = {digest([first, second, HOLE, last]): 3, digest([second, HOLE, last]): 2}

    # On a disk: twice the hole, a few times over, is more than a machine's memory may have.
    base = BASE if not LONG else None
    steps = [LOGIN + b'DELE 1\r\nQUIT\r\n']
    tally = Tally()

    def make():
        spool = Spool(base)
        spool.lines(f'{BOX}:{{PLAIN}}secret')
        path = spool.mbox(BOX, first + second)
        with path.open('r+b') as f:
            f.seek(len(first + second) + HOLE)
            f.write(last)
        return spool

    def run(kill):
        spool = make()
        try:
            end = session(spool, steps, kill)
            torn, state = file_digest(spool.path / BOX) not in right, state_of(spool)
            many, next_end = login(spool)
            found = file_digest(spool.path / BOX)
            faults = leftovers(spool)
            if many is None or right.get(found) != many or (not kill.n and many != 2):
                faults.append(f'{many} messages: {next_end.text!r} {next_end.log}')
            tally.add('sparse', torn, faults, kill, end, b'', state)
            return end
        finally:
            spool.remove()

    calls = run(Kill()).calls
    assert calls > 300
    # While the journal is written; when it is; while the mail moves; at its end.
    for i, part in enumerate(scale((.2, .45, .51, .6, .95), (.2, .45, .505, .52, .6, .75, .9, .97))):
        run(Kill(int(calls * part), bool(i % 2)))
    for before_the_end in (30, 24, 18, 12):
        run(Kill(calls - before_the_end, bool(before_the_end % 4)))
    assert tally.show(f'killed at a sample of calls, sparse mailbox of {HOLE >> 20} MB') >= 9
    assert sum(tally.torn.values()) >= 2
