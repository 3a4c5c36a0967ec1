"""The same mailboxes served by almond, Dovecot and popa3d.  Each difference stands in doc/DIFFERENCES.md, with its reason;
one that is new, or one of the table that is gone, fails.

The peers are Debian's packages, unpacked below build/peers by tools/deps and run in a root of their own that the test makes:
their accounts, spools and settings exist there alone.  They listen on loopback, or on nothing at all."""
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile

import pytest

from conftest import (GROUP, OWNER, ROOT, SECONDS, SEPARATOR, Pop, Program, Server, Spool, free_port, lf_lines, needs_root,
                      plain, tool, unix_crypt)

PEERS = ROOT / 'build/peers'
TABLE = ROOT / 'doc/DIFFERENCES.md'
pytestmark = needs_root


def separator(date=b'Mon Jan  5 10:00:00 2026', sender=b'anna@example.org'):
    return b'From ' + sender + b' ' + date + b'\n'


def mail(n, body=b'Hello.\n', more=b''):
    return b'From: anna@example.org\nSubject: %d\nMessage-ID: <%d@example.org>\n' % (n, n) + more + b'\n' + body


def box(*mails):
    return b''.join(SEPARATOR + m + b'\n' for m in mails)


PSEUDO = (b'Date: 05 Jan 2026 10:00:00 +0000\nFrom: Mail System Internal Data <MAILER-DAEMON@example.org>\n'
          b"Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\nX-IMAP: 1767600000 0000000002\nStatus: RO\n\n"
          b'This text is part of the internal format of your mail folder, and is not\na real message.\n')

# Name: what lies at SPOOL/name.
BOXES = {
    'plain': box(mail(1), mail(2, b'a\n\nb\n'), mail(3, b'\n\n')),
    'zero-bytes': b'',
    'missing': None,
    'no-last-newline': box(mail(1)) + SEPARATOR + mail(2, b'the end'),
    'no-last-blank-line': box(mail(1)) + SEPARATOR + mail(2, b'the end\n'),
    'many-last-blank-lines': box(mail(1, b'a\n\n\n\n'), mail(2, b'b\n\n\n')),
    'no-blank-between': SEPARATOR + mail(1) + SEPARATOR + mail(2) + b'\n',
    'crlf': box(mail(1), mail(2, b'a\n\n.b\n')).replace(b'\n', b'\r\n'),
    'crlf-in-lf': box(mail(1), mail(2).replace(b'\n', b'\r\n'), mail(3)),
    'crlf-no-last-newline': (SEPARATOR + mail(1, b'the end')).replace(b'\n', b'\r\n'),
    'lone-cr': box(mail(1, b'a\rb\r\rc\n\r\n'), mail(2, b'end\r')),
    'dots': box(mail(1, b'.\n..\n.a\n\n.\nb.\n.\n'), mail(2)),
    'dot-first': box(b'.first: octet\n' + mail(1), mail(2)),
    'nul': box(mail(1, b'a\0b\n\0\n'), mail(2, b'after\n', b'X-Nul: a\0b\n')),
    'long-line': box(mail(1, b'0123456789' * 10000 + b'\nend\n'), mail(2)),
    'long-header-line': box(mail(1, more=b'X-Long: ' + b'0123456789' * 2000 + b'\n'), mail(2)),
    'from-paragraph': box(mail(1, b'One.\n\nFrom here on it goes wrong.\n\nTwo.\n'), mail(2)),
    'from-no-blank': box(mail(1, b'One.\n' + SEPARATOR + b'Two.\n'), mail(2)),
    'from-quoted': box(mail(1, b'One.\n\n>From here on.\n>>From there.\n'), mail(2)),
    'from-dates': b''.join(separator(d) + mail(n) + b'\n' for n, d in enumerate((
        b'Mon Jan  5 10:00:00 2026', b'Mon Jan 5 10:00:00 2026', b'Mon Jan 05 10:00:00 2026', b'Mon Jan  5 10:00 2026',
        b'Mon Jan  5 10:00:00 UTC 2026', b'Mon Jan  5 10:00:00 +0100 2026', b'Mon Jan  5 10:00:00 2026 +0100',
        b'Mon Jan  5 10:00:00 2026 remote from there'), 1)),
    'from-mail-date': SEPARATOR + mail(1) + b'\n' + separator(b'Mon, 5 Jan 2026 10:00:00 +0000') + mail(2) + b'\n',
    'from-no-date': SEPARATOR + mail(1) + b'\nFrom anna@example.org\n' + mail(2) + b'\n',
    'from-no-sender': SEPARATOR + mail(1) + b'\nFrom Mon Jan  5 10:00:00 2026\n' + mail(2) + b'\n',
    'from-blank-sender': SEPARATOR + mail(1) + b'\n' + separator(sender=b'"anna b"@example.org') + mail(2) + b'\n',
    'first-no-date': b'From anna@example.org\n' + mail(1) + b'\n' + SEPARATOR + mail(2) + b'\n',
    'junk-first': b'some\njunk\n\n' + box(mail(1), mail(2)),
    'blank-first': b'\n' + box(mail(1), mail(2)),
    'only-junk': b'This is no mailbox.\nNo, it is not.\n',
    'pseudo-message': separator(sender=b'MAILER-DAEMON') + PSEUDO + b'\n' + box(mail(1), mail(2)),
    'pseudo-message-as-mail': box(PSEUDO, mail(1), mail(2)),
    'content-length-right': box(mail(1, b'12345\n', b'Content-Length: 6\n'), mail(2)),
    'content-length-short': box(mail(1, b'0123456789\n', b'Content-Length: 3\n'), mail(2)),
    'content-length-long': box(mail(1, b'12345\n', b'Content-Length: 1000000\n'), mail(2)),
    'content-length-hides': box(mail(1, b'12345\n', b'Content-Length: %d\n' % len(b'12345\n\n' + SEPARATOR + mail(2))),
                                mail(2), mail(3)),
    'header-only': box(b'From: anna@example.org\nSubject: 1\n', b'Subject: 2\n', mail(3)),
    'header-only-open': SEPARATOR + b'From: anna@example.org\nSubject: 1',
    'body-only': box(b'\nNo header at all.\n', mail(2)),
    'empty-mails': SEPARATOR + SEPARATOR + b'\n' + SEPARATOR + b'\n\n' + box(mail(1)),
    'no-header-lines': box(b'this is no header\nnor is this\n\nbody\n', mail(2)),
    'status': box(mail(1, more=b'Status: RO\nX-Status: A\nX-Keywords:\n'), mail(2, more=b'X-UID: 7\nX-UIDL: mine\n'),
                  mail(3, more=b'X-IMAPbase: 1767600000 9\nX-UID: 9\nStatus: O\n')),
    'duplicates': box(mail(1), mail(1), mail(2), mail(1)),
    'same-header': box(mail(1, b'one\n'), mail(1, b'two\n')),
    'eight-bit': box(mail(1, bytes(range(0x80, 0x100)) + b'\n', b'X-Name: Gr\xc3\xbc\xc3\x9fe \xe9\n'), mail(2)),
}


def old(path):
    """popa3d waits for the next second after a change, as it must where times are all it has."""
    os.utime(path, (1767600000, 1767600000))


# What is said to the mailbox `talk`, of three messages, after the login, in two sessions.
WHEN = 'again|with one deleted|once deleted|after RSET'
TALKS = [
    ['CAPA', 'NOOP', 'NOOP x', 'STAT', 'STAT 1', 'stat', 'LAST', 'LIST 2', 'LIST 0', 'LIST 4', 'LIST -1', 'LIST 02', 'LIST 1x',
     'LIST 4294967297', 'LIST 18446744073709551617', 'LIST 2 2', 'UIDL 4', 'RETR', 'RETR 0', 'RETR 1 1', 'TOP 1', 'TOP 1 x',
     'TOP 1 -1', 'TOP 1 18446744073709551617'],
    ['DELE 2', 'DELE 2 again', 'STAT with one deleted', 'LIST 2 once deleted', 'RETR 2 once deleted', 'UIDL 2 once deleted',
     'TOP 2 0 once deleted', 'LIST with one deleted', 'RETR 3', 'LAST with one deleted', 'USER user', 'XYZZY', 'AUTH',
     'RSET', 'RSET x', 'STAT after RSET', 'LAST after RSET'],
]
BOXES['talk'] = box(mail(1), mail(2, b'a\n\nb\n'), mail(3, b'c\n'))
COMMANDS = sum(TALKS, [])
KNOWN = [*BOXES, *COMMANDS]

# ---- the servers

class Almond:
    name = 'almond'

    def __init__(self, base):
        self.spool = Spool(base)
        self.spool.lines(*(f'{name}:{plain("secret")}' for name in BOXES)).system(**{name: 'secret' for name in BOXES})
        self.mail = self.spool.path
        self.server = None

    def start(self):
        self.server = Server(self.spool)

    def connect(self):
        return self.server.connect()

    def stop(self):
        if self.server:
            self.server.stop()


class Peer:
    """A root directory with the package's files, the system's libraries, and accounts of its own."""

    def __init__(self, base):
        self.root = pathlib.Path(base) / self.name
        for path in ('etc/pam.d', 'var/mail', 'var/lib/popa3d', 'run/dovecot', 'home', 'tmp', 'dev', 'proc', 'usr/bin',
                     'usr/sbin', 'usr/lib/dovecot', 'usr/lib64'):
            (self.root / path).mkdir(parents=True)
        for name in ('bin', 'sbin', 'lib', 'lib64'):
            (self.root / name).symlink_to(f'usr/{name}')
        for loader in pathlib.Path('/usr/lib').glob('ld-*.so*'):
            (self.root / 'usr/lib' / loader.name).symlink_to(os.readlink(loader))
        self.mail = self.root / 'var/mail'
        self.mail.chmod(0o1777)
        for name in ('', 'home', 'var', 'run', 'etc'):
            (self.root / name).chmod(0o755)
        os.chown(self.root / 'home', OWNER, GROUP)
        users = [(name, OWNER, GROUP) for name in BOXES]
        own = [('root', 0, 0), ('popa3d', 901, 901), ('dovecot', 902, 902), ('dovenull', 903, 903)]
        etc = self.root / 'etc'
        (etc / 'passwd').write_text(''.join(f'{n}:x:{u}:{g}::/home:/bin/sh\n' for n, u, g in own + users))
        (etc / 'group').write_text(''.join(f'{n}:x:{g}:\n' for n, _, g in own) + f'mail:x:{GROUP}:\n')
        secret = unix_crypt('secret')
        (etc / 'shadow').write_text(''.join(f'{n}:{secret}:20000:0:99999:7:::\n' for n, *_ in users))
        (etc / 'shadow').chmod(0o600)
        (etc / 'nsswitch.conf').write_text('passwd: files\nshadow: files\ngroup: files\n')
        (etc / 'pam.d' / self.name).write_text('auth required pam_unix.so\naccount required pam_unix.so\n')
        self.running = []
        assert (PEERS / f'.{self.package}').exists(), f'{self.package} is not unpacked: tools/deps test'

    def command(self, *argv):
        """Begins with a view of the files that ends with the process."""
        binds = [(PEERS / 'usr/sbin', 'usr/sbin'), (PEERS / 'usr/bin', 'usr/bin'), ('/dev', 'dev'), ('/proc', 'proc')]
        binds += [(p.parent, f'usr/lib/{p.parent.name}') for p in pathlib.Path('/usr/lib').glob('*-linux-*/libc.so.6')]
        binds += [(p, str(p)[1:]) for p in (pathlib.Path('/usr/lib64'), ) if p.exists()]
        if (PEERS / 'usr/lib/dovecot').exists():
            binds += [(PEERS / 'usr/lib/dovecot', 'usr/lib/dovecot')]
        script = 'mount --make-rprivate / && '
        for source, target in binds:
            (self.root / target).mkdir(exist_ok=True)
            script += f'mount --bind "{source}" "{self.root / target}" && '
        return [tool('unshare'), '-m', 'sh', '-c', script + 'exec "$@"', 'sh', tool('chroot'), self.root, *argv]

    def log(self):
        return '\n'.join(p.log() for p in self.running)


class Popa3d(Peer):
    name = package = 'popa3d'

    def start(self):
        self.listener = socket.create_server(('127.0.0.1', 0))

    def connect(self):
        """As inetd does it."""
        ours = socket.create_connection(self.listener.getsockname())
        theirs, _ = self.listener.accept()
        with theirs:
            self.running.append(Program(self.command('/usr/sbin/popa3d'), stdin=theirs, stdout=theirs))
        return ours

    def stop(self):
        self.listener.close()
        for program in self.running:
            program.wait()


class Dovecot(Peer):
    name = 'dovecot'
    package = 'dovecot-pop3d'

    CONFIG = '''
protocols = pop3
listen = 127.0.0.1
base_dir = /run/dovecot
state_dir = /run/dovecot
log_path = /dovecot.log
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain
first_valid_uid = 1
first_valid_gid = 1
mail_max_userip_connections = 0
mail_location = mbox:/home/%%u:INBOX=/var/mail/%%u:INDEX=MEMORY
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=%(uid)d gid=%(gid)d home=/home/%%u
}
service anvil {
  chroot =
}
service pop3-login {
  chroot =
  inet_listener pop3 {
    port = %(port)d
  }
  inet_listener pop3s {
    port = 0
  }
}
service stats {
  chroot =
}
'''

    def start(self):
        for _ in range(20):
            self.port = free_port()
            (self.root / 'etc/dovecot.conf').write_text(self.CONFIG % {'port': self.port, 'uid': OWNER, 'gid': GROUP})
            program = Program(self.command('/usr/sbin/dovecot', '-F', '-c', '/etc/dovecot.conf'))
            self.running.append(program)
            while program.process.poll() is None:
                try:
                    socket.create_connection(('127.0.0.1', self.port), SECONDS).close()
                    return
                except ConnectionRefusedError:
                    try:
                        program.process.wait(0.05)
                    except subprocess.TimeoutExpired:
                        pass
            if 'Address already in use' not in self.log():
                break
        raise AssertionError(f'dovecot did not start:\n{self.log()}')

    def connect(self):
        return socket.create_connection(('127.0.0.1', self.port))

    def log(self):
        path = self.root / 'dovecot.log'
        return super().log() + (path.read_text() if path.exists() else '')

    def stop(self):
        for program in self.running:
            if program.process.poll() is None:
                program.process.terminate()
            program.wait()


# ---- one look at one mailbox

def raw_text(pop):
    """A multi-line reply's text as it is on the line: with its dots, without the final one."""
    if pop.peek(3) == b'.\r\n':
        pop.until(b'.\r\n')
        return b''
    return pop.until(b'\r\n.\r\n')[:-3]


def rows(pop, command):
    assert pop.raw_line().startswith(b'+OK'), command
    return [line.split(b' ') for line in raw_text(pop).split(b'\r\n')[:-1]]


class View:
    """What a client sees of a mailbox: STAT, LIST, UIDL, and of each message RETR and TOP with 0 and 2 lines."""

    def __init__(self, server, name):
        self.refused, self.sizes, self.sent, self.text, self.tops, self.uids = None, [], [], [], [], []
        pop = Pop(server.connect(), greeting=False)
        assert pop.raw_line().startswith(b'+OK'), server.log()
        pop.send(f'USER {name}\r\n')
        assert pop.raw_line().startswith(b'+OK')
        pop.send('PASS secret\r\n')
        try:
            reply = pop.raw_line()
            if reply.startswith(b'+OK'):        # Dovecot looks at the mailbox only now
                pop.send('STAT\r\n')
                reply = pop.raw_line()
        except (EOFError, ConnectionError):
            reply = b'the line is closed'
        if not reply.startswith(b'+OK'):
            self.refused = re.sub(r'\s*<.*?>', '', reply.decode().strip())
            pop.close()
            return
        self.stat = tuple(map(int, reply.split()[1:3]))
        pop.send('LIST\r\n')
        self.sizes = [int(size) for _, size in rows(pop, 'LIST')]
        pop.send('UIDL\r\n')
        self.uids = [uid for _, uid in rows(pop, 'UIDL')]
        for n in range(1, len(self.sizes) + 1):
            self.text.append(self.fetch(pop, f'RETR {n}'))
            self.tops.append([self.fetch(pop, f'TOP {n} {lines}') for lines in (0, 2)])
        pop.send('QUIT\r\n')
        pop.raw_line()
        pop.rest()
        pop.close()

    def fetch(self, pop, command):
        pop.send(command + '\r\n')
        reply = pop.raw_line()
        assert reply.startswith(b'+OK'), (command, reply)
        return raw_text(pop)


def unstuffed(text):
    return re.sub(rb'(^|\n)\.', rb'\1', text)


def octets(text):
    return len(unstuffed(text))


def faults(view):
    """What contradicts itself, whoever says it."""
    found = {}

    def say(n, what):
        found.setdefault(what, []).append(n)
    if view.refused:
        return found
    if view.stat != (len(view.sizes), sum(view.sizes)):
        say(0, f'STAT says {view.stat[0]} {view.stat[1]}')
    for n, (size, text) in enumerate(zip(view.sizes, view.text), 1):
        if size != octets(text):
            say(n, f'announces {size}, sends {octets(text)}')
        if re.search(rb'(^|\n)\.(?!\.)', text):
            say(n, 'a dot is not doubled')
        if not all(line.endswith(b'\r\n') for line in lf_lines(text)):
            say(n, 'a bare LF')
        uid = view.uids[n - 1]
        if not re.fullmatch(rb'[\x21-\x7e]{1,70}', uid):
            say(n, 'a bad unique-id')
        if view.uids.count(uid) > 1:
            say(n, 'the same unique-id')
    return found


def differences(ours, theirs, changed):
    """Of a peer's view from almond's, as the table has them."""
    found = faults(theirs)
    if changed:
        found['writes to the mailbox'] = [0]
    if theirs.refused:
        return [f'refused: {theirs.refused}']
    if len(ours.text) != len(theirs.text):
        found[f'{len(theirs.text)} messages for {len(ours.text)}'] = [0]
    else:
        for n, (a, b) in enumerate(zip(ours.text, theirs.text), 1):
            if unstuffed(a) != unstuffed(b):
                what = f'{octets(b)} octets for {octets(a)}' if octets(a) != octets(b) else 'other octets'
                found.setdefault(what, []).append(n)
            for lines, x, y in zip((0, 2), ours.tops[n - 1], theirs.tops[n - 1]):
                if unstuffed(x) != unstuffed(y) and unstuffed(a) == unstuffed(b):
                    found.setdefault(f'TOP {lines} sends {octets(y)} octets for {octets(x)}', []).append(n)
    return sorted((f'{", ".join(map(str, at))}: ' if at != [0] else '') + what for what, at in found.items())


def talk(server):
    """{command: '-ERR', or '+OK' and the numbers behind it}; of CAPA all that it lists."""
    said = {}
    for commands in TALKS:
        pop = Pop(server.connect(), greeting=False)
        pop.raw_line()
        for command in ('USER talk', 'PASS secret'):
            pop.send(command + '\r\n')
            assert pop.raw_line().startswith(b'+OK'), command
        for command in commands:
            said[command] = answer(pop, command)
        pop.send('QUIT\r\n')
        reply = pop.raw_line()
        assert reply.startswith(b'+OK'), (server.name, reply, said)
        pop.rest()
        pop.close()
    return said


def answer(pop, command):
    line = re.sub(f' ({WHEN})$', '', command)
    pop.send(line + '\r\n')
    reply = pop.raw_line().decode()
    if reply.startswith('-ERR'):
        return '-ERR'
    if line in ('CAPA', 'LIST', 'AUTH'):
        return ' '.join(sorted(raw_text(pop).decode().split('\r\n')[:-1]))
    if re.match('RETR|TOP', line):
        raw_text(pop)
    return ' '.join(['+OK', *re.findall(r'\d+', reply)[:2]]) if re.match('(?i)STAT|LAST|LIST', line) else '+OK'


# ---- all of it

@pytest.fixture(scope='module')
def seen():
    """{(peer, mailbox): differences}, and what almond itself says."""
    base = tempfile.mkdtemp(prefix='almond-')
    os.chmod(base, 0o755)
    servers = [Almond(base), Dovecot(base), Popa3d(base)]
    views, changed, said = {}, {}, {}
    try:
        for server in servers:
            for name, data in BOXES.items():
                if data is not None:
                    path = server.mail / name
                    path.write_bytes(data)
                    path.chmod(0o600)
                    os.chown(path, OWNER, GROUP)
                    old(path)
            server.start()
            try:
                for name in BOXES:
                    views[server.name, name] = View(server, name)
                said[server.name] = talk(server)
            finally:
                server.stop()
            for name, data in BOXES.items():
                path = server.mail / name
                changed[server.name, name] = (path.read_bytes() if path.exists() else None) != data
    finally:
        shutil.rmtree(base)
    return views, changed, said


def table():
    """{(mailbox, peer): differences} of doc/DIFFERENCES.md; a row is | mailbox | peer | what | why |."""
    found = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')] if line.startswith('|') else []
        if len(cells) == 4 and cells[1] in ('Dovecot', 'popa3d'):
            names, peer, what, why = cells
            assert why, line
            named = re.findall('`([^`]*)`', names)
            assert not set(named) - set(KNOWN), f'there is no such mailbox or command: {line}'
            for name in [n for n in BOXES if n not in named] if names.startswith('all but') else named:
                found.setdefault((name, peer.lower()), []).extend(re.findall('`([^`]*)`', what))
    return {key: sorted(value) for key, value in found.items()}


@pytest.mark.parametrize('name', BOXES)
def test_almond_keeps_its_word(seen, name):
    views, changed, _ = seen
    view = views['almond', name]
    assert not view.refused and not faults(view) and not changed['almond', name]
    for text, (none, two) in zip(view.text, view.tops):
        assert text.startswith(none) or text == none + b'\r\n' or none == text + b'\r\n'
        assert len(none) <= len(two) <= len(text)


@pytest.mark.parametrize('peer', ['dovecot', 'popa3d'])
@pytest.mark.parametrize('name', BOXES)
def test_differences_are_those_of_the_table(seen, name, peer):
    views, changed, _ = seen
    found = differences(views['almond', name], views[peer, name], changed[peer, name])
    assert found == table().get((name, peer), [])


@pytest.mark.parametrize('peer', ['dovecot', 'popa3d'])
@pytest.mark.parametrize('command', COMMANDS)
def test_replies_differ_as_the_table_says(seen, command, peer):
    said = seen[2]
    ours, theirs = said['almond'][command], said[peer][command]
    assert ([] if ours == theirs else [f'{theirs} for {ours}']) == table().get((command, peer), [])


def test_table_names_every_mailbox():
    text = TABLE.read_text()
    assert [name for name in BOXES if f'`{name}`' not in text] == []
