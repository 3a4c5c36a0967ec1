"""Every dialogue of test/dialogues, over each kind of mailbox, sent in each way, each with a server of its own."""
import hashlib
import os
import re

import pytest

from conftest import ALMOND, SEPARATOR, Pop, Server, Spool, host, plain, scram, switches, wire
from dialogue import load

SWITCHES = switches(ALMOND)
MODES = os.environ.get('DIALOGUE_MODES', 'step piped bytes').split()
CASES = [pytest.param(d, box, mode, id=f'{d.name}-{box}-{mode}') for d in load() if d.fits(SWITCHES)
         for box in d.boxes if d.box_fits(box, SWITCHES) for mode in d.modes if mode in MODES]


@pytest.mark.parametrize('dialogue,box,mode', CASES)
def test_dialogue(dialogue, box, mode):
    spool = Spool()
    try:
        dialogue.fill(spool, box)
        with Server(spool, *dialogue.args) as server:
            dialogue.play(server, spool, mode)
    finally:
        spool.remove()


# ---- what a dialogue cannot say

both = pytest.mark.parametrize('box', [b for b in ('mbox', 'maildir') if SWITCHES['ENABLE_' + b.upper()]])
each = pytest.mark.skipif(not (SWITCHES['ENABLE_MBOX'] and SWITCHES['ENABLE_MAILDIR']), reason='both formats')
MAILS = [
    b'Subject: one\nMessage-ID: <1@example.org>\n\nbody\n',
    b'Subject: two\nMessage-ID: <2@example.org>\n\n.\nFrom here\n\nx\n',
    b'Subject: header only\n\n',
    b'Subject: equal header\n\nanother body\n',
    b'Subject: equal header\n\nyet another body\n',
    b'Subject: long\n\n' + b'z' * 300000 + b'\nend\n',
]


def fill(spool, box, mails):
    if box == 'mbox':
        spool.mails('user', mails)
    else:
        spool.maildir('user', {f'new/17676{i:05}.M{i}P1.host': mail for i, mail in enumerate(mails)})


def uidls(server):
    pop = server.pop('user')
    found = pop.uidl()
    assert pop.quit().startswith('+OK')
    return found


@each
def test_uidl_equal_in_both_formats_and_line_ends(spool, serve):
    spool.users(user='secret')
    server = serve()
    spool.mails('user', MAILS)
    want = uidls(server)
    assert len(set(want)) == len(MAILS)
    spool.mails('user', MAILS, crlf=True)
    assert uidls(server) == want
    (spool.path / 'user').unlink()
    fill(spool, 'maildir', MAILS)
    assert uidls(server) == want


@both
def test_uidl_after_another_program_wrote_status(spool, serve, box):
    spool.users(user='secret')
    fill(spool, box, MAILS)
    server = serve()
    want = uidls(server)
    marks = (b'Status: RO\nX-Status: A\nX-Keywords: a\n\tb\nX-UID: 7\nContent-Length: 5\nLines: 1\n'
             b'X-Mozilla-Status: 0001\nX-IMAPbase: 1 2\n')
    fill(spool, box, [marks + mail for mail in MAILS])
    assert uidls(server) == want
    fill(spool, box, [mail.replace(b'\n\n', b'\nStatus: O\n\n', 1) for mail in MAILS])
    assert uidls(server) == want


@both
def test_uidl_believes_no_x_uidl(spool, serve, box):
    spool.users(user='secret')
    fill(spool, box, MAILS)
    server = serve()
    want = uidls(server)
    fill(spool, box, [b'X-UIDL: ' + want[0].encode() + b'\n' + mail for mail in MAILS])
    assert uidls(server) == want


@both
def test_uidl_of_what_remains(spool, serve, box):
    spool.users(user='secret')
    fill(spool, box, MAILS)
    server = serve()
    want = uidls(server)
    pop = server.pop('user')
    pop.ok('DELE 1')
    pop.ok('DELE 4')
    pop.quit()
    assert uidls(server) == [want[i] for i in (1, 2, 4, 5)]


@pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='a matter of Maildirs')
def test_uidl_after_new_to_cur(spool, serve):
    spool.users(user='secret')
    fill(spool, 'maildir', MAILS)
    server = serve()
    want = uidls(server)
    for path in list((spool.path / 'user/new').iterdir()):
        path.rename(spool.path / 'user/cur' / (path.name + ':2,S'))
    assert uidls(server) == want


@pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='a matter of Maildirs')
def test_maildir_moves_and_vanishes_in_a_session(spool, serve):
    """new to cur, other flags: the mail is still there.  Gone: -ERR, and the others are as they were."""
    spool.users(user='secret')
    fill(spool, 'maildir', MAILS)
    server = serve()
    pop = server.pop('user')
    sizes = pop.sizes()
    box = spool.path / 'user'
    for i, path in enumerate(sorted((box / 'new').iterdir())):
        if i == 1:
            path.unlink()
        else:
            path.rename(box / 'cur' / (path.name + ':2,RS'))
    assert pop.multi('RETR 1') == wire(MAILS[0])
    pop.err('RETR 2')
    pop.err('RETR 2')
    assert pop.multi('TOP 4 0') == b'Subject: equal header\r\n\r\n'
    assert sorted(set(sizes) - set(pop.sizes())) == [2]
    for n in (1, 3):
        pop.ok(f'DELE {n}')
    for path in list((box / 'cur').iterdir()):
        path.rename(box / 'cur' / path.name.replace(':2,RS', ':2,S'))
    assert pop.quit().startswith('+OK')
    assert [p.read_bytes() for p in sorted((box / 'cur').iterdir())] == [MAILS[i] for i in (3, 4, 5)]


@both
def test_true_duplicates_have_ids_of_their_own(spool, serve, box):
    spool.users(user='secret')
    fill(spool, box, [MAILS[0]] * 3 + [MAILS[1]] + [MAILS[0]] * 20)
    server = serve()
    found = uidls(server)
    assert len(set(found)) == 24
    assert uidls(server) == found
    pop = server.pop('user')
    assert [pop.ok(f'UIDL {n}').split()[2] for n in (24, 1, 4)] == [found[23], found[0], found[3]]
    pop.quit()


@both
def test_deliveries_meanwhile_are_seen_next_time(spool, serve, box):
    """Mail that arrives in a session is not seen in it, and stays whatever the session deletes."""
    spool.users(user='secret')
    fill(spool, box, MAILS[:3])
    server = serve()
    pop = server.pop('user')
    new = b'Subject: late\n\nnews\n'
    if box == 'mbox':
        with open(spool.path / 'user', 'ab') as f:
            f.write(SEPARATOR + new + b'\n')
    else:
        (spool.path / 'user/new/1767699999.M1P1.host').write_bytes(new)
        spool.own(spool.path / 'user/new/1767699999.M1P1.host')
    assert len(pop.sizes()) == 3
    assert pop.multi('RETR 3') == wire(MAILS[2])
    for n in (1, 2, 3):
        pop.ok(f'DELE {n}')
    assert pop.quit().startswith('+OK')
    if box == 'mbox':
        assert spool.read('user') == SEPARATOR + new + b'\n'
    pop = server.pop('user')
    assert pop.multi('RETR 1') == wire(new)
    assert pop.ok('STAT') == f'+OK 1 {len(wire(new))}'
    pop.quit()


@pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='a matter of mboxes')
@pytest.mark.parametrize('command', ['RETR 2', 'TOP 2 1', 'DELE 2', 'UIDL'])
def test_mbox_rewritten_in_a_session(spool, serve, command):
    """Another program took the first mail out: what lies at the second one's place is another mail.  It must not be sent in the
    second one's name, and nothing is deleted."""
    spool.users(user='secret')
    spool.mails('user', MAILS[:3])
    server = serve()
    pop = server.pop('user')
    pop.ok('DELE 1')
    data = spool.mails('user', [MAILS[1], MAILS[0] + b'x' * 100 + b'\n']).read_bytes()
    pop.err(command)
    assert pop.cmd('QUIT').startswith('-ERR')
    pop.closed()
    assert spool.read('user') == data


@pytest.mark.skipif(not SWITCHES['ENABLE_APOP'], reason='APOP is not built in')
class TestApop:
    @staticmethod
    def stamp(pop):
        found = re.fullmatch(r'\+OK POP3 ' + re.escape(host()) + r' server ready (<[A-Za-z0-9]+@' + re.escape(host()) + '>)',
                             pop.greeting)
        assert found, pop.greeting
        return found[1]

    @staticmethod
    def digest(stamp, secret):
        return hashlib.md5((stamp + secret).encode()).hexdigest()

    def test_right_and_wrong(self, spool, serve):
        spool.account('user', 'se cret', plain)
        spool.mails('user', MAILS[:1]) if SWITCHES['ENABLE_MBOX'] else fill(spool, 'maildir', MAILS[:1])
        server = serve()
        stamps = set()
        for secret, name, change in (('se cret', 'user', str), ('se cret', 'user', str.upper)):
            pop = Pop(server.connect())
            stamp = self.stamp(pop)
            stamps.add(stamp)
            pop.ok(f'APOP {name} {change(self.digest(stamp, secret))}')
            assert len(pop.sizes()) == 1
            pop.quit()
        pop = Pop(server.connect())
        stamp = self.stamp(pop)
        stamps.add(stamp)
        good = self.digest(stamp, 'se cret')
        for bad in (f'APOP user {good[:-1]}', f'APOP user {good}0', 'APOP user', 'APOP', f'APOP {good}',
                    f'APOP ../user {good}', f'APOP user {good[:-1]}g', f'APOP  {good}'):
            pop.err(bad)
        assert '[AUTH]' in pop.err('APOP user ' + self.digest(stamp, 'secret'))
        assert '[AUTH]' in pop.err('APOP other ' + good)
        pop.ok(f'APOP user {good}')
        pop.quit()
        assert len(stamps) == 3
        server.wait_log(r'auth fail user=user rip=\S+ method=APOP$')

    def test_user_and_pass_too(self, spool, serve):
        spool.account('user', 'secret', plain)
        pop = serve().pop('user')
        assert pop.ok('STAT') == '+OK 0 0'
        pop.quit()

    def test_only_where_all_can(self, spool, serve):
        spool.lines('user:' + plain('secret'), 'other:' + scram('secret'))
        pop = Pop(serve().connect())
        assert '<' not in pop.greeting
        pop.err('APOP user ' + '0' * 32)
        pop.ok('USER user')
        pop.ok('PASS secret')
        pop.quit()


@both
def test_terminator_with_the_last_line(spool, serve, box):
    """A reply that fits is sent by one write: the final dot comes with the text."""
    spool.users(user='secret')
    fill(spool, box, MAILS[:1])
    pop = serve().pop('user')
    pop.send('RETR 1\r\n')
    assert pop.fill().endswith(b'body\r\n.\r\n')
    pop.buffer = b''
    pop.quit()


def test_no_reply_is_longer_than_512_octets(spool, serve):
    """Whatever the longest names and numbers are.  Pop.line checks it of each reply."""
    long = 'n' * 64
    spool.users(**{long: 'secret'})
    server = serve()
    pop = Pop(server.connect())
    pop.ok('USER ' + long)
    pop.ok('PASS secret')
    for command in ('STAT', 'RSET', 'NOOP'):
        pop.ok(command)
    for command in ('RETR ' + '9' * 240, 'x' * 240, 'TOP ' + '1' * 120 + ' ' + '1' * 120, 'DELE ' + '0' * 240):
        pop.err(command)
    pop.quit()
