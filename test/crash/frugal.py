"""What each kind of session writes: octets, files, fsyncs, truncations, as the kernel saw them (strace), never timed.
`make frugal` prints the table; test_frugal.py asserts what it promises."""
import os
import pathlib
import re
import subprocess
import sys

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent), str(pathlib.Path(__file__).resolve().parent)]
BUILT = pathlib.Path(__file__).resolve().parents[2] / 'build/crash/almond'
os.environ.setdefault('ALMOND', os.environ.get('CRASH_ALMOND', str(BUILT)))

import test_trace as trace                                                              # noqa: E402
from conftest import SECONDS, Server, inetd_style                                       # noqa: E402
from crash import ALMOND, BOX, K, Shape, body, home, make_spool                         # noqa: E402

SPOT = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
MAILS = 20
NEW_MAIL = body('new', 4 * K)


def twenty(name, gone):
    return Shape(name, [4 * K] * MAILS, gone)


LOOK = twenty('look', [1])
ALL = twenty('all', range(1, MAILS + 1))
LAST = twenty('last', [MAILS])
TAIL = twenty('tail', [MAILS - 2, MAILS - 1, MAILS])
FIRST = twenty('first', [1])
MIDDLE = twenty('middle', [MAILS // 2])
ALTERNATE = twenty('alternate', range(1, MAILS + 1, 2))
TINY = Shape('alternate-tiny', [60] * 400, range(1, 401, 2))
FILES = {f'{"cur" if i % 2 else "new"}/{1000 + i}.{i}.host{":2,S" if i % 2 else ""}': mail for i, mail in enumerate(LOOK.mails)}


# ---- running one, traced ----

def look(pop):
    """All that can be said without DELE."""
    pop.login(BOX)
    count = int(pop.ok('STAT').split()[1])
    for command in ('LIST', 'UIDL'):
        pop.multi(command)
    for i in range(count):
        pop.multi(f'RETR {i + 1}')
        pop.multi(f'TOP {i + 1} 1')
    assert count and pop.quit().startswith('+OK')


def delete(gone):
    def run(pop):
        pop.login(BOX)
        for n in gone:
            pop.ok(f'DELE {n}')
        assert pop.quit().startswith('+OK')
    return run


def nothing(pop):
    pop.login(BOX)
    assert pop.quit().startswith('+OK')


def fail(pop):
    pop.ok(f'USER {BOX}')
    pop.err('PASS wrong')
    assert pop.quit().startswith('+OK')


def session(spool, run, alone=False):
    """One session under strace; its calls, and the paths that came into being and stayed."""
    before = {str(p) for p in spool.path.rglob('*')}
    for file in spool.base.glob('trace.*'):
        file.unlink()
    if alone:
        with Server(spool, almond=ALMOND, prefix=trace.strace(spool)) as server:
            run(server.pop())
    else:
        pop, program = inetd_style(spool, almond=ALMOND, prefix=trace.strace(spool))
        run(pop)
        assert program.wait() == 0, program.log()
    return trace.calls(spool), sorted({str(p) for p in spool.path.rglob('*')} - before)


def delivery(spool, mail=NEW_MAIL):
    """The same of almond deliver."""
    before = {str(p) for p in spool.path.rglob('*')}
    for file in spool.base.glob('trace.*'):
        file.unlink()
    argv = [*trace.strace(spool), ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, BOX]
    done = subprocess.run([str(x) for x in argv], input=mail, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
    assert done.returncode == 0, done
    return trace.calls(spool), sorted({str(p) for p in spool.path.rglob('*')} - before)


# ---- what it wrote ----

class Figures:
    def __init__(self, spool, traced, stayed, shape=None):
        self.box, self.place = str(spool.path / BOX), str(home(spool))
        every = [call for call in trace.every(traced) if not call[2].startswith('-')]
        in_box = re.compile(re.escape(self.box) + '(/|$)')
        octets = trace.written(traced)
        self.mailbox = sum(n for path, n in octets.items() if in_box.match(path))
        self.journal = sum(n for path, n in octets.items() if path.startswith(self.place + '/'))
        self.other = sum(octets.values()) - self.mailbox - self.journal
        paths = {os.path.join(trace.place(arguments), re.search(r'"([^"]*)"', arguments).group(1))
                 for name, arguments, _ in every if name == 'mkdirat' or name == 'openat' and 'O_CREAT' in arguments}
        self.made = len(paths - ({str(p) for p in spool.path.rglob('*')} - set(stayed)))
        self.stayed = stayed
        self.syncs = [trace.place(arguments) for name, arguments, _ in every if name in ('fsync', 'fdatasync', 'sync_file_range')]
        self.cuts = [trace.place(arguments) for name, arguments, _ in every if name in ('ftruncate', 'truncate')]
        offsets = [int(re.search(r', (\d+)$', arguments).group(1)) for name, arguments, _ in every
                   if name == 'pwrite64' and in_box.match(trace.place(arguments))]
        self.lowest = min(offsets, default=None)
        self.elsewhere = [name for name, arguments, _ in every if in_box.match(trace.place(arguments)) and
                          name in trace.WRITES and name != 'pwrite64']
        self.bound = 2 * (len(shape.old) - shape.at) + 512 if shape and not shape.truncation else None
        self.changed = [path for path in trace.changed(traced) if path and not path.startswith(('/dev/null', '/run/'))]


def fresh(shape, second=False):
    """A spool with this mailbox; second: it had a commit and a delivery before."""
    spool = make_spool(shape, SPOT)
    if second:
        spool.mbox(BOX, MIDDLE.old)
        session(spool, delete(MIDDLE.gone))
        delivery(spool)
        spool.mbox(BOX, shape.old)
    return spool


def with_maildir():
    spool = make_spool(LOOK, SPOT)
    (spool.path / BOX).unlink()
    spool.maildir(BOX, FILES)
    return spool


def of_mbox(shape, second=False):
    spool = fresh(shape, second)
    try:
        figures = Figures(spool, *session(spool, delete(shape.gone)), shape)
        assert spool.read(BOX) == shape.new
        return figures
    finally:
        spool.remove()


def of(spool, run):
    try:
        return Figures(spool, *(run(spool) if run is delivery else session(spool, run)))
    finally:
        spool.remove()


KINDS = [
    ('a login that fails', lambda: of(fresh(LOOK), fail)),
    ('login, QUIT', lambda: of(fresh(LOOK), nothing)),
    ('look at all, mbox', lambda: of(fresh(LOOK), look)),
    ('look at all, Maildir', lambda: of(with_maildir(), look)),
    ('delete all', lambda: of_mbox(ALL)),
    ('delete the last, the first time', lambda: of_mbox(LAST)),
    ('delete the last', lambda: of_mbox(LAST, True)),
    ('delete the last 3', lambda: of_mbox(TAIL, True)),
    ('delete the first, the first time', lambda: of_mbox(FIRST)),
    ('delete the first', lambda: of_mbox(FIRST, True)),
    ('delete one in the middle', lambda: of_mbox(MIDDLE, True)),
    ('delete every second one', lambda: of_mbox(ALTERNATE, True)),
    ('delete every second one of 400 tiny', lambda: of_mbox(TINY, True)),
    ('delete one, Maildir', lambda: of(with_maildir(), delete([MAILS // 2]))),
    ('delete all, Maildir', lambda: of(with_maildir(), delete(ALL.gone))),
    ('deliver to an mbox, the first time', lambda: of(fresh(LOOK), delivery)),
    ('deliver to an mbox', lambda: of(fresh(LOOK, True), delivery)),
    ('deliver to a Maildir', lambda: of(with_maildir(), delivery)),
]


def main():
    size = len(LOOK.mails[0])
    print(f'{MAILS} mails of {size:,} octets; a mail of {len(NEW_MAIL):,} is delivered.  Octets written, calls counted:\n')
    head = ('session', 'mailbox', 'journal', 'other', 'files made', 'that stay', 'fsync', 'truncate', 'at most')
    row = '{:<38}' + '{:>10}' * 3 + '{:>12}' + '{:>11}' + '{:>7}' + '{:>10}' + '{:>10}'
    print(row.format(*head))
    for name, run in KINDS:
        f = run()
        print(row.format(name, f.mailbox, f.journal, f.other, f.made, len(f.stayed), len(f.syncs), len(f.cuts), f.bound or ''))
    print('\nother: the dot-lock.  journal: all files in SPOOL/.almond/BOX.  at most: mailbox and journal together, twice\n'
          'what lies behind the first deletion, and a header.  The first time: its directory and files are made then, and stay.')


if __name__ == '__main__':
    main()
