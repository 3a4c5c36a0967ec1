"""Power cuts below file systems that this kernel need not have: f2fs, vfat, jffs2 and ubifs, in a guest under qemu.

The guest is Debian's kernel with busybox, almond and a small client; it does what it is told on a serial line.  f2fs
and vfat lie on a virtual disk that is recorder.c's file, and go the way of test_disk.py.  jffs2 and ubifs lie on
mtdram, a flash chip made of the guest's memory; that memory is a file of ours, and the guest's debugger stops it before
each write to the chip and each erasure, so all that a power cut could leave is there, but for what is cut inside a
write: such are made from what came before and after.  Each disk or chip is put back, mounted, logged into, compared.

vfat has no journal, almond warns of it, and fsck.fat mends it first: its figure is shown, and nothing is promised."""
import base64
import hashlib
import mmap
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import time

import pytest

from conftest import GROUP, OWNER, ROOT, SEPARATOR, needs_root, tool
from crash import ALMOND, ARRIVED, LONG, SHAPE, arrived, report
from test_disk import (DICE, MIB, Counts, Disks, Record, Story, copy, cuts_of, describe, impossible, libc, place,
                       recorder, run)

HERE = pathlib.Path(__file__).resolve().parent
pytestmark = [needs_root, pytest.mark.skipif(bool(impossible()), reason=impossible()),
              pytest.mark.skipif(not LONG, reason='part of the long form alone: make crash')]
MEMORY = 192 * MIB
CHIP, BLOCK = 8 * MIB, 64 * 1024
PAGE = 4096
PR_SET_PDEATHSIG = 1
# An emulated machine on a busy one; no more than a bound.
PATIENCE = 300

MODULES = ('virtio_pci virtio_blk f2fs crc32_generic crc32c_generic vfat nls_cp437 nls_ascii mtdram jffs2 ubi ubifs '
           'lzo lzo_rle deflate zstd').split()


def closure(kernel):
    """The files of these modules and of those that they need."""
    needs = {}
    for text in (kernel / 'modules.dep').read_text().splitlines():
        name, _, more = text.partition(':')
        needs[name] = more.split()
    names = {pathlib.Path(path).stem.replace('-', '_'): path for path in needs}
    built_in = {pathlib.Path(path).stem.replace('-', '_') for path in (kernel / 'modules.builtin').read_text().split()}
    found, todo = set(), []
    for name in MODULES:
        assert name in names or name in built_in, f'this kernel has no module {name}'
        todo += [names[name]] if name in names else []
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += needs[path]
    return sorted(found)


# Logs in to each mailbox named, and says what it finds.
LOOK = ('look() { for i in "$@"; do was=$(md5sum /mnt/$i/user 2>/dev/null); reply=$(/pop /mnt/$i 2>>/log); '
        'is=$(md5sum /mnt/$i/user 2>/dev/null); echo "$i ${was%% *}- ${is%% *}- $reply"; done; }')


def end_with_us():
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Guest:
    """A machine, and the line to it: guest('command') is what the command said; it must end well."""

    def __init__(self, place, shapes, *disks):
        self.place = place
        done = subprocess.run([HERE / 'guest/kernel'], stdout=subprocess.PIPE, timeout=PATIENCE)
        assert done.returncode == 0, 'no kernel for the guest: guest/kernel says why'
        version = done.stdout.decode().strip()
        unpacked = ROOT / 'build/crash/kernel'
        self.make_root(unpacked / 'lib/modules' / version, shapes)
        self.memory = place / 'memory'
        with open(self.memory, 'wb') as f:
            f.truncate(MEMORY)
        drives = []
        for path in disks:
            drives += ['-drive', f'file={path},if=virtio,format=raw,cache=writeback']
        self.process = subprocess.Popen(
            [tool('qemu-system-x86_64'), '-accel', 'tcg', '-cpu', 'max', '-smp', '1',
             '-m', str(MEMORY // MIB), '-machine', 'pc,memory-backend=ram',
             '-object', f'memory-backend-file,id=ram,size={MEMORY},mem-path={self.memory},share=on',
             '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot',
             '-kernel', unpacked / f'boot/vmlinuz-{version}', '-initrd', place / 'initrd',
             '-append', 'console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check nowatchdog '
             'rdinit=/init', '-serial', f'file:{place / "console"}', '-serial', 'stdio',
             '-gdb', f'unix:{place / "gdb"},server=on,wait=off', *drives],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(place / 'qemu.log', 'wb'),
            preexec_fn=end_with_us)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.got = b''
        self.answer()
        self('modprobe virtio_pci; modprobe virtio_blk; test -b /dev/vda')
        self(LOOK)

    def make_root(self, kernel, shapes):
        root = self.place / 'root'
        for path in ('bin', 'sbin', 'proc', 'sys', 'dev', 'shapes', 'etc'):
            (root / path).mkdir(parents=True)
        shutil.copy(tool('busybox'), root / 'bin/busybox')
        for name in ('bin/sh', 'sbin/modprobe'):
            (root / name).symlink_to('/bin/busybox')
        shutil.copy(HERE / 'guest/init', root / 'init')
        (root / 'init').chmod(0o755)
        shutil.copy(ALMOND, root / 'almond')
        run(tool('musl-gcc'), '-static', '-O2', '-s', '-o', root / 'pop', HERE / 'guest/pop.c')
        (root / 'users').write_text('user:{PLAIN}secret\n')
        (root / 'users').chmod(0o600)
        (root / 'etc/passwd').write_text('root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n')
        (root / 'late').write_bytes(SEPARATOR + ARRIVED)
        for i, shape in enumerate(shapes):
            (root / f'shapes/{i}').write_bytes(shape.old)
        target = root / 'lib/modules' / kernel.name
        for path in closure(kernel):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kernel / path, target / path)
        run(tool('busybox'), 'depmod', '-b', root, kernel.name)
        files = b'\n'.join(sorted(bytes(p.relative_to(root)) for p in root.rglob('*')))
        with open(self.place / 'initrd', 'wb') as f:
            subprocess.run([tool('cpio'), '-o', '-H', 'newc', '--quiet', '-R', '0:0'], input=files, cwd=root, stdout=f,
                           check=True)

    def said(self, timeout):
        """Everything up to an answer's end, if it comes in time."""
        if any(key.fileobj is self.process.stdout for key, _ in self.selector.select(timeout)):
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, 'the guest ended:\n' + self.complaints()
            self.got += data
        done = re.search(rb'@(\d+)@\r?\n', self.got)
        if not done:
            return None
        text, self.got = self.got[:done.start()], self.got[done.end():]
        return int(done.group(1)), text.decode(errors='replace')

    def complaints(self):
        return ''.join((self.place / name).read_text(errors='replace')[-3000:] for name in ('qemu.log', 'console'))

    def ask(self, command):
        self.process.stdin.write(command.encode() + b'\n')
        self.process.stdin.flush()

    def answer(self):
        end = time.monotonic() + PATIENCE
        while not (done := self.said(1)):
            assert time.monotonic() < end, 'the guest is silent:\n' + self.complaints()
        return done

    def __call__(self, command):
        self.ask(command)
        code, text = self.answer()
        assert code == 0, f'in the guest: {command}: {code}\n{text}\n{self.complaints()}'
        return text

    def stop(self):
        self.process.kill()
        self.process.wait(PATIENCE)


# ---- what both kinds of proof do in the guest

NAMES = ['middle', 'alternate', 'borders-64k', 'tail', 'small-first', 'crlf', 'two-runs', 'all']
SHAPES = [SHAPE[name] for name in NAMES]


def settle(guest, mount, umount):
    """Put the mailboxes there; the medium knows all of it."""
    guest(mount)
    for i in range(len(SHAPES)):
        guest(f'mkdir /mnt/{i} && cp /shapes/{i} /mnt/{i}/user && chmod 600 /mnt/{i}/user && '
              f'{{ chown -R {OWNER}:{GROUP} /mnt/{i} || test $(stat -c %u /mnt/{i}/user) = {OWNER}; }}')
    guest(umount)
    guest(mount)


def play(position, do):
    """A session and a delivery for each mailbox; do(command) has it done in the guest, position() is where the record
    is then."""
    story = Story(*(shape.old for shape in SHAPES))

    def step(i, command, data):
        do(command)
        story.step(position(), i, data)
        assert do(f'md5sum </mnt/{i}/user').split()[0] == hashlib.md5(data).hexdigest(), f'{SHAPES[i]}, before any cut'
    for i, shape in enumerate(SHAPES):
        early = i % 3 == 1
        delivery = f'/almond deliver -d /mnt/{i} -u /users user </late'
        if early:
            step(i, delivery, shape.old + arrived(shape.old))
        step(i, f'/pop /mnt/{i} {" ".join(map(str, shape.gone))} 2>>/log',
             shape.new + (arrived(shape.old) if early else b''))
        if not early:
            step(i, delivery, shape.new + arrived(shape.new))
    return story


def judge(guest, name, story, at, cut, mount, umount, counts):
    """Mount what was cut, log in, compare."""
    limits = story.allowed(at)
    try:
        guest(mount)
    except AssertionError as error:
        counts.wrong.append(f'{name}, {cut}: no mount: {error}')
        guest.ask(umount)                       # as far as it came
        guest.answer()
        return
    mended = False
    for text in guest(f'>/log; look {" ".join(map(str, story.touched(at)))}').splitlines():
        i, was, seen, reply = text.split(' ', 3)
        i, limit = int(i), limits[int(i)]
        sums = [hashlib.md5(data).hexdigest() + '-' for data in limit]
        mended |= was != seen
        if not reply.startswith('+OK') or seen not in sums:
            data = base64.b64decode(guest(f'base64 /mnt/{i}/user 2>/dev/null || :'))
            counts.wrong.append(f'{name}, {cut}, {SHAPES[i]}: {reply}; {describe(data, limit)}\n{guest("cat /log")}')
        elif limit[0] != limit[1]:
            counts.old += seen == sums[0]
            counts.new += seen == sums[1]
    counts.mended += mended
    guest(umount)


TRIED = set()


def conclude(name, counts, least, promised=True):
    TRIED.add(name)
    report(f'power cut in a guest: {name}', cuts=counts.cuts, old=counts.old, new=counts.new, mended=counts.mended,
           wrong=len(counts.wrong))
    assert counts.cuts >= least and counts.old and counts.new, 'cuts that meet no commit prove nothing'
    if promised:
        assert not counts.wrong, '\n'.join([f'{len(counts.wrong)} wrong:', *counts.wrong[:20]])
    else:
        print('\n'.join(counts.wrong[:20]))


# ---- cards: block devices

CARDS = {
    'f2fs': (64 * MIB, ['mkfs.f2fs', '-q', '-f'], '', 400),
    'vfat': (32 * MIB, ['mkfs.vfat', '-F', '16'], f'-o uid={OWNER},gid={GROUP},umask=022', 150),
}


@pytest.mark.parametrize('kind', CARDS)
def test_a_card_loses_power(place, recorder, kind):
    size, (mkfs, *more), options, want = CARDS[kind]
    image, base, log, target = (place / name for name in ('image', 'base', 'log', 'cut'))
    for path in (image, target):
        with open(path, 'wb') as f:
            f.truncate(size)
    run(tool(mkfs), *more, image)
    copy(image, base)
    daemon = subprocess.Popen([recorder, image, log, place / 'fuse'])
    while not (place / 'fuse/disk').exists():
        assert daemon.poll() is None, 'the recorder ended'
    guest = Guest(place, SHAPES, place / 'fuse/disk', target)

    def position():
        return log.stat().st_size
    mount = f'modprobe {kind}; modprobe nls_cp437; modprobe nls_ascii; mount -t {kind} {options} /dev/vd%s /mnt'
    settle(guest, mount % 'a', 'umount /mnt')
    first = position()
    story = play(position, guest)
    guest('umount /mnt')
    record, counts = Record(log), Counts()
    disks = Disks(base, record, target)
    for cut in cuts_of(record, record.at(first), len(record.entries), want, random.Random(DICE)):
        disks.make(cut)
        if kind == 'vfat':                      # what a vfat wants after a power cut; 1: it has mended something
            done = subprocess.run([tool('fsck.fat'), '-a', target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert done.returncode in (0, 1), done.stdout
        judge(guest, kind, story, cut.position, cut, mount % 'b', 'umount /mnt', counts)
        counts.cuts += 1
    guest.stop()
    conclude(kind, counts, want // 2, promised=kind != 'vfat')


# ---- chips: raw flash, which is the guest's memory

STOPPED = (b'T05', b'S05')


class Debugger:
    """The guest's gdb stub: stops the machine where a function begins.  Only what this needs of the protocol."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))          # this stops the machine
        self.got = b''

    def send(self, packet):
        self.socket.sendall(b'$%s#%02x' % (packet, sum(packet) % 256))

    def read(self):
        data = self.socket.recv(4096)
        assert data, 'the debugger ended'
        self.got += data

    def packet(self):
        """The next one, if it is there."""
        packet = re.search(rb'\$([^#]*)#..', self.got)
        if packet:
            self.got = self.got[packet.end():]
            self.socket.sendall(b'+')
        return packet and packet.group(1)

    def receive(self):
        while not (packet := self.packet()):
            self.read()
        return packet

    def ask(self, packet):
        self.send(packet)
        return self.receive()

    def break_at(self, address):
        reply = self.ask(b'Z0,%x,1' % address)
        while reply.startswith(b'T02'):         # that the machine was stopped
            reply = self.receive()
        assert reply == b'OK', reply

    def go_on(self):
        """From where it stopped, which may be such a place."""
        assert self.ask(b's').startswith(STOPPED)
        self.send(b'c')


class Chip:
    """The pages of mtdram in the guest's memory.  The guest writes patterns to its flash, in another order each time;
    the pages that hold the right one of each are the flash's, all others are what is left of the way there."""

    def __init__(self, guest, scratch):
        self.guest, self.scratch, self.samples, self.now = guest, scratch, [], None
        with open(guest.memory, 'rb') as f:
            self.memory = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
        guest(f'modprobe mtdram total_size={CHIP // 1024} erase_size={BLOCK // 1024}; test -c /dev/mtd0')
        found, half = [None] * (CHIP // PAGE), CHIP // BLOCK // 2
        for turn, order in enumerate(([0, half], [half, 0])):
            mark = b'almond-chip-%d-' % turn + os.urandom(8)
            scratch.write_bytes(b''.join((mark + b'%08d' % i).ljust(PAGE, b'.') for i in range(CHIP // PAGE)))
            for at in order:
                guest(f'dd if=/dev/vda of=/dev/mtd0 bs={BLOCK} count={half} skip={at} seek={at} iflag=direct '
                      '2>/dev/null')
            for i, seen in enumerate(self.pages_with(mark)):
                found[i] = seen if found[i] is None else found[i] & seen
        assert all(len(pages) == 1 for pages in found), 'the chip is not to be found in the memory'
        self.map = [pages.pop() for pages in found]

    def pages_with(self, mark):
        pages, at = [set() for _ in range(CHIP // PAGE)], self.memory.find(mark)
        while at >= 0:
            if at % PAGE == 0:
                pages[int(self.memory[at + len(mark):at + len(mark) + 8])].add(at)
            at = self.memory.find(mark, at + PAGE - at % PAGE)
        return pages

    def put(self, data):
        """Into the chip, by the guest's own hand."""
        self.scratch.write_bytes(data.ljust(CHIP, b'\xff'))
        self.guest(f'dd if=/dev/vda of=/dev/mtd0 bs={BLOCK} iflag=direct 2>/dev/null')
        assert b''.join(self.pages()) == self.scratch.read_bytes(), 'this is not the chip'

    def watch(self):
        """From here on the guest stops before each write to the chip and each erasure."""
        text = self.guest("grep -E ' ram_(write|erase)\t' /proc/kallsyms | grep mtdram")
        names = {line.split()[2]: line.split()[0] for line in text.splitlines()}
        self.debugger = Debugger(self.guest.place / 'gdb')
        for name in ('ram_write', 'ram_erase'):
            self.debugger.break_at(int(names[name], 16))
        self.guest.selector.register(self.debugger.socket, selectors.EVENT_READ)
        self.sample()
        self.debugger.go_on()

    def unwatch(self):
        self.guest.selector.unregister(self.debugger.socket)
        self.debugger.socket.sendall(b'\x03')
        self.debugger.receive()                 # that the machine was stopped
        self.debugger.send(b'D')
        while b'$OK' not in self.debugger.got:  # not acknowledged: what comes while the machine runs would stop it
            self.debugger.read()
        self.debugger.socket.close()

    def pages(self):
        return [self.memory[at:at + PAGE] for at in self.map]

    def sample(self):
        """What the chip holds, if it is not what it held before."""
        pages = self.pages()
        if pages != self.now:
            self.samples.append({i: page for i, page in enumerate(pages) if not self.now or page != self.now[i]})
            self.now = pages

    def do(self, command):
        """Have it done, and look on."""
        guest, debugger = self.guest, self.debugger
        guest.ask(command)
        end = time.monotonic() + PATIENCE
        while not (done := guest.said(0)):
            assert time.monotonic() < end, 'the guest is silent:\n' + guest.complaints()
            for key, _ in guest.selector.select(1):
                if key.fileobj is debugger.socket:
                    debugger.read()
                    if (debugger.packet() or b'').startswith(STOPPED):
                        self.sample()
                        debugger.go_on()
        assert done[0] == 0, f'in the guest: {command}: {done}'
        self.sample()
        return done[1]


def torn(before, pages, state, dice):
    """What was in between, if the pages differ by one write that went into empty flash: a part of that write."""
    changed = [i * PAGE + k for i in sorted(pages) for k in range(PAGE) if before[i][k] != pages[i][k]]
    at, end = changed[0], changed[-1] + 1
    if end - at < 2 or end - at > BLOCK or any(before[at // PAGE][at % PAGE] != 0xff for at in changed):
        return None
    middle, data = dice.randrange(at + 1, end), bytearray(state)
    for at in changed:
        if at >= middle:
            data[at] = 0xff
    return data


UBI = f"""[box]
mode=ubi
vol_id=0
vol_type=dynamic
vol_name=box
vol_size={100 * (BLOCK - 128)}
"""
CHIPS = {
    'jffs2': ('modprobe jffs2; mount -t jffs2 mtd0 /mnt', 'umount /mnt'),
    'ubifs': ('modprobe ubi mtd=0; modprobe ubifs; mount -t ubifs ubi0:box /mnt',
              'umount /mnt; rmmod ubifs; rmmod ubi'),
}


@pytest.mark.parametrize('kind', CHIPS)
def test_a_chip_loses_power(place, kind):
    mount, umount = CHIPS[kind]
    dice, scratch = random.Random(DICE), place / 'scratch'
    scratch.write_bytes(bytes(CHIP))
    guest = Guest(place, SHAPES, scratch)
    chip = Chip(guest, scratch)
    (place / 'ini').write_text(UBI)
    if kind == 'ubifs':
        run(tool('ubinize'), '-m', '1', '-p', '64KiB', '-o', place / 'chip', place / 'ini')
        chip.put((place / 'chip').read_bytes())
    else:
        chip.put(b'')
    settle(guest, mount, umount)
    chip.watch()
    story = play(lambda: len(chip.samples), chip.do)
    chip.unwatch()
    guest(umount)

    counts, state = Counts(), bytearray(CHIP)
    chosen = set(dice.sample(range(1, len(chip.samples)), min(len(chip.samples) - 1, 250)))
    for n, pages in enumerate(chip.samples):
        before = {i: bytes(state[i * PAGE:(i + 1) * PAGE]) for i in pages}
        for i, page in pages.items():
            state[i * PAGE:(i + 1) * PAGE] = page
        if n not in chosen:
            continue
        for data, how in ((torn(before, pages, state, dice), 'in the middle of'), (state, 'after')):
            if data:
                chip.put(data)
                judge(guest, kind, story, n + 1, f'{how} write {n}', mount, umount, counts)
                counts.cuts += 1
    guest.stop()
    conclude(kind, counts, 100)


def test_all_of_them_were_tried():
    """Behind the others, in the same run."""
    assert TRIED == {*CARDS, *CHIPS} and len(TRIED) == 4, f'tried: {TRIED}'
    report('  not to be had: a NAND chip (nandsim keeps its pages where no one sees them)')
