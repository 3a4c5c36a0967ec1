"""Disks that are really full, to the last octet; quotas, limits, spools that cannot be written, and what others may have put where
almond keeps its own.  What needs no room is done, anything else is refused with a word on what to do, and no octet of the mailbox
changes.  Root's: each test mounts what it needs, in a name space that ends with the tests."""
import contextlib
import ctypes
import os
import pathlib
import re
import shutil
import stat
import subprocess
import tempfile

import pytest

import test_faults as faults
from conftest import GROUP, OWNER, SECONDS, needs_root, wire
from crash import BOX, K, SHAPE, Shape, body, home, make_spool, report, scale

pytestmark = needs_root
MIDDLE, LAST, ALL = SHAPE['middle'], SHAPE['last'], SHAPE['all']
LITTLE_BEHIND = faults.MIDDLE_AND_TAIL
MUCH_BEHIND = Shape('middle-and-large-tail', [900, 1100, 2 * K, 90 * K], [2, 4])
MIB = 1 << 20
STRANGER = 23456
WHAT_TO_DO = r'make room|free|ask|tell|try|log in|almond'
points = []


@pytest.fixture(scope='module', autouse=True)
def own_mounts(request):
    """All mounts are this process's alone, and go when it does."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())               # CLONE_NEWNS
    assert libc.mount(b'none', b'/', None, (1 << 14) | (1 << 18), None) == 0            # MS_REC | MS_PRIVATE
    faults.build()
    failed = request.session.testsfailed
    yield
    report('full disks, quotas, limits, read-only, foreign files', points=len(points),
           wrong=request.session.testsfailed - failed)


def run(*argv, **how):
    return subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS, **how)


# ---- a disk ----

class Disk:
    """A file system of its own, and whatever fills it."""

    def __init__(self, kind, base, size=None, options=''):
        self.kind, self.image = kind, base / 'image'
        self.path = self.top = base / 'disk'
        self.path.mkdir()
        if kind == 'tmpfs':
            self.mount('-t', 'tmpfs', '-o', f'size={size or 4 * MIB},mode=755{options}', 'tmpfs')
            return
        make, default = {'ext4': (['mkfs.ext4', '-q', '-m', '0'], 8 * MIB), 'xfs': (['mkfs.xfs', '-q'], 300 * MIB),
                         'btrfs': (['mkfs.btrfs', '-q'], 128 * MIB),
                         'btrfs-mixed': (['mkfs.btrfs', '-q', '--mixed'], 32 * MIB)}[kind]
        with self.image.open('wb') as f:
            f.truncate(size or default)
        done = run(*make, self.image)
        assert done.returncode == 0, done
        self.mount('-t', kind.partition('-')[0], '-o', 'loop' + options, self.image)

    def mount(self, *how):
        done = run('mount', *how, self.path)
        assert done.returncode == 0, done

    def fill(self):
        """Until not one octet more fits."""
        self.filler = self.path / 'filler'
        with open(self.filler, 'ab', buffering=0) as f:
            for size in (MIB, 64 * K, K, 1, K, 1):
                with contextlib.suppress(OSError):
                    for _ in range(1 << 16):
                        f.write(b'x' * size)
                    raise AssertionError('a disk without an end')
                with contextlib.suppress(OSError):
                    os.fsync(f.fileno())
        assert self.is_full()

    def empty(self):
        self.filler.unlink()
        run('sync', '-f', self.path)

    def is_full(self):
        try:
            with open(self.path / 'more', 'wb') as f:
                f.write(b'x' * 4096)
                f.flush()
                os.fsync(f.fileno())
        except OSError:
            return True
        finally:
            with contextlib.suppress(OSError):
                (self.path / 'more').unlink()
        return False

    def remove(self):
        done = run('umount', self.top)
        assert done.returncode == 0, done


def can(kind):
    kind = kind.partition('-')[0]
    known = pathlib.Path('/proc/filesystems').read_text().split()
    return kind in known and (kind == 'tmpfs' or shutil.which(f'mkfs.{kind}', path=os.environ['PATH'] + ':/usr/sbin:/sbin'))


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Where spools and images lie is no more than memory: a real disk's own fsyncs prove nothing here."""
    with tempfile.TemporaryDirectory(dir=faults.SPOT) as base:
        os.chmod(base, 0o755)
        monkeypatch.setattr(faults, 'SPOT', base)
        yield pathlib.Path(base)


def helpless(disk):
    """Data and what describes it share the space that is full, and nothing is changed in place: it cannot even cut a file."""
    return disk.kind == 'btrfs-mixed'


@pytest.fixture(params=scale(['tmpfs', 'ext4', 'btrfs'], ['tmpfs', 'ext4', 'xfs', 'btrfs', 'btrfs-mixed']))
def disk(request, memory):
    if not can(request.param):
        pytest.skip(f'no {request.param} here')
    made = Disk(request.param, memory)
    yield made
    made.remove()


# ---- sessions ----

def session(spool, gone, prefix=()):
    """One that deletes; its last answer and its log."""
    reply, _, log = faults.converse(spool, gone, prefix)
    points.append(reply)
    return reply, log


def look(spool, prefix=()):
    """One that only looks: PASS's answer and all mails."""
    reply, mails, log = faults.converse(spool, None, prefix)
    points.append(reply)
    return reply, mails, log


def hand_over(spool, mail=faults.MAIL, prefix=()):
    points.append(mail)
    return faults.hand_over(spool, mail, prefix)


def untouched(spool, shape, reply, want='-ERR [SYS/TEMP] '):
    """The commit was refused: not an octet changed, and someone who reads the answer knows what to do."""
    assert reply and reply.startswith(want), reply
    assert re.search(WHAT_TO_DO, reply), reply
    assert spool.read(BOX) == shape.old
    assert [name for name in faults.dirt(spool) if not name.startswith('.almond')] == []


def refused(spool, shape, reply):
    """The file system itself could not cut the file, and may have left half of that: no torn mail is served."""
    assert reply.startswith('-ERR [SYS/TEMP] ') and re.search(WHAT_TO_DO, reply), reply
    reply, mails, log = look(spool)
    whole = [faults.wanted(shape, which) for which in ('old', 'new', 'tail')]
    assert reply.startswith('-ERR [SYS/TEMP] ') or mails in whole, f'{reply}\n{log}'


def as_owner(spool):
    """almond without root: the mailbox's owner starts it."""
    spool.own(spool.users_file)
    return ['setpriv', '--reuid', str(OWNER), '--regid', str(GROUP), '--clear-groups']


# ---- full ----

@pytest.mark.parametrize('shape', [ALL, LAST, SHAPE['tail']], ids=str)
def test_what_needs_no_room(disk, shape):
    """Delete all, or the last ones: +OK."""
    spool = make_spool(shape, disk.path)
    disk.fill()
    reply, log = session(spool, shape.gone)
    if helpless(disk) and not reply.startswith('+OK'):
        refused(spool, shape, reply)
        disk.empty()
        assert faults.mended(spool, shape, ['old', 'new']) is None
        return
    assert reply.startswith('+OK'), f'{reply}\n{log}'
    assert spool.read(BOX) == shape.new
    assert faults.dirt(spool) == []
    assert look(spool)[1] == faults.wanted(shape, 'new')


@pytest.mark.parametrize('second', [False, True], ids=['first', 'second'])
def test_what_needs_room(disk, second):
    """From the middle: refused, with what to do, and nothing changed; with room again it is done."""
    spool = make_spool(MIDDLE, disk.path)
    if second:
        faults.second_time(spool, MIDDLE)
    disk.fill()
    reply, log = session(spool, MIDDLE.gone)
    untouched(spool, MIDDLE, reply)
    assert re.search('disk full', reply) and re.search('commit .*disk full', log), f'{reply}\n{log}'
    assert faults.dirt(spool) == []
    reply, mails, log = look(spool)
    assert reply.startswith('+OK') and mails == faults.wanted(MIDDLE, 'old')
    disk.empty()
    assert session(spool, MIDDLE.gone)[0].startswith('+OK')
    assert spool.read(BOX) == MIDDLE.new


def test_little_room_comes_from_the_end(disk):
    """The deleted mails at the end go first; the room that they leave is too small for the rest, which stays as it was."""
    spool = make_spool(LITTLE_BEHIND, disk.path)
    disk.fill()
    reply, log = session(spool, LITTLE_BEHIND.gone)
    if helpless(disk) and not reply.startswith('+OK'):
        refused(spool, LITTLE_BEHIND, reply)
        return
    seen = faults.state(LITTLE_BEHIND, spool.read(BOX))
    if reply.startswith('+OK'):
        assert seen == 'new'
    else:
        assert reply.startswith('-ERR [SYS/TEMP] ') and seen == 'tail', f'{reply} {seen}\n{log}'
    assert faults.dirt(spool) == []
    assert look(spool)[1] == faults.wanted(LITTLE_BEHIND, seen)


def test_much_room_comes_from_the_end(disk):
    """The deleted mails at the end go first, and the rest of the deletion finds room.  (A file system that gives freed blocks out
    only later refuses: then the kept mails are as they were.)"""
    spool = make_spool(MUCH_BEHIND, disk.path)
    disk.fill()
    reply, log = session(spool, MUCH_BEHIND.gone)
    if helpless(disk) and not reply.startswith('+OK'):
        refused(spool, MUCH_BEHIND, reply)
        return
    seen = faults.state(MUCH_BEHIND, spool.read(BOX))
    if disk.kind in ('tmpfs', 'ext4') or reply.startswith('+OK'):
        assert reply.startswith('+OK') and seen == 'new', f'{reply} {seen}\n{log}'
    else:
        assert reply.startswith('-ERR [SYS/TEMP] ') and seen == 'tail', f'{reply} {seen}\n{log}'
    assert faults.dirt(spool) == []
    assert look(spool)[1] == faults.wanted(MUCH_BEHIND, seen)


@pytest.mark.parametrize('room', scale([0, 3], [0, 1, 3, 8]))
def test_a_delivery(disk, room):
    """Exit code 75 and the mailbox as it was, with no room or with too little."""
    spool = make_spool(MIDDLE, disk.path)
    spare = disk.path / 'spare'
    spare.write_bytes(b'x' * 4096 * room)
    disk.fill()
    spare.unlink()
    run('sync', '-f', disk.path)
    mail = body('large', 600 * K)
    code = hand_over(spool, mail)
    assert code == 75
    if helpless(disk):
        disk.empty()
        assert look(spool)[0].startswith('+OK')
        disk.fill()
    assert spool.read(BOX) == MIDDLE.old and faults.dirt(spool) == []
    assert look(spool)[1] == faults.wanted(MIDDLE, 'old')
    disk.empty()
    assert hand_over(spool, mail) == 0
    assert faults.delivered(MIDDLE.old, spool.read(BOX), mail) == 'whole'


def test_a_maildir(disk):
    """An unlink wants no room; a delivery does."""
    spool = make_spool(MIDDLE, disk.path)
    (spool.path / BOX).unlink()
    spool.maildir(BOX, faults.FILES)
    disk.fill()
    assert hand_over(spool, body('large', 600 * K)) == 75
    assert faults.files(spool) == list(faults.FILES.values())
    assert list((spool.path / BOX / 'tmp').iterdir()) == []
    reply, log = session(spool, [1, 3])
    assert reply.startswith('+OK'), f'{reply}\n{log}'
    assert faults.files(spool) == [mail for i, mail in enumerate(faults.FILES.values()) if i not in (0, 2)]


def test_no_inode_is_left(memory):
    """No dot-lock can be made: the kernel's locks do.  A journal that is there is used, one that is not cannot be made."""
    disk = Disk('tmpfs', memory, options=',nr_inodes=64')
    try:
        spools = [make_spool(shape, disk.path) for shape in (MIDDLE, MIDDLE, ALL)]
        faults.second_time(spools[1], MIDDLE)
        with pytest.raises(OSError):
            for i in range(100):
                (disk.path / f'filler{i}').touch()
        reply, log = session(spools[0], MIDDLE.gone)
        untouched(spools[0], MIDDLE, reply)
        reply, log = session(spools[1], MIDDLE.gone)
        assert reply.startswith('+OK') and spools[1].read(BOX) == MIDDLE.new, log
        reply, log = session(spools[2], ALL.gone)
        assert reply.startswith('+OK') and spools[2].read(BOX) == b'', log
        code = hand_over(spools[0])
        assert code in (0, 75) and faults.delivered(MIDDLE.old, spools[0].read(BOX)) == ('absent' if code else 'whole')
    finally:
        disk.remove()


# ---- quota, limit ----

def test_a_quota(memory):
    """btrfs counts by subvolume and says EDQUOT; elsewhere faults.c says it."""
    if not can('btrfs') or not shutil.which('btrfs'):
        pytest.skip('no btrfs here')
    disk = Disk('btrfs', memory, 200 * MIB)
    try:
        for argv in (['quota', 'enable', disk.top], ['subvolume', 'create', disk.top / 'sub'],
                     ['qgroup', 'limit', '2M', disk.top / 'sub']):
            done = run('btrfs', *argv)
            assert done.returncode == 0, done
        disk.path = disk.top / 'sub'
        spools = {shape.name: make_spool(shape, disk.path) for shape in (MIDDLE, LAST, ALL)}
        faults.second_time(spools['middle'], MIDDLE)
        disk.fill()
        with pytest.raises(OSError, match='quota'):
            disk.filler.with_name('more').write_bytes(b'x' * MIB)
        reply, log = session(spools['middle'], MIDDLE.gone)
        untouched(spools['middle'], MIDDLE, reply)
        assert 'quota' in reply and 'quota' in log
        assert hand_over(spools['middle'], body('large', 600 * K)) == 75
        assert spools['middle'].read(BOX) == MIDDLE.old and faults.dirt(spools['middle']) == []
        for shape in (LAST, ALL):
            reply, log = session(spools[shape.name], shape.gone)
            if not reply.startswith('+OK'):     # btrfs's ftruncate may say EDQUOT itself: for a block that it copies, or its own trees
                refused(spools[shape.name], shape, reply)
            else:
                assert reply.startswith('+OK') and spools[shape.name].read(BOX) == shape.new, f'{reply}\n{log}'
    finally:
        disk.remove()


@pytest.mark.parametrize('limit', [0, 100, 1000, 5000, 8192, 9500, 10500, 12000, 13000, 14000, 15000, 16000, 40000])
def test_a_file_size_limit(limit):
    """RLIMIT_FSIZE, as a careless start script leaves it: no signal kills almond, and the answer is true."""
    for shape in (MIDDLE, LITTLE_BEHIND, LAST, ALL):
        spool = make_spool(shape, faults.SPOT)
        reply, log = session(spool, shape.gone, ['prlimit', f'--fsize={limit}'])
        assert reply, log
        if shape.truncation or limit >= 40000:
            assert reply.startswith('+OK'), f'{reply}\n{log}'
        if reply.startswith('+OK'):
            assert spool.read(BOX) == shape.new
        else:
            untouched(spool, shape, reply)
        reply, mails, log = look(spool, ['prlimit', f'--fsize={limit}'])
        assert reply.startswith('+OK') and faults.dirt(spool) == [], f'{reply}\n{log}'
        left = spool.read(BOX)
        code = hand_over(spool, prefix=['prlimit', f'--fsize={limit}'])
        assert code in (0, 75) and (code == 0 or limit < 40000)
        assert faults.delivered(left, spool.read(BOX)) == ('absent' if code else 'whole')
        assert faults.dirt(spool) == []
        assert look(spool)[0].startswith('+OK')


# ---- read-only ----

@contextlib.contextmanager
def read_only(spool):
    """The spool's directory, on a mount that nobody can write to."""
    assert run('mount', '--bind', spool.path, spool.path).returncode == 0
    try:
        assert run('mount', '-o', 'remount,bind,ro', spool.path).returncode == 0
        yield
    finally:
        assert run('umount', spool.path).returncode == 0


@pytest.mark.parametrize('shape', [MIDDLE, LAST, ALL], ids=str)
def test_a_read_only_spool(shape):
    """Mail can be read; a deletion is refused, as is a delivery."""
    spool = make_spool(shape, faults.SPOT)
    with read_only(spool):
        reply, mails, log = look(spool)
        assert reply.startswith('+OK') and mails == faults.wanted(shape, 'old'), f'{reply}\n{log}'
        reply, log = session(spool, shape.gone)
        untouched(spool, shape, reply, '-ERR [SYS/')
        assert 'read-only' in reply and 'read-only' in log, f'{reply}\n{log}'
        assert hand_over(spool) == 75
        assert spool.read(BOX) == shape.old
    assert session(spool, shape.gone)[0].startswith('+OK')
    assert spool.read(BOX) == shape.new


def test_a_read_only_maildir():
    spool = faults.make_maildir()
    with read_only(spool):
        reply, mails, log = look(spool)
        assert reply.startswith('+OK') and mails == [wire(mail) for mail in faults.FILES.values()]
        reply, log = session(spool, [1, 3])
        assert reply.startswith('-ERR [SYS/') and re.search(WHAT_TO_DO, reply) and 'read-only' in log, f'{reply}\n{log}'
        assert hand_over(spool) == 75
        assert faults.files(spool) == list(faults.FILES.values())


def first_torn(shape):
    """A mailbox that a crash left torn, its journal beside it."""
    at = [n for n, is_torn in faults.torn_points(shape) if is_torn]
    assert at
    return faults.torn(shape, at[len(at) // 2])


def test_a_torn_mailbox_in_a_read_only_spool():
    """It cannot be mended, so it is not served; nor is it delivered to.  Writable again, it is mended."""
    spool = first_torn(MIDDLE)
    torn = spool.read(BOX)
    with read_only(spool):
        reply, mails, log = look(spool)
        assert reply.startswith('-ERR [SYS/TEMP] ') and not mails, f'{reply}\n{log}'
        assert re.search('read-only|err=-30', log), log
        assert hand_over(spool) == 75
        assert spool.read(BOX) == torn
    assert faults.mended(spool, MIDDLE, ['old', 'new']) is None


def test_a_torn_mailbox_on_a_full_disk(disk):
    """Mending rewrites what is there, and wants no room where the file system does not copy on write."""
    spool = make_spool(MIDDLE, disk.path)
    donor = first_torn(MIDDLE)
    shutil.copytree(donor.path / '.almond' / BOX, home(spool))
    for path in (home(spool), *home(spool).iterdir()):
        spool.own(path, 0o700 if path.is_dir() else 0o600)
    spool.mbox(BOX, donor.read(BOX))
    disk.fill()
    reply, mails, log = look(spool)
    if disk.kind.startswith('btrfs') and reply.startswith('-ERR [SYS/TEMP] '):
        disk.empty()
        reply, mails, log = look(spool)
    assert reply.startswith('+OK') and mails == faults.wanted(MIDDLE, 'old'), f'{reply}\n{log}'
    assert spool.read(BOX) == MIDDLE.old and faults.dirt(spool) == []


# ---- a place that is not there, or not ours ----

def test_without_root_and_without_a_place():
    """A spool that is root's, with no .almond: the user cannot make one.  What needs none is done, the rest refused."""
    for shape in (MIDDLE, LAST, ALL, SHAPE['tail']):
        spool = make_spool(shape, faults.SPOT)
        os.rmdir(spool.path / '.almond')
        os.chown(spool.path, 0, 0)
        os.chmod(spool.path, 0o1777)
        reply, log = session(spool, shape.gone, as_owner(spool))
        if shape.truncation:
            assert reply.startswith('+OK') and spool.read(BOX) == shape.new, f'{reply}\n{log}'
        else:
            untouched(spool, shape, reply, '-ERR [SYS/')
            assert re.search(r'(almond -T|almond\(8\))', log), log
        assert not (spool.path / '.almond').exists()
        reply, mails, log = look(spool, as_owner(spool))
        assert reply.startswith('+OK') and mails == faults.wanted(shape, 'new' if shape.truncation else 'old')
        before = spool.read(BOX)
        code = hand_over(spool, prefix=as_owner(spool))
        assert code in (0, 75) and faults.delivered(before, spool.read(BOX)) == ('absent' if code else 'whole')


def place_of_a_stranger(spool, there):
    os.chown(there, STRANGER, STRANGER)


def place_that_all_can_write(spool, there):
    os.chmod(there, 0o777)


def place_that_is_a_link(spool, there):
    there.rename(spool.base / 'elsewhere')
    there.symlink_to(spool.base / 'elsewhere')


def place_that_is_a_file(spool, there):
    shutil.rmtree(there)
    there.write_bytes(b'a file')
    spool.own(there)


def top_that_is_a_link(spool, there):
    there.parent.rename(spool.base / 'elsewhere')
    there.parent.symlink_to(spool.base / 'elsewhere')


def top_of_a_stranger(spool, there):
    os.chown(there.parent, STRANGER, STRANGER)


def journal_that_is_a_link(spool, there):
    (there / 'journal').rename(spool.base / 'elsewhere')
    (there / 'journal').symlink_to(spool.base / 'elsewhere')


def journal_that_is_a_fifo(spool, there):
    (there / 'journal').unlink()
    os.mkfifo(there / 'journal')
    spool.own(there / 'journal')


def journal_with_two_names(spool, there):
    os.link(there / 'journal', spool.base / 'elsewhere')


def journal_of_a_stranger(spool, there):
    os.chown(there / 'journal', STRANGER, STRANGER)
    os.chmod(there / 'journal', 0o666)


def journal_that_is_a_directory(spool, there):
    (there / 'journal').unlink()
    (there / 'journal').mkdir()
    spool.own(there / 'journal', 0o700)


def picture(*tops):
    """Kind, owner and content of all that lies below."""
    seen = {}
    for top in tops:
        for path in [top, *sorted(top.rglob('*'))] if top.exists() else []:
            if path.name == 'note':         # almond's, beside a journal that is not
                continue
            st = path.lstat()
            data = (path.read_bytes() if stat.S_ISREG(st.st_mode) else
                    os.readlink(path) if stat.S_ISLNK(st.st_mode) else None)
            seen[str(path)] = (st.st_mode, st.st_uid, st.st_nlink, data)
    return seen


@pytest.mark.parametrize('foul', [
    place_of_a_stranger, place_that_all_can_write, place_that_is_a_link, place_that_is_a_file, top_that_is_a_link,
    top_of_a_stranger, journal_that_is_a_link, journal_that_is_a_fifo, journal_with_two_names, journal_of_a_stranger,
    journal_that_is_a_directory], ids=lambda f: f.__name__)
def test_a_place_that_is_not_ours(foul):
    """Not followed, not believed, not changed, and logged.  The journal in it would undo a deletion, were it read; the mailbox
    stays as it is, also where a mail in its middle is to go.  What needs no journal is done."""
    spool = first_torn(MIDDLE)
    there = home(spool)
    foul(spool, there)
    torn = spool.read(BOX)
    places = (spool.path / '.almond', spool.base / 'elsewhere')
    before = picture(*places)
    reply, mails, log = look(spool)
    assert reply.startswith(('+OK', '-ERR [SYS/')), f'{reply}\n{log}'
    assert spool.read(BOX) == torn and picture(*places) == before, log
    spool.mbox(BOX, MIDDLE.old)
    reply, log2 = session(spool, MIDDLE.gone)
    untouched(spool, MIDDLE, reply, '-ERR [SYS/')
    assert picture(*places) == before, log2
    assert re.search(r'almond -T|almond\(8\)|unreadable', log2), f'{log}\n{log2}'
    code = hand_over(spool)
    assert code in (0, 75) and faults.delivered(MIDDLE.old, spool.read(BOX)) == ('absent' if code else 'whole')
    assert picture(*places) == before
    spool.mbox(BOX, ALL.old)
    reply, log = session(spool, ALL.gone)
    assert reply.startswith(('+OK', '-ERR [SYS/')), f'{reply}\n{log}'
    assert spool.read(BOX) == (b'' if reply.startswith('+OK') else ALL.old)
    assert picture(*places) == before, log


def test_a_journal_of_another_mailbox_is_no_harm():
    """Copied from elsewhere, or left from before the mailbox was made anew: no octet of it gets into the mailbox."""
    for shape in (LAST, SHAPE['twins'], SHAPE['two-runs']):
        spool = first_torn(MIDDLE)
        spool.mbox(BOX, shape.old)
        reply, mails, log = look(spool)
        assert reply.startswith('+OK') and mails == faults.wanted(shape, 'old'), f'{reply}\n{log}'
        assert spool.read(BOX) == shape.old
        assert session(spool, shape.gone)[0].startswith('+OK') and spool.read(BOX) == shape.new
