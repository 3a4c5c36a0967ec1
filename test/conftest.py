"""What the tests share: a spool with exact bytes, a server, a line client.

ALMOND names the binary under test (default: build/test/almond, whose waits are short, see TEST_DEFS in the Makefile).
Nothing here asserts a time; every wait is for an event, and bounded only so that a hang becomes a failure."""
import base64
import hashlib
import hmac
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import warnings

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALMOND = str(pathlib.Path(os.environ.get('ALMOND', ROOT / 'build/test/almond')).absolute())
IS_ROOT = os.geteuid() == 0
# almond serves no mail as root: a test's mail belongs to a user that need not exist.
OWNER = 12345 if IS_ROOT else os.geteuid()
GROUP = 12345 if IS_ROOT else os.getegid()
SECONDS = float(os.environ.get('TEST_HANG', '60'))
SEPARATOR = b'From sender@example.org Mon Jan  5 10:00:00 2026\n'
SANITIZER = re.compile(r'AddressSanitizer|LeakSanitizer|runtime error:|died by signal|almond: broken|exit 70')

os.environ.setdefault('ASAN_OPTIONS', 'detect_leaks=0:abort_on_error=1:handle_abort=0')
os.environ.setdefault('UBSAN_OPTIONS', 'print_stacktrace=1:abort_on_error=1')
os.umask(0o022)
# A shell's background job ignores both, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def switches(almond=ALMOND):
    """What `almond -V` says of the build: {'ENABLE_APOP': True, ...}."""
    text = subprocess.run([almond, '-V'], stdout=subprocess.PIPE, check=True, timeout=SECONDS).stdout.decode()
    return {name: value == '1' for name, value in re.findall(r'^(ENABLE_\w+) ([01])$', text, re.M)}


def host():
    name = socket.gethostname()[:64] or 'localhost'
    return ''.join('-' if c <= ' ' or c > '~' or c in '<>' else c for c in name)


def scram(secret, salt=b'almond tests....', rounds=4096):
    """A verifier, made without almond's own code."""
    secret = secret.encode() if isinstance(secret, str) else secret
    salted = hashlib.pbkdf2_hmac('sha256', secret, salt, rounds)
    stored = hashlib.sha256(hmac.digest(salted, b'Client Key', 'sha256')).digest()
    server = hmac.digest(salted, b'Server Key', 'sha256')
    text = [base64.b64encode(x).decode() for x in (salt, stored, server)]
    return 'SCRAM-SHA-256$%d:%s$%s:%s' % (rounds, *text)


def unix_crypt(secret):
    """As it stands in /etc/shadow, in a format that the build knows."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import crypt
    return crypt.crypt(secret, '$6$rounds=1000$almond$' if switches()['ENABLE_SHA_CRYPT'] else '$1$almond$')


def plain(secret):
    return '{PLAIN}' + secret


def wire(mail):
    """What RETR sends of it, before dots are doubled: written here again, on purpose, in another way than almond does."""
    text = re.sub(rb'(?<!\r)\n', b'\r\n', mail)
    return text if not text or text.endswith(b'\n') else text + b'\r\n'


def stuff(text):
    return re.sub(rb'(^|\n)\.', rb'\1..', text)


def top(mail, lines):
    """The wire form of its header, the blank line and that many lines of its body."""
    text = wire(mail)
    head, blank, body = text.partition(b'\r\n\r\n') if not text.startswith(b'\r\n') else (b'', b'\r\n', text[2:])
    return head + blank + b''.join(lf_lines(body)[:lines])


def lf_lines(text):
    return re.findall(rb'[^\n]*\n|[^\n]+$', text)


class Spool:
    """A spool directory that a user without rights can reach, and what lies in it."""

    def __init__(self, base=None):
        self.base = pathlib.Path(tempfile.mkdtemp(prefix='almond-', dir=base))
        self.base.chmod(0o755)
        self.path = self.base / 'spool'
        self.path.mkdir()
        self.own(self.path, 0o755)
        # As an installation leaves it: the first almond that root starts makes it.
        (self.path / '.almond').mkdir()
        (self.path / '.almond').chmod(0o1777)
        self.users_file = self.base / 'users'

    def own(self, path, mode=0o600):
        os.chmod(path, mode)
        os.chown(path, OWNER, GROUP)

    def mbox(self, name, data, mode=0o600):
        path = self.path / name
        path.write_bytes(data)
        self.own(path, mode)
        return path

    def mails(self, name, mails, crlf=False):
        """An mbox of these mails, each with a separator before and a blank line after it."""
        data = b''
        for mail in mails:
            data += SEPARATOR + mail + (b'' if not mail or mail.endswith(b'\n') else b'\n') + b'\n'
        return self.mbox(name, data.replace(b'\n', b'\r\n') if crlf else data)

    def maildir(self, name, files):
        """A Maildir; files: {'new/name': bytes}."""
        path = self.path / name
        for sub in ('', 'cur', 'new', 'tmp'):
            (path / sub).mkdir(exist_ok=True)
            self.own(path / sub, 0o700)
        for file, data in files.items():
            (path / file).write_bytes(data)
            self.own(path / file)
        return path

    def users(self, **secrets):
        """The users file, with these secrets."""
        return self.lines(*(f'{name}:{scram(secret)}' for name, secret in secrets.items())).system(**secrets)

    def account(self, name, secret, kind=scram):
        return self.lines(f'{name}:{kind(secret)}').system(**{name: secret})

    def system(self, **secrets):
        """The same as a system's accounts, which with_system puts in place of the machine's."""
        own = ''.join(f'{name}:x:{OWNER}:{GROUP}::/:/bin/false\n' for name in secrets)
        (self.base / 'passwd').write_text(own + 'nobody:x:65534:65534::/:/bin/false\n')
        (self.base / 'shadow').write_text(''.join(
            f'{name}:{unix_crypt(secret)}:20000:0:99999:7:::\n'
            for name, secret in secrets.items()))
        return self

    def with_system(self):
        """The beginning of a command that sees the spool's accounts as the system's."""
        return ['unshare', '-m', 'sh', '-c', 'cd "$0" && mount --bind passwd /etc/passwd && '
                'mount --bind shadow /etc/shadow && exec "$@"', self.base]

    def lines(self, *lines):
        self.users_file.write_text(''.join(line + '\n' for line in lines))
        self.users_file.chmod(0o600)
        return self

    def names(self):
        """What lies in the spool, but for what almond keeps there."""
        return sorted(p.name for p in self.path.iterdir() if p.name != '.almond')

    def read(self, name):
        return (self.path / name).read_bytes()

    def picture(self):
        """All that a session which deletes nothing must leave as it is."""
        seen = {}
        for top_, dirs, files in os.walk(self.path):
            for name in ['.'] + dirs + files:
                path = os.path.join(top_, name)
                st = os.lstat(path)
                data = pathlib.Path(path).read_bytes() if name in files and not os.path.islink(path) else None
                seen[os.path.relpath(path, self.path)] = (st.st_mode, st.st_uid, st.st_ino, st.st_size, st.st_mtime_ns,
                                                          st.st_ctime_ns, data)
        return seen

    def remove(self):
        shutil.rmtree(self.base, ignore_errors=True)


class Pop:
    """The client's end of a line."""

    def __init__(self, sock, greeting=True):
        self.sock = sock
        self.sock.settimeout(SECONDS)
        self.sent = b''
        self.got = b''          # all that ever came
        self.buffer = b''
        self.greeting = self.line() if greeting else None

    def send(self, data):
        self.sock.sendall(data.encode() if isinstance(data, str) else data)

    def fill(self):
        data = self.sock.recv(65536)
        self.got += data
        self.buffer += data
        return data

    def until(self, end):
        """All up to and with these bytes."""
        start = 0
        while (at := self.buffer.find(end, start)) < 0:
            start = max(0, len(self.buffer) - len(end))
            if not self.fill():
                raise EOFError(f'the line ended after {self.buffer[-200:]!r}')
        at += len(end)
        data, self.buffer = self.buffer[:at], self.buffer[at:]
        return data

    def raw_line(self):
        """A line with its end, of a multi-line reply's text."""
        return self.until(b'\n')

    def line(self):
        """A reply's first line, checked: +OK or -ERR, CRLF, no more than 512 octets."""
        line = self.raw_line()
        assert re.fullmatch(rb'(\+OK|-ERR)( [\x20-\x7e]*)?\r\n', line), line
        assert len(line) <= 512, line
        return line[:-2].decode()

    def text(self):
        """A multi-line reply's text, dots halved, without the final one."""
        if self.buffer.startswith(b'.\r\n') or (len(self.buffer) < 3 and self.peek(3) == b'.\r\n'):
            self.until(b'.\r\n')
            return b''
        data = self.until(b'\r\n.\r\n')[:-3]
        for line in lf_lines(data):
            assert line.endswith(b'\r\n'), f'an LF without a CR: {line[-60:]!r}'
        assert not re.search(rb'(^|\n)\.(?!\.)', data), 'a dot that was not doubled'
        return re.sub(rb'(^|\n)\.\.', rb'\1.', data)

    def peek(self, n):
        while len(self.buffer) < n and self.fill():
            pass
        return self.buffer[:n]

    def cmd(self, command):
        self.send((command.encode() if isinstance(command, str) else command) + b'\r\n')
        return self.line()

    def ok(self, command):
        reply = self.cmd(command)
        assert reply.startswith('+OK'), f'{command}: {reply}'
        return reply

    def err(self, command):
        reply = self.cmd(command)
        assert reply.startswith('-ERR'), f'{command}: {reply}'
        return reply

    def multi(self, command):
        self.ok(command)
        return self.text()

    def login(self, name='user', secret='secret'):
        self.ok(f'USER {name}')
        return self.ok(f'PASS {secret}')

    def uidl(self):
        return [line.split()[1].decode() for line in self.multi('UIDL').splitlines()]

    def sizes(self):
        return {int(n): int(size) for n, size in (line.split() for line in self.multi('LIST').splitlines())}

    def closed(self):
        """The server closes, and nothing more comes before."""
        assert self.rest() == b''

    def rest(self):
        try:
            while self.fill():
                pass
        except ConnectionResetError:
            pass
        data, self.buffer = self.buffer, b''
        return data

    def quit(self):
        reply = self.cmd('QUIT')
        self.closed()
        self.close()
        return reply

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Program:
    """A process whose standard error is the log."""

    def __init__(self, argv, **how):
        self.argv = [str(a) for a in argv]
        self.log_lines = []
        self.more = threading.Condition()
        how.setdefault('stdin', subprocess.DEVNULL)
        how.setdefault('stdout', subprocess.DEVNULL)
        self.process = subprocess.Popen(self.argv, stderr=subprocess.PIPE, **how)
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr:
            with self.more:
                self.log_lines.append(line.decode(errors='replace').rstrip('\n'))
                self.more.notify_all()
        with self.more:
            self.log_lines.append(None)
            self.more.notify_all()

    def log(self):
        with self.more:
            return '\n'.join(line for line in self.log_lines if line is not None)

    def wait_log(self, pattern, count=1):
        """Wait until that many lines of the log fit; the last of them."""
        def found():
            hits = [line for line in self.log_lines if line is not None and re.search(pattern, line)]
            return hits[count - 1] if len(hits) >= count else None
        with self.more:
            self.more.wait_for(lambda: found() or None in self.log_lines, timeout=SECONDS)
            hit = found()
        assert hit, f'no {pattern!r} in the log:\n{self.log()}'
        return hit

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        code = self.process.wait(SECONDS)
        self.reader.join(SECONDS)
        return code

    def check_log(self):
        assert not SANITIZER.search(self.log()), self.log()


def free_port(family=socket.AF_INET, address='127.0.0.1'):
    with socket.socket(family) as s:
        s.bind((address, 0))
        return s.getsockname()[1]


class Server(Program):
    """almond alone, listening on loopback.  A build without ENABLE_ALONE is started for each connection, as inetd does."""

    def __init__(self, spool, *args, almond=ALMOND, prefix=(), users=True, **how):
        self.spool = spool
        self.almond = almond
        if users and not switches(almond).get('ENABLE_USERS'):
            users, prefix, args = False, (*prefix, *spool.with_system()), ('-s', *args)
        base = [*prefix, almond, '-E', '-d', spool.path, *(['-u', spool.users_file] if users else []), *args]
        self.inetd = None
        if not switches(almond).get('ENABLE_ALONE'):
            self.base = base + ['-i']
            self.inetd = socket.create_server(('127.0.0.1', 0))
            self.port = self.inetd.getsockname()[1]
            self.sessions = []
            return
        for _ in range(20):
            self.port = free_port()
            super().__init__(base + ['-F', '-l', f'127.0.0.1:{self.port}'], **how)
            with self.more:
                self.more.wait_for(lambda: None in self.log_lines or any('started' in x for x in self.log_lines),
                                   timeout=SECONDS)
            if 'started' in self.log():
                return
            code = self.wait()
            if code != 69:      # 69: another took the port in the meantime
                break
        raise AssertionError(f'almond did not start, exit code {code}:\n{self.log()}')

    def connect(self):
        sock = socket.create_connection(('127.0.0.1', self.port), timeout=SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.inetd:
            accepted, _ = self.inetd.accept()
            self.sessions.append(Program(self.base, stdin=accepted, stdout=accepted))
            accepted.close()
        return sock

    def pop(self, name=None, secret='secret'):
        client = Pop(self.connect())
        if name:
            client.login(name, secret)
        return client

    def log(self):
        return '\n'.join(s.log() for s in self.sessions) if self.inetd else super().log()

    def wait_log(self, pattern, count=1):
        if not self.inetd:
            return super().wait_log(pattern, count)
        for s in self.sessions:
            s.wait()
        hits = re.findall(rf'^.*{pattern}.*$', self.log(), re.M)
        assert len(hits) >= count, f'no {pattern!r} in the log:\n{self.log()}'
        return hits[count - 1]

    def stop(self):
        """TERM, a clean exit, and nothing of a sanitizer's in the log."""
        if self.inetd:
            self.inetd.close()
            for s in self.sessions:
                if s.process.poll() is None:
                    s.signal(signal.SIGTERM)
                s.wait()
            self.check_log()
            return
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        code = self.wait()
        self.check_log()
        assert code == 0, f'exit code {code}:\n{self.log()}'

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.stop()
        elif not self.inetd and self.process.poll() is None:
            self.process.kill()
            self.wait()


def inetd_style(spool, *args, almond=ALMOND, tcp=False, prefix=(), **how):
    """almond -i on one end of a socket; the client on the other, and the process."""
    if tcp:
        with socket.create_server(('127.0.0.1', 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
    else:
        ours, theirs = socket.socketpair()
    with theirs:
        argv = [*prefix, almond, '-i', '-E', '-d', spool.path, '-u', spool.users_file, *args]
        program = Program(argv, stdin=theirs, stdout=theirs, **how)
    return Pop(ours), program


@pytest.fixture(scope='session')
def almond():
    assert os.access(ALMOND, os.X_OK), f'{ALMOND} is not built: make test-build'
    return ALMOND


@pytest.fixture
def spool(almond):
    s = Spool()
    yield s
    s.remove()


@pytest.fixture
def serve(spool):
    """serve(*args) starts a server for the test's spool, stopped and checked at the end."""
    running = []

    def start(*args, **how):
        running.append(Server(spool, *args, **how))
        return running[-1]

    yield start
    for s in running:
        s.stop()


needs_root = pytest.mark.skipif(not IS_ROOT, reason='only root can')


def tool(name):
    """A tool's path; a test that needs it fails where it is not there."""
    path = shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin:/sbin')
    assert path, f'{name} is missing: tools/deps test'
    return path
