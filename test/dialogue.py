"""Dialogues as data: reads test/dialogues/NAME.txt and plays one against a server.

A file is a header, a line `---`, and steps.  A line that begins with `#` is a remark.  In texts, escapes are those of a
Python string (\\n, \\x00, ...), and $HOST stands for the server's host name.

Header:
  needs: ENABLE_APOP         switches that the build must have (ENABLE_X=0: must not have)
  box: mbox|maildir|both     how the mailbox `user` is stored; default both
  mail: TEXT                 one more mail
  mail* EXPRESSION           the same, or a list of mails, as a Python expression
  name: new/NAME             Maildir: the file name of the next mail
  file: TEXT                 mbox: a piece of the file as it is; `file* EXPRESSION`
  expect: TEXT               mbox with file: a mail that must be seen in it; `expect* EXPRESSION`
  spool: crlf                mbox: line ends of the file are CRLF, separators too
  users: scram|plain         how the secret of `user`, "secret", is stored; default scram
  secret: TEXT               another secret
  args: WORDS                more of the command line
  modes: step piped bytes    ways to send it; default all three: line by line, a connection's lines in one segment, and octet
                             by octet.  The answers must be the same.
Steps:
  C: TEXT        the client sends this line, CRLF added
  C= TEXT        the same without CRLF
  C* EXPRESSION  the same, as a Python expression
  S: TEXT        the server's next line is this, CRLF added
  S~ REGEX       it fits this expression
  ? mail N       +OK, and all of mail N
  ? top N K      +OK, its header, and K lines of its body
  ? stat N...    these are left, and the sizes are right; ? list N...; ? uidl N... (distinct, of the right alphabet)
                 ? mails A B, ? lists A B, ? uidls A B: the same for all of A to B
  ? close        the server closes, and nothing comes before
  CLOSE          the client closes
  NEW            another connection
  GREETING       the server's first line
  LOGIN          the greeting, USER and PASS, and their answers
Behind them, on the mailbox:
  ! left N...    these are left, octet for octet
  ! after TEXT   mbox: the file is this; `! after* EXPRESSION`
  ! untouched    nothing in the spool has changed, times included
  ! log REGEX    the log says so
Whatever is sent and holds "xyzzy" must not come back."""
import ast
import pathlib
import random
import re
import socket
import threading

from conftest import SEPARATOR, Pop, host, plain, scram, top, wire

HERE = pathlib.Path(__file__).resolve().parent / 'dialogues'
MODES = ('step', 'piped', 'bytes')


def unescape(text):
    """Escapes to octets; what is not ASCII counts as UTF-8."""
    return ast.literal_eval('b"""' + text.replace('"', '\\"') + '"""') if text.isascii() else text.encode()


def value(mark, text):
    if mark == '*':
        return eval(text, {'random': random.Random(1), 'host': host()})     # our own data, as Python
    return unescape(text.replace('$HOST', host()))


class Dialogue:
    def __init__(self, path):
        self.name = path.stem
        self.needs, self.boxes, self.modes, self.args = [], ['mbox', 'maildir'], list(MODES), []
        self.mails, self.names, self.file, self.expect = [], {}, None, []
        self.crlf, self.users, self.secret = False, 'scram', 'secret'
        self.steps, self.checks = [], []
        header = True
        for number, line in enumerate(path.read_text().split('\n'), 1):
            if line == '---':
                header = False
            elif line and not line.startswith('#'):
                try:
                    (self.read_header if header else self.read_step)(line, number)
                except Exception as e:
                    raise ValueError(f'{path}:{number}: {line}: {e!r}')
        if self.file is not None:
            self.boxes = ['mbox']
            self.mails = self.expect

    def read_header(self, line, _):
        key, mark, text = re.fullmatch(r'(\w+)([:*]) ?(.*)', line).groups()
        if key == 'needs':
            self.needs += text.split()
        elif key == 'box':
            self.boxes = ['mbox', 'maildir'] if text == 'both' else [text]
        elif key == 'mail' or key == 'expect':
            v = value(mark, text)
            (self.mails if key == 'mail' else self.expect).extend(v if isinstance(v, list) else [v])
        elif key == 'name':
            self.names[len(self.mails)] = text
        elif key == 'file':
            self.file = (self.file or b'') + value(mark, text)
        elif key == 'spool':
            self.crlf = text == 'crlf'
        elif key == 'users':
            self.users = text
        elif key == 'secret':
            self.secret = unescape(text).decode()
        elif key == 'args':
            self.args += text.split()
        elif key == 'modes':
            self.modes = text.split()
        else:
            raise ValueError('no such key')

    def read_step(self, line, number):
        kind, text = re.fullmatch(r'(C[:=*]|S[:~]|[?!]|CLOSE|NEW|GREETING|LOGIN) ?(.*)', line).groups()
        if kind == '!':
            self.checks.append((number, *re.fullmatch(r'(\w+)([*]?) ?(.*)', text).groups()))
        elif kind[0] == 'C' and kind != 'CLOSE':
            data = value('*' if kind == 'C*' else ':', text) + (b'\r\n' if kind == 'C:' else b'')
            self.steps.append((number, 'C', data))
        elif kind in ('GREETING', 'LOGIN'):
            self.steps.append((number, 'S~', r'\+OK POP3 $HOST server ready( <[A-Za-z0-9]+@$HOST>)?'))
            if kind == 'LOGIN':
                self.steps += [(number, 'C', b'USER user\r\n'), (number, 'S~', r'\+OK.*'),
                               (number, 'C', b'PASS %s\r\n' % self.secret.encode()), (number, 'S~', r'\+OK.*')]
        else:
            self.steps.append((number, kind, text))

    def fits(self, switches):
        for need in self.needs:
            name, _, v = need.partition('=')
            if switches.get(name, False) != (v != '0'):
                return False
        return True

    def box_fits(self, box, switches):
        return switches['ENABLE_' + box.upper()]

    # ---- the mailbox

    def stored(self, i, box):
        """Mail i as it lies in the store."""
        mail = self.mails[i]
        if box == 'maildir':
            return mail
        data = SEPARATOR + mail + (b'' if not mail or mail.endswith(b'\n') else b'\n') + b'\n'
        return data.replace(b'\n', b'\r\n') if self.crlf else data

    def fill(self, spool, box):
        self.box = box
        if box == 'mbox' and self.file is not None:
            spool.mbox('user', self.file)
        elif box == 'mbox' and self.mails:
            spool.mbox('user', b''.join(self.stored(i, box) for i in range(len(self.mails))))
        elif box == 'maildir' and (self.mails or self.boxes == ['maildir']):
            self.files = [self.names.get(i, f'new/17676{i:05}.M{i}P1.host') for i in range(len(self.mails))]
            spool.maildir('user', dict(zip(self.files, self.mails)))
        spool.account('user', self.secret, plain if self.users == 'plain' else scram)
        self.before = spool.picture()

    def seen(self, i):
        """Mail i as the server sees it: an mbox has a line end behind each, and a blank line, which a header without a body
        keeps."""
        mail = self.mails[i]
        if self.box == 'mbox' and self.file is None:
            mail += b'' if not mail or mail.endswith(b'\n') else b'\n'
            if not re.search(rb'(^|\n)\r?\n', mail):
                mail += b'\n'
            if self.crlf:
                mail = mail.replace(b'\n', b'\r\n')
        return mail

    # ---- the play

    def connections(self):
        group = []
        for step in self.steps:
            if step[1] == 'NEW':
                yield group
                group = []
            else:
                group.append(step)
        yield group

    def play(self, server, spool, mode):
        got = b''
        for i, group in enumerate(self.connections(), 1):
            got += self.connection(server, group, mode)
            if any(kind == 'CLOSE' for _, kind, _ in group):    # the mailbox is free when the log says so
                server.wait_log('end user=', i)
        for number, what, mark, text in self.checks:
            try:
                self.check(server, spool, what, mark, text)
            except AssertionError as e:
                raise AssertionError(f'{self.name}.txt:{number}: ! {what} {text}: {e}') from e
        sent = b''.join(s[2] for s in self.steps if s[1] == 'C')
        if b'xyzzy' in sent:
            assert b'xyzzy' not in got, 'input came back'

    def connection(self, server, steps, mode):
        pop = Pop(server.connect(), greeting=False)
        sender = None
        if mode != 'step':
            data = b''.join(s[2] for s in steps if s[1] == 'C')
            sender = threading.Thread(target=self.send_all, args=(pop.sock, data, mode))
            sender.start()
        with pop:
            for number, kind, text in steps:
                try:
                    if kind == 'C':
                        if mode == 'step':
                            pop.send(text)
                    elif kind == 'CLOSE':
                        if sender:
                            sender.join()
                        pop.sock.shutdown(socket.SHUT_WR)
                        pop.rest()
                    else:
                        self.answer(pop, kind, text)
                except (AssertionError, OSError, EOFError) as e:
                    raise AssertionError(f'{self.name}.txt:{number}: {kind} {text!r}: {e!r}') from e
            if sender:
                sender.join()
            return pop.got

    @staticmethod
    def send_all(sock, data, mode):
        try:
            if mode == 'piped':
                sock.sendall(data)
            else:
                for i in range(len(data)):
                    sock.send(data[i:i + 1])
        except OSError:         # the server may close before it has read all
            pass

    def answer(self, pop, kind, text):
        if kind == 'S:':
            want = value(':', text) + b'\r\n'
            got = pop.raw_line()
            assert got == want, f'got {got!r}'
        elif kind == 'S~':
            got = pop.raw_line()
            assert len(got) <= 512 and got.endswith(b'\r\n'), f'got {got!r}'
            assert re.fullmatch(text.replace('$HOST', re.escape(host())), got[:-2].decode('latin-1')), f'got {got!r}'
        else:
            what, *numbers = text.split()
            getattr(self, 'expect_' + what)(pop, *map(int, numbers))

    def ok(self, pop):
        line = pop.line()
        assert line.startswith('+OK'), line
        return line

    def expect_mail(self, pop, n):
        self.ok(pop)
        self.compare(pop.text(), wire(self.seen(n - 1)))

    def expect_mails(self, pop, first, last):
        for n in range(first, last + 1):
            self.expect_mail(pop, n)

    def expect_lists(self, pop, first, last):
        self.expect_list(pop, *range(first, last + 1))

    def expect_uidls(self, pop, first, last):
        self.expect_uidl(pop, *range(first, last + 1))

    def expect_top(self, pop, n, lines):
        self.ok(pop)
        self.compare(pop.text(), top(self.seen(n - 1), lines))

    @staticmethod
    def compare(got, want):
        if got != want:
            at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
            raise AssertionError(f'{len(got)} octets, {len(want)} wanted; they differ at {at}: '
                                 f'{got[max(0, at - 20):at + 20]!r}, wanted {want[max(0, at - 20):at + 20]!r}')

    def size(self, n):
        return len(wire(self.seen(n - 1)))

    def expect_stat(self, pop, *numbers):
        line = pop.line()
        assert line == f'+OK {len(numbers)} {sum(map(self.size, numbers))}', line

    def expect_list(self, pop, *numbers):
        self.ok(pop)
        got = pop.text()
        want = ''.join(f'{n} {self.size(n)}\r\n' for n in numbers).encode()
        assert got == want, f'{got!r}, wanted {want!r}'

    def expect_uidl(self, pop, *numbers):
        self.ok(pop)
        lines = pop.text().decode().split('\r\n')[:-1]
        found = [re.fullmatch(r'(\d+) ([!-~]{1,70})', line) for line in lines]
        assert all(found) and [int(m[1]) for m in found] == list(numbers), lines
        assert len({m[2] for m in found}) == len(found), lines

    @staticmethod
    def expect_close(pop):
        pop.closed()

    # ---- afterwards

    def check(self, server, spool, what, mark, text):
        if what == 'untouched':
            now = spool.picture()
            assert now == self.before, {k: (self.before.get(k), now.get(k)) for k in self.before.keys() | now.keys()
                                        if self.before.get(k) != now.get(k)}
        elif what == 'after':
            assert spool.read('user') == value(mark, text)
        elif what == 'log':
            server.wait_log(text)
        elif what == 'left':
            left = [int(n) - 1 for n in text.split()]
            if self.box == 'mbox':
                self.compare(spool.read('user'), b''.join(self.stored(i, 'mbox') for i in left))
            else:
                now = {f'{d}/{p.name}': p.read_bytes() for d in ('new', 'cur', 'tmp')
                       for p in (spool.path / 'user' / d).iterdir()}
                assert now == {self.files[i]: self.mails[i] for i in left}, sorted(now)
        else:
            raise AssertionError('no such check')


def load():
    return [Dialogue(path) for path in sorted(HERE.glob('*.txt'))]
