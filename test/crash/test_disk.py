"""Power cuts of a real block device below real file systems.

A loop device lies over a file of recorder.c's, which writes down every write and every flush that the kernel sends to
the "disk".  A file system on it holds mailboxes; sessions delete, `almond deliver` delivers, all is recorded.  A power
cut is then any prefix of the record in which, of what was written after the last flush, any part may be missing: a disk
with a cache may write in whatever order it likes between two flushes, in units of a sector.  Each such disk is mounted
(the file system mends itself), the user logs in (almond mends the mailbox), and the mailbox must be what it was before
or after the step that was cut; and what was answered +OK, or exit code 0, before the cut must be there.

popa3d goes the same way as a control: if its mail survived, this would prove nothing."""
import ctypes
import hashlib
import os
import pathlib
import random
import shutil
import struct
import subprocess
import tempfile

import pytest

from conftest import GROUP, OWNER, SECONDS, SEPARATOR, Pop, needs_root, tool
from crash import ALMOND, ARRIVED, BOX, SHAPE, arrived, make_spool, reopen, report, scale, session
from test_differential import Popa3d

HERE = pathlib.Path(__file__).resolve().parent
SECTOR = 4096
MIB = 1 << 20
PEER_BOX = 'plain'            # an account that Popa3d makes
DICE = int(os.environ.get('CRASH_SEED', '3'))


def impossible():
    """Why this machine cannot have it, if so: no loop device, no FUSE, no mount."""
    for path in ('/dev/fuse', '/dev/loop-control'):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            return f'{path}: {error.strerror}'
    return ''


pytestmark = [needs_root, pytest.mark.skipif(bool(impossible()), reason=impossible())]


def run(*argv, **how):
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
                          **how)
    assert done.returncode == 0, f'{argv}: {done.stdout.decode(errors="replace")}'
    return done.stdout


# ---- where all of it lies

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000


def enter(call, *args):
    assert call(*args) == 0, f'name space: {os.strerror(ctypes.get_errno())}'


@pytest.fixture
def place():
    """A tmpfs, in a name space of mounts of our own: what is mounted below it ends with the test, however that ends."""
    path, here = pathlib.Path(tempfile.mkdtemp(prefix='almond-disk-')), os.getcwd()
    before = os.open('/proc/thread-self/ns/mnt', os.O_RDONLY)
    enter(libc.unshare, CLONE_NEWNS)
    try:
        run(tool('mount'), '--make-rprivate', '/')
        run(tool('mount'), '-t', 'tmpfs', '-o', 'size=80%', 'tmpfs', path)
        (path / 'mnt').mkdir()
        (path / 'fuse').mkdir()
        yield path
    finally:
        subprocess.run([tool('umount'), '--lazy', '--recursive', path])
        enter(libc.setns, before, CLONE_NEWNS)
        os.close(before)
        os.chdir(here)
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def recorder(place):
    flags = run(tool('pkg-config'), '--cflags', '--libs', 'fuse3').decode().split()
    run(tool('cc'), '-std=c11', '-O2', '-Wall', '-Wextra', '-Werror', '-D_FILE_OFFSET_BITS=64',
        '-o', place / 'recorder', HERE / 'recorder.c', *flags)
    return place / 'recorder'


# ---- the record

class Write:
    """A sector's worth of a write, or less: what a disk does whole or not at all."""

    def __init__(self, at, data):
        self.at, self.data = at, data
        self.print = hashlib.md5(at.to_bytes(8, 'big') + data).digest()


class Record:
    """What the device was told: windows between flushes, and where in the record each write ended."""

    def __init__(self, path):
        self.entries = []               # (end of the entry in the record, [Write] or None for a flush)
        with open(path, 'rb') as f:
            while head := f.read(16):
                at, size = struct.unpack('=QQ', head)
                flush = at == 2**64 - 1
                data = b'' if flush else f.read(size)
                assert flush or len(data) == size
                self.entries.append((f.tell(), None if flush else list(self.sectors(at, data))))

    @staticmethod
    def sectors(at, data):
        done = 0
        while done < len(data):
            n = min(len(data) - done, SECTOR - (at + done) % SECTOR)
            yield Write(at + done, data[done:done + n])
            done += n

    def at(self, position):
        """How many entries had ended there."""
        return sum(end <= position for end, _ in self.entries)

    def safe(self, n):
        """Of the first n entries, how many are followed by a flush that ended."""
        while n and self.entries[n - 1][1] is not None:
            n -= 1
        return n


class Cut:
    """A disk: the first `safe` entries, and of the writes between there and entry n those that were kept."""

    def __init__(self, record, n, keep, how):
        self.n, self.how = n, how
        self.position = record.entries[n - 1][0] if n else 0
        self.safe = record.safe(n)
        loose = [w for _, writes in record.entries[self.safe:n] for w in writes]
        self.kept = [w for w in loose if keep(w)]
        self.lost = len(loose) - len(self.kept)
        seen = {}                       # a later write of the same octets hides an earlier one
        for w in self.kept:
            seen[w.at, len(w.data)] = w.print
        self.print = (self.safe, hashlib.md5(b''.join(sorted(seen.values()))).digest())

    def __repr__(self):
        return f'cut {self.n} ({self.how}: {self.lost} sectors lost, {len(self.kept)} kept since the last flush)'


def some(dice, share):
    return lambda _: dice.random() < share


def cuts_of(record, first, last, want, dice):
    """Up to `want` cuts behind the first, up to the last entry, no two of them with the same disk; in their order."""
    seen, found = set(), []
    for turn in range(1 + want * 20 // max(1, last - first)):
        points = list(range(first, last + 1))
        dice.shuffle(points)
        for n in points:
            kind = ('all', 'none', 'half', 'few', 'most')[dice.randrange(5)] if turn else ('all', 'none', 'half')[n % 3]
            keep = {'all': lambda _: True, 'none': lambda _: False, 'half': some(dice, .5), 'few': some(dice, .15),
                    'most': some(dice, .85)}[kind]
            cut = Cut(record, n, keep, kind)
            if cut.print not in seen and len(found) < want:
                seen.add(cut.print)
                found.append(cut)
    return sorted(found, key=lambda cut: (cut.safe, cut.n))


def copy(source, target):
    """With its holes."""
    size = os.path.getsize(source)
    with open(source, 'rb') as f, open(target, 'wb') as g:
        g.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(f.fileno(), at, os.SEEK_HOLE)
            os.lseek(g.fileno(), at, os.SEEK_SET)
            os.lseek(f.fileno(), at, os.SEEK_SET)
            while at < end:
                piece = os.read(f.fileno(), min(MIB, end - at))
                os.write(g.fileno(), piece)
                at += len(piece)


class Disks:
    """Makes the disks of cuts, in the order of cuts_of: what is safe is written to the base once."""

    def __init__(self, base, record, target):
        self.base, self.record, self.target, self.done = base, record, target, 0

    def make(self, cut):
        assert cut.safe >= self.done
        with open(self.base, 'r+b') as f:
            for _, writes in self.record.entries[self.done:cut.safe]:
                self.put(f, writes or ())
        self.done = cut.safe
        copy(self.base, self.target)
        with open(self.target, 'r+b') as f:
            self.put(f, cut.kept)
        return self.target

    @staticmethod
    def put(f, writes):
        for w in writes:
            f.seek(w.at)
            f.write(w.data)


# ---- what happened, and what may be seen of it

class Story:
    """The mailboxes after each step, and the position in the record at which the step's success was known."""

    def __init__(self, *start):
        self.steps = [(0, start)]

    def step(self, position, which, data):
        boxes = list(self.steps[-1][1])
        boxes[which] = data
        self.steps.append((position, tuple(boxes)))

    def last(self, position):
        return max(i for i, (end, _) in enumerate(self.steps) if end <= position)

    def allowed(self, position):
        """For each mailbox what it may be after a cut there: as after the last step, or as after the next one."""
        last = self.last(position)
        return list(zip(self.steps[last][1], self.steps[min(last + 1, len(self.steps) - 1)][1]))

    def touched(self, position):
        """The mailboxes that a session or a delivery has been at, or was at just then."""
        steps = [boxes for _, boxes in self.steps[:self.last(position) + 2]]
        return [i for i in range(len(steps[0])) if len({boxes[i] for boxes in steps}) > 1]


class Mending:
    """A second cut, while almond mends what the first one left: until a login was answered its mailbox may be what it
    might be before; then it is what that login saw."""

    def __init__(self, limits, touched):
        self.limits, self.seen, self.boxes = limits, {}, touched

    def step(self, position, which, data):
        self.seen[which] = (position, data)

    def allowed(self, position):
        return [(self.seen[i][1],) * 2 if i in self.seen and self.seen[i][0] <= position else limit
                for i, limit in enumerate(self.limits)]

    def touched(self, _):
        return self.boxes


def describe(data, allowed):
    """A wrong mailbox, in one line."""
    parts = [f'{len(data)} octets']
    for a in dict.fromkeys(allowed):
        differ = [i for i, (x, y) in enumerate(zip(a, data)) if x != y]
        where = f', {differ[0]} to {differ[-1]}, {sum(not data[i] for i in differ)} of them NUL' if differ else ''
        parts.append(f'of the {len(a)} that may be {len(differ)} differ{where}')
    return '; '.join(parts)


# ---- the file systems

JUNK = (SEPARATOR + b'Subject: an old mail of somebody else\n\n' + b'stale ' * 600 + b'\n')[:SECTOR]


class Disk:
    """A file system on an image; `options` go to mount."""

    def __init__(self, place, recorder, kind, size, mkfs, options, type):
        self.place, self.recorder, self.kind, self.options, self.type = place, recorder, kind, options, type
        self.mnt, self.image, self.base, self.cut = (place / name for name in ('mnt', 'image', 'base', 'cut'))
        self.log = place / 'log'
        self.log.unlink(missing_ok=True)
        with open(self.image, 'wb') as f:
            f.truncate(size)
        run(*mkfs, self.image)
        run(tool('fallocate'), '--dig-holes', self.image)
        self.daemon = None

    def mount(self, image):
        run(tool('mount'), '-t', self.type, '-o', ','.join(('loop', *self.options)), image, self.mnt)

    def umount(self):
        run(tool('umount'), self.mnt)

    def litter(self, size):
        """Free blocks hold other people's mail: what was allocated and never written shows."""
        with open(self.mnt / 'junk', 'wb') as f:
            f.write(JUNK * (size // len(JUNK)))
            os.fsync(f.fileno())
        (self.mnt / 'junk').unlink()
        os.sync()

    def record(self, image=None):
        """From here on all is written down; the base is the disk as it is now."""
        image = image or self.image
        self.log.unlink(missing_ok=True)
        copy(image, self.base)
        self.daemon = subprocess.Popen([self.recorder, image, self.log, self.place / 'fuse'])
        while not (self.place / 'fuse/disk').exists():
            assert self.daemon.poll() is None, 'the recorder ended'
        self.mount(self.place / 'fuse/disk')

    def position(self):
        return self.log.stat().st_size

    def stop(self):
        """All comes to the disk; the record is whole."""
        self.umount()
        return self.stop_recorder()

    def stop_recorder(self):
        for _ in range(1000):           # the loop device lets go of its file a moment later
            done = subprocess.run([tool('umount'), self.place / 'fuse'], stderr=subprocess.PIPE)
            if not done.returncode or b'busy' not in done.stderr:
                break
            self.daemon.poll()
        assert not done.returncode, done.stderr
        assert self.daemon.wait(SECONDS) == 0
        return Record(self.log)


EXT4 = ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0,nodiscard']
KINDS = {
    'ext4, ordered': ('ext4', 16 * MIB, [*EXT4, '-b', '4096'], ['data=ordered']),
    'ext4, writeback': ('ext4', 16 * MIB, [*EXT4, '-b', '1024'], ['data=writeback']),
    'ext4, data journaled': ('ext4', 24 * MIB, [*EXT4, '-b', '4096'], ['data=journal']),
    'xfs': ('xfs', 300 * MIB, ['mkfs.xfs', '-q', '-K'], []),
    'btrfs': ('btrfs', 110 * MIB, ['mkfs.btrfs', '-q', '-K'], ['nodiscard']),
}


def make(place, recorder, kind):
    type, size, (mkfs, *more), options = KINDS[kind]
    return Disk(place, recorder, kind, size, [tool(mkfs), *more], options, type)


# ---- almond

def deliver(spool):
    done = subprocess.run([ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, BOX], input=SEPARATOR + ARRIVED,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
    assert done.returncode == 0, done.stdout


def play(disk, shapes):
    """One session for each mailbox, and a delivery before or after it; the record and the story."""
    disk.mount(disk.image)
    if disk.type == 'ext4':
        disk.litter(8 * MIB)
    spools = [make_spool(shape, base=disk.mnt) for shape in shapes]
    disk.umount()
    disk.record()
    story = Story(*(shape.old for shape in shapes))

    def done(i, expected):
        story.step(disk.position(), i, expected)
        assert spools[i].read(BOX) == expected, f'{shapes[i]}, before any cut'
    for i, (shape, spool) in enumerate(zip(shapes, spools)):
        early = i % 3 == 1
        if early:
            deliver(spool)
            done(i, shape.old + arrived(shape.old))
        reply, log = session(spool, shape.gone)
        assert reply and reply.startswith('+OK'), (reply, log)
        done(i, shape.new + (arrived(shape.old) if early else b''))
        if not early:
            deliver(spool)
            done(i, shape.new + arrived(shape.new))
    return spools, story, disk.stop()


class Counts:
    def __init__(self):
        self.cuts = self.again = self.old = self.new = self.mended = 0
        self.wrong = []


def look(disk, spools, story, cut, counts):
    """Mount the disk, log in, compare; did almond change a mailbox?"""
    mended = False
    disk.mount(disk.cut)
    try:
        for i, (spool, allowed) in enumerate(zip(spools, story.allowed(cut.position))):
            found = before = spool.read(BOX)
            reply = '+OK'
            if i in story.touched(cut.position):
                reply, _, log = reopen(spool)
                found = spool.read(BOX)
                mended |= before != found
            if not reply.startswith('+OK'):
                counts.wrong.append(f'{disk.kind}, {cut}, mailbox {i}: {reply}\n{log}')
            elif found not in allowed:
                counts.wrong.append(f'{disk.kind}, {cut}, mailbox {i}: {describe(found, allowed)}')
            elif allowed[0] != allowed[1]:
                counts.old += found == allowed[0]
                counts.new += found == allowed[1]
    finally:
        disk.umount()
    counts.mended += mended
    return mended


def look_at_all(disk, spools, story, record, want, counts, keep=0):
    """Up to `want` cuts; of the disks whose mailboxes almond mended, the first `keep` are kept as they were before."""
    dice = random.Random(DICE)
    disks, kept = Disks(disk.base, record, disk.cut), []
    cuts = cuts_of(record, 0, len(record.entries), want, dice)
    for cut in cuts:
        disks.make(cut)
        copy(disk.cut, disk.place / 'kept')
        if look(disk, spools, story, cut, counts) and len(kept) < keep:
            kept.append((cut, disk.place / f'kept-{len(kept)}'))
            (disk.place / 'kept').rename(kept[-1][1])
    return len(cuts), kept


def prove(place, recorder, kind, shapes, want, keep, again):
    """The cuts of one story, and for some of the disks that almond mended, cuts of the mending."""
    disk, counts = make(place, recorder, kind), Counts()
    spools, story, record = play(disk, shapes)
    counts.cuts, kept = look_at_all(disk, spools, story, record, want, counts, keep)
    for cut, image in kept:
        disk.record(image)
        touched = story.touched(cut.position)
        mending = Mending(story.allowed(cut.position), touched)
        for i in touched:
            reopen(spools[i])
            mending.step(disk.position(), i, spools[i].read(BOX))
        n, _ = look_at_all(disk, spools, mending, disk.stop(), again, counts)
        counts.again += n
        image.unlink()
    return counts


# ---- the proofs

BOUNDED = ['middle', 'borders-64k', 'tail', 'alternate']
ALL = ['middle', 'alternate', 'borders-64k', 'small-first', 'tail', 'crlf', 'large-first', 'two-runs', 'all',
       'junk-first', 'all-but-last', 'twins', 'small-before-large']


@pytest.mark.parametrize('kind', scale(['ext4, ordered', 'ext4, writeback'], list(KINDS)))
def test_a_disk_loses_power(place, recorder, kind):
    shapes = [SHAPE[name] for name in scale(BOUNDED, ALL)]
    counts = prove(place, recorder, kind, shapes, want=scale(80, 600), keep=scale(2, 12), again=scale(10, 25))
    report(f'power cut of a disk: {kind}', cuts=counts.cuts + counts.again, old=counts.old, new=counts.new,
           mended=counts.mended, wrong=len(counts.wrong))
    assert not counts.wrong, '\n'.join([f'{len(counts.wrong)} wrong:', *counts.wrong[:20]])
    assert counts.cuts >= scale(60, 300) and counts.again >= scale(6, 50)
    assert counts.old and counts.new and counts.mended, 'cuts that meet no commit prove nothing'


def popa3d_session(peer, gone):
    peer.start()
    with Pop(peer.connect()) as pop:
        pop.login(PEER_BOX)
        for n in gone:
            pop.ok(f'DELE {n}')
        reply = pop.cmd('QUIT')
    peer.stop()
    assert reply.startswith('+OK'), peer.log()


@pytest.mark.parametrize('kind', ['ext4, ordered'])
def test_the_control_loses_mail(place, recorder, kind):
    """popa3d moves mail in place and is not ready for a cut.  Its mailbox is only looked at: it mends nothing."""
    disk, counts = make(place, recorder, kind), Counts()
    shapes = [SHAPE[name] for name in BOUNDED if not SHAPE[name].truncation]
    disk.mount(disk.image)
    disk.litter(8 * MIB)
    peers = []
    for shape in shapes:
        (disk.mnt / shape.name).mkdir()
        peers.append(Popa3d(disk.mnt / shape.name))
        box = peers[-1].mail / PEER_BOX
        box.write_bytes(shape.old)
        box.chmod(0o600)
        os.chown(box, OWNER, GROUP)
        os.utime(box, (1767600000, 1767600000))         # it would wait for the next second
    disk.umount()
    disk.record()
    for peer, shape in zip(peers, shapes):
        popa3d_session(peer, shape.gone)
        assert (peer.mail / PEER_BOX).read_bytes() == shape.new
    record = disk.stop()
    disks = Disks(disk.base, record, disk.cut)
    for cut in cuts_of(record, 0, len(record.entries), scale(40, 200), random.Random(DICE)):
        disks.make(cut)
        disk.mount(disk.cut)
        counts.cuts += 1
        for peer, shape in zip(peers, shapes):
            found = (peer.mail / PEER_BOX).read_bytes()
            if found not in (shape.old, shape.new):
                counts.wrong.append(f'{cut}, {shape}: {describe(found, (shape.old, shape.new))}')
        disk.umount()
    report(f'  the same for popa3d, as a control: {kind}', cuts=counts.cuts, wrong=len(counts.wrong))
    assert counts.cuts >= 20
    assert counts.wrong, 'no mail of popa3d was lost: this proves nothing'
