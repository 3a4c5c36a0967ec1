"""Lines that drop, peers that vanish, clients that stop reading, servers that are told to stop, and sessions that are taken over:
what RFC 1939 says is deleted is deleted, all of it, and nothing else is.

The build below build/lines has short times.  A peer vanishes in network name spaces of the test's own."""
import contextlib
import ctypes
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import threading
import time

import pytest

from conftest import ALMOND, IS_ROOT, ROOT, SECONDS, Pop, Server, inetd_style, needs_root, switches, tool, wire
from crash import BOX, SHAPE, converse, report, scale, verdict
from test_delivery import Holder, make_mail, read_mail
from test_regressions import MAKE, children, leaf, narrow, reset, soon

SWITCHES = switches(ALMOND)
pytestmark = pytest.mark.skipif(
    not all(SWITCHES[x] for x in ('ENABLE_USERS', 'ENABLE_ALONE', 'ENABLE_MBOX', 'ENABLE_PRIVSEP', 'ENABLE_DELIVER')),
    reason='a build without a users file, a listener, mbox, two processes or deliver')
STALL = 1500
DEFS = (f'-DFAIL_DELAY=20 -DTAKEOVER_IDLE=300 -DIDLE_TIMEOUT=4000 -DSEND_STALL={STALL} -DLOCK_WAIT=10000 -DLOCK_STALE=500 '
        '-DLOCK_OLD=0 -DPASSWD_TIME=5 -DRUN_DIR=\'"/run/almond-test"\'')
MAILS = SHAPE['alternate']
DROPPED = (EOFError, ConnectionError, socket.timeout)
NET = '10.91.10'


@pytest.fixture(scope='module')
def quick():
    """ALMOND_LINES names another."""
    if 'ALMOND_LINES' in os.environ:
        return os.environ['ALMOND_LINES']
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k not in ('CFLAGS', 'CPPFLAGS', 'LDFLAGS')}
    done = subprocess.run([MAKE, '-s', f'-j{os.cpu_count()}', 'O=build/lines', f'TEST_DEFS={DEFS}', 'test-build'], cwd=ROOT,
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=600)
    assert done.returncode == 0, done.stdout.decode()
    return str(ROOT / 'build/lines/test/almond')


@pytest.fixture
def boxed(spool):
    spool.lines(f'{BOX}:{{PLAIN}}secret')
    spool.mbox(BOX, MAILS.old)
    return spool


def state(spool):
    return verdict(MAILS, spool.read(BOX))


def deleting(server):
    """A session that has only to say QUIT."""
    pop = server.pop()
    converse(pop, MAILS.gone, quit=False)
    return pop


def again(server, name=BOX):
    """Log in; who holds the mailbox may have to be waited for, or to give way."""
    def enter():
        pop = server.pop()
        pop.ok(f'USER {name}')
        reply = pop.cmd('PASS secret')
        if reply.startswith('+OK'):
            return pop
        assert '[IN-USE]' in reply, reply
        pop.close()
    pop = soon(enter)
    assert pop, 'never let in'
    return pop


def half(sock):
    sock.shutdown(socket.SHUT_WR)


# ---- before QUIT is a whole line, nothing is deleted

ENDS = {'close': socket.socket.close, 'half-close': half, 'reset': reset}
UNSAID = {'dele': '', 'qui': 'QUI', 'quit': 'QUIT', 'quit-cr': 'QUIT\r', 'argument': 'QUIT now\r\n', 'word': 'QUITS\r\n',
          'in-a-line': 'NOOP QUIT\r\n', 'retr': 'RETR 2\r\n', 'long-line': 'x' * 300 + 'QUIT', 'nul': '\0QUIT\r\n'}


@pytest.mark.parametrize('end', ENDS)
@pytest.mark.parametrize('said', UNSAID)
def test_without_quit(boxed, serve, quick, said, end):
    server = serve(almond=quick)
    pop = deleting(server)
    pop.send(UNSAID[said])
    ENDS[end](pop.sock)
    if end == 'half-close':
        assert b'+OK POP3' not in pop.rest()
        pop.close()
    server.wait_log('end user=user .* why=lost')
    assert state(boxed) == 'old'


def test_reset_at_each_stage(boxed, serve, quick):
    """After each octet of a session but QUIT's last."""
    server = serve(almond=quick)
    script = (f'USER {BOX}\r\nPASS secret\r\n' + ''.join(f'DELE {n}\r\n' for n in MAILS.gone) + 'QUIT\r').encode()
    step = scale(7, 1)
    stages = [*range(0, len(script), step), len(script)]
    for stage in stages:
        pop = server.pop()
        for line in re.findall(rb'[^\n]*\n|[^\n]+', script[:stage]):
            pop.send(line)
            if not line.endswith(b'\n'):
                continue
            reply = pop.line()
            if '[IN-USE]' in reply:         # the one before is on its way out
                break
            assert reply.startswith('+OK'), reply
        reset(pop.sock)
    assert soon(lambda: not children(server.process.pid))
    assert state(boxed) == 'old'
    report('a line reset at each octet of a session', points=len(stages), wrong=0)


# ---- QUIT is the line that counts

def test_quit_and_gone_at_once(boxed, serve, quick):
    """The answer has no reader: UPDATE was entered all the same."""
    server = serve(almond=quick)
    rounds = scale(20, 300)
    for n in range(rounds):
        boxed.mbox(BOX, MAILS.old)
        pop = deleting(server)
        pop.send('QUIT\r\n')
        pop.close()
        server.wait_log('end user=user .* why=quit', n + 1)
        assert state(boxed) == 'new'
    report('QUIT, and the line closed at once', points=rounds, wrong=0)


@pytest.mark.parametrize('how', ('reset', 'unread'))
def test_quit_that_may_not_be_heard(boxed, serve, quick, how):
    """A reset overtakes what was sent; replies to DELE that do not arrive delete nothing: all, or nothing at all."""
    server, dice, found = serve(almond=quick), random.Random(1), dict.fromkeys(('old', 'new', 'wrong'), 0)
    rounds = scale(30, 500)
    for n in range(rounds):
        boxed.mbox(BOX, MAILS.old)
        pop = server.pop(BOX)
        commands = [f'DELE {n}\r\n' for n in MAILS.gone] + ['QUIT\r\n']
        if how == 'reset':
            for line in commands[:-1]:
                pop.ok(line.strip())
            pop.send(commands[-1])
            time.sleep(max(0, dice.random() - 0.5) * 0.008)
            reset(pop.sock)
        else:
            pop.send(''.join(commands))
            time.sleep(max(0, dice.random() - 0.5) * 0.004)
            pop.close()
        server.wait_log('end user=user ', n + 1)
        found[state(boxed)] += 1
    report(f'QUIT, and the line dropped: {how}', points=rounds, **found)
    assert not found['wrong'], found


@pytest.mark.parametrize('how', ('step', 'pipelined'))
def test_quit_and_half_closed(boxed, serve, quick, how):
    """Who says no more can still listen."""
    server = serve(almond=quick)
    if how == 'step':
        pop = deleting(server)
        pop.send('QUIT\r\n')
    else:
        pop = server.pop()
        pop.send(f'USER {BOX}\r\nPASS secret\r\n' + ''.join(f'DELE {n}\r\n' for n in MAILS.gone) + 'QUIT\r\n')
    half(pop.sock)
    answers = pop.rest().decode().splitlines()
    pop.close()
    assert len(answers) == (1 if how == 'step' else 3 + len(MAILS.gone)) and all(x.startswith('+OK') for x in answers), answers
    assert state(boxed) == 'new'


@pytest.mark.parametrize('pipelined', (False, True))
def test_a_client_that_cannot_hear(boxed, quick, pipelined):
    """What was not told to be marked is not deleted; what was is, though nobody can be told so."""
    pop, program = inetd_style(boxed, almond=quick)
    with pop:
        pop.login(BOX)
        commands = [f'DELE {n}' for n in MAILS.gone]
        if not pipelined:
            for line in commands:
                pop.ok(line)
        pop.sock.shutdown(socket.SHUT_RD)
        pop.send('\r\n'.join([*(commands if pipelined else []), 'QUIT']) + '\r\n')
        assert program.wait() == 0
    assert state(boxed) == ('old' if pipelined else 'new')


# ---- a client that stops reading

BIG = b'Subject: big\n\n' + (b'y' * 70 + b'\n') * 200000


@pytest.fixture
def big(spool):
    spool.lines(f'{BOX}:{{PLAIN}}secret')
    spool.mails(BOX, [b'Subject: small\n\nsmall\n', BIG, b'Subject: last\n\nlast\n'])
    return spool


@pytest.mark.parametrize('quits', (False, True))
def test_a_client_that_stops_reading(big, serve, quick, quits):
    server, before = serve(almond=quick), big.read(BOX)
    with narrow(server) as pop:
        pop.login(BOX)
        pop.ok('DELE 1')
        pop.send('RETR 2\r\n' + ('QUIT\r\n' if quits else ''))
        assert pop.raw_line().startswith(b'+OK')
        server.wait_log('end user=user ')
        assert b'\r\n.\r\n' not in pop.rest()[-5:]
    assert big.read(BOX) == before
    with again(server) as pop:
        assert pop.cmd('STAT').startswith('+OK 3 ')


def test_one_that_does_not_read_gives_way(big, serve, quick):
    """A session that waits to send hears that another asks."""
    server, before = serve(almond=quick), big.read(BOX)
    with narrow(server) as pop:
        pop.login(BOX)
        pop.ok('DELE 1')
        pop.send('RETR 2\r\nQUIT\r\n')
        assert pop.raw_line().startswith(b'+OK')
        with again(server) as second:
            assert second.cmd('STAT').startswith('+OK 3 ')
            assert b'\r\n.\r\n' not in pop.rest()[-5:]
            assert second.quit().startswith('+OK')
    assert big.read(BOX) == before


# ---- a peer that vanishes

def setns(pid):
    """This thread's network becomes that process's."""
    fd = os.open(f'/proc/{pid}/ns/net', os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.setns(fd, 0x40000000)     # CLONE_NEWNET
    os.close(fd)
    assert not failed, os.strerror(ctypes.get_errno())


class Network:
    """Two hosts and a cable."""

    def __init__(self):
        self.hosts = [subprocess.Popen(['unshare', '-n', 'sh', '-c', 'ip link set lo up && echo ready && exec cat'],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
        self.server, self.client = (h.pid for h in self.hosts)
        for host in self.hosts:
            assert host.stdout.readline() == b'ready\n'
        self.ip(self.server, 'link', 'add', 'cable', 'type', 'veth', 'peer', 'name', 'cable', 'netns', str(self.client))
        for host, number in ((self.server, 1), (self.client, 2)):
            self.ip(host, 'addr', 'add', f'{NET}.{number}/24', 'dev', 'cable')
            self.ip(host, 'link', 'set', 'cable', 'up')

    @property
    def prefix(self):
        return ['nsenter', f'--net=/proc/{self.server}/ns/net']

    def ip(self, host, *args):
        subprocess.run(['nsenter', f'--net=/proc/{host}/ns/net', tool('ip'), *args], check=True, timeout=SECONDS)

    def unplug(self):
        self.ip(self.client, 'link', 'set', 'cable', 'down')

    def plug_in(self):
        self.ip(self.client, 'link', 'set', 'cable', 'up')

    def deafen(self):
        """The client is heard, but hears nothing."""
        self.ip(self.server, 'neigh', 'replace', f'{NET}.2', 'lladdr', '02:00:00:00:00:99', 'dev', 'cable', 'nud', 'permanent')

    def connect(self, host, address, window=None):
        """A socket that lives on that host."""
        found = []

        def work():
            setns(host)
            sock = socket.socket()
            if window:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
            sock.settimeout(SECONDS)
            sock.connect(address)
            found.append(sock)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return Pop(found[0])

    def close(self):
        for host in self.hosts:
            host.kill()
            host.wait()
            host.stdin.close()
            host.stdout.close()


class Far(Server):
    """Listens on the first host; its clients are on the second."""

    def __init__(self, network, spool, almond):
        self.network = network
        super().__init__(spool, '-n', f'{NET}.0/24', '-l', f'{NET}.1:110', almond=almond, prefix=network.prefix)

    def connect(self, **how):
        raise NotImplementedError

    def far(self, **how):
        pop = self.network.connect(self.network.client, (f'{NET}.1', 110), **how)
        pop.login(BOX)
        return pop

    def pop(self, name=None, secret='secret'):
        """From the server's own host: who can still come."""
        pop = self.network.connect(self.network.server, ('127.0.0.1', self.port))
        if name:
            pop.login(name, secret)
        return pop


def far_hosts():
    if not IS_ROOT:
        return False
    done = subprocess.run(['unshare', '-n', 'sh', '-c', 'ip link add cable type veth peer name other'], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, timeout=SECONDS)
    return done.returncode == 0


@pytest.fixture
def network():
    if not far_hosts():
        pytest.skip('no network name spaces here')
    n = Network()
    yield n
    n.close()


@needs_root
@pytest.mark.parametrize('says', ('nothing', 'quit'))
def test_a_peer_vanishes(boxed, network, quick, says):
    """Neither FIN nor RST comes; the silence ends the session, and what is said into a dead cable is not heard."""
    with Far(network, boxed, quick) as server:
        pop = server.far()
        for n in MAILS.gone:
            pop.ok(f'DELE {n}')
        network.unplug()
        if says == 'quit':
            pop.send('QUIT\r\n')
        server.wait_log('end user=user .* why=idle')
        assert state(boxed) == 'old'
        network.plug_in()
        if says == 'nothing':
            with contextlib.suppress(*DROPPED):     # what comes back late comes too late
                pop.send('QUIT\r\n')
        assert b'+OK' not in pop.rest()
        pop.close()
        with server.far() as second:
            assert second.cmd('STAT').startswith(f'+OK {len(MAILS.mails)} ')
            assert second.quit().startswith('+OK')
    assert state(boxed) == 'old'


@needs_root
def test_a_peer_vanishes_and_another_comes(boxed, network, quick):
    with Far(network, boxed, quick) as server:
        with server.far() as pop:
            for n in MAILS.gone:
                pop.ok(f'DELE {n}')
            network.unplug()
            with again(server) as second:
                assert second.cmd('STAT').startswith(f'+OK {len(MAILS.mails)} ')
                server.wait_log('end user=user .* why=(idle|taken over)')
                network.plug_in()
                with contextlib.suppress(*DROPPED):
                    pop.send('QUIT\r\n')
                assert b'+OK' not in pop.rest()
                assert second.quit().startswith('+OK')
        assert state(boxed) == 'old'


@needs_root
@pytest.mark.parametrize('window', (None, 4096), ids=('reads', 'reads-little'))
def test_a_peer_vanishes_in_a_mail(big, network, quick, window):
    """What was sent is confirmed by nobody: the send time-out ends it."""
    before = big.read(BOX)
    with Far(network, big, quick) as server:
        with server.far(window=window) as pop:
            pop.ok('DELE 1')
            pop.send('RETR 2\r\n')
            assert pop.raw_line().startswith(b'+OK')
            pop.sock.recv(4096)
            network.unplug()
            pop.send('QUIT\r\n')
            server.wait_log('end user=user ')
            network.plug_in()
        assert big.read(BOX) == before
        with again(server) as second:
            assert second.cmd('STAT').startswith('+OK 3 ')


@needs_root
def test_a_peer_that_hears_nothing_any_more(boxed, network, quick):
    """QUIT came: UPDATE is done, whatever becomes of the answer."""
    with Far(network, boxed, quick) as server:
        with server.far() as pop:
            for n in MAILS.gone:
                pop.ok(f'DELE {n}')
            network.deafen()
            pop.send('QUIT\r\n')
            server.wait_log('end user=user .* why=quit')
            assert state(boxed) == 'new'


def socket_of(pid, fd):
    """That process's socket itself: pidfd_getfd(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    got = libc.syscall(438, pidfd, fd, 0)
    os.close(pidfd)
    assert got >= 0, os.strerror(ctypes.get_errno())
    return socket.socket(fileno=got)


@needs_root
@pytest.mark.parametrize('start', ('alone', 'inetd'))
def test_the_kernel_watches_the_line(boxed, serve, quick, start):
    if start == 'alone':
        server = serve(almond=quick)
        pop, pid = server.pop(BOX), server.process.pid
    else:
        pop, program = inetd_style(boxed, almond=quick, tcp=True)
        pop.login(BOX)
        pid = program.process.pid
    session = leaf(pid)
    assert session != pid
    with pop, socket_of(session, 1) as line:
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == STALL
    if start == 'inetd':
        program.wait()


# ---- a server that is told to stop

@pytest.mark.parametrize('number', (signal.SIGTERM, signal.SIGINT))
@pytest.mark.parametrize('start', ('alone', 'inetd'))
def test_stopped_with_a_deletion_pending(boxed, serve, quick, start, number):
    if start == 'alone':
        program = serve(almond=quick)
        pop = program.pop()
    else:
        pop, program = inetd_style(boxed, almond=quick)
    with pop:
        converse(pop, MAILS.gone, quit=False)
        program.signal(number)
        with contextlib.suppress(*DROPPED):
            pop.send('QUIT\r\n')
        said = pop.rest()
    assert program.wait() == 0
    # QUIT may have been there first; it was not answered +OK without being done, nor done by half
    assert state(boxed) == ('new' if said.startswith(b'+OK') else 'old'), said


@pytest.mark.parametrize('start', ('alone', 'inetd'))
def test_stopped_with_a_deletion_pending_and_nothing_said(boxed, serve, quick, start):
    if start == 'alone':
        program = serve(almond=quick)
        pop = program.pop()
    else:
        pop, program = inetd_style(boxed, almond=quick)
    with pop:
        converse(pop, MAILS.gone, quit=False)
        program.signal(signal.SIGTERM)
        assert pop.rest() == b''
    assert program.wait() == 0
    assert re.search('end user=user .* why=stopped', program.log())
    assert state(boxed) == 'old'


def has_begun(pid, box):
    """The monitor has opened the mailbox for writing."""
    for fd in pathlib.Path(f'/proc/{pid}/fd').iterdir():
        with contextlib.suppress(FileNotFoundError):
            flags = int(re.search(r'^flags:\s*(\d+)', pathlib.Path(f'/proc/{pid}/fdinfo/{fd.name}').read_text(), re.M)[1], 8)
            if os.readlink(fd) == str(box) and flags & os.O_ACCMODE == os.O_RDWR:
                return True
    return False


@pytest.mark.parametrize('numbers', ((signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)),
                         ids=lambda numbers: '-'.join(n.name for n in numbers))
@pytest.mark.parametrize('to', ('server', 'monitor'))
def test_stopped_while_committing(boxed, serve, quick, numbers, to):
    """It waits for a delivery's end, and is told to stop: it finishes, and says so."""
    server, box = serve(almond=quick), boxed.path / BOX
    with deleting(server) as pop:
        monitor = children(server.process.pid)[-1]
        with Holder('fcntl', box):
            pop.send('QUIT\r\n')
            assert soon(lambda: has_begun(monitor, box))
            for number in numbers:
                server.signal(number) if to == 'server' else os.kill(monitor, number)
            time.sleep(0.1)
            assert state(boxed) == 'old'
        assert pop.line().startswith('+OK')
        pop.closed()
    assert state(boxed) == 'new'


SLOW = [tool('strace'), '-D', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=fsync', '-e', 'inject=fsync:delay_enter=400000']


def test_stopped_while_moving(boxed, quick):
    """The same with each fsync of the commit held up."""
    with Server(boxed, almond=quick, prefix=SLOW) as server, deleting(server) as pop:
        pop.send('QUIT\r\n')
        assert soon((boxed.path / f'{BOX}.lock').exists)
        server.signal(signal.SIGTERM)
        assert pop.line().startswith('+OK')
        pop.closed()
        assert server.wait() == 0
    assert state(boxed) == 'new'


# ---- takeover

def test_no_takeover_of_a_commit(boxed, serve, quick):
    """However long its client has been silent, a session that commits does not give way."""
    server, box = serve(almond=quick), boxed.path / BOX
    with deleting(server) as pop:
        monitor = children(server.process.pid)[-1]
        with Holder('fcntl', box):
            pop.send('QUIT\r\n')
            assert soon(lambda: has_begun(monitor, box))
            time.sleep(1.4)         # silent for longer than TAKEOVER_IDLE, whatever the pulse's second
            for _ in range(2):
                with server.pop() as second:
                    second.ok(f'USER {BOX}')
                    assert second.cmd('PASS secret').startswith('-ERR [IN-USE]')
                    second.closed()
        assert pop.line().startswith('+OK')
    with again(server) as third:
        assert third.cmd('STAT').startswith(f'+OK {len(MAILS.mails) - len(MAILS.gone)} ')
    assert state(boxed) == 'new'


def test_logins_during_a_commit(boxed, quick):
    """Whoever is let in sees what the commit left."""
    left, faults, refused = len(MAILS.mails) - len(MAILS.gone), [], 0
    with Server(boxed, almond=quick, prefix=SLOW) as server:
        with deleting(server) as pop:
            pop.send('QUIT\r\n')
            assert soon((boxed.path / f'{BOX}.lock').exists)

            def ask():
                nonlocal refused
                try:
                    while True:
                        with server.pop() as other, contextlib.suppress(*DROPPED):  # taken over at once
                            other.ok(f'USER {BOX}')
                            reply = other.cmd('PASS secret')
                            if '[IN-USE]' in reply:
                                refused += 1
                                continue
                            assert reply.startswith(f'+OK {left} '), reply
                            return
                except Exception as e:
                    faults.append(e)
            threads = [threading.Thread(target=ask) for _ in range(3)]
            for t in threads:
                t.start()
            assert pop.line().startswith('+OK')
            for t in threads:
                t.join()
        assert not faults, faults
    assert state(boxed) == 'new'
    report('logins while a session commits', refused=refused, let_in=len(threads), wrong=0)


class Ledger:
    """A mailbox, and all that its mails went through.  Under one lock; a client's own knowledge is in Client."""

    def __init__(self, name):
        self.name, self.lock = name, threading.Lock()
        self.mails, self.arrived, self.gone, self.uids = {}, set(), set(), {}
        self.doubt = {}                     # a session whose QUIT has no answer: what it asked for
        self.over = set()                   # of them, those that ended

    def before(self):
        with self.lock:
            return set(self.arrived), set(self.gone), set(self.over)

    def view(self, before, seen):
        """{uid: number} of a login, against what was known before it."""
        arrived, gone, over = before
        here = set(seen.values())
        with self.lock:
            assert len(here) == len(seen), f'{self.name}: doubled: {sorted(seen.values())}'
            assert not here & gone, f'{self.name}: deleted, and there again: {sorted(here & gone)}'
            doubt = set().union(*self.doubt.values())
            lost = arrived - self.gone - doubt - here
            assert not lost, f'{self.name}: lost: {sorted(lost)}'
            for uid, number in seen.items():
                assert self.uids.setdefault(number, uid) == uid, f'{self.name}: another unique-id of {number}'
            for session in over & set(self.doubt):
                asked = self.doubt.pop(session).difference(self.gone, *self.doubt.values())
                assert not asked & here or asked <= here, f'{self.name}: half a commit'
                self.gone |= asked - here


class Client:
    """It fetches what it does not know by its unique-id, and keeps all."""

    def __init__(self, server, ledger, seed):
        self.server, self.ledger, self.dice, self.have = server, ledger, random.Random(seed), {}

    def enter(self):
        """Log in, and hold everything against the ledger; (the line, {uid: message}, {uid: number}), or None: dropped."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            pop = self.server.pop()
            pop.ok(f'USER {self.ledger.name}')
            before = self.ledger.before()
            reply = pop.cmd('PASS secret')
            if reply.startswith('+OK'):
                break
            assert '[IN-USE]' in reply, reply
            pop.close()
        else:
            raise AssertionError('never let in')
        uids = [line.split() for line in pop.multi('UIDL').decode().splitlines()]
        at, seen = {uid: int(n) for n, uid in uids}, {}
        assert len(at) == len(uids), 'one unique-id twice'
        for uid, n in at.items():
            if uid not in self.have:
                text = pop.multi(f'RETR {n}')
                number = read_mail(text)
                assert text == wire(self.ledger.mails[number])
                assert number not in self.have.values(), f'{self.ledger.name}: {number} fetched twice'
                self.have[uid] = number
            seen[uid] = self.have[uid]
        self.ledger.view(before, seen)
        return pop, at, seen

    def mark(self, pop, at, seen):
        """DELE for some; their numbers."""
        chosen = self.dice.sample(sorted(at), min(len(at), self.dice.randrange(1, 6)))
        for uid in chosen:
            pop.ok(f'DELE {at[uid]}')
        return {seen[uid] for uid in chosen}

    def confirmed(self, asked):
        with self.ledger.lock:
            self.ledger.gone |= asked


def last_words(pop):
    """QUIT of a client that woke up; what it hears."""
    with contextlib.suppress(*DROPPED):
        pop.send('QUIT\r\n')
    said = b''
    with contextlib.suppress(*DROPPED):
        said = pop.rest()
    pop.close()
    return said


class Load:
    """Each mailbox has its sessions that fall silent and are taken over; one is shared by all; mail comes to all of them."""

    def __init__(self, spool, server, almond, boxes):
        self.spool, self.server, self.almond, self.faults, self.stop = spool, server, almond, [], threading.Event()
        self.ledgers = [Ledger(name) for name in boxes]
        self.late = self.rounds = self.races = self.sessions = 0
        self.lock, self.numbers = threading.Lock(), iter(range(10**9))

    def run(self, what, *args):
        def work():
            try:
                what(*args)
            except Exception as e:          # told in the main thread
                self.faults.append(e)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def mail(self, seed):
        dice = random.Random(seed)
        while not self.stop.wait(0.01):
            ledger = dice.choice(self.ledgers)
            if len(ledger.mails) - len(ledger.gone) > 25:
                continue
            with ledger.lock:
                number = next(self.numbers)
                ledger.mails[number] = mail = make_mail(number, dice)
            argv = [self.almond, 'deliver', '-d', str(self.spool.path), '-u', str(self.spool.users_file), ledger.name]
            code = 75
            while code == 75:
                code = subprocess.run(argv, input=mail, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                                      timeout=SECONDS).returncode
            assert code == 0, code
            with ledger.lock:
                ledger.arrived.add(number)

    def own(self, ledger, rounds, seed):
        """The first falls silent with deletions pending, the second takes over, the first wakes: at any time."""
        first, second = Client(self.server, ledger, seed), Client(self.server, ledger, seed + 1000)
        for _ in range(rounds):
            pop, at, seen = first.enter()
            asked, when = first.mark(pop, at, seen), first.dice.random()
            timer = None
            if when < 0.4:                  # it says QUIT while the second comes: one of them is first
                with ledger.lock:
                    ledger.doubt['first'] = asked
                timer = threading.Timer(first.dice.random() * 1.2, last_wish, (pop,))
                timer.start()
            other, at, seen = second.enter()
            if timer:
                timer.join()
                said = pop.rest()
                pop.close()
                with ledger.lock:
                    del ledger.doubt['first']
                if said.startswith(b'+OK'):
                    first.confirmed(asked)
                    assert not asked & set(seen.values())
                else:
                    assert asked <= set(seen.values()), 'deleted by one that was taken over'
            else:
                assert asked <= set(seen.values()), 'deleted by one that was silent'
                if when < 0.7:
                    assert not last_words(pop)
            more = second.mark(other, at, seen)
            assert other.quit().startswith('+OK')
            second.confirmed(more)
            if not timer and when >= 0.7:
                assert not last_words(pop)
            with self.lock:
                self.rounds += 1
                self.late += not timer
                self.races += timer is not None

    def shared(self, ledger, sessions, seed):
        """All at one mailbox, in each other's way."""
        client, dice, pause = Client(self.server, ledger, seed), random.Random(seed), threading.Event()
        for n in range(sessions):
            pop = None
            try:
                pop, at, seen = client.enter()
                asked = client.mark(pop, at, seen)
                if dice.random() < 0.5:
                    pause.wait(dice.random())
                if dice.random() < 0.2:
                    pop.close()
                    continue
                with ledger.lock:
                    ledger.doubt[seed, n] = asked
                reply = pop.cmd('QUIT')
                with ledger.lock:
                    del ledger.doubt[seed, n]
                    if reply.startswith('+OK'):
                        ledger.gone |= asked
                assert reply.startswith(('+OK', '-ERR [IN-USE]')), reply
            except DROPPED:                 # taken over
                with ledger.lock:
                    ledger.over.add((seed, n))
            finally:
                if pop:
                    pop.close()
                with self.lock:
                    self.sessions += 1


def last_wish(pop):
    with contextlib.suppress(*DROPPED):
        pop.send('QUIT\r\n')


def test_takeover_under_load(spool, serve, quick):
    count, rounds, sessions = 4, scale(12, 200), scale(25, 400)
    boxes = [f'own{i}' for i in range(count)] + ['shared']
    spool.lines(*(f'{name}:{{PLAIN}}secret' for name in boxes))
    for name in boxes:
        spool.mbox(name, b'')
    server = serve(almond=quick)
    load = Load(spool, server, quick, boxes)
    posts = [load.run(load.mail, seed) for seed in range(2)]
    threads = [load.run(load.own, ledger, rounds, 10 + i) for i, ledger in enumerate(load.ledgers[:count])]
    threads += [load.run(load.shared, load.ledgers[count], sessions, 100 + i) for i in range(count)]
    for t in threads:
        t.join()
    load.stop.set()
    for t in posts:
        t.join()
    assert not load.faults, load.faults
    for ledger in load.ledgers:
        pop, at, seen = Client(server, ledger, 0).enter()
        pop.quit()
        assert set(seen.values()) == ledger.arrived - ledger.gone
        assert not ledger.doubt
    taken = server.log().count('why=taken over')
    mails = sum(len(ledger.arrived) for ledger in load.ledgers)
    report('takeover under load', rounds=load.rounds, sessions=load.sessions, taken=taken, late_quits=load.late, races=load.races,
           mails=mails, wrong=0)
    assert taken > count * rounds // 2 and load.late and load.races and mails > count * rounds
