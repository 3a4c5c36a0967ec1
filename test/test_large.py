"""Large mail and large mailboxes: sizes beyond 2^31 and 2^32, 200,000 messages, a mailbox cut while it is sent."""
import hashlib
import os
import re
import subprocess

import pytest

import conftest
from conftest import ALMOND, ROOT, SEPARATOR, Server, switches, wire

SWITCHES = switches(ALMOND)
mbox = pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='ENABLE_MBOX is off')
maildir = pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='ENABLE_MAILDIR is off')
HEAD = b'Subject: large\n\n'
TAIL = b'\nlast line\n'


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Reading gigabytes is no hang."""
    monkeypatch.setattr(conftest, 'SECONDS', 600)


def sparse(path, start, hole, end):
    """A file with a hole of NULs in it, which takes no room on the disk."""
    with open(path, 'wb') as f:
        f.write(start)
        f.seek(hole, os.SEEK_CUR)
        f.write(end)


def size(hole):
    return len(wire(HEAD)) + hole + len(wire(TAIL))


def receive(pop, octets):
    """That many octets of a mail's text, and the final dot."""
    assert pop.ok('RETR 1') == f'+OK {octets} octets'
    head, pop.buffer = pop.buffer, b''
    last, left = head[-64:], octets + 3 - len(head)
    room = bytearray(1 << 20)
    while left > 0:
        n = pop.sock.recv_into(room, min(left, len(room)))
        assert n, 'the line ended'
        left -= n
        last = (last + room[:n][-64:])[-64:]
    assert left == 0 and last.endswith(b'\0\r\nlast line\r\n.\r\n'), last


@mbox
def test_2_gb_in_an_mbox(spool, serve):
    hole = 2_200_000_000
    spool.users(user='secret')
    path = spool.path / 'user'
    second = b'Subject: behind it\n\nx\n'
    sparse(path, SEPARATOR + HEAD, hole, TAIL + b'\n' + SEPARATOR + second + b'\n')
    spool.own(path)
    pop = serve().pop('user')
    assert pop.sizes() == {1: size(hole), 2: len(wire(second))}
    assert len(set(pop.uidl())) == 2
    assert pop.multi('TOP 1 0') == wire(HEAD)
    receive(pop, size(hole))
    assert pop.multi('RETR 2') == wire(second)
    pop.ok('DELE 1')
    assert pop.quit().startswith('+OK')
    assert path.read_bytes() == SEPARATOR + second + b'\n'


@maildir
def test_4_gb_in_a_maildir(spool, serve):
    hole = 4_500_000_000
    spool.users(user='secret')
    spool.maildir('user', {'new/1767600002.M2P1.h': b'Subject: two\n\n'})
    path = spool.path / 'user/new/1767600001.M1P1.h'
    sparse(path, HEAD, hole, TAIL)
    spool.own(path)
    pop = serve().pop('user')
    assert pop.sizes() == {1: size(hole), 2: 16}
    assert pop.ok('STAT') == f'+OK 2 {size(hole) + 16}'
    assert pop.multi('TOP 1 0') == wire(HEAD)
    pop.ok('DELE 1')
    assert pop.ok('STAT') == '+OK 1 16'
    pop.quit()
    assert not path.exists()


@mbox
def test_200000_messages(spool, serve):
    n = 200_000
    spool.users(user='secret')
    spool.mbox('user', b''.join(SEPARATOR + b'Subject: %d\n\n%d\n\n' % (i, i % 1000) for i in range(n)))
    server = serve()
    pop = server.pop('user')
    sizes = pop.sizes()
    assert len(sizes) == n
    assert all(sizes[i + 1] == len(wire(b'Subject: %d\n\n%d\n' % (i, i % 1000))) for i in range(n))
    ids = pop.uidl()
    assert len(set(ids)) == n
    assert pop.multi(f'RETR {n}') == wire(b'Subject: %d\n\n999\n' % (n - 1))
    pop.err(f'RETR {n + 1}')
    pop.send(b''.join(b'DELE %d\r\n' % i for i in range(1, n, 2)))
    for _ in range(n // 2):
        assert pop.line().startswith('+OK')
    assert pop.quit().startswith('+OK')
    data = spool.read('user')
    assert re.findall(rb'^Subject: (\d+)$', data, re.M) == [b'%d' % i for i in range(1, n, 2)]
    pop = server.pop('user')
    assert pop.uidl() == ids[1::2]
    pop.quit()


@pytest.mark.parametrize('box', ['mbox', 'maildir'])
def test_cut_while_it_is_sent(spool, serve, box):
    """The mail ends before its end: the client gets no final dot, so that it knows."""
    if not SWITCHES['ENABLE_' + box.upper()]:
        pytest.skip('not in this build')
    spool.users(user='secret')
    mail = HEAD + b'x' * 99 + b'\n' + (b'y' * 99 + b'\n') * 500_000
    if box == 'mbox':
        path = spool.mails('user', [mail])
    else:
        path = spool.maildir('user', {'new/1767600001.M1P1.h': mail}) / 'new/1767600001.M1P1.h'
    server = serve()
    pop = server.pop('user')
    pop.ok('RETR 1')
    os.truncate(path, 1_000_000)
    text = pop.rest()
    assert len(text) < len(mail) and not text.endswith(b'\r\n.\r\n')
    server.wait_log('why=store')
    assert os.path.getsize(path) == 1_000_000


# ---- long lines, long moves, many files, files that move

def digest_of(pop, n):
    """A message's octets as sent, dots and all, read in pieces: their count and their digest."""
    octets = int(pop.ok(f'RETR {n}').split()[1])
    left, h = octets + 3, hashlib.sha256()
    data, pop.buffer = pop.buffer[:left], pop.buffer[left:]
    while data:
        h.update(data)
        left -= len(data)
        data = pop.sock.recv(min(left, 1 << 20)) if left else b''
    assert left == 0, 'the line ended'
    return octets, h.hexdigest()


@pytest.mark.parametrize('box', ['mbox', 'maildir'])
def test_lines_of_50_mb(spool, serve, box):
    """One with an end, and one without; CR and LF where buffers end."""
    if not SWITCHES['ENABLE_' + box.upper()]:
        pytest.skip('not in this build')
    spool.users(user='secret')
    block = b'0123456789abcdef' * 4096
    mail = HEAD + block * 800 + b'\n' + (b'x' * 32766 + b'\r\n') * 20 + b'y' * 65535 + b'\r\n' + block[1:] + b'\r\r\n' + block * 800
    if box == 'mbox':
        spool.mbox('user', SEPARATOR + mail)
    else:
        spool.maildir('user', {'new/1767600001.M1P1.h': mail})
    text = wire(mail)
    pop = serve().pop('user')
    assert pop.sizes() == {1: len(text)}
    assert digest_of(pop, 1) == (len(text), hashlib.sha256(text + b'.\r\n').hexdigest())
    assert len(pop.uidl()) == 1
    pop.quit()


@mbox
def test_a_gigabyte_less_in_the_middle(spool, serve):
    """1 GB of 1.07: what lies behind it moves down, whole."""
    spool.users(user='secret')
    path = spool.path / 'user'
    big = b'Subject: behind\n\n' + os.urandom(1 << 20).hex().encode() * 32 + b'\n'
    first = SEPARATOR + b'Subject: first\n\n1\n\n'
    last = SEPARATOR + b'Subject: last\n\n3\n\n'
    sparse(path, first + SEPARATOR + HEAD, 1 << 30, TAIL + b'\n' + SEPARATOR + big + b'\n' + last)
    spool.own(path)
    server = serve()
    with server.pop('user') as pop:
        assert list(pop.sizes()) == [1, 2, 3, 4]
        pop.ok('DELE 2')
        assert pop.quit().startswith('+OK')
    assert path.read_bytes() == first + SEPARATOR + big + b'\n' + last
    with server.pop('user') as pop:
        assert digest_of(pop, 2) == (len(wire(big)), hashlib.sha256(wire(big) + b'.\r\n').hexdigest())
        pop.quit()


@maildir
def test_20000_files(spool, serve):
    """Some vanish, some move from new to cur and change their flags while the session lasts."""
    n = 20_000
    spool.users(user='secret')
    box = spool.maildir('user', {f'new/{1767600000 + i}.M1P{i}.h': b'Subject: %d\n\n%d\n' % (i, i) for i in range(n)})
    with serve().pop('user') as pop:
        assert pop.sizes() == {i + 1: len(wire(b'Subject: %d\n\n%d\n' % (i, i))) for i in range(n)}
        for i in range(n):
            name = f'{1767600000 + i}.M1P{i}.h'
            if i % 3 == 0:
                (box / 'new' / name).rename(box / 'cur' / (name + ':2,S'))
            elif i % 1000 == 1:
                (box / 'new' / name).unlink()
        for i in (0, 3, 2, 9999, n - 2, n - 1):
            assert pop.multi(f'RETR {i + 1}') == wire(b'Subject: %d\n\n%d\n' % (i, i))
        for i in (1, 4001):
            assert pop.cmd(f'RETR {i + 1}').startswith('-ERR [SYS/TEMP]')
        assert pop.multi('RETR 4') == wire(b'Subject: 3\n\n3\n')
        pop.send(b''.join(b'DELE %d\r\n' % (i + 1) for i in range(n) if i % 2 == 0))
        for _ in range(n // 2):
            assert pop.line().startswith('+OK')
        assert pop.quit().startswith('+OK')
    left = {int(re.search(r'P(\d+)\.', p.name)[1]) for p in box.rglob('*.h*')}
    assert left == {i for i in range(n) if i % 2 and (i % 3 == 0 or i % 1000 != 1)}


@maildir
def test_files_that_move(spool, serve):
    """A message is the same under another name; one that vanished is said to be gone, and never mistaken for another."""
    spool.users(user='secret')
    names = [f'176760000{i}.M{i}P1.h' for i in range(6)]
    mails = [b'Subject: %d\n\nbody %d\n' % (i, i) for i in range(6)]
    box = spool.maildir('user', {f'new/{name}': mail for name, mail in zip(names, mails)})
    server = serve()
    with server.pop('user') as pop:
        ids = pop.uidl()
        (box / 'new' / names[0]).rename(box / 'cur' / (names[0] + ':2,S'))
        assert pop.multi('RETR 1') == wire(mails[0])
        (box / 'cur' / (names[0] + ':2,S')).rename(box / 'cur' / (names[0] + ':2,RS'))
        assert pop.multi('TOP 1 0') == b'Subject: 0\r\n\r\n'
        (box / 'new' / names[1]).unlink()
        assert re.match(r'-ERR \[SYS/TEMP\]', pop.cmd('RETR 2'))
        assert pop.cmd('STAT').startswith('+OK 5 ')
        (box / 'new' / names[2]).rename(box / 'cur' / (names[2] + ';2,S'))
        (box / 'new' / '1767600009.M9P1.h').write_bytes(b'Subject: late\n\n')
        spool.own(box / 'new' / '1767600009.M9P1.h')
        assert pop.multi('RETR 3') == wire(mails[2])
        pop.ok('DELE 3')
        (box / 'cur' / (names[2] + ';2,S')).rename(box / 'cur' / (names[2] + ':2,'))
        pop.ok('DELE 4')
        (box / 'new' / names[3]).unlink()       # deleted twice is deleted
        assert pop.quit().startswith('+OK')
    assert sorted(p.name for p in box.rglob('*.h*')) == [names[0] + ':2,RS', names[4], names[5], '1767600009.M9P1.h']
    with server.pop('user') as pop:
        assert pop.uidl()[:3] == [ids[0], ids[4], ids[5]]
        pop.quit()


# ---- memory

def private(pid):
    with open(f'/proc/{pid}/smaps_rollup') as f:
        return sum(int(k) for k in re.findall(r'^Private_(?:Clean|Dirty):\s+(\d+) kB$', f.read(), re.M))


def parent(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            return int(f.read().rpartition(')')[2].split()[1])
    except OSError:
        return 0


def children(pid):
    return [int(p) for p in os.listdir('/proc') if p.isdigit() and parent(p) == pid]


@mbox
def test_memory_of_an_idle_session(spool):
    """The static file's: 128 kB of private memory, a session's processes together; after much work, no more than what the index
    takes besides."""
    make = os.environ.get('MAKE', 'make')
    built = subprocess.run([make, '-C', ROOT, 'O=build/memory', 'CPPFLAGS=-DRUN_DIR=\'"/run/almond-test"\'', 'build/memory/almond-static'],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert built.returncode == 0, built.stdout.decode()
    spool.users(user='secret', other='secret')
    spool.mails('user', [b'Subject: %d\n\n%d\n' % (i, i) for i in range(5)])
    spool.mails('other', [b'Subject: %d\n\n' % i + b'x' * 70 * 1000 + b'\n' for i in range(100)])
    with Server(spool, almond=str(ROOT / 'build/memory/almond-static')) as server:
        idle = server.pop('user')
        idle.ok('STAT')
        (monitor,) = children(server.process.pid)
        (session,) = children(monitor)
        assert private(monitor) + private(session) <= 128, (private(monitor), private(session))
        idle.quit()
        busy = server.pop('other')
        busy.uidl()
        for i in range(1, 101):
            busy.multi(f'RETR {i}')
        busy.ok('STAT')
        (monitor,) = [c for c in children(server.process.pid) if children(c)]
        (session,) = children(monitor)
        assert private(monitor) + private(session) <= 128 + 64, (private(monitor), private(session))
        busy.quit()
