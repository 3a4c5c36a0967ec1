"""What the proofs of test/crash share: mailboxes of many shapes, one session that deletes, mail that arrives meanwhile, the look
afterwards, and the verdict.

CRASH=long is `make crash`: everything.  Without it each proof runs in a bounded form, as part of `make test`.
CRASH_ALMOND names the binary (default: build/crash/almond, the static file's own flags, with short waits)."""
import fcntl
import hashlib
import os
import pathlib
import struct
import threading

from conftest import GROUP, IS_ROOT, OWNER, ROOT, SECONDS, SEPARATOR, Spool, inetd_style

ALMOND = str(pathlib.Path(os.environ.get('CRASH_ALMOND', ROOT / 'build/crash/almond')).absolute())
LONG = os.environ.get('CRASH') == 'long'
REPORT = ROOT / 'build/crash/report.txt'
BOX = 'user'
ARRIVED = b'From: late@example.org\nSubject: arrived meanwhile\n\nThis one came between.\n'
report_lock = threading.Lock()


def scale(short, long):
    return long if LONG else short


def report(proof, **figures):
    """One line of the table that `make crash` prints: what was tried, how often, how many were wrong."""
    line = f'{proof:<58} ' + '  '.join(f'{name} {value}' for name, value in figures.items())
    with report_lock:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        with REPORT.open('a') as f:
            f.write(line.rstrip() + '\n')
    print(line)


def body(name, size, eight=False):
    """A mail of about `size` octets whose every line is its own: spliced or glued mail cannot look whole."""
    head = f'From: sender@example.org\nSubject: {name}\nMessage-ID: <{name}@test>\n\n'.encode()
    lines, n, i = [], len(head), 0
    while n < size:
        line = f'{name} line {i} {hashlib.md5(f"{name}{i}".encode()).hexdigest() * 2}\n'.encode()
        lines.append(line)
        n += len(line)
        i += 1
    text = head + b''.join(lines)
    return text[:max(size, len(head)) - 1] + b'\n'


class Shape:
    """A mailbox and what is deleted from it.  old and new are the file before and after the commit, octet for octet."""

    def __init__(self, name, sizes, gone, crlf=False, mails=None, open_end=False, junk=b''):
        self.name = name
        self.mails = mails if mails is not None else [body(f'{name}-{i + 1}', size) for i, size in enumerate(sizes)]
        self.gone = sorted(gone)
        self.stored = [SEPARATOR + mail + b'\n' for mail in self.mails]
        if crlf:
            self.stored = [mail.replace(b'\n', b'\r\n') for mail in self.stored]
        if open_end:
            self.stored[-1] = self.stored[-1].rstrip(b'\r\n')
        self.old = junk + b''.join(self.stored)
        self.new = junk + b''.join(mail for i, mail in enumerate(self.stored) if i + 1 not in self.gone)
        self.at = len(junk) + sum(len(mail) for mail in self.stored[:self.gone[0] - 1])     # the first deletion

    @property
    def truncation(self):
        """Nothing that stays lies behind the first deletion."""
        return len(self.new) == self.at

    def __repr__(self):
        return self.name


TWIN = body('twin', 700)
K = 1024
SHAPES = [
    Shape('small-first', [600] + [50 * K] * 4, [1]),
    Shape('large-first', [200 * K, 600, 700, 800], [1]),
    Shape('small-before-large', [600] + [200 * K] * 2, [1]),
    Shape('borders-64k', [65536 - len(SEPARATOR) - 1] * 3 + [65536], [2]),
    Shape('border-less-one', [65535 - len(SEPARATOR) - 1, 65537, 65536, 100], [1, 3]),
    Shape('crlf', [900, 2000, 70 * K, 400], [2], crlf=True),
    Shape('middle', [3 * K] * 5, [3]),
    Shape('alternate', [1500] * 9, [1, 3, 5, 7, 9]),
    Shape('all-but-last', [2 * K] * 6, [1, 2, 3, 4, 5]),
    Shape('all-but-middle', [2 * K] * 5, [1, 2, 4, 5]),
    Shape('two-runs', [700, 800, 30 * K, 900, 1000, 5 * K, 600], [2, 3, 5]),
    Shape('twins', None, [1], mails=[body('head', 700), TWIN, TWIN, TWIN]),
    Shape('all-alike', None, [2], mails=[TWIN] * 4),
    Shape('no-last-newline', [900, 1100, 1300], [1], open_end=True),
    Shape('junk-first', [900, 1100, 1300], [1], junk=b'no mail at all\n\n'),
    Shape('last', [3 * K] * 4, [4]),
    Shape('tail', [3 * K] * 5, [3, 4, 5]),
    Shape('all', [2 * K] * 4, [1, 2, 3, 4]),
]
MOVING = [shape for shape in SHAPES if not shape.truncation]
SHAPE = {shape.name: shape for shape in SHAPES}


def make_spool(shape, base=None):
    """A spool that holds the shape's mailbox, and one user whose check costs nothing."""
    spool = Spool(base)
    spool.lines(f'{BOX}:{{PLAIN}}secret')
    spool.mbox(BOX, shape.old)
    return spool


def arrived(data):
    """The octets that a delivery agent appends to a mailbox of these octets: a separator wants a blank line in front."""
    gap = b'' if not data or data.endswith((b'\n\n', b'\n\r\n')) else b'\n' if data.endswith(b'\n') else b'\n\n'
    return gap + SEPARATOR + ARRIVED + b'\n'


def deliver(path):
    """As an agent that locks by fcntl and knows nothing of journals; what it appended."""
    with open(path, 'r+b') as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        data = f.read()
        more = arrived(data)
        f.seek(0, os.SEEK_END)
        f.write(more)
    return more


def converse(pop, gone, quit=True):
    """Log in, delete, QUIT; the last answer, or None where the line ended."""
    pop.login(BOX)
    for n in gone:
        pop.ok(f'DELE {n}')
    if not quit:
        return None
    try:
        return pop.cmd('QUIT')
    except (EOFError, ConnectionError, BrokenPipeError):
        return None


def session(spool, gone, prefix=(), almond=ALMOND):
    """One session of almond as inetd starts it, under `prefix` (a tracer, a killer); its last answer and its log.  A session
    that was killed answers None."""
    pop, program = inetd_style(spool, almond=almond, prefix=prefix)
    with pop:
        try:
            reply = converse(pop, gone)
        except (EOFError, ConnectionError, BrokenPipeError):
            reply = None
    program.wait()
    return reply, program.log()


def reopen(spool, almond=ALMOND):
    """What the next login finds: the first line of PASS, every mail by RETR as the wire has it, and the log."""
    pop, program = inetd_style(spool, almond=almond)
    with pop:
        assert pop.ok(f'USER {BOX}')
        reply = pop.cmd('PASS secret')
        mails = []
        if reply.startswith('+OK'):
            count = int(pop.ok('STAT').split()[1])
            mails = [pop.multi(f'RETR {i + 1}') for i in range(count)]
            assert pop.cmd('QUIT').startswith('+OK')
    program.wait()
    return reply, mails, program.log()


def home(spool):
    """Where almond keeps what it needs to mend the mailbox."""
    return spool.path / '.almond' / BOX


def verdict(shape, data, late=b''):
    """'old', 'new', or 'wrong': a mailbox is what it was before the commit, or what it should be after it, with what arrived
    behind.  `late` is what deliver() appended (its first line ends may differ with the end that it met)."""
    tails = {late, arrived(shape.old), arrived(shape.new)} if late else {b''}
    return 'old' if data in {shape.old + t for t in tails} else 'new' if data in {shape.new + t for t in tails} else 'wrong'


def is_whole(spool, shape, late=b''):
    """Log in, which mends what a crash left, and look at the file."""
    reply, mails, log = reopen(spool)
    assert reply.startswith('+OK'), f'{shape}: {reply}\n{log}'
    return verdict(shape, spool.read(BOX), late)
