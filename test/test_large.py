"""Large mail and large mailboxes: sizes beyond 2^31 and 2^32, 200,000 messages, a mailbox cut while it is sent."""
import os
import re

import pytest

from conftest import ALMOND, SEPARATOR, switches, wire

SWITCHES = switches(ALMOND)
mbox = pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='ENABLE_MBOX is off')
maildir = pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='ENABLE_MAILDIR is off')
HEAD = b'Subject: large\n\n'
TAIL = b'\nlast line\n'


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
