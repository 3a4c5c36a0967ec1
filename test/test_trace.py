"""What the kernel saw of a session: looking writes nothing, deleting writes no more than it must, root reads nothing that a client
sent, and the process which does holds nothing.  By strace; the tests of identities are root's."""
import os
import pathlib
import re
import socket

import pytest

from conftest import ALMOND, IS_ROOT, OWNER, SEPARATOR, Pop, Program, Server, needs_root, switches, tool, wire

SWITCHES = switches(ALMOND)
STORES = [store for store, switch in (('mbox', 'ENABLE_MBOX'), ('maildir', 'ENABLE_MAILDIR')) if SWITCHES[switch]]
pytestmark = pytest.mark.skipif(not SWITCHES['ENABLE_USERS'] or not SWITCHES['ENABLE_ALONE'],
                                reason='a build without a users file or without a listener')
mbox_only = pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='a build without mbox')
two_processes = pytest.mark.skipif(not SWITCHES['ENABLE_PRIVSEP'], reason='a build without ENABLE_PRIVSEP')
MAILS = [b'From: a@example.org\nSubject: mail %d\n\nbody of mail %d\n.dot\n' % (i, i) * (1 + i % 3) for i in range(8)]


# ---- starting, traced ----

def strace(spool):
    """The tracer is a grandchild: the process that we started is almond."""
    return [tool('strace'), '-D', '-ff', '-qq', '-yy', '-s', '0', '-o', spool.base / 'trace']


class Inetd(Program):
    """almond as inetd starts it: the client on 0, 1 and the log on 2."""

    def __init__(self, spool, *args, prefix=()):
        with socket.create_server(('127.0.0.1', 0)) as listener:
            self.ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        with theirs:
            super().__init__([*prefix, ALMOND, '-E', '-d', spool.path, '-u', spool.users_file, *args], stdin=theirs,
                             stdout=theirs)

    def pop(self, name=None):
        pop = Pop(self.ours)
        if name:
            pop.login(name)
        return pop

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.ours.close()
        if kind is None:
            assert self.wait() == 0, self.log()
            self.check_log()
        elif self.process.poll() is None:
            self.process.kill()
            self.wait()


STARTS = {'alone': Server, 'inetd': Inetd}


def calls(spool):
    """{pid: [(name, arguments, result)]} of a trace that is complete: its tracer ended with the log."""
    traced = {}
    for file in sorted(spool.base.glob('trace.*')):
        mine = traced.setdefault(int(file.suffix[1:]), [])
        for line in file.read_text(errors='replace').splitlines():
            match = re.match(r'(\w+)\((.*)\)\s+= (-?\d+|\?|0x[0-9a-f]+)', line)
            if match:
                mine.append(match.groups())
    assert traced
    return traced


def every(traced):
    return [call for mine in traced.values() for call in mine]


def place(arguments):
    """What the first descriptor of a call is: a path, "TCP:[...]", "pipe:[...]"."""
    match = re.match(r'(?:AT_FDCWD|-?\d+)<(.*?)>(?:,|$)', arguments)
    return match.group(1) if match else ''


WRITES = ('write', 'pwrite64', 'writev', 'pwritev', 'pwritev2', 'sendfile', 'copy_file_range', 'splice')


def written(traced):
    """Octets written, by target; sockets, and the log's pipe, are no files."""
    bytes_of = {}
    for name, arguments, result in every(traced):
        if name in WRITES and result.isdigit():
            target = place(arguments)
            assert target, (name, arguments)
            if not re.match(r'(TCP|UNIX[\w-]*|socket|pipe):', target):
                bytes_of[target] = bytes_of.get(target, 0) + int(result)
    return bytes_of


CHANGES = re.compile(r'(creat|rename|link|unlink|symlink|mkdir|rmdir|mknod|utime|chmod|chown|fchmod|fchown|lchown|truncate|ftruncate|'
                     r'fallocate|setxattr|fsetxattr|lsetxattr|removexattr|utimes|futimesat|utimensat)(at|at2|2|64)?$')


def changed(traced):
    """Paths that a call made, removed, renamed or opened for writing."""
    paths = []
    for name, arguments, result in every(traced):
        opened = name in ('open', 'openat', 'openat2') and re.search(r'O_(WRONLY|RDWR|CREAT|TRUNC|TMPFILE)', arguments)
        if (opened or CHANGES.match(name)) and not result.startswith('-'):
            quoted = re.search(r'"([^"]*)"', arguments)
            paths.append(os.path.join(place(arguments), quoted.group(1) if quoted else ''))
    return paths


def fill(spool, store, mails=MAILS):
    spool.users(user='secret')
    if store == 'mbox':
        spool.mails('user', mails)
    else:
        spool.maildir('user', {f'{"cur" if i % 2 else "new"}/{1000 + i}.{i}.host{":2,S" if i % 2 else ""}': mail
                               for i, mail in enumerate(mails)})


def look(pop):
    """All that can be said without DELE."""
    pop.login()
    assert pop.cmd('STAT').startswith(f'+OK {len(MAILS)} ')
    assert len(pop.sizes()) == len(MAILS)
    assert len(set(pop.uidl())) == len(MAILS)
    for i, mail in enumerate(MAILS):
        assert pop.multi(f'RETR {i + 1}') == wire(mail)
        pop.multi(f'TOP {i + 1} 1')
    pop.ok('NOOP')
    pop.ok('RSET')
    assert pop.quit().startswith('+OK')


# ---- reading writes nothing ----

def times(paths):
    """Of access too; looked at without a read."""
    return {str(p): (st.st_ino, st.st_size, st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns) for p in paths for st in [p.lstat()]}


@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('store', STORES)
def test_reading_writes_nothing(spool, store, start):
    fill(spool, store)
    paths = [spool.path, *sorted(spool.path.rglob('*'))]
    for path in paths:
        os.utime(path, ns=(10**18, 10**18 + 5))         # an access time that any read renews
    before = times(paths)
    with STARTS[start](spool, prefix=strace(spool)) as server:
        look(server.pop())
    traced = calls(spool)
    assert written(traced) == {}
    for path in changed(traced):
        assert re.match(r'/dev/null|/run/almond-test(/|$)', path) or path == '', path
    assert times(paths) == before
    assert [spool.path, *sorted(spool.path.rglob('*'))] == paths
    opened = [a for name, a, result in every(traced) if name == 'openat' and not result.startswith('-') and
              re.search(rf'{re.escape(str(spool.path))}.*O_NOATIME', a)]
    assert len(opened) >= (1 if store == 'mbox' else len(MAILS))


# ---- deleting writes no more than it must ----

def delete(spool, numbers):
    with Server(spool, prefix=strace(spool)) as server, server.pop('user') as pop:
        for n in numbers:
            pop.ok(f'DELE {n}')
        assert pop.quit().startswith('+OK')
    return calls(spool)


def order(traced, path):
    """The calls that change this file, in their order."""
    return [name for name, arguments, _ in every(traced) if place(arguments) == str(path) and
            name in (*WRITES, 'ftruncate', 'fsync', 'fdatasync')]


@mbox_only
@pytest.mark.parametrize('numbers,left', [(range(1, 9), 0), ((8,), 7), ((6, 7, 8), 5)], ids=['all', 'last', 'tail'])
def test_deleting_all_or_the_tail_writes_no_mail(spool, numbers, left):
    fill(spool, 'mbox')
    traced = delete(spool, numbers)
    path = spool.path / 'user'
    assert str(path) not in written(traced)
    # A cut inside a block wants a note first, and what others wrote on the disk before that.
    assert order(traced, path) == ['fsync'] * (left > 0) + ['ftruncate', 'fsync']
    assert sum(written(traced).values()) - written(traced).get(str(path) + '.lock', 0) == (80 if left else 0)
    assert path.read_bytes() == b''.join(SEPARATOR + mail + b'\n' for mail in MAILS[:left])
    assert spool.names() == ['user']


@mbox_only
def test_deleting_in_the_middle_goes_through_the_journal(spool):
    """What lay behind the first deletion is written to the journal, then what stays of it to the mailbox; nothing in front of it,
    and each step is synced before the next."""
    fill(spool, 'mbox')
    stored = [len(SEPARATOR + mail) + 1 for mail in MAILS]
    traced = delete(spool, (3, 5))
    path, kept = spool.path / 'user', [mail for i, mail in enumerate(MAILS) if i not in (2, 4)]
    journal = spool.path / '.almond/user/journal'
    mark, moved = 16, sum(len(SEPARATOR + mail) + 1 for mail in kept[2:])
    assert written(traced)[str(path)] == mark + moved
    assert sum(stored[2:]) < written(traced)[str(journal)] < sum(stored[2:]) + 200
    places = [int(arguments.rsplit(', ', 1)[1]) for name, arguments, _ in every(traced)
              if name == 'pwrite64' and place(arguments) == str(path)]
    assert min(places) == sum(stored[:2])
    steps = [(os.path.basename(place(arguments)), name) for name, arguments, _ in every(traced) if
             name in (*WRITES, 'ftruncate', 'fsync', 'fdatasync') and place(arguments).startswith(str(spool.path))
             and not place(arguments).endswith('.lock')]
    steps = [step for i, step in enumerate(steps) if step != steps[i - 1] or not i]
    assert steps == [('user', 'fsync'), ('.almond', 'fsync'), ('journal', 'pwrite64'), ('journal', 'fsync'), ('user', 'fsync'),
                     ('user', 'pwrite64'), ('user', 'fsync'), ('user', 'pwrite64'), ('user', 'fsync'), ('user', 'ftruncate'),
                     ('user', 'fsync'), ('journal', 'ftruncate'), ('journal', 'fsync')]
    assert path.read_bytes() == b''.join(SEPARATOR + mail + b'\n' for mail in kept)
    assert journal.stat().st_size == 0 and journal.stat().st_mode & 0o777 == 0o600
    assert journal.parent.stat().st_mode & 0o777 == 0o700


@mbox_only
def test_a_commit_is_locked_in_all_ways(spool):
    """fcntl, the dot-lock, flock: taken before the first change, let go after the last."""
    fill(spool, 'mbox')
    traced = delete(spool, (1,))
    path = str(spool.path / 'user')
    seen = []
    for name, arguments, _ in every(traced):
        if name == 'fcntl' and place(arguments) == path and 'F_OFD_SETLK' in arguments:
            seen.append('fcntl' if 'F_WRLCK' in arguments else 'no fcntl' if 'F_UNLCK' in arguments else None)
        elif name == 'flock' and place(arguments) == path:
            seen.append('flock' if 'LOCK_EX' in arguments else 'no flock' if 'LOCK_UN' in arguments else None)
        elif name == 'openat' and '"user.lock"' in arguments and 'O_EXCL' in arguments:
            seen.append('dot')
        elif name == 'unlinkat' and '"user.lock"' in arguments:
            seen.append('no dot')
        elif place(arguments) == path and name in (*WRITES, 'ftruncate', 'fsync') and seen[-1] != 'change':
            seen.append('change')
    taken = seen.index('change')
    assert sorted(seen[taken - 3:taken]) == ['dot', 'fcntl', 'flock'], seen
    assert sorted(seen[taken + 1:taken + 4]) == ['no dot', 'no fcntl', 'no flock'], seen
    assert len(seen) == taken + 4


@pytest.mark.skipif('maildir' not in STORES, reason='a build without Maildir')
def test_deleting_from_a_maildir(spool):
    """One unlink a message, and an fsync of the directories after the last; no octet written."""
    fill(spool, 'maildir')
    traced = delete(spool, (1, 2, 5))
    assert written(traced) == {}
    path = str(spool.path / 'user')
    names = [name for name, arguments, result in every(traced) if result == '0' and
             (name == 'unlinkat' and place(arguments) == path or name == 'fsync' and place(arguments).startswith(path))]
    assert names == ['unlinkat'] * 3 + ['fsync'] * 2
    assert sorted(p.name for p in spool.path.rglob('*.host*')) == [
        f'{1000 + i}.{i}.host{":2,S" if i % 2 else ""}' for i in (2, 3, 5, 6, 7)]


# ---- root never parses ----

READS = ('read', 'readv', 'pread64', 'recvfrom', 'recvmsg', 'recvmmsg', 'splice', 'sendfile')


@needs_root
@two_processes
@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('store', STORES)
def test_root_reads_nothing_of_the_client(spool, store, start):
    fill(spool, store)
    with STARTS[start](spool, prefix=strace(spool)) as server:
        look(server.pop())
    readers = []
    for pid, mine in calls(spool).items():
        uid, root = 0, '/'
        for name, arguments, result in mine:
            if name in ('setresuid', 'setresuid32') and result == '0':
                uid = int(arguments.split(',')[1])
            elif name in ('setuid', 'setreuid', 'seteuid'):
                pytest.fail(f'{name}({arguments})')
            elif name == 'chroot' and result == '0':
                root = arguments
            elif name in READS and place(arguments).startswith('TCP:') and not result.startswith('-'):
                assert uid != 0 and root != '/', f'{pid}: {name}({arguments}) as uid {uid} in {root}'
                assert uid != OWNER
                readers.append(pid)
            elif name in ('open', 'openat', 'socket', 'execve', 'connect') and uid not in (0, OWNER):
                pytest.fail(f'the session calls {name}({arguments})')
            if name in READS and str(spool.path) in place(arguments) and result != '-1':
                assert uid != 0, f'root reads mail: {name}({arguments})'
    assert readers and len(set(readers)) == 1, 'one process reads from the client'


# ---- what the session holds ----

def parent(pid):
    try:
        stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return 0
    return int(stat.rpartition(')')[2].split()[1])


def child(pid):
    children = [int(p) for p in os.listdir('/proc') if p.isdigit() and parent(p) == pid]
    assert len(children) == 1, f'{pid} has the children {children}'
    return children[0]


def holds(pid):
    return {int(fd): os.readlink(f'/proc/{pid}/fd/{fd}') for fd in os.listdir(f'/proc/{pid}/fd')}


def status(pid, field):
    text = pathlib.Path(f'/proc/{pid}/status').read_text()
    return re.search(rf'^{field}:[ \t]*(.*)$', text, re.M).group(1).split()


def check(session, more):
    """It holds the client, a last word, the monitor and these; it is nobody, nowhere."""
    held = holds(session)
    assert set(held) - {0, 1, 2, 3} == set(more), held
    assert held[0] == held[1] and held[0].startswith('socket:') and held[3].startswith('socket:')
    uids = status(session, 'Uid')
    assert len(set(uids)) == 1 and int(uids[0]) not in (0, OWNER)
    assert '0' not in status(session, 'Gid') and status(session, 'Groups') == []
    assert os.readlink(f'/proc/{session}/root') not in ('/', '')
    assert os.listdir(f'/proc/{session}/root/') == []
    assert status(session, 'CapEff') == ['0000000000000000'] and status(session, 'CapPrm') == ['0000000000000000']
    for fd in more:
        flags = re.search(r'^flags:\s*(\d+)', pathlib.Path(f'/proc/{session}/fdinfo/{fd}').read_text(), re.M).group(1)
        assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY


@needs_root
@two_processes
@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('store', STORES)
def test_what_the_session_holds(spool, store, start):
    """Before the first octet of the client, and with the mailbox open."""
    fill(spool, store)
    with STARTS[start](spool) as server, server.pop() as pop:
        monitor = child(server.process.pid) if start == 'alone' else server.process.pid
        session = child(monitor)
        check(session, [])
        assert status(monitor, 'Uid') == ['0'] * 4
        pop.login()
        assert status(monitor, 'Uid') == [str(OWNER)] * 4           # root no more
        assert status(monitor, 'CapEff') == ['0000000000000000']
        check(session, [4] if store == 'mbox' else [])
        pop.multi('RETR 1')
        check(session, [4])
        assert pop.quit().startswith('+OK')


@two_processes
def test_a_session_without_root(spool):
    """Started by a user: no identity to change, but the session holds nothing else."""
    fill(spool, STORES[0])
    prefix = ['setpriv', '--reuid', str(OWNER), '--regid', str(OWNER), '--clear-groups'] if IS_ROOT else []
    spool.own(spool.users_file)
    with Server(spool, prefix=prefix) as server, server.pop() as pop:
        session = child(child(server.process.pid))
        assert set(holds(session)) == {0, 1, 2, 3}
        look(pop)
