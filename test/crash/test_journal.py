"""Journals that are not what they seem: torn, stale, another mailbox's, of a mailbox that another program rewrote; and those that another
login, or a delivery, must mend."""
import os
import re
import shutil
import subprocess

import pytest

from conftest import GROUP, OWNER, SECONDS
from crash import ALMOND, ARRIVED, BOX, SHAPE, deliver, home, is_whole, make_spool, reopen, report, scale
from test_kill import LOGIN, Kill, dele, killer, session       # noqa: F401 (the fixture builds the killer)

HEAD = 80
NAMES = scale(['middle', 'small-first'], ['middle', 'small-first', 'alternate', 'crlf', 'all-but-last', 'two-runs', 'junk-first'])


@pytest.fixture
def made():
    """made(shape): a spool; all are removed at the end."""
    spools = []

    def make(shape):
        spools.append(make_spool(shape))
        return spools[-1]

    yield make
    for spool in spools:
        spool.remove()


def journal(spool, box=BOX):
    return spool.path / '.almond' / box / 'journal'


def put(path, data):
    """As the mailbox's owner would."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o600)
    for p in (path, path.parent):
        os.chown(p, OWNER, GROUP)


def killed(spool, shape, kill, who=BOX):
    end = session(spool, [LOGIN.replace(BOX.encode(), who.encode()) + dele(shape.gone) + b'QUIT\r\n'], kill)
    assert end.killed, end.log
    for lock in spool.path.glob('*.lock'):
        lock.unlink()


def torn(made, name):
    """A spool whose commit was killed when all had moved, before the cut."""
    shape = SHAPE[name]
    spool = made(shape)
    killed(spool, shape, Kill(1, call='ftruncate'))
    data = spool.read(BOX)
    assert data not in (shape.old, shape.new) and data[:len(shape.new)] == shape.new and journal(spool).stat().st_size > HEAD
    return shape, spool


def written(made, name):
    """A spool whose commit was killed when its journal was on the disk, and nothing else had begun: in front of the first call that
    changes the mailbox."""
    shape = SHAPE[name]
    for n in range(1, 200):
        spool = made(shape)
        killed(spool, shape, Kill(n, True))
        if spool.read(BOX) != shape.old:
            break
    spool = made(shape)
    killed(spool, shape, Kill(n))
    assert spool.read(BOX) == shape.old and journal(spool).stat().st_size > HEAD
    return shape, spool


def kept(spool, box=BOX):
    return sorted(p for p in (spool.path / '.almond' / box).iterdir() if p.name.startswith('kept-'))


def left_alone(spool, shape, data):
    """The mailbox stays as it is, and the journal is put aside, once, with a word."""
    reply, _, log = reopen(spool)
    assert reply.startswith('+OK'), log
    assert spool.read(BOX) == data
    file, = kept(spool)
    assert file.read_bytes()[HEAD:HEAD + len(shape.old) - shape.at] == shape.old[shape.at:]
    assert file.name in log and 'THE JOURNAL' in log
    assert not journal(spool).exists()
    log = reopen(spool)[2]
    assert spool.read(BOX) == data and kept(spool) == [file] and 'THE JOURNAL' not in log
    found = subprocess.run([ALMOND, 'check', '-d', spool.path, '-u', spool.users_file], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           timeout=SECONDS)
    assert found.returncode == 1 and f'.almond/{BOX}: see THE JOURNAL'.encode() in found.stdout


# ---- another program was there between the crash and the login ----

@pytest.mark.parametrize('how', ['rename', 'in place', 'an octet', 'cut short', 'emptied'])
@pytest.mark.parametrize('name', NAMES)
def test_rewritten(made, name, how):
    shape, spool = torn(made, name)
    path, data = spool.path / BOX, spool.read(BOX)
    if how == 'rename':                 # as mutt with a new file
        data = data.replace(b'Subject:', b'Status: RO\nSubject:')
        new = spool.path / 'new'
        put(new, data)
        spool.own(spool.path, 0o755)
        new.rename(path)
    elif how == 'in place':             # as Dovecot
        data = data.replace(b'Subject:', b'X-UID: 1\nSubject:')
        path.write_bytes(data)
    elif how == 'an octet':
        data = data[:shape.at + 5] + b'\x01' + data[shape.at + 6:]
        path.write_bytes(data)
    elif how == 'cut short':
        data = data[:shape.at + 10]
        path.write_bytes(data)
    else:
        data = b''
        path.write_bytes(data)
    left_alone(spool, shape, data)


def test_removed_and_made_anew(made):
    """Its inode may even be the same."""
    shape, spool = torn(made, 'middle')
    (spool.path / BOX).unlink()
    assert reopen(spool)[0].startswith('+OK 0 ')
    spool.mails(BOX, [ARRIVED])
    left_alone(spool, shape, spool.read(BOX))


def test_another_mailboxs(made):
    shape, spool = torn(made, 'middle')
    other = made(SHAPE['small-first'])
    put(journal(other), journal(spool).read_bytes())
    reply, _, log = reopen(other)
    assert reply.startswith('+OK') and other.read(BOX) == SHAPE['small-first'].old and len(kept(other)) == 1, log


# ---- the journal itself ----

def test_torn_while_it_was_written(made):
    """Any octet of it wrong, or its end missing: then nothing was begun."""
    wrong = points = 0
    shape, spool = written(made, 'alternate')
    whole = journal(spool).read_bytes()
    places = [*range(0, HEAD + 30), *range(HEAD + 30, len(whole), scale(997, 101)), len(whole) - 1]
    states = [whole[:i] + bytes([whole[i] ^ 0x40]) + whole[i + 1:] for i in places]
    states += [whole[:n] for n in (1, 40, HEAD, HEAD + 1, 4096, len(whole) - 1)]
    states += [b'\0' * 4096 + whole[4096:], whole[:4096] + b'\0' * (len(whole) - 4096), b'\0' * len(whole), whole + b'\0']
    for state in states:
        put(journal(spool), state)
        reply, _, log = reopen(spool)
        points += 1
        wrong += not (reply.startswith('+OK') and spool.read(BOX) == shape.old and not journal(spool).stat().st_size and not kept(spool))
    report('journals that are torn', journals=points, wrong=wrong)
    assert points > 100 and not wrong


@pytest.mark.parametrize('name', [*NAMES, 'twins', 'all-alike'])
def test_comes_back(made, name):
    """The commit was done; then its journal is there again: alone, with mail behind, and with mail whose octets are what it holds."""
    shape, spool = written(made, name)
    old, same = journal(spool).read_bytes(), shape.old[len(shape.new):]
    same = [same, same + shape.stored[0]] if same.startswith(b'From ') else []
    assert same or name in NAMES
    for late in (b'', None, *same):
        spool.mbox(BOX, shape.new)
        if late is None:
            late = deliver(spool.path / BOX)
        else:
            spool.mbox(BOX, shape.new + late)
        put(journal(spool), old)
        reply, _, log = reopen(spool)
        assert reply.startswith('+OK') and spool.read(BOX) == shape.new + late and not kept(spool), log
        assert not journal(spool).stat().st_size


# ---- who mends ----

def test_two_logins_share_the_mailbox(made):
    """The journal is the mailbox's, not the login's."""
    shape = SHAPE['middle']
    spool = made(shape)
    spool.lines(f'anna/{BOX}:{{PLAIN}}secret', f'{BOX}:{{PLAIN}}secret')
    killed(spool, shape, Kill(1, call='ftruncate'), 'anna')
    assert spool.read(BOX) not in (shape.old, shape.new) and journal(spool).stat().st_size
    assert is_whole(spool, shape) == 'old'
    assert sorted(p.name for p in (spool.path / '.almond').iterdir()) == [BOX]


def test_clocks_say_nothing(made):
    for times in ((0, 0), (2**33, 2**33)):
        shape, spool = torn(made, 'middle')
        for path in (spool.path / BOX, journal(spool)):
            os.utime(path, times)
        assert is_whole(spool, shape) == 'old'


def test_a_copy_of_the_spool_is_mended(made):
    """Restored on another disk: other inodes, the same octets."""
    shape, spool = torn(made, 'middle')
    copy = made(shape)
    shutil.rmtree(copy.path)
    subprocess.run(['cp', '-a', spool.path, copy.path], check=True, timeout=SECONDS)
    assert is_whole(copy, shape) == 'old'


def test_a_delivery_mends_first(made):
    shape, spool = torn(made, 'small-first')
    done = subprocess.run([ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, BOX], input=ARRIVED, stderr=subprocess.PIPE,
                          timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    data = spool.read(BOX)
    assert data.startswith(shape.old) and re.fullmatch(rb'From MAILER-DAEMON [^\n]*\n' + re.escape(ARRIVED) + rb'\n', data[len(shape.old):])


def test_looking_at_a_mended_mailbox_writes_nothing(made):
    shape, spool = torn(made, 'middle')
    assert is_whole(spool, shape) == 'old'
    before = spool.picture()
    assert reopen(spool)[0].startswith('+OK')
    assert spool.picture() == before
