"""A spool in which others may make files: each trick is refused with a clear reply and a line in the log, and nothing is touched.
Three starts: root with a users file, root with the system's accounts (copies, in a mount name space of the server's), a plain user
from inetd.  What needs root: other owners, devices, the first two starts."""
import hashlib
import os
import re
import socket
import stat

import pytest

from conftest import ALMOND, GROUP, IS_ROOT, OWNER, SEPARATOR, Pop, Program, Server, switches, wire

SWITCHES = switches(ALMOND)
MBOX, MAILDIR = SWITCHES['ENABLE_MBOX'], SWITCHES['ENABLE_MAILDIR']
pytestmark = pytest.mark.skipif(not SWITCHES['ENABLE_USERS'] or not SWITCHES['ENABLE_SYSTEM'] or not SWITCHES['ENABLE_ALONE'],
                                reason='a build without a users file, system accounts or a listener')
mbox_only = pytest.mark.skipif(not MBOX, reason='a build without mbox')
maildir_only = pytest.mark.skipif(not MAILDIR, reason='a build without Maildir')
OTHER = OWNER + 1
ONE, TWO, THREE = (b'Subject: %d\n\nbody %d\n' % (i, i) for i in (1, 2, 3))
SECRET = SEPARATOR + b'Subject: secret\n\nof another\n\n'


class Inetd(Program):
    """From inetd, as the user whose mail it is."""

    def __init__(self, spool):
        self.ours, theirs = socket.socketpair()
        who = ['setpriv', '--reuid', str(OWNER), '--regid', str(GROUP), '--clear-groups'] if IS_ROOT else []
        with theirs:
            super().__init__([*who, ALMOND, '-i', '-E', '-d', spool.path, '-u', spool.users_file], stdin=theirs, stdout=theirs)

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


STARTS = {'inetd': Inetd}
if IS_ROOT:
    STARTS['root'] = Server
    STARTS['system'] = lambda spool: Server(spool, '-s', users=False, prefix=spool.with_system())


@pytest.fixture
def tree(spool):
    """A spool as /var/mail is, with another's mail in it, and a file that no one is to read."""
    spool.users(user='secret', other='secret')
    spool.own(spool.users_file)
    spool.path.chmod(0o1777)
    for path, mode in ((spool.path / 'victim', 0o600), (spool.base / 'readable', 0o644)):
        path.write_bytes(SECRET)
        path.chmod(mode)
        if IS_ROOT:
            os.chown(path, OTHER, OTHER)
    return spool


def picture(spool, committed=False):
    """Everything, outside of the spool too, with what regular files hold and their time of access.  A commit, one that fails too,
    reads the mailbox, and makes and removes a dot-lock, which the spool's times show."""
    seen = {}
    for path in [spool.path, *sorted(spool.base.rglob('*'))]:
        st = path.lstat()
        times = (st.st_mtime_ns, st.st_ctime_ns) + ((st.st_atime_ns,) if stat.S_ISREG(st.st_mode) and not committed else ())
        if committed and path == spool.path:
            times = ()
        small = stat.S_ISREG(st.st_mode) and st.st_size < 1 << 20 and os.access(path, os.R_OK)
        seen[str(path)] = [st.st_mode, st.st_uid, st.st_gid, st.st_ino, st.st_nlink, st.st_size, times, small]
    for path, entry in seen.items():
        if entry[-1] and path != str(spool.users_file) and not path.endswith(('/passwd', '/shadow')):
            fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
            entry.append(hashlib.sha256(os.read(fd, 1 << 20)).hexdigest())
            os.close(fd)
        elif entry[-1]:
            entry[6] = ()               # the server reads these
    return seen


def refused(server, log, code=r'\[SYS/PERM\]', name='user'):
    """A login that is right, and a mailbox that is not."""
    with server.pop() as pop:
        pop.ok(f'USER {name}')
        reply = pop.cmd('PASS secret')
        assert re.match(f'-ERR {code} .+', reply), reply
        pop.closed()
    server.wait_log(log)


# ---- what lies in a mailbox's place ----

def symlink_to(target):
    def make(spool, path):
        path.symlink_to(spool.base / target)
        if IS_ROOT:
            os.chown(path, OWNER, GROUP, follow_symlinks=False)
    return make


def hard_link(spool, path):
    os.link(spool.path / 'victim', path)


def own_hard_link(spool, path):
    os.link(spool.mails('mine', [ONE]), path)


def fifo(spool, path):
    os.mkfifo(path)
    spool.own(path)


def unix_socket(spool, path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
    spool.own(path)


def device(number):
    def make(spool, path):
        os.mknod(path, stat.S_IFCHR | 0o600, number)
        spool.own(path)
    return make


def foreign(mode):
    def make(spool, path):
        path.write_bytes(SECRET)
        path.chmod(mode)
        os.chown(path, OTHER, OTHER)
    return make


def unreadable(spool, path):
    spool.mails(path.name, [ONE])
    path.chmod(0)


def directory(*parts):
    def make(spool, path):
        path.mkdir()
        spool.own(path, 0o700)
        for part in parts:
            (path / part).mkdir()
            spool.own(path / part, 0o700)
    return make


def odd_part(part, make_part):
    """A Maildir in which new or cur is something else."""
    def make(spool, path):
        directory('new' if part == 'cur' else 'cur', 'tmp')(spool, path)
        make_part(spool, path / part)
    return make


def file_part(spool, path):
    path.write_bytes(SECRET)
    spool.own(path)


def foreign_maildir(spool, path):
    directory('cur', 'new', 'tmp')(spool, path)
    (path / 'new' / '1.a').write_bytes(ONE)
    for p in (path, *path.rglob('*')):
        os.chown(p, OTHER, OTHER)
        p.chmod(0o755)


REFUSED = r'mailbox user refused: '
NO_MAILDIR = REFUSED + ('.*no Maildir' if MAILDIR else '.*directory')
UNREADABLE = REFUSED + '|note user=user .*unreadable'
TRICKS = {
    'symlink to another\'s': (symlink_to('spool/victim'), REFUSED + '.*symbolic link'),
    'symlink to a readable file': (symlink_to('readable'), REFUSED + '.*symbolic link'),
    'symlink to nothing': (symlink_to('nothing'), REFUSED + '.*symbolic link'),
    'symlink to a directory': (symlink_to('spool'), REFUSED + '.*symbolic link'),
    'hard link to another\'s': (hard_link, REFUSED),
    'hard link to one\'s own': (own_hard_link, REFUSED + '.*hard link'),
    'fifo': (fifo, REFUSED + '.*file'),
    'socket': (unix_socket, UNREADABLE),
    'zero device': (device(os.makedev(1, 5)), REFUSED + '.*file'),
    'terminal': (device(os.makedev(5, 0)), UNREADABLE),
    'foreign': (foreign(0o600), REFUSED),
    'foreign, readable': (foreign(0o666), REFUSED + '.*another user'),
    'foreign Maildir': (foreign_maildir, REFUSED + '.*another user'),
    'unreadable': (unreadable, REFUSED + '.*read it'),
    'empty directory': (directory(), NO_MAILDIR),
    'only cur': (directory('cur'), NO_MAILDIR),
    'only new': (directory('new', 'tmp'), NO_MAILDIR),
    'new is a file': (odd_part('new', file_part), NO_MAILDIR),
    'cur is a file': (odd_part('cur', file_part), NO_MAILDIR),
    'new is a fifo': (odd_part('new', fifo), NO_MAILDIR),
    'cur is a symlink': (odd_part('cur', symlink_to('spool')), NO_MAILDIR + '|symbolic link|unreadable'),
    'new is a symlink': (odd_part('new', symlink_to('spool')), NO_MAILDIR + '|symbolic link|unreadable'),
}
FOR_ROOT = ('zero device', 'terminal', 'foreign', 'foreign, readable', 'foreign Maildir')
OF_MBOX = ('hard link to another\'s', 'hard link to one\'s own', 'foreign', 'foreign, readable', 'unreadable')
CASES = [pytest.param(start, trick, id=f'{start}-{trick}'.replace(' ', '-')) for start in STARTS for trick in TRICKS
         # With a users file, root serves each mailbox as its owner: there is no foreign one.
         if not (trick.startswith('foreign') and start == 'root') and (MBOX or trick not in OF_MBOX) and
         (MAILDIR or not trick.startswith('foreign M'))]


@pytest.mark.parametrize('start,trick', CASES)
def test_trick(tree, start, trick):
    if trick in FOR_ROOT and not IS_ROOT:
        pytest.skip('only root can make it')
    make, log = TRICKS[trick]
    make(tree, tree.path / 'user')
    before = picture(tree)
    with STARTS[start](tree) as server:
        refused(server, log, code=r'\[SYS/(PERM|TEMP)\]')
    assert picture(tree) == before


@mbox_only
@pytest.mark.skipif(not IS_ROOT, reason='only root can make a file of root')
@pytest.mark.parametrize('mode', (0o600, 0o666))
def test_a_mailbox_of_root(tree, mode):
    """Nobody's session reads it, whoever's name it bears."""
    path = tree.path / 'user'
    path.write_bytes(SECRET)
    path.chmod(mode)
    before = picture(tree)
    for start in STARTS.values():
        with start(tree) as server:
            refused(server, REFUSED)
    assert picture(tree) == before


@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('store', [pytest.param('mbox', marks=mbox_only), pytest.param('maildir', marks=maildir_only)])
def test_a_terabyte_of_nothing(tree, start, store):
    """Far more than is on the disk: refused before anything is read."""
    if store == 'mbox':
        path = tree.mbox('user', SEPARATOR + ONE)
    else:
        path = tree.maildir('user', {'new/1.a': ONE}) / 'new/1.a'
    os.truncate(path, 1 << 40)
    before = picture(tree)
    with STARTS[start](tree) as server:
        if store == 'mbox':
            refused(server, REFUSED + '.*disk')
        else:
            with server.pop('user') as pop:
                assert pop.cmd('STAT') == '+OK 0 0'
            server.wait_log('maildir: new/1.a of user left out')
    assert picture(tree) == before


# ---- names ----

NAMES = {
    'up': b'../x', 'dots': b'..', 'dot': b'.x', 'slash': b'a/b', 'slash first': b'/etc/passwd', 'slash last': b'user/',
    'empty': b'', 'blank': b' ', 'lock': b'user.lock', 'only lock': b'.lock', 'NUL': b'user\0', 'NUL inside': b'us\0er',
    'tab': b'us\ter', 'escape': b'\x1b[2Juser', 'CR': b'us\rer', 'DEL': b'user\x7f', 'long': b'a' * 65, 'longer': b'a' * 240,
    '300': b'a' * 300, '70000': b'a' * 70000, 'newline of UTF-8': b'user\xe2\x80\xa8', 'percent': b'%s%n%x/',
}


@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('name', NAMES)
def test_name(tree, start, name):
    """Refused, logged without its octets, and it leads nowhere."""
    if MBOX:
        tree.mails('user', [ONE])
        tree.mbox('a', SECRET)
    before = picture(tree)
    with STARTS[start](tree) as server, server.pop() as pop:
        reply = pop.cmd(b'USER ' + NAMES[name])
        if reply.startswith('+OK'):             # it can be a file's name: then there is no such user
            reply = pop.cmd('PASS secret')
        assert re.match(r'-ERR .*(name|line|NUL)', reply), reply
        pop.err('PASS secret')
        pop.err('STAT')
        server.wait_log('refused|auth fail')
        assert pop.quit().startswith('+OK')
        assert re.fullmatch(r'[\x20-\x7e\n]*', server.log())
        assert 'a' * 65 not in server.log()
    assert picture(tree) == before


# ---- what lies in a Maildir ----

@maildir_only
@pytest.mark.parametrize('start', STARTS)
def test_odd_things_in_a_maildir(tree, start):
    """Only plain files are messages; nothing else is opened, read or removed, whatever is asked for."""
    path = tree.maildir('user', {'new/1.a': ONE, 'cur/2.b:2,S': TWO, 'new/.hidden': SECRET})
    symlink_to('readable')(tree, path / 'new/3.symlink')
    symlink_to('spool/victim')(tree, path / 'cur/4.symlink:2,')
    fifo(tree, path / 'new/5.fifo')
    unix_socket(tree, path / 'cur/6.socket')
    directory('cur', 'new')(tree, path / 'new/7.directory')
    if IS_ROOT:
        device(os.makedev(1, 5))(tree, path / 'cur/8.device')
    before = picture(tree)
    with STARTS[start](tree) as server, server.pop('user') as pop:
        assert pop.sizes() == {1: len(wire(ONE)), 2: len(wire(TWO))}
        assert pop.multi('RETR 1') == wire(ONE) and pop.multi('RETR 2') == wire(TWO)
        assert picture(tree) == before
        pop.ok('DELE 1')
        pop.ok('DELE 2')
        assert pop.quit().startswith('+OK')
    for gone in ('new/1.a', 'cur/2.b:2,S'):
        del before[str(path / gone)]
    after = picture(tree)
    assert set(after) == set(before)
    assert all(after[p] == before[p] for p in after if not stat.S_ISDIR(before[p][0]))


@maildir_only
@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('trick', ('symlink', 'fifo', 'directory', 'gone', 'unreadable'))
def test_a_message_that_turns_into_something_else(tree, start, trick):
    """After the login: RETR refuses it, and the others can still be read."""
    path = tree.maildir('user', {'new/1.a': ONE, 'new/2.b': TWO, 'new/3.c': THREE})
    victim = path / 'new/2.b'
    with STARTS[start](tree) as server, server.pop('user') as pop:
        victim.unlink()
        if trick == 'symlink':
            symlink_to('readable')(tree, victim)
        elif trick == 'fifo':
            fifo(tree, victim)
        elif trick == 'directory':
            directory()(tree, victim)
        elif trick == 'unreadable':
            victim.write_bytes(TWO)
            tree.own(victim, 0)
        before = picture(tree)
        assert re.match(r'-ERR \[SYS/TEMP\] ', pop.cmd('RETR 2'))
        assert pop.multi('RETR 1') == wire(ONE) and pop.multi('RETR 3') == wire(THREE)
        assert pop.quit().startswith('+OK')
        if trick != 'gone':
            server.wait_log('maildir: new/2.b of user left out|unreadable')
    assert picture(tree) == before


# ---- a mailbox that changes under a session ----

@pytest.fixture
def box(tree):
    return tree.mails('user', [ONE, TWO, THREE])


@mbox_only
@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('mails', [[TWO, ONE, THREE], [ONE, TWO, THREE]], ids=['other', 'copy'])
def test_replaced_by_rename(tree, box, start, mails):
    """The new mailbox is another one: nothing is taken out of it."""
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        tree.mails('fresh', mails).rename(box)
        before = picture(tree, committed=True)
        reply = pop.cmd('RETR 2')
        if reply.startswith('+OK'):
            assert pop.text() == wire(TWO)      # what was indexed, or nothing
        assert pop.quit().startswith('-ERR [SYS/TEMP]')
        server.wait_log('commit user=user .*: ')
    assert picture(tree, committed=True) == before


@mbox_only
@pytest.mark.parametrize('start', STARTS)
def test_removed(tree, box, start):
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        box.unlink()
        before = picture(tree, committed=True)
        assert pop.quit().startswith('-ERR [SYS/')
        server.wait_log('commit user=user .*: ')
    assert picture(tree, committed=True) == before


@mbox_only
@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('trick', ('symlink', 'fifo', 'hard link'))
def test_replaced_by_a_trick(tree, box, start, trick):
    """Between login and QUIT: what is committed to is looked at again."""
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        if trick == 'hard link':
            os.link(box, tree.path / 'link')
            os.link(box, tree.path / 'fresh')
            os.rename(tree.path / 'fresh', tree.path / 'link')
            box.unlink()
            os.link(tree.path / 'victim', box)
        else:
            box.unlink()
            (symlink_to('spool/victim') if trick == 'symlink' else fifo)(tree, box)
        before = picture(tree, committed=True)
        assert pop.quit().startswith('-ERR [SYS/')
        server.wait_log('commit user=user .*: ')
    assert picture(tree, committed=True) == before


@mbox_only
@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('left', (0, 10, -12, -1))
def test_truncated(tree, box, start, left):
    """Somebody cut it short: what is cut is refused, and nothing is taken out of the rest."""
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        os.truncate(box, left if left >= 0 else box.stat().st_size + left)
        before = picture(tree, committed=True)
        if left != -1:
            assert pop.cmd('RETR 3').startswith('-ERR [SYS/TEMP]')
            assert pop.cmd('DELE 3').startswith('-ERR [SYS/TEMP]')
            server.wait_log('another program changed the mailbox')
        else:                                   # the blank line behind it is no part of it
            assert pop.multi('RETR 3') == wire(THREE)
        assert pop.quit().startswith('-ERR [SYS/TEMP]')
        server.wait_log('commit user=user .*: ')
    assert picture(tree, committed=True) == before


def drain(pop):
    """How much comes until the line ends, and the last five octets."""
    count, end = 0, pop.buffer
    while data := pop.sock.recv(1 << 20):
        count += len(data)
        end = (end + data)[-5:]
    return count, end[-5:]


@mbox_only
@pytest.mark.parametrize('start', STARTS)
def test_truncated_inside_a_retr(tree, start):
    """The line is cut without the final dot: the client knows that it has not got the message."""
    big = b'Subject: big\n\n' + b'0123456789abcdef' * 4096 * 400 + b'\n'
    box = tree.mails('user', [ONE, big, THREE])
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.send('RETR 2\r\n')
        pop.raw_line()
        os.truncate(box, 4096)
        count, end = drain(pop)
        assert end != b'\r\n.\r\n' and count < len(big)
        server.wait_log('another program changed the mailbox')
    assert box.stat().st_size == 4096


@mbox_only
@pytest.mark.parametrize('start', STARTS)
def test_rewritten_inside_a_retr(tree, start):
    """The same length, other mail: the final dot does not come."""
    big = b'Subject: big\n\n' + b'0123456789abcdef' * 4096 * 400 + b'\n'
    box = tree.mails('user', [ONE, big, THREE])
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.send('RETR 2\r\n')
        pop.raw_line()
        with box.open('r+b') as f:
            f.write(box.read_bytes().replace(b'Subject: big', b'Subject: BIG'))
        count, end = drain(pop)
        assert end != b'\r\n.\r\n' and count
        server.wait_log('another program changed the mailbox')


REWRITES = {
    'first gone': [TWO, THREE], 'another order': [THREE, TWO, ONE], 'a status': [ONE.replace(b'\n\n', b'\nStatus: RO\n\n', 1), TWO, THREE],
    'one more in front': [b'Subject: 0\n\nzero\n', ONE, TWO, THREE], 'two are one': [ONE + b'\n' + TWO, THREE],
    'all other': [b'Subject: x\n\nx\n'] * 3,
}


@mbox_only
@pytest.mark.parametrize('start', STARTS)
@pytest.mark.parametrize('how', REWRITES)
def test_rewritten_in_place(tree, box, start, how):
    """By a mail program: the same file, other extents.  No message is mistaken for another."""
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        tree.mails('user', REWRITES[how])
        before = picture(tree, committed=True)
        if how == 'two are one' or REWRITES[how][1] == TWO and len(REWRITES[how][0]) == len(ONE):
            reply = pop.cmd('RETR 2')           # where it was, it may still be
            if reply.startswith('+OK'):
                assert pop.text() == wire(TWO)
        else:
            assert pop.cmd('RETR 2').startswith('-ERR [SYS/TEMP]')
            assert pop.cmd('DELE 2').startswith('-ERR [SYS/TEMP]')
            assert pop.cmd('TOP 2 0').startswith('-ERR [SYS/TEMP]')
            server.wait_log('another program changed the mailbox')
        assert pop.quit().startswith('-ERR [SYS/TEMP]')
        server.wait_log('commit user=user .*: ')
    assert picture(tree, committed=True) == before


@mbox_only
@pytest.mark.parametrize('start', STARTS)
def test_appended(tree, box, start):
    """No rewriting: mail that came meanwhile is kept, and the session goes on."""
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        with box.open('ab') as f:
            f.write(SECRET)
        assert pop.multi('RETR 2') == wire(TWO)
        pop.ok('DELE 3')
        assert pop.quit().startswith('+OK')
    assert box.read_bytes() == SEPARATOR + TWO + b'\n' + SECRET


@mbox_only
@pytest.mark.parametrize('start', STARTS)
def test_touched(tree, box, start):
    """Times alone say nothing: the mail is what it was."""
    with STARTS[start](tree) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        os.utime(box, (0, 0))
        assert pop.multi('RETR 2') == wire(TWO)
        box.write_bytes(box.read_bytes())
        assert pop.multi('RETR 3') == wire(THREE)
        assert pop.quit().startswith('+OK')
    assert box.read_bytes() == b''.join(SEPARATOR + mail + b'\n' for mail in (TWO, THREE))


@pytest.mark.parametrize('start', [s for s in STARTS if s != 'inetd'])
def test_another_users_mail(tree, start):
    """A right password opens one's own mailbox and no other; each is read as its owner."""
    if not MBOX:
        pytest.skip('a build without mbox')
    tree.mails('user', [ONE])
    tree.mails('other', [TWO])
    with STARTS[start](tree) as server:
        with server.pop() as pop:
            pop.ok('USER user')
            pop.ok('USER other')                # the last name counts
            pop.ok('PASS secret')
            assert pop.multi('RETR 1') == wire(TWO)
            pop.quit()
        with server.pop() as pop:
            pop.ok('USER victim')
            assert pop.cmd('PASS secret').startswith('-ERR [AUTH]')
