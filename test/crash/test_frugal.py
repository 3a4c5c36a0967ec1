"""What a session may write, and how often it may wait for the disk: the figures of frugal.py, asserted."""
import os
import re
import subprocess

import pytest

import frugal
import test_trace as trace
from conftest import SECONDS, needs_root
from crash import ALMOND, BOX, MOVING, SHAPES, make_spool, report
from frugal import ALL, ALTERNATE, FIRST, LAST, LOOK, MIDDLE, TAIL, TINY, Figures, delete, delivery, fresh, session, with_maildir

# A commit waits for: the journal; the mail that arrived; the mark; the move; the cut; the journal's end.  The first one makes a
# directory and a file, too.
SYNCS, SYNCS_FIRST = 6, 8
NOTE = 512
LOOKS = {'look': frugal.look, 'nothing': frugal.nothing, 'failed login': frugal.fail}


def untouched(spool, before, figures):
    assert (figures.mailbox, figures.journal, figures.other, figures.made) == (0, 0, 0, 0)
    assert figures.changed == [] and figures.stayed == [] and figures.syncs == [] and figures.cuts == []
    assert spool.picture() == before


@pytest.mark.parametrize('how', LOOKS)
@pytest.mark.parametrize('start', ['alone', 'inetd'])
@pytest.mark.parametrize('store', ['mbox', 'maildir'])
def test_looking_writes_nothing(store, start, how):
    """Not an octet, no file, no time."""
    spool = fresh(LOOK) if store == 'mbox' else with_maildir()
    try:
        before = spool.picture()
        untouched(spool, before, Figures(spool, *session(spool, LOOKS[how], start == 'alone')))
    finally:
        spool.remove()


@pytest.mark.parametrize('store', ['mbox', 'maildir'])
def test_looking_after_a_commit_writes_nothing(store):
    """Its journal is there, and empty."""
    spool = fresh(LOOK, True) if store == 'mbox' else with_maildir()
    try:
        before = spool.picture()
        untouched(spool, before, Figures(spool, *session(spool, frugal.look)))
    finally:
        spool.remove()


@needs_root
@pytest.mark.parametrize('by', ['login', 'check'])
def test_root_makes_one_directory_once(by):
    """A spool without .almond gets it from root's first login, or from `almond -T`; nothing else, then or later."""
    spool = make_spool(LOOK, frugal.SPOT)
    try:
        os.rmdir(spool.path / '.almond')
        before = spool.picture()
        if by == 'login':
            figures = Figures(spool, *session(spool, frugal.look))
            assert (figures.mailbox, figures.journal, figures.other, figures.made) == (0, 0, 0, 1)
            assert figures.stayed == [str(spool.path / '.almond')] and figures.cuts == []
        else:
            subprocess.run([ALMOND, '-T', '-E', '-d', spool.path, '-u', spool.users_file], timeout=SECONDS, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = spool.picture()
        assert sorted(set(after) - set(before)) == ['.almond'] and after[BOX] == before[BOX]
        assert after['.almond'][0] & 0o1777 == 0o1777 and after['.almond'][1] == 0
        untouched(spool, after, Figures(spool, *session(spool, frugal.look)))
    finally:
        spool.remove()


def within(figures, shape, first):
    """No octet before the first deletion, and twice those behind it at the most."""
    path = re.escape(BOX)
    assert figures.lowest is None or figures.lowest >= shape.at, figures.lowest
    assert figures.elsewhere == []
    assert [p for p in figures.cuts if re.search(f'spool/{path}$', p)] != []
    assert len(figures.syncs) <= (SYNCS_FIRST if first else SYNCS), figures.syncs
    assert figures.other <= 64
    stayed = [os.path.relpath(p, figures.place) for p in figures.stayed]
    assert set(stayed) <= ({'.', 'journal', 'note'} if first else set()), stayed
    if shape.truncation:
        assert figures.mailbox == 0 and figures.journal <= NOTE
        assert figures.cuts.count(figures.box) == 1 and figures.syncs.count(figures.box) <= 2       # before the note, after the cut
    else:
        assert 0 < figures.mailbox + figures.journal <= figures.bound


def test_deleting_all():
    """One truncation, one fsync, and nothing else: also where it is the first commit, and on a full disk."""
    for second in (False, True):
        figures = frugal.of_mbox(ALL, second)
        assert (figures.mailbox, figures.journal, figures.stayed) == (0, 0, [])
        assert figures.syncs == figures.cuts == [figures.box]


@pytest.mark.parametrize('first', [True, False], ids=['first', 'second'])
@pytest.mark.parametrize('shape', [LAST, TAIL], ids=str)
def test_deleting_the_end(shape, first):
    """No octet of mail, one truncation, and a note of it."""
    within(frugal.of_mbox(shape, not first), shape, first)


@pytest.mark.parametrize('first', [True, False], ids=['first', 'second'])
@pytest.mark.parametrize('shape', [FIRST, MIDDLE, ALTERNATE, TINY], ids=str)
def test_deleting_elsewhere(shape, first):
    within(frugal.of_mbox(shape, not first), shape, first)


def test_every_shape():
    """Those of the crash proofs, too."""
    for shape in SHAPES:
        within(frugal.of_mbox(shape, True), shape, False)
    assert len(MOVING) > 10
    report('frugal: octets, offsets and fsyncs of a commit', points=len(SHAPES), wrong=0)


@pytest.mark.parametrize('gone,left', [([10], ['new', 'cur']), (list(range(1, 21)), ['new', 'cur'])], ids=['one', 'all'])
def test_deleting_from_a_maildir(gone, left):
    """Not an octet; an fsync for each directory that lost a mail."""
    spool = with_maildir()
    try:
        figures = Figures(spool, *session(spool, delete(gone)))
        assert (figures.mailbox, figures.journal, figures.other, figures.made) == (0, 0, 0, 0)
        assert len(figures.syncs) <= min(len(gone), 2) and figures.cuts == [] and figures.stayed == []
        assert {os.path.relpath(p, figures.box) for p in figures.syncs} <= set(left)
        assert len(list((spool.path / BOX).rglob('*host*'))) == 20 - len(gone)
    finally:
        spool.remove()


@pytest.mark.parametrize('first', [True, False], ids=['first', 'second'])
def test_a_delivery_to_an_mbox(first):
    """The message once, and a note; no octet of what was there."""
    spool = fresh(LOOK, not first)
    try:
        figures = Figures(spool, *delivery(spool))
        assert len(frugal.NEW_MAIL) < figures.mailbox <= len(frugal.NEW_MAIL) + 128
        assert figures.lowest == len(LOOK.old) and figures.elsewhere == []
        assert figures.journal <= NOTE and figures.other <= 64
        assert len(figures.syncs) <= (5 if first else 3), figures.syncs
        assert spool.read(BOX).startswith(LOOK.old)
    finally:
        spool.remove()


def test_a_delivery_to_a_maildir():
    spool = with_maildir()
    try:
        figures = Figures(spool, *delivery(spool))
        assert (figures.mailbox, figures.journal, figures.other, figures.made) == (len(frugal.NEW_MAIL), 0, 0, 1)
        assert len(figures.syncs) == 2 and figures.cuts == []
        assert len(figures.stayed) == 1 and figures.stayed[0].startswith(str(spool.path / BOX / 'new') + '/')
    finally:
        spool.remove()


def test_the_table():
    """`make frugal` prints it, a line for each kind of session."""
    done = subprocess.run(['/usr/bin/python3', frugal.__file__], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
                          env={**os.environ, 'CRASH_ALMOND': ALMOND, 'ALMOND': ALMOND})
    text = done.stdout.decode()
    assert done.returncode == 0, text
    for name, _ in frugal.KINDS:
        assert re.search(rf'^{re.escape(name)} +(\d+ +){{6}}\d+', text, re.M), text
    assert not trace.SWITCHES.get('ENABLE_MBOX') or re.search(r'^delete all +0 +0 +\d+ +1 +0 +1 +1 *$', text, re.M), text
