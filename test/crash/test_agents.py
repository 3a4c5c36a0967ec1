"""Real delivery agents deliver to a mailbox while sessions delete from it and are killed, also in the middle of their commits and
of the mending that follows.  A ledger knows each message.  A deletion that QUIT's +OK confirmed stays; one whose QUIT got no answer
may have happened, all of it or none; every other message that was delivered is there once, octet for octet.

postfix is an instance of the test's own: its queue lies in the test's directory, it listens nowhere, and its processes, mounts and
network are in name spaces that end with it."""
import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import threading
import time

import pytest

import crash
from conftest import GROUP, IS_ROOT, OWNER, SECONDS, Spool, inetd_style, switches, tool, wire
from crash import BOX, home, report, scale
from test_delivery import Agents, make_mail, read_mail
from test_regressions import soon

SWITCHES = switches(crash.ALMOND)
pytestmark = pytest.mark.skipif(not SWITCHES['ENABLE_USERS'], reason='a build without a users file')
# What stands in front of a mail whatever its agent writes there; with a date, postfix adds nothing behind.
DATE = b'Date: Mon, 5 Jan 2026 10:00:00 +0000\n'
PACED = ('postfix', 'killed')    # these come and go so fast that the others would not get a turn
FEW, MANY = 8, 20       # messages: below, sessions delete little; above, agents wait


class Wrong(AssertionError):
    pass


def make_large(number):
    """One that takes some time to move; read_mail reads it too."""
    body = ''.join(f'line {i} of mail {number} {"z" * (i % 70)}\n' for i in range(4000)).rstrip('\n').encode()
    return (f'From: sender@example.org\nTo: user@example.org\nMessage-ID: <{number}@test>\n'
            f'X-Sum: {hashlib.sha256(body).hexdigest()}\n\n').encode() + body + b'\n'


# ---- postfix

MAIN = '''
compatibility_level = 3.6
queue_directory = {base}/queue
data_directory = {base}/data
maillog_file = {base}/data/log
maillog_file_prefixes = {base}
myhostname = post.test
mydestination = post.test
inet_interfaces = loopback-only
inet_protocols = ipv4
local_recipient_maps =
alias_maps =
alias_database =
mail_spool_directory = {spool}
mailbox_delivery_lock = fcntl, dotlock
mailbox_size_limit = 0
deliver_lock_attempts = 30
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 2s
transport_retry_time = 1s
service_throttle_time = 1s
'''
MASTER = '''
postlog unix-dgram n - n - 1 postlogd
pickup unix n - n 1 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 1 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
error unix - - n - - error
retry unix - - n - - error
local unix - n n - - local
'''


class Postfix:
    """local(8) and what feeds it.  A mail is delivered when the log says so."""

    def __init__(self, spool, maildir):
        self.base = spool.base / 'postfix'
        for name in ('conf', 'queue', 'data'):
            (self.base / name).mkdir(parents=True)
        subprocess.run(['chown', 'postfix', self.base / 'data'], check=True)
        place = f'{spool.path}/' if maildir else spool.path
        (self.base / 'conf/main.cf').write_text(MAIN.format(base=self.base, spool=place))
        (self.base / 'conf/master.cf').write_text(MASTER)
        with open('/etc/passwd') as f:
            others = [line for line in f if line.startswith(('root:', 'postfix:', 'nobody:'))]
        (self.base / 'passwd').write_text(''.join([*others, f'{BOX}:x:{OWNER}:{GROUP}::/:/bin/false\n']))
        self.log, self.at, self.number_of, self.delivered = self.base / 'data/log', 0, {}, set()
        self.lock = threading.Lock()
        # The shell is its name space's first process: it ends when we close its input, or end, and takes all others with it.
        script = 'mount --bind "$0" /etc/passwd && ip link set lo up && { "$@" & read end; }'
        self.process = subprocess.Popen(
            ['unshare', '-m', '-n', '-p', '-f', 'sh', '-c', script, self.base / 'passwd', tool('postfix'), '-c',
             self.base / 'conf', 'start-fg'], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait(lambda: 'daemon started' in self.text())

    def text(self):
        return self.log.read_text(errors='replace') if self.log.exists() else ''

    def wait(self, condition):
        pause, end = threading.Event(), time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end and ': fatal: ' not in self.text(), self.text()[-3000:]
            pause.wait(0.05)

    def take(self, mail):
        argv = [tool('sendmail'), '-C', str(self.base / 'conf'), '-i', '-f', 'sender@example.org', f'{BOX}@post.test']
        done = subprocess.run(argv, input=mail, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
        assert done.returncode == 0, done

    def sent(self):
        """The numbers of all mails delivered so far."""
        with self.lock, contextlib.suppress(FileNotFoundError), open(self.log, 'rb') as f:
            f.seek(self.at)
            data = f.read()
            data = data[:data.rfind(b'\n') + 1]
            self.at += len(data)
            for line in data.decode().splitlines():
                if m := re.search(r': (\w+): message-id=<(\d+)@test>', line):
                    self.number_of[m[1]] = int(m[2])
                elif m := re.search(r'/local\[\d+\]: (\w+): .* status=sent \(delivered to ', line):
                    self.delivered.add(self.number_of[m[1]])
                else:
                    assert ' status=bounced' not in line, line
        return set(self.delivered)

    def stop(self):
        self.process.stdin.close()
        self.process.wait(SECONDS)


# ---- the ledger

class Ledger:
    def __init__(self):
        self.lock = threading.Lock()
        self.mails, self.arrived, self.gone = {}, set(), set()
        self.perhaps = set()    # their agent was killed: once or not at all
        self.doubt = set()      # their session's QUIT got no answer
        self.hidden = self.lost = self.doubled = self.torn = self.risen = self.halves = 0
        self.numbers = iter(range(10**9))

    def begin(self, dice):
        with self.lock:
            number = next(self.numbers)
            self.mails[number] = DATE + (make_large(number) if dice.random() < 0.1 else make_mail(number, dice))
            return number, self.mails[number]

    def snapshot(self):
        with self.lock:
            return set(self.arrived), set(self.perhaps)

    def full(self):
        return len(self.mails) - len(self.gone) > MANY

    def wrong(self, kind, what):
        setattr(self, kind, getattr(self, kind) + (len(what) or 1))
        raise Wrong(f'{kind}: {what}')

    def same(self, text, number):
        """What came back by RETR is what was delivered; an agent may have put fields in front."""
        try:
            assert read_mail(text) == number
        except AssertionError as e:
            self.wrong('torn', [str(e)])
        if not text.endswith(wire(self.mails[number])):
            self.wrong('torn', [number])

    def view(self, before, seen, stored=None):
        """What a login sees, against what had arrived before it.  An mbox's commit is all or nothing.  `stored` is what lies in a
        Maildir: of that, a session may miss what another reader moves while it looks."""
        arrived, perhaps = before
        here = set(seen) | (stored or set())
        self.hidden += len((arrived - self.gone - self.doubt) & here - set(seen))
        with self.lock:
            twice = sorted(n for n in here if seen.count(n) > 1)
            if twice:
                self.wrong('doubled', twice)
            if here & self.gone:
                self.wrong('risen', sorted(here & self.gone))
            if lost := arrived - self.gone - self.doubt - here:
                self.wrong('lost', sorted(lost))
            if stored is None and self.doubt & here and self.doubt - here:
                self.wrong('halves', sorted(self.doubt - here))
            assert here <= set(self.mails)
            self.gone |= self.doubt - here
            self.doubt.clear()
            self.gone |= perhaps - here - self.arrived
            self.arrived |= perhaps & here
            self.perhaps -= perhaps


# ---- who delivers

class Writers(Agents):
    def __init__(self, spool, ledger, names):
        super().__init__(spool, BOX)
        self.ledger, self.faults, self.stop = ledger, [], threading.Event()
        self.post = Postfix(spool, self.path.is_dir()) if 'postfix' in names else None
        self.queued, self.counts, self.cut = set(), dict.fromkeys(names, 0), 0
        self.threads = [threading.Thread(target=self.work, args=(name, seed), daemon=True) 
                        for seed, name in enumerate([*names, *(n for n in names if n not in PACED)])]
        for t in self.threads:
            t.start()

    def argv(self):
        return [crash.ALMOND, 'deliver', '-d', str(self.spool.path), '-u', str(self.spool.users_file), BOX]

    def deliver(self, mail):
        code = 75
        while code == 75 and not self.stop.is_set():
            done = subprocess.run(self.argv(), input=mail, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
            code = done.returncode
        if code == 75:
            return False
        assert code == 0, done

    def killed(self, mail, dice):
        """`almond deliver`, killed somewhere: None, and nobody knows."""
        with subprocess.Popen(self.argv(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(mail)
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.random() * 0.025)
            process.kill()
            code = process.wait(SECONDS)
        return code == 0 if code >= 0 else None

    def work(self, name, seed):
        dice, pause = random.Random(seed), threading.Event()
        try:
            while not self.stop.is_set():
                if name in PACED:
                    pause.wait(dice.random() * 0.2)
                if self.ledger.full():
                    pause.wait(0.02)
                    continue
                number, mail = self.ledger.begin(dice)
                if name == 'postfix':
                    self.queued.add(number)
                    self.post.take(mail)
                    self.counts[name] += 1
                    continue
                came = self.killed(mail, dice) if name == 'killed' else getattr(self, name)(mail)
                with self.ledger.lock:
                    if came is None and name == 'killed':
                        self.ledger.perhaps.add(number)
                        self.cut += 1
                    elif came is not False:
                        self.ledger.arrived.add(number)
                        self.counts[name] += 1
        except Exception as e:      # told in the main thread
            self.faults.append(e)

    def look(self):
        """All that came so far goes into the ledger."""
        assert not self.faults, self.faults
        if self.post:
            sent = self.post.sent()
            with self.ledger.lock:
                self.ledger.arrived |= sent

    def at_work(self):
        return any(t.is_alive() for t in self.threads) or (self.post is not None and not self.queued <= self.post.sent())

    def close(self):
        self.stop.set()
        if self.post:
            self.post.stop()


class Movers:
    """Other readers of a Maildir: what is new becomes cur, and flags change."""

    def __init__(self, path):
        self.path, self.stop, self.lock, self.moves = path, threading.Event(), threading.Lock(), 0
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        dice = random.Random(5)
        while not self.stop.wait(0.005):
            with self.lock, contextlib.suppress(FileNotFoundError):
                new, cur = os.listdir(self.path / 'new'), os.listdir(self.path / 'cur')
                if new and dice.random() < 0.5:
                    name = dice.choice(new)
                    os.rename(self.path / 'new' / name, self.path / 'cur' / f'{name}:2,')
                elif cur:
                    name = dice.choice(cur)
                    flags = ''.join(c for c in 'FRS' if dice.random() < 0.5)
                    os.rename(self.path / 'cur' / name, self.path / 'cur' / f'{name.partition(":")[0]}:2,{flags}')
                self.moves += 1

    def close(self):
        self.stop.set()
        self.thread.join()


# ---- a session

class Reader:
    """One session after the other, in all ways that a session can go."""

    def __init__(self, spool, ledger, writers, movers):
        self.spool, self.ledger, self.writers, self.movers = spool, ledger, writers, movers
        self.dice = random.Random(1939)
        self.rounds = self.kills = self.journals = self.in_login = 0
        self.commit_time = [0.003]

    def stored(self):
        if self.movers:
            with self.movers.lock:
                return set(stored(self.spool.path / BOX))

    def start(self):
        return inetd_style(self.spool, almond=crash.ALMOND, start_new_session=True)

    def kill(self, pop, program):
        """All its processes at once; what it had said before is read."""
        self.kills += 1
        os.killpg(program.process.pid, signal.SIGKILL)
        program.wait()
        said = pop.rest()
        with contextlib.suppress(FileNotFoundError):
            self.journals += (home(self.spool) / 'journal').stat().st_size > 0
        pop.close()
        return said

    def enter(self):
        """Log in; now and then the first try is killed, perhaps while it mends what another left."""
        for _ in range(200):
            pop, program = self.start()
            pop.ok('USER user')
            if self.dice.random() < 0.15:
                pop.send('PASS secret\r\n')
                time.sleep(self.dice.random() * 0.01)
                self.in_login += 1
                self.kill(pop, program)
                continue
            self.writers.look()
            before = self.ledger.snapshot()
            reply = pop.cmd('PASS secret')
            if reply.startswith('+OK'):
                return pop, program, before
            assert '[IN-USE]' in reply, reply       # an agent holds the lock for long
            pop.close()
            program.wait()
        raise AssertionError('never let in')

    def fetch(self, pop, share):
        """{message: number}; a part of them whole, of the others the header."""
        numbers = {}
        for n, size in pop.sizes().items():
            whole = self.dice.random() < share
            pop.send(f'RETR {n}\r\n' if whole else f'TOP {n} 0\r\n')
            reply = pop.line()
            if not reply.startswith('+OK'):         # a Maildir's other reader was there
                assert self.movers, (n, reply)
                continue
            text = pop.text()
            found = re.findall(rb'^Message-ID: <(\d+)@test>\r$', text, re.M)
            if len(found) != 1:
                self.ledger.wrong('torn', [text[:300]])
            numbers[n] = int(found[0])
            if whole:
                assert len(text) == size
                self.ledger.same(text, numbers[n])
        return numbers

    def one(self):
        pop, program, before = self.enter()
        dice = self.dice
        self.rounds += 1
        numbers = self.fetch(pop, 0.3)
        self.ledger.view(before, list(numbers.values()), self.stored())
        many = len(numbers)
        chosen = dice.sample(sorted(numbers), min(many, dice.randrange(1, 3) if many < FEW else dice.randrange(1, many // 3 + 2)))
        asked = {numbers[n] for n in chosen}
        for n in chosen:
            pop.ok(f'DELE {n}')
        how = dice.random()
        if how < 0.2:
            start = time.monotonic()
            reply = pop.cmd('QUIT')
            self.commit_time = [*self.commit_time[-8:], time.monotonic() - start]
            self.answered(reply, asked)
            pop.closed()
        elif how < 0.3:
            pop.close()
        elif how < 0.4:
            if numbers and dice.random() < 0.5:
                pop.send(f'RETR {min(numbers)}\r\n')
            self.kill(pop, program)
            return
        else:
            # Somewhere in the commit, wherever that is on this machine.
            with self.ledger.lock:
                self.ledger.doubt |= asked
            pop.send('QUIT\r\n')
            time.sleep(dice.random() * dice.random() * 1.5 * sorted(self.commit_time)[len(self.commit_time) // 2])
            said = self.kill(pop, program)
            if b'\r\n' in said:
                with self.ledger.lock:
                    self.ledger.doubt -= asked
                self.answered(said.decode(), asked)
            return
        pop.close()
        program.wait()

    def answered(self, reply, asked):
        assert reply.startswith(('+OK', '-ERR [IN-USE]')), reply
        if reply.startswith('+OK'):
            with self.ledger.lock:
                self.ledger.gone |= asked

    def wait(self, condition):
        """A lock that a killed process left is in the way of all agents until somebody logs in."""
        def calm():
            pop, program = self.start()
            pop.ok('USER user')
            pop.cmd('PASS secret')
            pop.close()
            program.wait()
            return not condition()
        assert soon(calm, 3 * SECONDS)

    def last(self):
        """Nobody else is there any more: all that was delivered, octet for octet."""
        self.writers.look()
        before = self.ledger.snapshot()
        pop, program = self.start()
        pop.login()
        numbers = self.fetch(pop, 1)
        pop.quit()
        program.wait()
        self.ledger.view(before, list(numbers.values()), self.stored())
        return sorted(numbers.values())


def stored(path):
    """The numbers of the mails that lie in the mailbox, by its files' octets alone."""
    files = [p for sub in ('new', 'cur') for p in (path / sub).iterdir()] if path.is_dir() else [path]
    data = b'\n'.join(p.read_bytes() for p in files)
    assert b'\0' not in data
    return sorted(int(n) for n in re.findall(rb'^Message-ID: <(\d+)@test>$', data, re.M))


@pytest.fixture
def spool():
    s = Spool()
    s.lines(f'{BOX}:{{PLAIN}}secret')
    yield s
    s.remove()


@pytest.mark.parametrize('box', [
    pytest.param('mbox', marks=pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='a build without mbox')),
    pytest.param('maildir', marks=pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='a build without Maildir'))])
def test_agents(spool, box):
    is_mbox = box == 'mbox'
    names = ['procmail', 'maildrop'] + ['postfix'] * IS_ROOT + ['deliver', 'killed'] * SWITCHES['ENABLE_DELIVER']
    rounds = scale(150, 2000) if is_mbox else scale(100, 1000)
    spool.mbox(BOX, b'') if is_mbox else spool.maildir(BOX, {})
    ledger = Ledger()
    writers = Writers(spool, ledger, names)
    movers = None if is_mbox else Movers(spool.path / BOX)
    reader = Reader(spool, ledger, writers, movers)
    try:
        while reader.rounds < rounds:
            reader.one()
        writers.stop.set()
        reader.wait(writers.at_work)
        if movers:
            movers.close()
        left = reader.last()
        assert left == stored(spool.path / BOX)
        assert set(left) | ledger.gone == ledger.arrived | ledger.gone and not set(left) & ledger.gone
        assert ledger.arrived - ledger.gone == set(left)
    finally:
        writers.close()
        if movers:
            movers.close()
        counts = {'journals': reader.journals} if is_mbox else {'moves': movers.moves, 'hidden': ledger.hidden}
        report(f'delivery agents, sessions killed: {box}', rounds=reader.rounds, kills=reader.kills, in_login=reader.in_login,
               agents_killed=writers.cut, **counts, mails=len(ledger.arrived),
               **{k: getattr(ledger, k) for k in ('lost', 'doubled', 'torn', 'risen', 'halves')})
        print('delivered by', writers.counts)
    assert all(n for name, n in writers.counts.items()), writers.counts
    assert reader.kills > rounds // 4 and ledger.gone and (reader.journals or not is_mbox)


SLOW = [tool('strace'), '-D', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=fsync', '-e', 'inject=fsync:delay_enter=500000']


@pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'] or not SWITCHES['ENABLE_DELIVER'], reason='a build without mbox or deliver')
def test_the_last_message_while_another_comes(spool):
    """`almond deliver` makes room behind it, then writes: what is there of that is no reason to refuse the one in front."""
    dice = random.Random(1)
    mails = [make_mail(n, dice) for n in range(3)]
    box = spool.mails(BOX, mails[:2])
    size = box.stat().st_size
    pop, program = inetd_style(spool, almond=crash.ALMOND)
    with pop:
        pop.login()
        argv = [*SLOW, crash.ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, BOX]
        with subprocess.Popen([str(a) for a in argv], stdin=subprocess.PIPE) as agent:
            agent.stdin.write(mails[2])
            agent.stdin.close()
            assert soon(lambda: box.stat().st_size > size)
            assert pop.multi('RETR 2') == wire(mails[1])
            pop.ok('DELE 2')
            assert agent.wait(SECONDS) == 0
        assert pop.quit().startswith('+OK')
    program.wait()
    assert stored(box) == [0, 2]


@pytest.mark.skipif(not SWITCHES['ENABLE_MAILDIR'], reason='a build without Maildir')
def test_a_message_that_does_not_stand_still(spool):
    """Another reader changes its flags whenever it is about to be removed: what QUIT says of it is true."""
    first = '1000.1.host:2,'
    cur = spool.maildir(BOX, {f'cur/{first}': b'Subject: one\n\n1\n', 'cur/1001.1.host:2,': b'Subject: two\n\n2\n'}) / 'cur'
    stop = threading.Event()

    def move():
        name, n = first, 0
        with contextlib.suppress(FileNotFoundError):
            while not stop.wait(0.01):
                n += 1
                os.rename(cur / name, cur / f'{first}S{n}')
                name = f'{first}S{n}'
    slow = [tool('strace'), '-D', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=unlinkat', '-e', 'inject=unlinkat:delay_enter=100000']
    pop, program = inetd_style(spool, almond=crash.ALMOND, prefix=slow)
    with pop:
        pop.login()
        pop.ok('DELE 1')
        thread = threading.Thread(target=move)
        thread.start()
        reply = pop.cmd('QUIT')
    stop.set()
    thread.join()
    program.wait()
    left = {name.partition(':')[0] for name in os.listdir(cur)}
    assert left == ({'1001.1.host'} if reply.startswith('+OK') else {'1000.1.host', '1001.1.host'}), reply
