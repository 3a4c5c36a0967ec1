"""Mail that comes while mail goes: delivery agents, delivery locks, session locks, lines that drop.  Nothing is lost, doubled or
torn.  maildrop runs as root's child only where the test is root's: it wants its user in /etc/passwd."""
import hashlib
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time

import pytest

from conftest import ALMOND, GROUP, IS_ROOT, OWNER, SECONDS, SEPARATOR, needs_root, switches, tool

SWITCHES = switches(ALMOND)
mbox_only = pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='a build without mbox')
with_users = pytest.mark.skipif(not SWITCHES['ENABLE_USERS'] or not SWITCHES['ENABLE_ALONE'],
                                reason='a build without a users file or without a listener')


def as_owner():
    if IS_ROOT:
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(OWNER)


def run_as_owner(argv, data=b'', **how):
    return subprocess.run([str(a) for a in argv], input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          preexec_fn=as_owner, timeout=SECONDS, **how)


# ---- mails that say who they are ----

def make_mail(number, dice):
    """A mail with an id and the checksum of its body; dots, long lines, empty lines, all sizes."""
    lines = []
    for _ in range(dice.randrange(1, 60)):
        kind = dice.randrange(10)
        lines.append('.' * dice.randrange(1, 4) if kind == 0 else '' if kind == 1 else
                     'x' * dice.randrange(900, 9000) if kind == 2 else f'line {dice.random()} of mail {number}')
    body = '\n'.join(lines).strip('\n').encode() + b' end'
    head = (f'From: sender@example.org\nTo: user@example.org\nMessage-ID: <{number}@test>\n'
            f'X-Sum: {hashlib.sha256(body).hexdigest()}\n\n')
    return head.encode() + body + b'\n'


def read_mail(text):
    """The number of a mail that came back, its checksum checked: torn and glued mails fail."""
    head, _, body = text.replace(b'\r\n', b'\n').partition(b'\n\n')
    body = body.rstrip(b'\n')
    numbers = re.findall(rb'^Message-ID: <(\d+)@test>$', head, re.M)
    sums = re.findall(rb'^X-Sum: (\w+)$', head, re.M)
    assert len(numbers) == 1 and len(sums) == 1, f'a torn or glued mail: {text[:300]!r}'
    assert hashlib.sha256(body).hexdigest().encode() == sums[0], f'mail {numbers[0]} is torn: {text[:300]!r}'
    return int(numbers[0])


# ---- who delivers ----

class Agents:
    """Each agent takes a mail's bytes; when it returns, the mail is delivered."""

    def __init__(self, spool, box):
        self.spool = spool
        self.path = spool.path / box
        self.box = box
        self.env = {'PATH': os.environ['PATH'], 'HOME': str(spool.path), 'LOGNAME': 'user', 'USER': 'user', 'SHELL': '/bin/sh'}
        self.names = iter(range(10**9))
        slash = '/' if self.path.is_dir() else ''
        self.rc = spool.base / 'procmailrc'
        self.rc.write_text('LOCKSLEEP=1\nSHELL=/bin/sh\n')
        self.filter = spool.base / 'mailfilter'
        self.filter.write_text(f'LOCKSLEEP=1\nto "{self.path}{slash}"\n')
        for path in (self.rc, self.filter):
            spool.own(path)
        spool.system(user='secret')

    def run(self, argv, mail):
        done = run_as_owner(argv, mail, env=self.env, cwd=self.spool.path)
        assert done.returncode == 0, (argv, done)

    def procmail(self, mail):
        slash = '/' if self.path.is_dir() else ''
        self.run([tool('procmail'), '-f', 'sender@example.org', f'DEFAULT={self.path}{slash}', self.rc], mail)

    def maildrop(self, mail):
        if not IS_ROOT:
            self.run([tool('maildrop'), self.filter], mail)
            return
        argv = ['unshare', '-m', 'sh', '-c', 'mount --bind "$0/passwd" /etc/passwd && '
                f'exec setpriv --reuid {OWNER} --regid {GROUP} --clear-groups "$@"', self.spool.base, tool('maildrop'), self.filter]
        done = subprocess.run([str(a) for a in argv], input=mail, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=self.env, cwd=self.spool.path, timeout=SECONDS)
        assert done.returncode == 0, done

    def dotlockfile(self, mail):
        """liblockfile's lock alone, and a mail that comes in two parts."""
        self.run(['sh', '-c', 'n=0; until "$1" -l -r 0 -p "$0.lock"; do n=$((n+1)); [ $n -lt 1000 ] || exit 75; sleep 0.02; done; '
                  '(head -c 200; sleep 0.01; cat) >>"$0"; "$1" -u "$0.lock"', self.path, tool('dotlockfile')],
                 SEPARATOR + mail + b'\n')

    def deliver(self, mail):
        """Again after EX_TEMPFAIL, as every mail server does: nothing was delivered then."""
        argv = [str(a) for a in (ALMOND, 'deliver', '-d', self.spool.path, '-u', self.spool.users_file, self.box)]
        code = 75
        while code == 75:
            done = subprocess.run(argv, input=mail, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
            code = done.returncode
        assert code == 0, done

    def rename(self, mail):
        name = f'{int(time.time())}.{next(self.names)}.host'
        temporary = self.path / 'tmp' / name
        temporary.write_bytes(mail)
        self.spool.own(temporary)
        temporary.rename(self.path / 'new' / name)


# ---- the ledger ----

class Ledger:
    """What was begun, delivered and deleted; each session's view is checked against it."""

    def __init__(self):
        self.begun, self.delivered, self.gone = set(), set(), set()

    def check(self, delivered_before, seen):
        assert len(seen) == len(set(seen)), f'doubled: {sorted(seen)}'
        lost = delivered_before - self.gone - set(seen)
        assert not lost, f'lost: {sorted(lost)}'
        risen = set(seen) & self.gone
        assert not risen, f'deleted, and there again: {sorted(risen)}'
        assert set(seen) <= self.begun


def enter(server, name='user'):
    """Log in; a session whose line was dropped may take a moment to end."""
    while True:
        pop = server.pop()
        pop.ok(f'USER {name}')
        reply = pop.cmd('PASS secret')
        if reply.startswith('+OK'):
            return pop
        assert '[IN-USE]' in reply, reply
        pop.close()


def fetch_all(pop):
    sizes = pop.sizes()
    seen = {}
    for n, size in sizes.items():
        text = pop.multi(f'RETR {n}')
        assert len(text) == size, (n, size, len(text))
        seen[n] = read_mail(text)
    return seen


def one_round(server, ledger, dice):
    before = set(ledger.delivered)
    pop = enter(server)
    seen = fetch_all(pop)
    ledger.check(before, list(seen.values()))
    chosen = [n for n in seen if dice.random() < 0.6]
    for n in chosen:
        pop.ok(f'DELE {n}')
    how = dice.random()
    if how < 0.6:
        reply = pop.cmd('QUIT')
        assert reply.startswith(('+OK', '-ERR [IN-USE]')), reply
        if reply.startswith('+OK'):
            ledger.gone |= {seen[n] for n in chosen}
        pop.closed()
    elif how < 0.7:
        pop.send('QUIT\r\n')            # nobody waits for the answer: all of them or none
        pop.close()
        pop = enter(server)
        left = set(fetch_all(pop).values())
        asked = {seen[n] for n in chosen}
        assert not asked & left or asked <= left, 'half a commit'
        ledger.gone |= asked - left
    elif how < 0.8 and seen:
        pop.send(f'RETR {min(seen)}\r\n')   # if it is deleted, that is an error: no matter
    pop.close()


@with_users
@pytest.mark.parametrize('box,agents,each', [
    pytest.param('mbox', ('procmail', 'maildrop', 'dotlockfile', 'deliver'), 75, marks=mbox_only),
    pytest.param('maildir', ('deliver', 'rename'), 100,
                 marks=pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='a build without Maildir'))])
def test_nothing_lost_nothing_doubled(spool, serve, box, agents, each):
    """300 and 200 rounds: a session for each mail, all agents at once."""
    if not SWITCHES['ENABLE_DELIVER']:
        agents = tuple(a for a in agents if a != 'deliver')
    spool.users(user='secret')
    spool.mbox('user', b'') if box == 'mbox' else spool.maildir('user', {})
    server, ledger, dice, faults = serve(), Ledger(), random.Random(1939), []
    agent = Agents(spool, 'user')

    def deliver(which, numbers, seed):
        own = random.Random(seed)
        try:
            for number in numbers:
                mail = make_mail(number, own)
                ledger.begun.add(number)
                getattr(agent, which)(mail)
                ledger.delivered.add(number)
        except Exception as e:          # told in the main thread
            faults.append(e)

    threads = [threading.Thread(target=deliver, args=(which, range(k * each, (k + 1) * each), k), daemon=True)
               for k, which in enumerate(agents)]
    for t in threads:
        t.start()
    rounds = 0
    while rounds < each * len(agents) or any(t.is_alive() for t in threads):
        one_round(server, ledger, dice)
        rounds += 1
    assert not faults, faults
    assert len(ledger.delivered) == each * len(agents)
    with enter(server) as pop:
        left = list(fetch_all(pop).values())
        ledger.check(ledger.delivered, left)
        pop.quit()
    assert set(left) | ledger.gone == ledger.delivered and not set(left) & ledger.gone
    assert ledger.gone
    assert not list(spool.path.glob('*.lock'))


# ---- the locks of delivery agents ----

HOLD = '''
import fcntl, os, sys
kind, path = sys.argv[1:]
f = open(path, "ab", buffering=0)
if kind == "fcntl":
    fcntl.lockf(f, fcntl.LOCK_EX)
elif kind == "flock":
    fcntl.flock(f, fcntl.LOCK_EX)
else:
    fd = os.open(path + ".lock", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, b"%d" % os.getpid())
print("held", flush=True)
for line in sys.stdin:
    f.write(bytes.fromhex(line))
    print("done", flush=True)
if kind == "dot" and os.path.exists(path + ".lock"):
    os.unlink(path + ".lock")
'''


class Holder:
    """A delivery agent that holds one kind of lock, appends what it is told, and lets go."""

    def __init__(self, kind, path):
        self.process = subprocess.Popen([sys.executable, '-c', HOLD, kind, str(path)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, preexec_fn=as_owner, text=True)
        assert self.process.stdout.readline() == 'held\n'

    def write(self, data):
        self.process.stdin.write(data.hex() + '\n')
        self.process.stdin.flush()
        assert self.process.stdout.readline() == 'done\n'

    def let_go(self):
        self.process.stdin.close()
        assert self.process.wait(SECONDS) == 0
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.let_go()


KINDS = ('fcntl', 'flock', 'dot')
ONE, TWO = b'Subject: one\n\nfirst\n', b'Subject: two\n\nsecond\n'


@pytest.fixture
def box(spool):
    spool.users(user='secret')
    return spool.mails('user', [ONE])


class Later:
    """Do it in a moment: long enough that a server which does not wait has answered before."""

    def __init__(self, *actions):
        self.actions, self.begun = actions, False
        self.timer = threading.Timer(0.4, self.act)
        self.timer.start()

    def act(self):
        self.begun = True
        for action in self.actions:
            action()

    def join(self):
        assert self.begun, 'nobody waited'
        self.timer.join()


@mbox_only
@with_users
@pytest.mark.parametrize('kind', KINDS)
def test_login_waits_for_delivery(box, serve, kind):
    server = serve()
    mail = SEPARATOR + TWO + b'\n'
    with Holder(kind, box) as agent, server.pop() as pop:
        agent.write(mail[:-9])
        timer = Later(lambda: agent.write(mail[-9:]), agent.let_go)
        pop.login()
        timer.join()
        assert pop.multi('RETR 2') == TWO.replace(b'\n', b'\r\n')
        pop.quit()


@mbox_only
@with_users
@pytest.mark.parametrize('kind', KINDS)
def test_commit_waits_for_delivery(box, serve, kind):
    server = serve()
    mail = SEPARATOR + TWO + b'\n'
    with server.pop('user') as pop:
        pop.ok('DELE 1')
        with Holder(kind, box) as agent:
            agent.write(mail[:-9])
            timer = Later(lambda: agent.write(mail[-9:]), agent.let_go)
            assert pop.cmd('QUIT').startswith('+OK')
            timer.join()
    assert box.read_bytes() == mail


@mbox_only
@with_users
@pytest.mark.parametrize('kind', KINDS)
def test_a_lock_that_is_held_for_long(box, serve, spool, kind):
    """IN-USE in the end, at login and at QUIT; the lock of a process that lives stays, and so does the mail."""
    server, before = serve(), box.read_bytes()
    with server.pop('user') as pop:
        pop.ok('DELE 1')
        with Holder(kind, box):
            held = (spool.path / 'user.lock').read_bytes() if kind == 'dot' else None
            assert pop.cmd('QUIT').startswith('-ERR [IN-USE]')
            pop.closed()
            with server.pop() as second:
                second.ok('USER user')
                assert second.cmd('PASS secret').startswith('-ERR [IN-USE]')
                second.closed()
            if kind == 'dot':
                assert (spool.path / 'user.lock').read_bytes() == held
    assert box.read_bytes() == before
    assert not list(spool.path.glob('*.lock'))
    with server.pop('user') as pop:
        assert pop.cmd('STAT').startswith('+OK 1 ')


def boot_id():
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()


def dead_pid():
    process = subprocess.Popen(['true'])
    process.wait()
    return process.pid


OTHER_BOOT = '00000000-0000-4000-8000-000000000000'
STALE = {
    'dead': lambda: f'{dead_pid()}\n',
    'zero': lambda: '0',
    'empty': lambda: '',
    'no number': lambda: 'host.example.org\n',
    'other boot': lambda: f'{os.getpid()}\n{OTHER_BOOT}\n',
    'dead, this boot': lambda: f'{dead_pid()}\n{boot_id()}\n',
}


@mbox_only
@with_users
@pytest.mark.parametrize('what', STALE)
@pytest.mark.parametrize('when', ('login', 'commit'))
def test_a_stale_dot_lock_is_removed(box, serve, spool, what, when):
    server, lock = serve(), spool.path / 'user.lock'

    def leave():
        lock.write_text(STALE[what]())
        spool.own(lock, 0o444)
    if when == 'login':
        leave()
    with server.pop('user') as pop:
        assert pop.cmd('STAT').startswith('+OK 1 ')
        pop.ok('DELE 1')
        if when == 'commit':
            leave()
        assert pop.quit().startswith('+OK')
    server.wait_log(r'lock: removed user\.lock')
    assert not lock.exists()
    assert box.read_bytes() == b''


@mbox_only
@with_users
@pytest.mark.parametrize('what', ('alive', 'alive, this boot', 'zero, touched', 'zero, made anew'))
def test_a_live_dot_lock_stays(box, serve, spool, what):
    """A pid that lives; a lock of nobody that is touched or replaced again and again."""
    server, lock, stop = serve(), spool.path / 'user.lock', threading.Event()
    lock.write_text(f'{os.getpid()}\n' + (boot_id() + '\n' if what.endswith('boot') else '') if what.startswith('alive') else '0')
    spool.own(lock, 0o444)

    def touch():
        other = spool.path / 'other'
        while not stop.wait(0.1):
            if what.endswith('anew'):
                other.write_text('0')
                os.utime(other, (10**9, 10**9))
                other.rename(lock)
            else:
                os.utime(lock)
    thread = threading.Thread(target=touch)
    if what.startswith('zero'):
        thread.start()
    with server.pop() as pop:
        pop.ok('USER user')
        assert pop.cmd('PASS secret').startswith('-ERR [IN-USE]')
    stop.set()
    if what.startswith('zero'):
        thread.join()
    assert lock.exists()
    assert 'removed' not in server.log()


@mbox_only
@with_users
@needs_root
def test_a_spool_that_may_not_be_written(spool, serve):
    """No dot-lock can be made there: the kernel's locks are what there is, and deleting works."""
    spool.users(user='secret')
    spool.mails('user', [ONE, TWO])
    os.chown(spool.path, 0, 0)
    server = serve()
    with server.pop('user') as pop:
        pop.ok('DELE 1')
        with Holder('fcntl', spool.path / 'user') as agent:
            timer = Later(agent.let_go)
            assert pop.quit().startswith('+OK')
            timer.join()
    assert spool.read('user') == SEPARATOR + TWO + b'\n'


@mbox_only
@with_users
def test_an_append_without_locks(spool, serve):
    """Nobody can be right against one that does not lock; but whole mail stays whole, and what he writes is not touched."""
    spool.users(user='secret')
    box = spool.mails('user', [ONE, TWO])
    mail = make_mail(7, random.Random(7))
    late = SEPARATOR + mail + b'\n'
    server = serve()
    with box.open('ab', buffering=0) as f:
        f.write(late[:300])
        with server.pop('user') as pop:
            assert pop.multi('RETR 1') == ONE.replace(b'\n', b'\r\n')
            f.write(late[300:900])
            assert pop.multi('RETR 2') == TWO.replace(b'\n', b'\r\n')
            pop.ok('DELE 1')
            pop.ok('DELE 2')
            f.write(late[900:])
            assert pop.quit().startswith('+OK')
    assert box.read_bytes() == late
    with server.pop('user') as pop:
        assert read_mail(pop.multi('RETR 1')) == 7


# ---- the lock of a session ----

STORES = [pytest.param('mbox', marks=mbox_only), pytest.param('maildir', marks=pytest.mark.skipif(
    not SWITCHES['ENABLE_MAILDIR'], reason='a build without Maildir'))]


def fill(spool, store, mails):
    spool.users(user='secret')
    if store == 'mbox':
        spool.mails('user', mails)
    else:
        spool.maildir('user', {f'new/{1000 + i}.{i}.host': mail for i, mail in enumerate(mails)})


class Chatter:
    """A client that is never silent."""

    def __init__(self, pop):
        self.pop, self.stop, self.fault = pop, threading.Event(), None
        self.thread = threading.Thread(target=self.talk)
        self.thread.start()

    def talk(self):
        try:
            while not self.stop.is_set():
                self.pop.ok('NOOP')
        except Exception as e:
            self.fault = e

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        assert not self.fault, self.fault


@with_users
@pytest.mark.parametrize('store', STORES)
def test_one_session_a_mailbox(spool, serve, store):
    fill(spool, store, [ONE, TWO])
    server = serve()
    with server.pop('user') as first:
        first.ok('DELE 2')
        with Chatter(first):
            for _ in range(3):
                with server.pop() as second:
                    second.ok('USER user')
                    assert second.cmd('PASS secret').startswith('-ERR [IN-USE]')
                    second.closed()
        assert first.quit().startswith('+OK')
    with server.pop('user') as pop:
        assert pop.cmd('STAT').startswith('+OK 1 ')


@with_users
def test_two_names_one_mailbox(spool, serve):
    """Two logins may share a mailbox: the lock is the mailbox's."""
    fill(spool, 'mbox' if SWITCHES['ENABLE_MBOX'] else 'maildir', [ONE])
    spool.lines('user:{PLAIN}secret', 'other/user:{PLAIN}secret', 'third:{PLAIN}secret')
    server = serve()
    with server.pop('user') as first, Chatter(first), server.pop() as second:
        second.ok('USER other')
        assert second.cmd('PASS secret').startswith('-ERR [IN-USE]')
        with server.pop('third') as third:
            assert third.quit().startswith('+OK')


@with_users
@pytest.mark.parametrize('store', STORES)
def test_a_silent_session_gives_way(spool, serve, store):
    """The first ends without an UPDATE; the second sees all mail."""
    fill(spool, store, [ONE, TWO])
    server = serve()
    with server.pop('user') as first:
        first.ok('DELE 1')
        while True:
            second = server.pop()
            second.ok('USER user')
            reply = second.cmd('PASS secret')
            if reply.startswith('+OK'):
                break
            assert '[IN-USE]' in reply, reply
            second.close()
        assert reply.startswith('+OK 2 messages')
        assert first.rest() == b''
        server.wait_log('why=taken over')
        assert second.multi('RETR 1') == ONE.replace(b'\n', b'\r\n')
        assert second.quit().startswith('+OK')
        second.close()
    with server.pop('user') as third:
        assert third.cmd('STAT').startswith('+OK 2 ')


@with_users
@pytest.mark.parametrize('store', STORES)
def test_after_quit_the_next_is_let_in(spool, serve, store):
    """200 sessions, one after the other, each deletes a mail and is followed at once."""
    fill(spool, store, [b'Subject: %d\n\n%d\n' % (i, i) for i in range(200)])
    server = serve()
    for left in range(200, 0, -1):
        with server.pop() as pop:
            pop.ok('USER user')
            assert pop.cmd('PASS secret').startswith(f'+OK {left} messages')
            pop.ok('DELE 1')
            assert pop.cmd('QUIT').startswith('+OK')
    with server.pop('user') as pop:
        assert pop.cmd('STAT') == '+OK 0 0'


@with_users
@pytest.mark.parametrize('store', STORES)
def test_a_dropped_line_deletes_nothing(spool, serve, store):
    fill(spool, store, [ONE, TWO])
    server, before = serve(), spool.picture()
    with server.pop('user') as pop:
        pop.ok('DELE 1')
        pop.ok('DELE 2')
    server.wait_log('end user=user .* why=lost')
    with server.pop('user') as pop:
        pop.ok('DELE 1')
        pop.send('QUIT')        # not a line yet
    server.wait_log('end user=user .* why=lost', 2)
    assert spool.picture() == before
