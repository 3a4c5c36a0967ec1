"""Clients that people have, each in a scripted scenario: what arrives is byte for byte what was put into the spool.

Line ends are compared as LF, which is what the clients write; what a client adds to a message's header is named in its test
and taken off again.  A client that is missing is a failure: tools/deps test installs them all."""
import collections
import hashlib
import json
import os
import poplib
import pty
import re
import select
import signal
import subprocess

import pytest

from conftest import ALMOND, IS_ROOT, ROOT, SECONDS, Server, Spool, host, plain, switches, tool, top, wire

CLIENTS = ROOT / 'test/clients'
NODE_POP3 = 'node-pop3@0.11.0'
SWITCHES = switches(ALMOND)
NOBODY = 65534
WAIT = 2 * SECONDS


def head(name):
    return (f'From: Anna <anna@example.org>\nTo: user@example.org\nSubject: {name}\n'
            f'Date: Mon, 05 Jan 2026 10:00:00 +0000\nMessage-ID: <{name}@example.org>\n').encode()


MIME = b'MIME-Version: 1.0\nContent-Type: text/plain; charset=%s\nContent-Transfer-Encoding: 8bit\n'
MAILS = {
    'plain': head('plain') + b'\nOne line.\n\nAnd another.\n',
    'dots': head('dots') + b'\n.\n..\n.a line\n...\n\n.\nend\n.\n',
    'crlf': (head('crlf') + b'\nStored with CRLF.\n.dot\n\nend\n').replace(b'\n', b'\r\n'),
    'latin': head('latin') + MIME % b'iso-8859-1' + b'\n' + bytes(range(0xA0, 0x100)) + b'\n\xe9t\xe9\n',
    'utf': head('utf') + MIME % b'utf-8' + b'\n' + 'Grüße, Ἑλλάς, 日本\n'.encode(),
    'long': head('long') + b'\n' + b'0123456789' * 10000 + b'\nend\n',
    'empty': head('empty') + b'\n',
    'folded': head('folded') + b'X-Folded: a\n\tb\n   c\n\nbody\n',
    'million': head('million') + b'\n' + b''.join(b'%07d The quick brown fox jumps over the lazy dog.\n' % i
                                                  for i in range(19000)),
    'open': head('open') + b'\nNo newline at the end',
}
NAMES = list(MAILS)


def lf(text):
    return text.replace(b'\r\n', b'\n')


def digest(text):
    return hashlib.sha256(text).hexdigest()


# What a client that writes LF shall have.
WANTED = {name: digest(lf(wire(mail))) for name, mail in MAILS.items()}


def name_of(text):
    return re.search(rb'^Subject: (\w+)\r?$', text, re.M)[1].decode()


def check(texts, names=NAMES, without=()):
    """These messages arrived, each once and byte for byte, less header fields that the client adds."""
    texts = [without_fields(lf(t), without) for t in texts]
    got = [(name_of(t), digest(t)) for t in texts]
    assert collections.Counter(got) == collections.Counter((n, WANTED[n]) for n in names), \
        {name_of(t): first_difference(t) for t in texts}


def first_difference(text):
    want = lf(wire(MAILS[name_of(text)]))
    at = next((i for i, (a, b) in enumerate(zip(text, want)) if a != b), min(len(text), len(want)))
    return 'equal' if text == want else (at, text[max(at - 40, 0):at + 40], want[max(at - 40, 0):at + 40])


def without_fields(text, names):
    header, blank, body = text.partition(b'\n\n')
    for name in names:
        header = re.sub(rb'(?im)^' + name.encode() + rb':[^\n]*(\n[ \t][^\n]*)*(\n|\Z)', b'', header)
    return header.rstrip(b'\n') + blank + body


def read_dir(path):
    return [p.read_bytes() for p in sorted(path.iterdir())] if path.exists() else []


def read_maildir(path):
    return read_dir(path / 'new') + read_dir(path / 'cur')


def read_mbox(path):
    """The mails of an mbox that a client wrote: a separator before and a blank line after each."""
    data = path.read_bytes() if path.exists() else b''
    parts = re.split(rb'(?:^|(?<=\n\n))From [^\n]*\n', data)
    assert parts[0] == b'' and all(p.endswith(b'\n\n') for p in parts[1:])
    return [p[:-1] for p in parts[1:]]


class Box:
    """The user's mailbox, of either kind, with all mails in it."""

    def __init__(self, spool, store, mails=None, name='user'):
        self.spool, self.store, self.name = spool, store, name
        mails = list((MAILS if mails is None else mails).values())
        if store == 'maildir':
            self.path = spool.maildir(name, {f'{"new" if i % 2 else "cur"}/{1767600000 + i}.M1P1.h{"" if i % 2 else ":2,S"}':
                                             mail for i, mail in enumerate(mails)})
        else:
            # The last mail ends the file, whether it has a newline or not.
            self.path = spool.mbox(name, b'\n'.join(b'From anna@example.org Mon Jan  5 10:00:00 2026\n' + m for m in mails))

    def check_emptied(self):
        if self.store == 'maildir':
            assert [p.name for p in self.path.glob('*/*')] == []
        else:
            assert self.path.stat().st_size == 0


@pytest.fixture(params=[s for s in ('mbox', 'maildir') if SWITCHES[f'ENABLE_{s.upper()}']])
def store(request):
    return request.param


@pytest.fixture
def box(spool, store):
    return Box(spool, store)


@pytest.fixture(params=['pass', 'apop'] if SWITCHES['ENABLE_APOP'] else ['pass'])
def login(request, spool):
    """How clients log in: with APOP where every account has a plain secret, so that the greeting offers it."""
    if request.param == 'apop':
        spool.account('user', 'secret', plain)
    else:
        spool.users(user='secret')
    return request.param


@pytest.fixture
def server(login, box, serve):
    return serve()


def run(*argv, home, code=0, who=None, **env):
    env = {'PATH': os.environ['PATH'], 'HOME': str(home), 'LC_ALL': 'C.UTF-8', 'TZ': 'UTC', **env}
    argv = [tool(str(argv[0])), *map(str, argv[1:])]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, env=env,
                          cwd=home, **(who or {}))
    codes = code if isinstance(code, tuple) else (code,)
    assert done.returncode in codes, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


# ---- curl

class Curl:
    def __init__(self, server, home, login):
        self.url = f'pop3://127.0.0.1:{server.port}/'
        self.home, self.login = home, login

    def __call__(self, *args, **how):
        return run('curl', '-q', '-sS', '--noproxy', '*', '--max-time', WAIT, '-u', 'user:secret', *args, home=self.home,
                   **how).stdout

    def command(self, text, *more):
        return self('-X', text, self.url, *more)


@pytest.fixture
def curl(server, tmp_path, login):
    return Curl(server, tmp_path, login)


def test_curl_reads(curl, box, login, server):
    before = box.spool.picture()
    sizes = [len(wire(mail)) for mail in MAILS.values()]
    listing = b''.join(b'%d %d\r\n' % (i + 1, n) for i, n in enumerate(sizes))
    assert curl(curl.url) == listing
    assert curl('-l', curl.url) == listing
    uids = [line.split()[1] for line in curl.command('UIDL').splitlines()]
    assert len(set(uids)) == len(MAILS)
    texts = []
    for i, (name, mail) in enumerate(MAILS.items(), 1):
        text = curl(f'{curl.url}{i}')
        assert digest(text) == digest(wire(mail)), name
        texts.append(text)
        assert curl.command(f'TOP {i} 0') == top(mail, 0)
        assert curl.command(f'TOP {i} 2') == top(mail, 2)
        heads = curl('-v', '--stderr', '-', '-I', '-X', f'UIDL {i}', curl.url)
        assert b'< +OK %d %s\r\n' % (i, uids[i - 1]) in heads
        assert (b'> APOP user ' in heads) == (login == 'apop')
        assert (b'> PASS secret' in heads) == (login == 'pass')
    check(texts)
    assert box.spool.picture() == before


def test_curl_all_at_once_over_one_connection(curl, box, server, tmp_path):
    curl('-o', tmp_path / '#1', f'{curl.url}[1-{len(MAILS)}]')
    check((tmp_path / str(i)).read_bytes() for i in range(1, len(MAILS) + 1))
    server.wait_log('end user=user .*why=quit')
    assert server.log().count('end user=') == 1


def test_curl_deletes(curl, box):
    curl('-I', '-X', 'DELE 2', curl.url)
    assert curl(curl.url).count(b'\r\n') == len(MAILS) - 1
    assert curl(f'{curl.url}2') == wire(MAILS[NAMES[2]])
    more = []
    for i in range(1, len(MAILS)):
        more += ['--next', '-sS', '--noproxy', '*', '-u', 'user:secret', '-I', '-X', f'DELE {i}', curl.url]
    curl(*more[1:])
    assert curl(curl.url) == b'\r\n'      # curl's own line, for a list of nothing
    box.check_emptied()


def test_curl_wrong_password(server, tmp_path):
    url = f'pop3://127.0.0.1:{server.port}/'
    run('curl', '-q', '-sS', '--noproxy', '*', '-u', 'user:wrong', url, home=tmp_path, code=67)


# ---- mpop

def mpop(server, home, login, keep, delivery, code=0):
    method = {'pass': 'user', 'apop': 'apop'}[login]
    write(home / 'mpoprc', f'account default\nhost 127.0.0.1\nport {server.port}\nuser user\npassword secret\n'
          f'auth {method}\ntls off\nkeep {keep}\ndelivery {delivery}\nuidls_file {home}/uidls\nreceived_header off\n')
    return run('mpop', '-C', home / 'mpoprc', home=home, code=code)


@pytest.mark.parametrize('kind', ['maildir', 'mbox'])
def test_mpop_keeps_then_deletes(server, box, tmp_path, login, kind):
    into = tmp_path / 'in'
    for sub in ('cur', 'new', 'tmp') if kind == 'maildir' else ():
        (into / sub).mkdir(parents=True)

    def read():
        return read_maildir(into) if kind == 'maildir' else read_mbox(into)

    before = box.spool.picture()
    mpop(server, tmp_path, login, 'on', f'{kind} {into}')
    check(read())
    again = mpop(server, tmp_path, login, 'on', f'{kind} {into}')
    check(read())
    assert b'retrieving' not in again.stdout
    assert box.spool.picture() == before
    # What was fetched already is deleted, and not fetched again; a list that was lost fetches all.
    mpop(server, tmp_path, login, 'off', f'{kind} {into}')
    check(read())
    box.check_emptied()


def test_mpop_fetches_and_deletes_at_once(server, box, tmp_path, login):
    for sub in ('cur', 'new', 'tmp'):
        (tmp_path / 'in' / sub).mkdir(parents=True)
    mpop(server, tmp_path, login, 'off', f'maildir {tmp_path}/in')
    check(read_maildir(tmp_path / 'in'))
    box.check_emptied()
    mpop(server, tmp_path, login, 'off', f'maildir {tmp_path}/in')
    check(read_maildir(tmp_path / 'in'))


# ---- fetchmail: TOP where mail is kept, RETR where not; a Received field of its own, unless told not to; in lines longer than
# its buffer it puts a NUL, an octet of junk and a newline behind each 8,191 octets

def repaired(texts):
    return [re.sub(rb'([^\n]{8191})\0.\n', rb'\1', lf(t), flags=re.S) for t in texts]


def fetchmail(server, home, login, *how, mda, code=0, received=False):
    write(home / 'fetchmailrc',
          f'set no syslog\nset no bouncemail\n{"" if received else "set invisible"}\nset idfile "{home}/ids"\nset pidfile "{home}/pid"\n'
          f'poll 127.0.0.1 protocol {"APOP" if login == "apop" else "POP3"} port {server.port} uidl timeout {int(WAIT)} '
          f'{"" if login == "apop" else "auth password "}user "user" password "secret" sslproto "" '
          f'mda "{mda}" {" ".join(how)}\n')
    return run('fetchmail', '-f', home / 'fetchmailrc', '--nodetach', '--nosslcertck', home=home, code=code,
               FETCHMAILHOME=str(home))


@pytest.fixture
def into_files(tmp_path):
    """A delivery agent that puts each message into a file of its own."""
    (tmp_path / 'in').mkdir()
    write(tmp_path / 'mda', f'#!/bin/sh\nexec cat >"$(mktemp {tmp_path}/in/XXXXXXXX)"\n', 0o755)
    return tmp_path / 'mda'


@pytest.mark.parametrize('received', [False, True])
def test_fetchmail_keeps_then_flushes(server, box, tmp_path, login, into_files, received):
    extra = ('Received',) if received else ()
    before = box.spool.picture()
    fetchmail(server, tmp_path, login, 'keep', mda=into_files, received=received)
    texts = read_dir(tmp_path / 'in')
    assert all((b'\nReceived: from ' in b'\n' + lf(t)) == received for t in texts)
    check(repaired(texts), without=extra)
    assert box.spool.picture() == before
    fetchmail(server, tmp_path, login, 'keep', mda=into_files, received=received, code=1)       # 1: no new mail
    assert len(read_dir(tmp_path / 'in')) == len(MAILS)
    # Flush deletes what was fetched before, and fetches nothing again.
    fetchmail(server, tmp_path, login, 'nokeep', 'flush', mda=into_files, received=received, code=(0, 1))
    check(repaired(read_dir(tmp_path / 'in')), without=extra)
    box.check_emptied()


def test_fetchmail_into_another_spool(server, box, tmp_path, login, store):
    """fetchmail hands each message to `almond deliver`; the other spool serves the same mails, with the same unique-ids."""
    other = Spool()
    try:
        other.users(copy='secret')
        Box(other, store, {}, name='copy')
        fetchmail(server, tmp_path, login, 'nokeep', 'fetchall',
                  mda=f'{ALMOND} deliver -d {other.path} -u {other.users_file} -f anna@example.org copy')
        box.check_emptied()
        with Server(other) as second, second.pop('copy') as pop:
            texts = [pop.multi(f'RETR {i}') for i in pop.sizes()]
            pop.quit()
        check(repaired(texts))
    finally:
        other.remove()


# ---- getmail6: delivers nothing as root, and adds a Return-Path

@pytest.fixture
def ours(spool):
    """A directory of the user that getmail runs as."""
    path = spool.base / 'home'
    path.mkdir()
    return path


def getmail(server, home, login, delete, kind='Maildir', code=0):
    write(home / 'getmailrc',
          f'[retriever]\ntype = SimplePOP3Retriever\nserver = 127.0.0.1\nport = {server.port}\nusername = user\n'
          f'password = secret\nuse_apop = {login == "apop"}\n[destination]\ntype = {kind}\n'
          f'path = {home}/in{"/" if kind == "Maildir" else ""}\n'
          f'[options]\ndelete = {delete}\nread_all = false\ndelivered_to = false\nreceived = false\n')
    who = {'user': NOBODY, 'group': NOBODY, 'extra_groups': []} if IS_ROOT else {}
    for path in (home, *home.rglob('*')) if IS_ROOT else ():
        os.chown(path, NOBODY, NOBODY)
    tool('getmail')
    # The script's text, since the user may not be able to read the file.
    return run('/usr/bin/python3', '-c', (CLIENTS / 'getmail.py').read_text(), f'--getmaildir={home}',
               f'--rcfile={home}/getmailrc', home=home, code=code, who=who)


@pytest.mark.parametrize('kind', ['Maildir', 'Mboxrd'])
def test_getmail_keeps_then_deletes(server, box, ours, login, kind):
    into = ours / 'in'
    if kind == 'Maildir':
        for sub in ('cur', 'new', 'tmp'):
            (into / sub).mkdir(parents=True)
    else:
        into.write_bytes(b'')

    def read():
        return read_maildir(into) if kind == 'Maildir' else read_mbox(into)

    before = box.spool.picture()
    getmail(server, ours, login, 'false', kind)
    check(read(), without=['Return-Path'])
    getmail(server, ours, login, 'false', kind)
    check(read(), without=['Return-Path'])
    assert box.spool.picture() == before
    getmail(server, ours, login, 'true', kind)
    check(read(), without=['Return-Path'])
    box.check_emptied()


# ---- a terminal, for what wants one

class Terminal:
    """A program on a terminal of its own; `seen` is all that it wrote there."""

    def __init__(self, argv, home, **env):
        self.seen, self.at = b'', 0
        path = tool(argv[0])
        self.pid, self.fd = pty.fork()
        if not self.pid:
            try:
                os.chdir(home)
                os.execve(path, [str(a) for a in argv], {'PATH': os.environ['PATH'], 'HOME': str(home), 'TERM': 'vt100',
                                                         'LC_ALL': 'C.UTF-8', 'LINES': '40', 'COLUMNS': '120', **env})
            finally:
                os._exit(127)

    def fill(self):
        ready, _, _ = select.select([self.fd], [], [], WAIT)
        assert ready, f'nothing more came after {self.seen[-2000:]!r}'
        try:
            data = os.read(self.fd, 65536)
        except OSError:         # EIO: the other end is closed
            data = b''
        self.seen += data
        return data

    def expect(self, pattern):
        """What came since the last time, up to and with a match."""
        while not (hit := re.compile(pattern, re.S).search(self.seen, self.at)):
            assert self.fill(), f'no {pattern!r} in {self.seen[self.at:]!r}'
        text, self.at = self.seen[self.at:hit.end()], hit.end()
        return text

    def send(self, text):
        os.write(self.fd, text)

    def end(self):
        """The exit code, after all was read."""
        while self.fill():
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


# ---- mutt

def mutt(server, home, login, keys):
    """All mails are listed; then the keys are pressed.  What the list shows, in its order."""
    (home / 'tmp').mkdir(exist_ok=True)
    write(home / 'muttrc', f'set tmpdir="{home}/tmp" pop_authenticators="{"apop" if login == "apop" else "user"}"\n'
          'set pop_checkinterval=0 pop_delete=no pop_last=no pop_reconnect=no ssl_starttls=no ssl_force_tls=no beep=no\n'
          'set confirmcreate=no confirmappend=no mbox_type=Maildir wait_key=no move=no delete=yes quit=yes\n'
          f'set folder="{home}"\n'
          'set sort=mailbox-order index_format="(%C:%s)" header_cache="" message_cachedir="" suspend=no\n'
          f'macro index X "{keys}"\n')
    argv = ['mutt', '-n', '-F', home / 'muttrc', '-f', f'pop://user:secret@127.0.0.1:{server.port}/']
    with Terminal(argv, home) as screen:
        screen.expect(rb'\(%d:\w+\)' % len(MAILS))
        listed = re.findall(rb'\((\d+):(\w+)\)', screen.seen)
        screen.send(b'X')
        code = screen.end()
        assert code == 0, screen.seen
        return listed


def test_mutt_lists_and_saves_then_deletes(server, box, tmp_path, login):
    before = box.spool.picture()
    listed = mutt(server, tmp_path, login, f'<tag-pattern>~A<enter><tag-prefix><copy-message>{tmp_path}/in<enter><quit>')
    assert listed == [(b'%d' % i, name.encode()) for i, name in enumerate(NAMES, 1)]
    check(read_maildir(tmp_path / 'in'), without=('Content-Length', 'Lines'))      # which mutt adds
    assert box.spool.picture() == before
    mutt(server, tmp_path, login, '<delete-pattern>~A<enter><quit>')
    box.check_emptied()
    assert len(read_maildir(tmp_path / 'in')) == len(MAILS)


# ---- Python's poplib

@pytest.fixture
def pop(server, monkeypatch, login):
    monkeypatch.setattr(poplib, '_MAXLINE', 1 << 20)       # as published, it refuses lines of more than 2,048 octets
    pop = poplib.POP3('127.0.0.1', server.port, timeout=WAIT)
    if login == 'apop':
        pop.apop('user', 'secret')
    else:
        pop.user('user')
        pop.pass_('secret')
    yield pop
    pop.close()


def lines_text(lines):
    return b''.join(line + b'\n' for line in lines)


def test_poplib_reads(pop, box):
    before = box.spool.picture()
    sizes = [len(wire(mail)) for mail in MAILS.values()]
    assert pop.stat() == (len(MAILS), sum(sizes))
    assert pop.list()[1] == [b'%d %d' % (i + 1, n) for i, n in enumerate(sizes)]
    uids = [line.split()[1] for line in pop.uidl()[1]]
    assert len(set(uids)) == len(MAILS)
    for i, mail in enumerate(MAILS.values(), 1):
        assert pop.list(i) == b'+OK %d %d' % (i, sizes[i - 1])
        assert pop.uidl(i) == b'+OK %d %s' % (i, uids[i - 1])
        for n in (0, 1, 3, 100000):
            assert lines_text(pop.top(i, n)[1]) == lf(top(mail, n))
    check(lines_text(pop.retr(i + 1)[1]) for i in range(len(MAILS)))
    capa = pop.capa()
    assert {'USER', 'UIDL', 'TOP', 'PIPELINING'} <= set(capa)
    pop.dele(1)
    pop.dele(3)
    assert pop.stat() == (len(MAILS) - 2, sum(sizes) - sizes[0] - sizes[2])
    with pytest.raises(poplib.error_proto):
        pop.retr(3)
    pop.rset()
    assert pop.stat() == (len(MAILS), sum(sizes))
    pop.noop()
    assert pop.quit().startswith(b'+OK')
    assert box.spool.picture() == before


def test_poplib_deletes(pop, box):
    for i in range(len(MAILS), 0, -1):
        pop.dele(i)
    assert pop.stat() == (0, 0)
    assert pop.list()[1] == []
    pop.quit()
    box.check_emptied()


def test_poplib_deletes_nothing_without_quit(pop, box):
    before = box.spool.picture()
    pop.dele(1)
    pop.close()
    assert box.spool.picture() == before


def test_poplib_long_line_is_the_clients_limit(server, login):
    pop = poplib.POP3('127.0.0.1', server.port, timeout=WAIT)
    pop.user('user')
    pop.pass_('secret')
    with pytest.raises(poplib.error_proto, match='line too long'):
        pop.retr(NAMES.index('long') + 1)
    pop.close()


@pytest.mark.parametrize('login', ['pass'], indirect=True)
def test_poplib_utf8(spool, login, store, serve):
    mail = 'Subject: Grüße\n\nGrüße\n'.encode()
    Box(spool, store, {'utf': mail})
    server = serve()
    for ask in (True, False):
        pop = poplib.POP3('127.0.0.1', server.port, timeout=WAIT)
        assert ('UTF8' in pop.capa()) == SWITCHES['ENABLE_UTF8']
        if ask and SWITCHES['ENABLE_UTF8']:
            assert pop.utf8().startswith(b'+OK')
        elif ask:
            with pytest.raises(poplib.error_proto):
                pop.utf8()
        pop.user('user')
        pop.pass_('secret')
        text = lines_text(pop.retr(1)[1])
        want = mail
        if SWITCHES['ENABLE_UTF8'] and not ask:
            want = 'Subject: Gr????e\n\nGrüße\n'.encode()
        assert text == want and pop.list(1) == b'+OK 1 %d' % len(wire(mail))
        pop.quit()


# ---- Perl's Net::POP3

@pytest.mark.parametrize('what', ['keep', 'delete'])
def test_net_pop3(server, box, tmp_path, login, what):
    before = box.spool.picture()
    (tmp_path / 'in').mkdir()
    done = run('perl', CLIENTS / 'net-pop3.pl', server.port, 'user', 'secret', tmp_path / 'in', login, what, home=tmp_path)
    said = done.stdout.decode().splitlines()
    sizes = [len(wire(mail)) for mail in MAILS.values()]
    assert said[0] == f'login {len(MAILS)}'
    assert said[1] == f'stat {len(MAILS)} {sum(sizes)}'
    assert said[2] == 'last 0'
    rows = [line.split() for line in said if line.startswith('message ')]
    assert [(int(r[1]), int(r[2]), int(r[4])) for r in rows] == [
        (i, len(wire(mail)), len(lf(top(mail, 0)))) for i, mail in enumerate(MAILS.values(), 1)]
    assert said[-1].startswith('error ') and len(said) == len(rows) + 4
    check(read_dir(tmp_path / 'in'))
    if what == 'delete':
        box.check_emptied()
    else:
        assert box.spool.picture() == before


# ---- npm's node-pop3

@pytest.fixture(scope='session')
def node_pop3():
    """Installed once below build/npm, from wherever npm is told to fetch."""
    prefix = ROOT / 'build/npm'
    name, version = NODE_POP3.split('@')
    library = prefix / 'node_modules' / name

    def installed():
        package = library / 'package.json'
        return package.exists() and json.loads(package.read_text())['version'] == version
    if not installed():
        prefix.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([tool('npm'), 'install', '--prefix', str(prefix), '--no-audit', '--no-fund', '--no-package-lock',
                               '--ignore-scripts', '--loglevel=error', NODE_POP3], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10 * SECONDS)
        assert done.returncode == 0 and installed(), done.stdout.decode()
    return library / json.loads((library / 'package.json').read_text())['exports']['import']


@pytest.mark.parametrize('login', ['pass'], indirect=True)         # the client knows no APOP
@pytest.mark.parametrize('what', ['keep', 'delete'])
def test_node_pop3(node_pop3, server, box, tmp_path, what):
    before = box.spool.picture()
    (tmp_path / 'in').mkdir()
    done = run('node', CLIENTS / 'node-pop3.mjs', node_pop3, server.port, 'user', 'secret', tmp_path / 'in', what,
               home=tmp_path)
    said = json.loads(done.stdout)
    sizes = [len(wire(mail)) for mail in MAILS.values()]
    assert said['stat'] == f'{len(MAILS)} {sum(sizes)}'
    assert said['list'] == [[str(i), str(n)] for i, n in enumerate(sizes, 1)]
    assert said['one'] == [[a, b] for a, b in zip(said['list'], said['uidl'])]
    assert len({uid for _, uid in said['uidl']}) == len(MAILS)
    assert [t.encode('latin1') + b'\r\n' for t in said['top']] == [top(mail, 0) for mail in MAILS.values()]
    assert said['error'] and said['quit'] == f'POP3 {host()} server shutdown'
    for i, (name, mail) in enumerate(MAILS.items(), 1):
        assert digest((tmp_path / 'in' / str(i)).read_bytes()) == digest(wire(mail)), name
    if what == 'delete':
        box.check_emptied()
    else:
        assert box.spool.picture() == before


# ---- telnet, as every textbook shows it

@pytest.mark.parametrize('login', ['pass'], indirect=True)
def test_telnet(spool, login, store, serve, tmp_path):
    mail = head('telnet') + b'\nHello.\n.dot\n'
    box = Box(spool, store, {'telnet': mail})
    server = serve()
    size = len(wire(mail))
    with Terminal(['telnet', '127.0.0.1', server.port], tmp_path) as line:
        line.expect(rb"Connected to 127\.0\.0\.1\.\r\nEscape character is '\^\]'\.\r\n")
        line.expect(rb'\+OK POP3 %s server ready\r\n' % re.escape(host().encode()))
        for command, reply in [
            (b'USER user', rb'\+OK [^\r]*\r\n'),
            (b'PASS secret', rb'\+OK 1 messages \(%d octets\)\r\n' % size),
            (b'STAT', rb'\+OK 1 %d\r\n' % size),
            (b'LIST', rb'\+OK [^\r]*\r\n1 %d\r\n\.\r\n' % size),
            (b'RETR 1', rb'\+OK %d octets\r\n%s\.\r\n' % (size, re.escape(wire(mail).replace(b'\r\n.', b'\r\n..')))),
            (b'DELE 1', rb'\+OK [^\r]*\r\n'),
            (b'QUIT', rb'\+OK POP3 %s server shutdown\r\n' % re.escape(host().encode())),
        ]:
            line.send(command + b'\r')
            line.expect(re.escape(command) + rb'\r\n' + reply)
        line.expect(rb'Connection closed by foreign host\.\r\n')
        line.end()
    box.check_emptied()
