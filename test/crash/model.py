"""A power cut, modelled: what a program did to a spool is recorded call by call, and any cut of it is what a medium may then
hold.

Recorder   runs programs under strace and makes a list of changes of it: octets written, sizes, modes, names, and what was synced.
           A call that it does not know, and that may change a file, is an error; and what the list makes must be what lies
           there afterwards.  Owners are no part of it.
Medium     the list, cut behind any change.  What an fsync that had returned covers is there.  Of each thing after it, on its
           own, any value since then, or the one before: each page (or sector) of a file, its size, its mode, each name.  An
           fsync of a file covers all of it but its name: that takes an fsync of the directory.  One that had not returned
           covers nothing.
Cut        chooses: none of it, all, one at a time, all but one, or by dice.  in_order() is the kinder medium, of file systems
           that keep a journal: all but the pages changes in its order, and any fsync takes all of them along.

A file cut short ends inside a page.  The kernel writes zeros behind the end of such a page, and that page may reach the medium
before the size does: a version like any other."""
import os
import pathlib
import re

from conftest import tool

PAGE, SECTOR = 4096, 512
HARMLESS = re.compile(r'''(?x) (
    p?read(v|v2|64)? | recv(from|msg|mmsg) | send(to|msg|mmsg) | p?poll | p?select(6)? | epoll_\w+ | clock_\w+ |
    gettimeofday | time | times | nanosleep | get\w+id | get\w+ids | getgroups | set\w*id | setres[ug]id |
    setgroups | brk | munmap | mremap | mprotect | madvise | close_range | flock | ioctl | l?stat(64)? |
    fstat(64)? | newfstatat | statx | f?access(at2?)? | getdents(64)? | readlink(at)? | f?statfs | getcwd |
    f?chdir | chroot | socket(pair)? | bind | listen | accept4? | connect | get(sock|peer)name | [gs]etsockopt |
    shutdown | pipe2? | signalfd4? | eventfd2? | timerfd_\w+ | rt_sig\w+ | sigaltstack | t?g?kill | alarm |
    [gs]etitimer | getrandom | uname | sysinfo | u?[gs]etrlimit | prlimit64 | getrusage | (arch_)?prctl |
    seccomp | landlock_\w+ | cap[gs]et | wait(4|id) | exit(_group)? | execve | set_tid_address |
    set_robust_list | rseq | futex | sched_\w+ | personality | restart_syscall | getpgrp | [gs]etpriority |
    sync_file_range | fadvise64 | readahead | utimensat | [fl]?chown(at)? | sethostname )$''')
LEGACY = ('rename', 'link', 'unlink', 'mkdir', 'rmdir', 'symlink', 'mknod', 'truncate')
UMASK = 0o022           # conftest's


class Unknown(Exception):
    """A call of which the model cannot say what it does to the spool."""


def tree(root):
    """{path below root: its octets, or None for a directory}."""
    found = {}
    for top, dirs, files in os.walk(root):
        for name in dirs:
            found[os.path.relpath(os.path.join(top, name), root)] = None
        for name in files:
            path = os.path.join(top, name)
            assert not os.path.islink(path), path
            found[os.path.relpath(path, root)] = pathlib.Path(path).read_bytes()
    return found


def attributes(root):
    """{path below root: (mode, uid, gid)}."""
    found = {}
    for top, dirs, files in os.walk(root):
        for name in dirs + files:
            st = os.lstat(os.path.join(top, name))
            found[os.path.relpath(os.path.join(top, name), root)] = (st.st_mode & 0o7777, st.st_uid, st.st_gid)
    return found


# ---- strace's lines ----

def octets(text):
    """A string of strace -xx."""
    assert text.startswith('"'), text
    if text.endswith('...'):
        raise Unknown('strace cut a string short')
    return bytes.fromhex(text[1:-1].replace('\\x', ''))


def split(text):
    """Arguments; strings are hexadecimal, so that no comma or bracket is one of theirs."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r'[][(){},]', text):
        c = match.group()
        depth += (c in '([{') - (c in ')]}')
        if c == ',' and not depth:
            parts.append(text[start:match.start()].strip())
            start = match.end()
    return parts + [text[start:].strip()] if text.strip() else []


def descriptor(text):
    """(number, path) of `5<\\x2f...>`; of AT_FDCWD too."""
    match = re.match(r'(AT_FDCWD|-?\d+)(?:<([^>]*)>)?(\(deleted\))?$', text)
    if not match:
        raise Unknown(f'no descriptor: {text[:80]}')
    number, path, gone = match.groups()
    path = None if path is None or gone else bytes.fromhex(path.replace('\\x', '')).decode(errors='surrogateescape')
    return int(number) if number != 'AT_FDCWD' else -100, path


def lines(file):
    """(pid, name, arguments, result) of each call, where it returned."""
    begun = {}
    for line in open(file, encoding='ascii'):
        pid, text = line.rstrip('\n').split(None, 1)
        if text.startswith(('+++', '---')):
            continue
        resumed = re.match(r'<\.\.\. \w+ resumed>', text)
        if text.endswith('<unfinished ...>'):
            begun[pid] = text[:-len('<unfinished ...>')].rstrip()
            continue
        if resumed:
            text = begun.pop(pid) + text[resumed.end():]
        match = re.match(r'(\w+)\((.*)\)\s+= (.*)$', text)
        if not match:
            raise Unknown(text[:200])
        yield int(pid), *match.groups()


class Recorder:
    """All that happens to the spool from now on; what lies there now is on the medium."""

    def __init__(self, root):
        self.root = str(root)
        # ('write', file, at, data) ('size', file, n) ('mode', file, mode) ('sync', file) ('name', dir, name, file or None)
        # ('said', text)
        self.events = []
        self.attributes = attributes(root)
        self.live = {}          # path: file
        self.data = {}          # file: its octets now; None for a directory
        self.modes = {}         # file: its mode now
        self.open = {}          # (pid, descriptor): [offset]
        self.live['.'] = self.new(None, 0o755)
        for path, data in sorted(tree(root).items()):
            self.live[path] = self.new(data, self.attributes[path][0])
        self.start = dict(self.live), {n: None if d is None else bytes(d) for n, d in self.data.items()}, dict(self.modes)
        self.born = dict(self.modes)

    def new(self, data, mode):
        number = len(self.data)
        self.modes[number] = mode
        self.data[number] = None if data is None else bytearray(data)
        return number

    # ---- what happens

    def write(self, path, at, data):
        number = self.live[path]
        have = self.data[number]
        have.extend(bytes(max(0, at - len(have))))
        have[at:at + len(data)] = data
        self.events.append(('write', number, at, bytes(data)))

    def resize(self, path, size):
        number = self.live[path]
        have = self.data[number]
        del have[size:]
        have.extend(bytes(size - len(have)))
        self.events.append(('size', number, size))

    def mode(self, path, mode):
        self.modes[self.live[path]] = mode
        self.events.append(('mode', self.live[path], mode))

    def sync(self, path):
        self.events.append(('sync', self.live[path]))

    def name(self, path, number):
        if number is None:
            del self.live[path]
        else:
            self.live[path] = number
        self.events.append(('name', self.live[os.path.dirname(path) or '.'], os.path.basename(path), number))

    def agent(self, path, data, synced=True):
        """Another program appends, with or without an fsync."""
        full = os.path.join(self.root, path)
        with open(full, 'r+b') as f:
            f.seek(0, os.SEEK_END)
            at = f.tell()
            f.write(data)
        self.write(path, at, data)
        if synced:
            self.sync(path)

    def trace(self, run):
        """run(prefix) runs a program under that prefix, to its end, its tracer's end included."""
        file = os.path.join(os.path.dirname(self.root), 'trace')
        result = run([tool('strace'), '-D', '-f', '-qq', '-y', '-xx', '-s', str(1 << 26), '-e', 'signal=none',
                      '-o', file])
        self.open, self.injected, self.umask = {}, 0, UMASK
        for call in lines(file):
            self.injected += call[3].endswith('(INJECTED)')
            self.call(*call)
        os.unlink(file)
        self.attributes.update(attributes(self.root))
        mine = {path: n for path, n in self.live.items() if path != '.'}
        made = {path: None if self.data[n] is None else bytes(self.data[n]) for path, n in mine.items()}
        there = tree(self.root)
        other = sorted(path for path in made | there if made.get(path) != there.get(path))
        assert made == there, f'the record does not make what is there: {other}'
        modes = {path: self.modes[n] for path, n in mine.items()}
        assert modes == {path: self.attributes[path][0] for path in mine}, modes
        return result

    def state(self):
        """What lies there now."""
        found = State(tree(self.root))
        found.modes = {path: mode for path, (mode, _, _) in attributes(self.root).items()}
        return found

    # ---- calls

    def below(self, path):
        """The path below the spool, or None."""
        if path is None or not (path == self.root or path.startswith(self.root + '/')):
            return None
        return os.path.relpath(path, self.root)

    def named(self, where, text):
        name = octets(text).decode(errors='surrogateescape')
        if not name.startswith('/'):
            where = descriptor(where)[1] if where else None
            if where is None:
                raise Unknown(f'a name without a place: {name}')
            name = os.path.join(where, name)
        return self.below(os.path.normpath(name))

    def call(self, pid, name, text, result):
        if result.startswith(('-1', '?')) and name not in ('exit', 'exit_group'):
            return
        handler = getattr(self, 'do_' + name, None)
        if handler:
            handler(pid, split(text), result)
        elif not HARMLESS.match(name):
            raise Unknown(f'{name}({text[:200]}) = {result}')

    def do_open(self, pid, args, result):
        return self.do_openat(pid, ['AT_FDCWD', *args], result)

    def do_openat(self, pid, args, result):
        fd, path = descriptor(result)
        path, flags = self.below(path), args[2]
        self.open[pid, fd] = [0, 'O_APPEND' in flags]
        if 'O_TMPFILE' in flags:
            raise Unknown('O_TMPFILE')
        if path is None:
            return
        if path not in self.live:
            if 'O_CREAT' not in flags:
                raise Unknown(f'{path} came from nowhere')
            self.made(path, b'', args[3])
        elif 'O_TRUNC' in flags:
            self.resize(path, 0)

    def made(self, path, data, mode):
        number = self.new(data, int(mode, 8) & ~self.umask)
        self.born[number] = self.modes[number]
        self.name(path, number)

    def do_umask(self, pid, args, result):
        self.umask = int(args[0], 8)

    def do_fchmod(self, pid, args, result):
        path = self.target(args)
        if path is not None:
            self.mode(path, int(args[1], 8))

    def do_fchmodat(self, pid, args, result):
        path = self.named(args[0], args[1])
        if path is not None:
            self.mode(path, int(args[2], 8))

    do_fchmodat2 = do_fchmodat

    def do_chmod(self, pid, args, result):
        self.do_fchmodat(pid, ['AT_FDCWD', *args], result)

    def do_creat(self, pid, args, result):
        self.do_openat(pid, ['AT_FDCWD', args[0], 'O_CREAT|O_TRUNC', args[1]], result)

    def do_close(self, pid, args, result):
        self.open.pop((pid, descriptor(args[0])[0]), None)

    def copied(self, pid, old, new):
        if (pid, old) in self.open:
            self.open[pid, new] = self.open[pid, old]

    def do_dup(self, pid, args, result):
        self.copied(pid, descriptor(args[0])[0], descriptor(result)[0])

    do_dup2 = do_dup3 = do_dup

    def do_fcntl(self, pid, args, result):
        if args[1].startswith('F_DUPFD'):
            self.do_dup(pid, args, result)

    def do_clone(self, pid, args, result):
        if 'CLONE_FILES' in ' '.join(args):
            raise Unknown('CLONE_FILES')
        child = int(result.split()[0])
        for (owner, fd), at in list(self.open.items()):
            if owner == pid:
                self.open.setdefault((child, fd), at)

    do_clone3 = do_fork = do_vfork = do_clone

    def do_mmap(self, pid, args, result):
        if 'MAP_SHARED' in args[3] and 'PROT_WRITE' in args[2] and 'MAP_ANONYMOUS' not in args[3]:
            if self.below(descriptor(args[4])[1]) is not None:
                raise Unknown(f'a file of the spool is mapped for writing: {args}')

    def target(self, args):
        path = descriptor(args[0])[1]
        path = self.below(path) if path else None
        if path is not None and path not in self.live:
            raise Unknown(f'{path} is not known')
        return path

    def moved(self, pid, fd, n):
        at = self.open.get((pid, fd))
        if at:
            at[0] += n

    def do_read(self, pid, args, result):
        self.moved(pid, descriptor(args[0])[0], int(result.split()[0]))

    do_readv = do_read

    def do_lseek(self, pid, args, result):
        at = self.open.get((pid, descriptor(args[0])[0]))
        if at:
            at[0] = int(result.split()[0])

    do__llseek = do_lseek

    def do_write(self, pid, args, result):
        n, path = int(result.split()[0]), self.target(args)
        if path is None:
            if re.match(r'"\\x2b\\x4f\\x4b', args[1]) and descriptor(args[0])[0] in (0, 1):
                self.events.append(('said', octets(args[1]).decode(errors='replace')))
            return
        at = self.open.get((pid, descriptor(args[0])[0]))
        if at is None:
            raise Unknown(f'write to {path}: no one knows where')
        if at[1]:
            at[0] = len(self.data[self.live[path]])
        self.write(path, at[0], self.vector(args[1])[:n])
        at[0] += n

    do_writev = do_write

    @staticmethod
    def vector(text):
        if text.startswith('"'):
            return octets(text)
        return b''.join(octets(s) for s in re.findall(r'iov_base=("[^"]*"(?:\.\.\.)?)', text))

    def do_pwrite64(self, pid, args, result):
        path = self.target(args)
        if path is not None:
            at = self.open.get((pid, descriptor(args[0])[0]))
            if at and at[1]:
                raise Unknown('pwrite to a file that is open for appending')
            self.write(path, int(args[3]), self.vector(args[1])[:int(result.split()[0])])

    do_pwritev = do_pwritev2 = do_pwrite64

    def do_copy_file_range(self, pid, args, result):
        path, source = self.target(args[2:]), self.target(args)
        places = [re.match(r'\[(\d+)', args[i]) for i in (1, 3)]
        if path is None:
            return
        if source is None or not all(places):
            raise Unknown(f'copy_file_range: {args}')
        from_, to = (int(m.group(1)) for m in places)
        self.write(path, to, bytes(self.data[self.live[source]][from_:from_ + int(result.split()[0])]))

    def none_of_ours(self, pid, args, result):
        for text in args:
            if re.match(r'\d+<', text) and self.below(descriptor(text)[1]) is not None:
                raise Unknown(f'{args}')

    do_sendfile = do_splice = do_vmsplice = do_tee = none_of_ours

    def do_ftruncate(self, pid, args, result):
        path = self.target(args)
        if path is not None:
            self.resize(path, int(args[1]))

    def do_fallocate(self, pid, args, result):
        path = self.target(args)
        if path is None or args[1] == 'FALLOC_FL_KEEP_SIZE':
            return
        if args[1] != '0':
            raise Unknown(f'fallocate: {args}')
        size = int(args[2]) + int(args[3])
        if size > len(self.data[self.live[path]]):
            self.resize(path, size)

    def do_fsync(self, pid, args, result):
        path = self.target(args)
        if path is not None:
            self.sync(path)

    do_fdatasync = do_fsync

    def do_mkdirat(self, pid, args, result):
        path = self.named(args[0], args[1])
        if path is not None:
            self.made(path, None, args[2])

    def do_unlinkat(self, pid, args, result):
        path = self.named(args[0], args[1])
        if path is not None:
            self.name(path, None)

    def do_renameat(self, pid, args, result):
        old, new = self.named(args[0], args[1]), self.named(args[2], args[3])
        if old is None and new is None:
            return
        number = self.live.get(old)
        flags = args[4] if len(args) > 4 else '0'
        if old is None or new is None or self.data[number] is None or flags not in ('0', 'RENAME_NOREPLACE'):
            raise Unknown(f'renameat: {args}')
        self.name(new, number)
        self.name(old, None)

    do_renameat2 = do_renameat

    def do_linkat(self, pid, args, result):
        old, new = self.named(args[0], args[1]), self.named(args[2], args[3])
        if new is not None:
            if old is None:
                raise Unknown(f'linkat: {args}')
            self.name(new, self.live[old])

    def legacy(name):
        def do(self, pid, args, result):
            cwd = 'AT_FDCWD'
            if name == 'truncate':
                path = self.named(None, args[0])
                if path is not None:
                    self.resize(path, int(args[1]))
            elif name in ('rename', 'link'):
                getattr(self, f'do_{name}at')(pid, [cwd, args[0], cwd, args[1]], result)
            elif name in ('mkdir', 'unlink', 'rmdir'):
                getattr(self, 'do_mkdirat' if name == 'mkdir' else 'do_unlinkat')(pid, [cwd, *args], result)
            elif self.named(None, args[-1 if name == 'symlink' else 0]) is not None:
                raise Unknown(f'{name}: {args}')
        return do

    for _name in LEGACY:
        locals()['do_' + _name] = legacy(_name)
    del _name, legacy


# ---- the medium ----

class File:
    """On the medium `data`, whole; since then versions of pages, and sizes."""

    def __init__(self, data, page):
        self.data, self.now, self.page = bytes(data), bytearray(data), page
        self.pages, self.sizes = {}, []          # page: [(octets, number of the event)]; [(size, number)]

    def version(self, first, last, event):
        for p in range(first // self.page, -(-last // self.page)):
            text = bytes(self.now[p * self.page:(p + 1) * self.page])
            self.pages.setdefault(p, []).append((text + bytes(self.page - len(text)), event))

    def write(self, at, data, event):
        end = len(self.now)
        if at > end:
            self.resize(at, event)
        self.now[at:at + len(data)] = data
        self.version(at, at + len(data), event)
        if len(self.now) > end:
            self.sizes.append((len(self.now), event))

    def resize(self, size, event):
        end = len(self.now)
        if size < end:
            del self.now[size:]
            if size % self.page:
                self.version(size, size + 1, event)
        elif size > end:
            self.now.extend(bytes(size - end))
            # What lay there once, below an end that was further off, reads as zeros now.
            once = max([len(self.data)] + [s for s, _ in self.sizes])
            if once > end:
                self.version(end, min(size, once), event)
        if size != end:
            self.sizes.append((size, event))

    def sync(self):
        self.data, self.pages, self.sizes = bytes(self.now), {}, []

    def copy(self):
        other = File.__new__(File)
        other.data, other.now, other.page = self.data, None, self.page
        other.pages, other.sizes = {p: list(v) for p, v in self.pages.items()}, list(self.sizes)
        return other

    def build(self, size, chosen):
        """What lies there with that size and those versions {page: index}."""
        data = bytearray(self.data[:size])
        data.extend(bytes(size - len(data)))
        for p, i in chosen.items():
            if p * self.page < size:
                text = self.pages[p][i][0]
                data[p * self.page:(p + 1) * self.page] = text
        return bytes(data[:size])


class Medium:
    """The cuts of a record: cut(k) is behind the first k events."""

    def __init__(self, recorder, page=PAGE, events=None):
        self.page, self.events = page, recorder.events if events is None else events
        self.attributes = recorder.attributes
        live, data, modes = recorder.start
        modes = {n: [mode, []] for n, mode in {**recorder.born, **modes}.items()}
        files = {n: File(d, page) for n, d in data.items() if d is not None}
        names = {}                               # (dir, name): [file on the medium, [(file, event), ...]]
        dirs = {n for n, d in recorder.data.items() if d is None}
        for path, number in live.items():
            if path != '.':
                names[live[os.path.dirname(path) or '.'], os.path.basename(path)] = [number, []]
        self.cuts = [Cut(self, 0, files, names, modes, 0)]
        floor = 0
        for i, event in enumerate(self.events, 1):
            kind = event[0]
            if kind == 'write':
                files[event[1]].write(event[2], event[3], i)
            elif kind == 'size':
                files[event[1]].resize(event[2], i)
            elif kind == 'mode':
                modes[event[1]][1].append((event[2], i))
            elif kind == 'name':
                if event[3] is not None and event[3] not in dirs and event[3] not in files:
                    files[event[3]] = File(b'', page)
                names.setdefault(event[1:3], [None, []])[1].append((event[3], i))
            elif kind == 'sync':
                floor = i
                if modes[event[1]][1]:
                    modes[event[1]] = [modes[event[1]][1][-1][0], []]
                if event[1] in dirs:
                    for (where, _), entry in names.items():
                        if where == event[1] and entry[1]:
                            entry[:] = [entry[1][-1][0], []]
                else:
                    files[event[1]].sync()
            self.cuts.append(Cut(self, i, files, names, modes, floor))

    def cut(self, k):
        return self.cuts[k]


class State(dict):
    """{path: octets, or None for a directory}"""

    def __init__(self, *what):
        super().__init__(*what)
        self.modes = dict(what[0].modes) if what and isinstance(what[0], State) else {}

    def without(self, end):
        """Less the names that end so."""
        less = State(self)
        for path in [path for path in self if path.endswith(end)]:
            del less[path], less.modes[path]
        return less

    def key(self):
        return hash((tuple(sorted(self.items(), key=lambda item: item[0])), tuple(sorted(self.modes.items()))))


class Cut:
    """Items are what may or may not have reached the medium: ('page', file, p), ('size', file), ('mode', file), ('name',
    (dir, name)); each has as many values as it has changed since it was last synced, and 0 is the one that was synced."""

    def __init__(self, medium, k, files, names, modes, floor):
        self.medium, self.k, self.floor = medium, k, floor
        self.files = {n: f.copy() for n, f in files.items()}
        self.names = {key: (entry[0], list(entry[1])) for key, entry in names.items()}
        self.modes = {n: (mode, list(log)) for n, (mode, log) in modes.items()}
        self.items = {}
        for n, f in self.files.items():
            self.items.update((('page', n, p), [e for _, e in v]) for p, v in f.pages.items())
            if f.sizes:
                self.items['size', n] = [e for _, e in f.sizes]
        self.items.update((('mode', n), [e for _, e in log]) for n, (_, log) in self.modes.items() if log)
        self.items.update((('name', key), [e for _, e in entry[1]]) for key, entry in self.names.items() if entry[1])
        self.metadata = sorted({e for item, events in self.items.items() if item[0] != 'page' for e in events})

    # ---- choices: {item: index of its value, from 1; what is not named is 0}

    def none(self):
        return {}

    def all(self):
        return {item: len(events) for item, events in self.items.items()}

    def single(self, item, i):
        return {item: i}

    def all_but(self, item, i):
        return {**self.all(), item: i}

    def dice(self, dice):
        chance = dice.choice((0.1, 0.3, 0.5, 0.7, 0.9))
        return {item: dice.randrange(1, len(events) + 1) if dice.random() < 0.3 else len(events)
                for item, events in self.items.items() if dice.random() < chance}

    def in_order(self, until, choice):
        """Of the choice the pages only; names and sizes as they were after event `until`, or after the last fsync."""
        until = max(until, self.floor)
        ordered = {item: i for item, i in choice.items() if item[0] == 'page'}
        for item, events in self.items.items():
            if item[0] != 'page':
                ordered[item] = sum(e <= until for e in events)
        return ordered

    def tell(self, choice):
        """In words, for people."""
        words = [f'{" ".join(map(str, item))} as of event {self.items[item][i - 1] - 1}' for item, i in choice.items()
                 if i and item in self.items]
        return f'{len(words)} of {len(self.items)} reached: {"; ".join(words[:30])}'

    # ---- what lies there then

    def file(self, n, choice):
        f = self.files[n]
        size = choice.get(('size', n), 0)
        return f.build(f.sizes[size - 1][0] if size else len(f.data),
                       {p: choice['page', n, p] - 1 for p in f.pages if choice.get(('page', n, p))})

    def state(self, choice):
        """What tree() would find; .modes are the modes."""
        entries, found = {}, State()
        for key, (number, log) in self.names.items():
            i = choice.get(('name', key), 0)
            number = log[i - 1][0] if i else number
            if number is not None:
                entries.setdefault(key[0], []).append((key[1], number))
        todo = [('', 0)]
        while todo:
            top, number = todo.pop()
            for name, child in entries.get(number, []):
                path = os.path.join(top, name)
                found[path] = self.file(child, choice) if child in self.files else None
                mode, log = self.modes[child]
                i = choice.get(('mode', child), 0)
                found.modes[path] = log[i - 1][0] if i else mode
                if found[path] is None:
                    todo.append((path, child))
        return found


def choices(medium, places, count, dice):
    """`count` pairs (cut, choice) of the cuts at these places: all that is systematic, or half of the count of it; the rest by dice.
    Of the latter each second one is of the kinder medium."""
    cuts = [medium.cut(k) for k in places]
    plan = [(cut, how) for cut in cuts for how in (cut.none, cut.all)]
    for cut in cuts:
        for item, events in cut.items.items():
            plan += [(cut, cut.single, item, i + 1) for i in range(len(events))]
            plan += [(cut, cut.all_but, item, i) for i in range(len(events))]
        plan += [(cut, cut.in_order, e, choice) for e in [0, *cut.metadata] for choice in (cut.none(), cut.all())]
    if len(plan) > count // 2:
        plan = dice.sample(plan, count // 2)
    for cut, how, *args in plan:
        yield cut, how(*args)
    busy = [cut for cut in cuts if cut.items] or cuts
    for i in range(count - len(plan)):
        cut = dice.choice(busy)
        choice = cut.dice(dice)
        yield cut, cut.in_order(dice.choice([0, *cut.metadata]), choice) if i % 2 else choice
