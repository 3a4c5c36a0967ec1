"""almond passwd, deliver and check, as a person, a script or a delivery agent calls them."""
import base64
import calendar
import concurrent.futures
import contextlib
import fcntl
import os
import pty
import pwd
import re
import resource
import select
import signal
import stat
import subprocess
import tempfile
import termios
import time

import pytest

from conftest import ALMOND, GROUP, IS_ROOT, OWNER, SECONDS, needs_root, scram, tool

MAIL = b'Subject: hello\nTo: you\n\nA line.\n'
FROM = rb'From %s (Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ 1-3]\d \d\d:\d\d:\d\d \d{4}\n'


def run(name, *args, data=b'', code=0, **how):
    """One tool, its exit code asserted; its output."""
    done = subprocess.run([ALMOND, name, *map(str, args)], input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=SECONDS, **how)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert b'runtime error' not in done.stderr and b'Sanitizer' not in done.stderr, done.stderr
    return done


@contextlib.contextmanager
def small_disk(size):
    """A file system that is full soon; a user without rights can reach it."""
    at = tempfile.mkdtemp(prefix='almond-')
    os.chmod(at, 0o755)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size},mode=755', 'tmpfs', at], check=True)
    try:
        yield at
    finally:
        subprocess.run(['umount', '-l', at], check=True)
        os.rmdir(at)


# ---- passwd -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def users(tmp_path, almond):
    return tmp_path / 'users'


def passwd(users, *args, secret=b'secret\n', code=0, **how):
    return run('passwd', '-u', users, *args, data=secret, code=code, **how)


def verifier(users, name):
    """The user's line, without almond's own code: name, mailbox, verifier."""
    hits = [line for line in users.read_text().split('\n') if re.match(f'{re.escape(name)}[/:]', line)]
    assert len(hits) == 1, hits
    login, value = hits[0].split(':', 1)
    return login, value


def is_right(value, secret):
    rounds, salt = re.match(r'SCRAM-SHA-256\$(\d+):([^$]*)\$', value).groups()
    return value == scram(secret, base64.b64decode(salt), int(rounds))


def test_passwd_new_file(users):
    passwd(users, '-s', 'anna')
    comment, salt, line, end = users.read_text().split('\n')
    assert comment.startswith('# ') and line.startswith('anna:SCRAM-SHA-256$') and end == ''
    assert len(base64.b64decode(salt.removeprefix('#salt:'), validate=True)) == 16
    assert is_right(verifier(users, 'anna')[1], 'secret')
    assert stat.S_IMODE(users.stat().st_mode) == 0o600
    assert os.listdir(users.parent) == ['users']


def test_passwd_two_files_have_two_salts(users, tmp_path):
    passwd(users, '-s', 'anna')
    passwd(tmp_path / 'two', '-s', 'anna')
    assert not set(users.read_text().split('\n')[1:-1]) & set((tmp_path / 'two').read_text().split('\n')[1:-1])


@pytest.mark.parametrize('end', [b'\n', b''])
def test_passwd_other_lines_stay(users, end):
    before = b'# mine\n\n  \t\nzoe:{PLAIN}a:b/c \r\nno colon\n\x00\xff junk\nannabel:{PLAIN}x\n'
    after = b'#salt:MDEyMzQ1Njc4OWFiY2RlZg==\n an/x:{PLAIN}y'
    users.write_bytes(before + b'anna:{PLAIN}old\n' + after + end)
    passwd(users, '-s', 'anna')
    data = users.read_bytes()
    assert data.startswith(before + b'anna:SCRAM-SHA-256$')
    assert data.endswith(b'=\n' + after + b'\n')
    assert b'old' not in data


def test_passwd_adds_the_salt_once(users):
    users.write_bytes(b'# text\nbob:{PLAIN}x')
    passwd(users, '-s', 'anna')
    passwd(users, '-s', 'carl')
    assert re.fullmatch(rb'#salt:[^\n]{24}\n# text\nbob:{PLAIN}x\nanna:[^\n]+\ncarl:[^\n]+\n', users.read_bytes())


def test_passwd_mailbox(users):
    passwd(users, '-s', 'anna/shared')
    passwd(users, '-s', 'bob')
    assert verifier(users, 'anna')[0] == 'anna/shared'
    passwd(users, '-s', 'anna', secret=b'new\n')
    login, value = verifier(users, 'anna')
    assert login == 'anna/shared' and is_right(value, 'new')
    passwd(users, '-s', 'anna/other')
    assert verifier(users, 'anna')[0] == 'anna/other'
    assert verifier(users, 'bob')[0] == 'bob'


def test_passwd_second_line_of_a_user_goes(users):
    users.write_text('anna:{PLAIN}one\nbob:{PLAIN}b\nanna/x:{PLAIN}two\n')
    passwd(users, '-s', 'anna')
    assert verifier(users, 'anna')[0] == 'anna'
    users.write_text('anna:{PLAIN}one\nbob:{PLAIN}b\nanna/x:{PLAIN}two\n')
    passwd(users, '-d', 'anna')
    assert 'anna' not in users.read_text() and 'bob:{PLAIN}b\n' in users.read_text()


def test_passwd_delete(users):
    passwd(users, '-s', 'anna')
    passwd(users, '-s', 'bob')
    passwd(users, '-d', 'anna')
    assert 'anna' not in users.read_text().replace('# ', '') and is_right(verifier(users, 'bob')[1], 'secret')
    before, seen = users.read_bytes(), users.stat()
    assert b'no such user' in passwd(users, '-d', 'anna', code=1).stderr
    assert users.read_bytes() == before and users.stat().st_ino == seen.st_ino


def test_passwd_delete_makes_no_file(users):
    passwd(users, '-d', 'anna', code=1)
    assert os.listdir(users.parent) == []


def test_passwd_check(users):
    passwd(users, '-s', 'anna')
    assert passwd(users, '-c', '-s', 'anna').stdout == b'right\n'
    assert passwd(users, '-c', '-s', 'anna', secret=b'wrong\n', code=1).stdout == b'wrong\n'
    assert b'no such user' in passwd(users, '-c', '-s', 'bob', code=1).stderr
    users.write_text('anna:$9$strange$hash\n')
    assert b'not built in' in passwd(users, '-c', '-s', 'anna', code=1).stderr


@pytest.mark.parametrize('argv', [['htpasswd', '-nb', '-5', 'anna', 'secret'], ['htpasswd', '-nbm', 'anna', 'secret'],
                                  ['mkpasswd', '-m', 'sha512crypt', 'secret'], ['mkpasswd', '-m', 'sha256crypt', 'secret']])
def test_passwd_pasted_lines(users, argv):
    line = subprocess.run([tool(argv[0]), *argv[1:]], stdout=subprocess.PIPE, check=True).stdout.decode().strip()
    users.write_text((line if line.startswith('anna:') else 'anna:' + line) + '\n')
    passwd(users, '-c', '-s', 'anna')
    passwd(users, '-c', '-s', 'anna', secret=b'wrong\n', code=1)


def test_passwd_plain(users):
    passwd(users, '-s', '-p', 'anna', secret=b'a: b#$/\n')
    assert verifier(users, 'anna')[1] == '{PLAIN}a: b#$/'
    passwd(users, '-c', '-s', 'anna', secret=b'a: b#$/\n')


def test_passwd_rounds(users):
    passwd(users, '-s', '-r', '5000', 'anna')
    assert verifier(users, 'anna')[1].startswith('SCRAM-SHA-256$5000:')
    for bad in ('4095', '4000001', 'x', ''):
        passwd(users, '-s', '-r', bad, 'anna', code=64)


def test_passwd_generate(users):
    said = passwd(users, '-g', 'anna').stdout
    assert re.fullmatch(rb'([abcdefghijkmnpqrstuvwxyz2-9]{4}-){4}[abcdefghijkmnpqrstuvwxyz2-9]{4}\n', said)
    passwd(users, '-c', '-s', 'anna', secret=said)
    assert passwd(users, '-g', 'anna').stdout != said


@pytest.mark.parametrize('secret', [b'', b'\n', b'x' * 249 + b'\n', b'x' * 9000 + b'\n', b'a\tb\n', b'a\x00b\n', b'a\x7f\n',
                                    b'a\rb\n'])
def test_passwd_refused(users, secret):
    users.write_text('bob:{PLAIN}x\n')
    passwd(users, '-s', 'anna', secret=secret, code=65)
    passwd(users, '-s', '-p', 'anna', secret=secret, code=65)
    assert users.read_text() == 'bob:{PLAIN}x\n'


@pytest.mark.parametrize('line, secret, warning', [
    (b'x' * 248 + b'\n', 'x' * 248, b''), (b'secret\r\nmore\n', 'secret', b''), (b'secret', 'secret', b''),
    (' blank '.encode() + b'\n', ' blank ', b'blank'), ('gr\u00fcn\n'.encode(), 'gr\u00fcn', b'ASCII')])
def test_passwd_taken(users, line, secret, warning):
    said = passwd(users, '-s', 'anna', secret=line).stderr
    assert warning in said if warning else said == b''
    assert is_right(verifier(users, 'anna')[1], secret)
    passwd(users, '-s', '-p', 'anna', secret=line)
    assert verifier(users, 'anna')[1] == '{PLAIN}' + secret


def test_passwd_usage(users):
    for args in ([], ['-s'], ['anna', 'bob'], ['-x', 'anna'], ['-s', '-g', 'anna'], ['-d', '-c', 'anna'], ['-u'], ['-r']):
        done = run('passwd', *args, code=64)
        assert b'usage: almond passwd' in done.stderr and done.stdout == b''
    assert b'usage: almond passwd' in run('passwd', '--help').stdout
    assert re.fullmatch(rb'almond \d\S*\n', run('passwd', '--version').stdout)
    assert not users.exists()


@pytest.mark.parametrize('name', ['', '.x', 'a/b/c', 'a:b', 'a b', 'x' * 65, 'x.lock', '#x', 'a/', '/b', 'a/.b'])
def test_passwd_bad_names(users, name):
    passwd(users, '-s', name, code=65)
    assert not users.exists()


def test_passwd_options_in_any_place(users):
    run('passwd', 'anna', '-sp', '-u', users, data=b'secret\n')
    run('passwd', f'-u{users}', '-s', '--', 'bob', data=b'secret\n')
    run('passwd', f'-pu{users}', 'carl', '-s', data=b'secret\n')
    assert verifier(users, 'anna')[1] == verifier(users, 'carl')[1] == '{PLAIN}secret'
    assert is_right(verifier(users, 'bob')[1], 'secret')


def test_passwd_mode_and_owner_stay(users):
    users.write_text('bob:{PLAIN}x\n')
    users.chmod(0o644)
    if IS_ROOT:
        os.chown(users, OWNER, GROUP)
    passwd(users, '-s', 'anna')
    assert stat.S_IMODE(users.stat().st_mode) == 0o640
    assert (users.stat().st_uid, users.stat().st_gid) == (OWNER, GROUP)


def test_passwd_refuses_a_link(users, tmp_path):
    (tmp_path / 'real').write_text('bob:{PLAIN}x\n')
    users.symlink_to('real')
    assert b'symbolic link' in passwd(users, '-s', 'anna', code=73).stderr
    assert users.is_symlink() and (tmp_path / 'real').read_text() == 'bob:{PLAIN}x\n'


def test_passwd_where_nothing_is(tmp_path):
    passwd(tmp_path / 'no' / 'users', '-s', 'anna', code=73)
    passwd(tmp_path / 'users', '-c', '-s', 'anna', code=73)


@needs_root
def test_passwd_where_one_may_not(spool):
    spool.lines('bob:{PLAIN}x')
    passwd(spool.users_file, '-s', 'anna', code=77, user=OWNER, group=GROUP, extra_groups=[])
    assert spool.users_file.read_text() == 'bob:{PLAIN}x\n'


def test_passwd_stale_new_file(users):
    users.write_text('bob:{PLAIN}x\n')
    stale = users.with_name('users.new')
    stale.symlink_to('victim')
    passwd(users, '-s', 'anna')
    assert os.listdir(users.parent) == ['users'] and is_right(verifier(users, 'anna')[1], 'secret')


def test_passwd_waits_for_the_lock(users):
    users.write_text('bob:{PLAIN}x\n')
    with open(users) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        passwd(users, '-s', 'anna', code=75)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(passwd, users, '-s', 'anna')
            time.sleep(0.3)
            os.rename(users, str(users) + '.old')      # as another almond does it, while this one waits
            users.write_text('carl:{PLAIN}y\n')
            fcntl.flock(held, fcntl.LOCK_UN)
            waiting.result()
    assert 'carl:{PLAIN}y\n' in users.read_text() and is_right(verifier(users, 'anna')[1], 'secret')


def test_passwd_many_at_once(users):
    names = [f'user{i}' for i in range(20)]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda name: passwd(users, '-s', '-r', '4096', name, secret=name.encode()), names))
    for name in names:
        assert is_right(verifier(users, name)[1], name)
    assert users.read_text().count('#salt:') == 1
    assert os.listdir(users.parent) == ['users']


@needs_root
def test_passwd_full_disk(almond):
    with small_disk('16k') as at:
        users = f'{at}/users'
        passwd(users, '-s', '-p', 'anna')
        before = open(users, 'rb').read()
        with open(f'{at}/filler', 'wb', buffering=0) as f, contextlib.suppress(OSError):
            while True:
                f.write(b'x' * 4096)
        assert b'full' in passwd(users, '-s', '-p', 'bob', code=75).stderr
        assert open(users, 'rb').read() == before
        assert sorted(os.listdir(at)) == ['filler', 'users']


def test_passwd_cut_short(users):
    """As a full disk, without root: the file may not grow beyond some octets."""
    passwd(users, '-s', 'anna')
    before = users.read_bytes()
    passwd(users, '-s', 'bob', code=75, preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                                                            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))))
    assert users.read_bytes() == before and os.listdir(users.parent) == ['users']


def calls(trace, argv, data):
    """The system calls that make a change durable or visible, in their order, with what they were done to."""
    subprocess.run([tool('strace'), '-y', '-o', trace, '-e', 'trace=write,pwrite64,fsync,rename,renameat,renameat2',
                    ALMOND, *map(str, argv)], input=data, stdout=subprocess.DEVNULL, check=True, timeout=SECONDS)
    seen = []
    for line in trace.read_text().split('\n'):
        hit = re.match(r'(\w+)\((?:\d+<([^>]*)>)?.*= \d', line)
        if hit and (hit[1].startswith('rename') or hit[2]):
            seen.append((re.sub(r'at2?$', '', hit[1]), os.path.basename(hit[2] or '')))
    return [x for i, x in enumerate(seen) if i == 0 or x != seen[i - 1]]


def test_passwd_is_durable_before_it_counts(users, tmp_path):
    got = calls(tmp_path / 'trace', ['passwd', '-s', '-u', users, 'anna'], b'secret\n')
    assert [(call, name) for call, name in got if call != 'rename'] == [
        ('write', 'users.new'), ('fsync', 'users.new'), ('fsync', tmp_path.name)]
    assert [call for call, _ in got] == ['write', 'fsync', 'rename', 'fsync']


class Terminal:
    """almond passwd, asked at a terminal of its own."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execv(ALMOND, [ALMOND, 'passwd', *map(str, args)])
        self.seen = b''

    def wait_for(self, text):
        while text not in self.seen:
            assert select.select([self.fd], [], [], SECONDS)[0], self.seen
            self.seen += os.read(self.fd, 1000)

    def echo(self):
        return bool(termios.tcgetattr(self.fd)[3] & termios.ECHO)

    def say(self, prompt, text):
        self.wait_for(prompt)
        assert not self.echo()
        os.write(self.fd, text)

    def end(self):
        with contextlib.suppress(OSError):
            while more := os.read(self.fd, 1000):
                self.seen += more
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_passwd_asks_twice_without_echo(users):
    t = Terminal('-u', users, 'anna')
    t.say(b'Password: ', b'geheim\n')
    t.say(b'Once more: ', b'geheim\n')
    assert t.end() == 0 and b'geheim' not in t.seen
    assert is_right(verifier(users, 'anna')[1], 'geheim')
    t = Terminal('-u', users, '-c', 'anna')
    t.say(b'Password: ', b'geheim\n')
    assert t.end() == 0 and b'right' in t.seen and b'Once' not in t.seen


def test_passwd_two_differ(users):
    t = Terminal('-u', users, 'anna')
    t.say(b'Password: ', b'geheim\n')
    t.say(b'Once more: ', b'gehein\n')
    assert t.end() == 65 and b'differ' in t.seen
    assert not users.exists()


@pytest.mark.parametrize('how', ['key', signal.SIGINT, signal.SIGTERM])
def test_passwd_interrupted_gives_echo_back(users, how):
    t = Terminal('-u', users, 'anna')
    t.wait_for(b'Password: ')
    assert not t.echo()
    slave = os.open(os.readlink(f'/proc/{t.pid}/fd/0'), os.O_RDWR | os.O_NOCTTY)       # the terminal outlives it
    if how == 'key':
        os.write(t.fd, b'\x03')
    else:
        os.kill(t.pid, how)
    assert os.waitstatus_to_exitcode(os.waitpid(t.pid, 0)[1]) == -(signal.SIGINT if how == 'key' else how)
    assert t.echo()
    os.close(slave)
    os.close(t.fd)
    assert not users.exists()


def test_passwd_without_a_terminal(users):
    assert b'-s' in passwd(users, 'anna', code=65, start_new_session=True).stderr
    assert not users.exists()


# ---- deliver ----------------------------------------------------------------------------------------------------------


def deliver(spool, *args, mail=MAIL, code=0, **how):
    if not spool.users_file.exists():
        spool.users(user='secret')
    return run('deliver', '-d', spool.path, '-u', spool.users_file, *args, data=mail, code=code, **how)


def test_deliver_new_mbox(spool):
    deliver(spool, 'user')
    data = spool.read('user')
    assert re.fullmatch(FROM % b'MAILER-DAEMON' + re.escape(MAIL) + b'\n', data), data
    seen = (spool.path / 'user').stat()
    assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (OWNER, GROUP, 0o600)
    assert spool.names() == ['user']


def test_deliver_date(spool):
    """Read by a library that knows the calendar."""
    deliver(spool, 'user')
    date = spool.read('user').split(b'\n')[0].decode().removeprefix('From MAILER-DAEMON ')
    got = time.strptime(date, '%a %b %d %H:%M:%S %Y')
    assert abs(calendar.timegm(got) - time.time()) < SECONDS
    assert time.strftime('%a', time.gmtime(calendar.timegm(got))) == date[:3]
    assert date[8] in ' 123'


@pytest.mark.parametrize('args, head, sender', [
    (['-f', 'a@b'], b'', b'a@b'), (['-f', '<a@b>'], b'', b'a@b'), (['-f', ''], b'', b'MAILER-DAEMON'),
    (['-f', '<>'], b'Return-Path: <x@y>\n', b'MAILER-DAEMON'), (['-f', 'a b\n\x01c'], b'', b'abc'),
    ([], b'Received: x\nreturn-path:  <x@y> \n', b'x@y'), ([], b'Return-Path: <>\n', b'MAILER-DAEMON'),
    ([], b'X: y\n\nReturn-Path: <x@y>\n', b'MAILER-DAEMON'), (['-f', 'x' * 5000], b'', b'x' * 319)])
def test_deliver_sender(spool, args, head, sender):
    deliver(spool, *args, 'user', mail=head + MAIL)
    assert re.fullmatch(FROM % re.escape(sender) + re.escape(head + MAIL) + b'\n', spool.read('user'))


@pytest.mark.parametrize('mail, stored', [
    (b'A: b\n\nFrom me\n>From me\n>>From me\n> From me\nfrom me\nxFrom me\n>\nFrom\n',
     b'A: b\n\n>From me\n>>From me\n>>>From me\n> From me\nfrom me\nxFrom me\n>\nFrom\n\n'),
    (b'A: b\n\nno end', b'A: b\n\nno end\n\n'), (b'A: b\n\nFrom ', b'A: b\n\n>From \n\n'), (b'x', b'x\n\n'), (b'\n', b'\n\n'),
    (b'A: b\r\n\r\nFrom x\r\n', b'A: b\r\n\r\n>From x\r\n\r\n'), (b'A: b\n\nx\n\n\n', b'A: b\n\nx\n\n\n\n'),
    (b'A: b\n\n\x00\xff\n', b'A: b\n\n\x00\xff\n\n'), (b'From nobody\n\nx\n', b'>From nobody\n\nx\n\n')])
def test_deliver_text(spool, mail, stored):
    deliver(spool, 'user', mail=mail)
    assert re.fullmatch(FROM % b'MAILER-DAEMON' + re.escape(stored), spool.read('user')), spool.read('user')


def test_deliver_takes_a_separator_that_is_there(spool):
    line = b'From me@there Mon Jan  5 10:00:00 2026\n'
    deliver(spool, '-f', 'x@y', 'user', mail=line + MAIL)
    assert spool.read('user') == line + MAIL + b'\n'


@pytest.mark.parametrize('end, gap', [
    (b'x', b'\n\n'), (b'x\n', b'\n'), (b'x\n\n', b''), (b'x\r\n', b'\r\n'), (b'x\r\n\r\n', b''), (b'x\r', b'\n\n'), (b'', b'')])
def test_deliver_behind_what_is_there(spool, end, gap):
    old = b'From a@b Mon Jan  5 10:00:00 2026\nA: b\n\n' * bool(end) + end
    spool.mbox('user', old)
    deliver(spool, 'user')
    data = spool.read('user')
    assert data.startswith(old + gap + b'From MAILER-DAEMON') and data.endswith(b'\n' + MAIL + b'\n')


@pytest.mark.parametrize('old, gap', [(b'\n', b''), (b'\r\n', b''), (b'x', b'\n\n'), (b'x\n', b'\n'), (b'\n\n', b'')])
def test_deliver_behind_little(spool, old, gap):
    spool.mbox('user', old)
    deliver(spool, 'user')
    assert spool.read('user').startswith(old + gap + b'From MAILER-DAEMON')


def test_deliver_large(spool):
    mail = b'A: b\n\n' + b'0123456789abcdef' * 63 + b'\n'
    mail += b''.join(b'%d %s\nFrom x\n' % (i, b'y' * 70) for i in range(60000))
    deliver(spool, 'user', mail=mail)
    stored = spool.read('user').split(b'\n', 1)[1]
    assert stored == mail.replace(b'\nFrom x', b'\n>From x') + b'\n'


@pytest.mark.parametrize('mail', [b'', b'From me@there Mon Jan  5 10:00:00 2026\n'])
def test_deliver_nothing(spool, mail):
    spool.mbox('user', b'x\n\n')
    deliver(spool, 'user', mail=mail, code=65)
    assert spool.read('user') == b'x\n\n'


@pytest.mark.parametrize('name', ['nobody-here', '.user', '../user', 'a/b', 'user.lock', '', 'a b', 'x' * 65])
def test_deliver_unknown(spool, name):
    assert deliver(spool, name, code=67).stderr
    assert spool.names() == []


def test_deliver_usage(spool):
    for args in ([], ['user', 'two'], ['-x', 'user'], ['user', '-f']):
        assert b'usage: almond deliver' in deliver(spool, *args, code=64).stderr


def test_deliver_users_file_names_the_mailbox(spool):
    spool.lines('anna/shared:' + scram('x'), 'bob/shared:' + scram('x'))
    deliver(spool, 'anna')
    deliver(spool, 'bob')
    assert spool.names() == ['shared'] and spool.read('shared').count(b'\nSubject') == 2


def test_deliver_to_a_mailbox_without_account(spool):
    spool.mbox('other', b'')
    deliver(spool, 'other')
    assert spool.read('other').endswith(MAIL + b'\n')


@needs_root
def test_deliver_system_account(spool):
    os.chmod(spool.path, 0o1777)
    os.chown(spool.path, 0, 0)
    deliver(spool, 'daemon')
    assert (spool.path / 'daemon').stat().st_uid == pwd.getpwnam('daemon').pw_uid


@needs_root
def test_deliver_group_spool(spool):
    """Debian's: root:mail 2775, and the user is not in group mail."""
    os.chown(spool.path, 0, 54321)
    os.chmod(spool.path, 0o2775)
    deliver(spool, 'daemon')
    seen = (spool.path / 'daemon').stat()
    assert (seen.st_gid, stat.S_IMODE(seen.st_mode)) == (54321, 0o660)
    os.chmod(spool.path, 0o775)
    (spool.path / 'daemon').unlink()
    deliver(spool, 'daemon')
    assert (spool.path / 'daemon').stat().st_gid == 54321


@needs_root
def test_deliver_not_to_root(spool):
    assert b'alias' in deliver(spool, 'root', code=75).stderr
    os.chown(spool.path, 0, 0)
    (spool.path / 'user').write_bytes(b'')
    deliver(spool, 'user', code=75)
    assert (spool.path / 'user').read_bytes() == b''


@needs_root
def test_deliver_not_to_others(spool):
    os.chmod(spool.path, 0o1777)
    spool.users_file.write_text('')
    spool.users_file.chmod(0o644)
    deliver(spool, 'daemon', code=75, user=OWNER, group=GROUP, extra_groups=[])
    assert spool.names() == []


def test_deliver_no_spool(spool):
    spool.users(user='x')
    run('deliver', '-d', spool.path / 'no', '-u', spool.users_file, 'user', data=MAIL, code=75)


def test_deliver_no_users_file(spool):
    run('deliver', '-d', spool.path, '-u', spool.base / 'no', 'user', data=MAIL, code=75)


def test_deliver_maildir(spool):
    box = spool.maildir('user', {})
    os.rmdir(box / 'tmp')
    for mail in (MAIL, b'From me@there Mon Jan  5 10:00:00 2026\n' + MAIL, b'From x\nno end'):
        deliver(spool, 'user', mail=mail)
    names = os.listdir(box / 'new')
    assert sorted((box / 'new' / n).read_bytes() for n in names) == sorted([MAIL, MAIL, b'From x\nno end'])
    assert all(re.fullmatch(r'\d+\.M\d+P\d+R[0-9a-f]+\.[^/:]+', n) for n in names)
    assert all(abs(int(n.split('.')[0]) - time.time()) < SECONDS for n in names)
    assert os.listdir(box / 'tmp') == os.listdir(box / 'cur') == []
    seen = (box / 'new' / names[0]).stat()
    assert (seen.st_uid, stat.S_IMODE(seen.st_mode)) == (OWNER, 0o600)


@pytest.mark.parametrize('kind', ['mbox', 'maildir'])
def test_deliver_is_durable_before_it_says_so(spool, kind):
    spool.users(user='x')
    box = spool.maildir('user', {}) if kind == 'maildir' else spool.path / 'user'
    got = calls(spool.base / 'trace', ['deliver', '-d', spool.path, '-u', spool.users_file, 'user'], MAIL)
    if kind == 'maildir':
        name, = os.listdir(box / 'new')
        assert [call for call, _ in got] == ['pwrite64', 'fsync', 'rename', 'fsync']
        assert got[1] == ('fsync', name) and got[3] == ('fsync', 'new')
    else:
        got = [x for x in got if x[1] != 'user.lock']
        # The new file's name; the note; all but the first octets; these.
        assert [x for i, x in enumerate(got) if x != got[i - 1]] == [
            ('fsync', 'spool'), ('fsync', '.almond'), ('pwrite64', 'note'), ('fsync', 'note'), ('fsync', 'user'),
            ('pwrite64', 'user'), ('fsync', 'user'), ('pwrite64', 'user'), ('fsync', 'user')], got


def refused(spool, name, *paths):
    """Not delivered; the mail waits; nothing that lies there has changed."""
    before = spool.picture()
    others = [p.read_bytes() for p in paths]
    done = deliver(spool, name, code=75)
    assert name.encode() in done.stderr
    assert spool.picture() == before and [p.read_bytes() for p in paths] == others


def test_deliver_symlink(spool):
    victim = spool.base / 'victim'
    victim.write_bytes(b'precious\n')
    spool.own(victim)
    (spool.path / 'user').symlink_to(victim)
    if IS_ROOT:
        os.chown(spool.path / 'user', OWNER, GROUP, follow_symlinks=False)
    refused(spool, 'user', victim)
    (spool.path / 'user').unlink()
    (spool.path / 'user').symlink_to(spool.base / 'nothing')
    refused(spool, 'user')
    assert not (spool.base / 'nothing').exists()


def test_deliver_hard_link(spool):
    os.link(spool.mbox('user', b''), spool.base / 'second')
    refused(spool, 'user', spool.base / 'second')


def test_deliver_fifo(spool):
    os.mkfifo(spool.path / 'user')
    spool.own(spool.path / 'user')
    before = spool.names()
    deliver(spool, 'user', code=75)
    assert spool.names() == before


@needs_root
def test_deliver_foreign_owner(spool):
    """A mailbox that someone else put where a system account's belongs."""
    os.chmod(spool.path, 0o1777)
    spool.mbox('daemon', b'', 0o666)
    refused(spool, 'daemon')
    (spool.path / 'daemon').unlink()
    spool.maildir('daemon', {})
    os.chmod(spool.path / 'daemon', 0o777)
    os.chmod(spool.path / 'daemon/new', 0o777)
    os.chmod(spool.path / 'daemon/tmp', 0o777)
    refused(spool, 'daemon')


def test_deliver_no_maildir(spool):
    (spool.path / 'user').mkdir()
    spool.own(spool.path / 'user', 0o700)
    deliver(spool, 'user', code=75)


@pytest.mark.parametrize('link', ['new', 'tmp'])
def test_deliver_maildir_with_a_link(spool, link):
    box = spool.maildir('user', {})
    os.rmdir(box / link)
    elsewhere = spool.base / 'elsewhere'
    elsewhere.mkdir()
    spool.own(elsewhere, 0o700)
    (box / link).symlink_to(elsewhere)
    deliver(spool, 'user', code=75)
    assert os.listdir(elsewhere) == []


@needs_root
@pytest.mark.parametrize('kind', ['mbox', 'maildir'])
def test_deliver_full_disk(spool, kind):
    with small_disk('64k') as at:
        os.chown(at, OWNER, GROUP)
        spool.path = type(spool.path)(at)
        old = b'From a@b Mon Jan  5 10:00:00 2026\nA: b\n\nx\n\n'
        box = spool.mbox('user', old) if kind == 'mbox' else spool.maildir('user', {'new/1.a.b': old})
        assert b'full' in deliver(spool, 'user', mail=MAIL + b'x' * 100000, code=75).stderr
        if kind == 'mbox':
            assert box.read_bytes() == old
        else:
            assert os.listdir(box / 'new') == ['1.a.b'] and os.listdir(box / 'tmp') == []
        deliver(spool, 'user')
        assert sorted({*os.listdir(at)} - {'.almond'}) == ['user']


@pytest.mark.parametrize('kind', ['mbox', 'maildir'])
def test_deliver_cut_short(spool, kind):
    """As a full disk or a quota, without root."""
    old = b'From a@b Mon Jan  5 10:00:00 2026\nA: b\n\nno end'
    box = spool.mbox('user', old) if kind == 'mbox' else spool.maildir('user', {'new/1.a.b': old})
    deliver(spool, 'user', mail=MAIL + b'x' * 9000, code=75,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
    if kind == 'mbox':
        assert box.read_bytes() == old
    else:
        assert os.listdir(box / 'new') == ['1.a.b'] and os.listdir(box / 'tmp') == []


@pytest.mark.parametrize('how', ['fcntl', 'flock', 'dot'])
def test_deliver_respects_locks(spool, how):
    box = spool.mbox('user', b'')
    dot = spool.path / 'user.lock'
    with open(box, 'r+b') as held:
        if how == 'dot':
            dot.write_text(f'{os.getpid()}\n')
        else:
            (fcntl.lockf if how == 'fcntl' else fcntl.flock)(held, fcntl.LOCK_EX)
        deliver(spool, 'user', code=75)
        assert box.stat().st_size == 0      # not opened: closing it would free the lock
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(deliver, spool, 'user')
            time.sleep(0.3)
            assert box.stat().st_size == 0
            if how == 'dot':
                dot.unlink()
            else:
                (fcntl.lockf if how == 'fcntl' else fcntl.flock)(held, fcntl.LOCK_UN)
            waiting.result()
    assert box.read_bytes().endswith(MAIL + b'\n') and not dot.exists()


def test_deliver_into_a_file_that_was_replaced(spool):
    """A program that rewrites the mailbox under another name and renames it while deliver waits for the lock."""
    box = spool.mbox('user', b'')
    with open(box, 'r+b') as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(deliver, spool, 'user')
            time.sleep(0.3)
            os.rename(spool.mbox('fresh', b'kept\n\n'), box)
            fcntl.lockf(held, fcntl.LOCK_UN)
            waiting.result()
        assert held.read() == b''
    assert box.read_bytes().startswith(b'kept\n\nFrom ') and box.read_bytes().endswith(MAIL + b'\n')


def test_deliver_is_not_interrupted(spool):
    """A caller that loses patience while the lock is waited for: the mail is there whole, or not."""
    box = spool.mbox('user', b'')
    spool.users(user='x')
    with open(box, 'r+b') as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        p = subprocess.Popen([ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, 'user'], stdin=subprocess.PIPE)
        p.stdin.write(MAIL)
        p.stdin.close()
        time.sleep(0.5)
        p.terminate()
        time.sleep(0.1)
        fcntl.lockf(held, fcntl.LOCK_UN)
        code = p.wait(SECONDS)
    assert code == 0 and box.read_bytes().endswith(MAIL + b'\n')
    assert not (spool.path / 'user.lock').exists()


@pytest.mark.parametrize('kind', ['mbox', 'maildir'])
def test_deliver_many_at_once(spool, kind):
    if kind == 'maildir':
        spool.maildir('user', {})
    spool.users(user='x')
    mails = [b'Subject: %d\n\n%s\n' % (i, b'%d' % i * 3000) for i in range(30)]
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        list(pool.map(lambda mail: retry(spool, mail), mails))
    if kind == 'maildir':
        new = spool.path / 'user/new'
        assert sorted((new / n).read_bytes() for n in os.listdir(new)) == sorted(mails)
        return
    got = re.split(rb'(?:^|(?<=\n\n))From MAILER-DAEMON [^\n]*\n', spool.read('user'))
    assert got[0] == b'' and sorted(got[1:]) == sorted(m + b'\n' for m in mails)


def retry(spool, mail):
    """As a queue does it: 75 means later."""
    for _ in range(20):
        done = subprocess.run([ALMOND, 'deliver', '-d', spool.path, '-u', spool.users_file, 'user'], input=mail,
                              stderr=subprocess.PIPE, timeout=SECONDS)
        if done.returncode == 0:
            return
        assert done.returncode == 75, done.stderr
    raise AssertionError('always busy')


# ---- check ------------------------------------------------------------------------------------------------------------


GOOD = b'From a@b Mon Jan  5 10:00:00 2026\nA: b\n\nx\n\n'


def check(spool, *args, code=1):
    if not spool.users_file.exists():
        spool.users(user='secret')
    before = spool.picture()
    done = run('check', '-d', spool.path, '-u', spool.users_file, *args, code=code)
    assert spool.picture() == before
    return done.stdout.decode(), done.stderr.decode()


def test_check_all_is_well(spool):
    spool.mbox('user', GOOD * 3)
    spool.mbox('empty', b'')
    spool.maildir('dir', {'new/1.a.b': b'x\n', 'new/2.a.b': b'y\n', 'cur/3.a.b:2,S': b'zz\n'})
    said, log = check(spool, code=0)
    assert 'user: mbox, 3 messages, %d octets\n' % (3 * len(GOOD)) in said
    assert 'empty: mbox, 0 messages, 0 octets\n' in said
    assert 'dir: Maildir, 2 new, 1 seen, 7 octets\n' in said
    assert 'mode 0755' in said and 'nothing is wrong' in said and '!' not in said and log == ''


@pytest.mark.parametrize('data, said', [
    (b'junk\n\n' + GOOD, '6 octets in front'), (GOOD + b'\0\0x\0\n\n', '3 NUL'), (b'no mail at all\n', 'no message begins'),
    (GOOD + b'cut', 'no end'), (GOOD[:-1] + GOOD, '1 separators behind no blank'), (b'\0' * 100000, '100000 NUL')],
                         ids=['junk', 'nul', 'none', 'cut', 'hidden', 'zeros'])
def test_check_damage(spool, data, said):
    spool.mbox('user', data)
    out, _ = check(spool)
    assert re.search(f'  ! .*{said}', out) and 'something to do' in out


def test_check_text_that_looks_like_a_separator(spool):
    spool.mbox('user', GOOD + b'From here on\n\n')
    out, _ = check(spool, code=0)
    assert '1 messages' in out and '1 lines "From' in out


def test_check_what_is_no_mailbox(spool):
    spool.mbox('real', GOOD)
    (spool.path / 'link').symlink_to('real')
    os.link(spool.mbox('two', GOOD), spool.base / 'second')
    os.mkfifo(spool.path / 'fifo')
    os.mkfifo(spool.path / 'fifo.lock')
    spool.mbox('open', GOOD, 0o666)
    spool.mbox('bad name', GOOD)
    spool.mbox('.hidden', b'junk')
    spool.users(user='x')
    out = run('check', '-d', spool.path, '-u', spool.users_file, code=1).stdout.decode()
    for name in ('link', 'two', 'fifo', 'bad name'):
        assert re.search(f'  ! {name}: .*not served', out), name
    assert '! fifo.lock: a lock of no living' in out and '! open: everybody may change it' in out and 'hidden' not in out


@needs_root
def test_check_owners(spool):
    spool.mbox('daemon', GOOD)
    (spool.path / 'roots').write_bytes(GOOD)
    out, _ = check(spool, '-s')
    assert '! daemon belongs to uid 12345' in out and '! roots belongs to root' in out
    spool.lines('roots:' + scram('x'))
    os.chown(spool.path, 0, 0)
    out, log = check(spool)
    assert 'user roots' in log and 'chown' in log


def test_check_locks(spool):
    spool.mbox('user', GOOD)
    spool.mbox('other', GOOD)
    spool.mbox('third', GOOD)
    (spool.path / 'user.lock').write_text(f'{os.getpid()}\n')
    (spool.path / 'other.lock').write_text('0')
    dead = subprocess.Popen(['true'])
    dead.wait()
    (spool.path / 'third.lock').write_text(f'{dead.pid}')
    out, _ = check(spool)
    assert 'user.lock: a living process holds it' in out and '! user.lock' not in out
    assert '! other.lock: a lock of no living' in out and '! third.lock: a lock of no living' in out


def test_check_maildir(spool):
    box = spool.maildir('user', {'new/1.a.b': b'x'})
    os.rmdir(box / 'tmp')
    (box / 'cur/sub').mkdir()
    (box / 'new/link').symlink_to('1.a.b')
    out, _ = check(spool)
    assert 'user: Maildir, 1 new, 0 seen, 1 octets' in out and '! user/tmp: not there' in out and '! 2 entries' in out


def test_check_spool_mode(spool):
    os.chmod(spool.path, 0o777)
    assert '! everybody may remove' in check(spool)[0]
    os.chmod(spool.path, 0o1777)
    out, _ = check(spool)
    assert 'mode 1777' in out and '! anybody can put a mailbox there' in out


def test_check_users_file(spool):
    spool.users(user='x')
    spool.users_file.chmod(0o644)
    assert 'others may read it; chmod 600' in check(spool, code=0)[1]
    spool.users_file.chmod(0o620)
    assert 'others may change it' in check(spool, code=0)[1]
    spool.lines('no colon here')
    assert 'line 1' in check(spool, code=0)[1]
    spool.users_file.unlink()
    done = run('check', '-d', spool.path, '-u', spool.users_file, code=1)
    assert b'almond passwd' in done.stderr


def test_check_no_spool(spool):
    spool.users(user='x')
    done = run('check', '-d', spool.base / 'no', '-u', spool.users_file, code=1)
    assert b'make it' in done.stderr
    run('check', 'operand', code=64)


@needs_root
def test_check_spool_on_tmpfs(spool):
    with small_disk('64k') as at:
        os.chown(at, OWNER, GROUP)
        spool.path = type(spool.path)(at)
        assert 'ALL MAIL IS LOST' in check(spool)[1]


@needs_root
def test_check_reads_mail_as_its_owner(spool):
    """What a sender wrote is never read by root."""
    spool.mbox('user', GOOD)
    trace = spool.base / 'trace'
    spool.users(user='x')
    subprocess.run([tool('strace'), '-f', '-y', '-o', trace, '-e', 'trace=pread64,setresuid', ALMOND, 'check', '-d', spool.path,
                    '-u', spool.users_file], stdout=subprocess.DEVNULL, timeout=SECONDS)
    became, read = set(), set()
    for line in trace.read_text().split('\n'):
        pid = line.split(' ')[0]
        if f'setresuid({OWNER}' in line:
            became.add(pid)
        if 'pread64' in line and '/user>' in line:
            read.add(pid)
    assert read and read <= became


def test_conf_is_looked_at_before_a_start(spool):
    """almond -T: what a start would look at, and its exit codes."""
    def look(code, *args):
        return run('-T', '-d', spool.path, '-u', spool.users_file, *args, code=code).stderr.decode()
    assert 'almond passwd' in look(78)
    spool.users(user='x')
    assert look(0) == ''
    run('-T', '-d', spool.base / 'no', '-u', spool.users_file, code=78)
    run('-T', '-d', spool.users_file, '-u', spool.users_file, code=78)


@needs_root
def test_conf_refused(spool):
    spool.users(user='x')
    run('-T', '-d', spool.path, '-u', spool.users_file, code=77, user=OWNER, group=GROUP, extra_groups=[])
    run('-T', '-d', spool.path, '-s', code=77, user=OWNER, group=GROUP, extra_groups=[])
    os.chmod(spool.users_file, 0o644)
    os.chmod(spool.path, 0o444)
    assert run('-T', '-d', spool.path, '-u', spool.users_file, code=77, user=OWNER, group=GROUP, extra_groups=[]).stderr
    os.chmod(spool.path, 0o755)
    os.chmod(spool.users_file, 0o600)
    (spool.path / 'user').write_bytes(b'')
    os.chown(spool.path, 0, 0)
    assert b'chown' in run('-T', '-d', spool.path, '-u', spool.users_file, code=78).stderr
    run('-T', '-d', spool.path, '-u', spool.users_file, '-s', code=0)
