"""Defects that were found once: each has its case here.  What needs longer waits than a test's build has, or shorter ones, has a
build below build/regress."""
import contextlib
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest

from conftest import (ALMOND, GROUP, OWNER, ROOT, SANITIZER, SECONDS, SEPARATOR, Pop, Program, Server, free_port, inetd_style,
                      needs_root, plain, switches, tool)

SWITCHES = switches(ALMOND)
pytestmark = pytest.mark.skipif(not all(SWITCHES[x] for x in ('ENABLE_USERS', 'ENABLE_ALONE', 'ENABLE_MBOX')),
                                reason='a build without a users file, a listener or mbox')
MAKE = os.environ.get('MAKE', 'make').split()[0]
DEFS = ('-DFAIL_DELAY=20 -DTAKEOVER_IDLE=1500 -DLOCK_WAIT=3000 -DLOCK_STALE=1500 -DLOCK_OLD=300 -DLOGIN_DEADLINE=1500 '
        '-DPASSWD_TIME=5 -DRUN_DIR=\'"/run/almond-test"\'')
END = b'\r\n.\r\n'
BIG = b'Subject: big\n\n' + (b'y' * 70 + b'\n') * 200000


@pytest.fixture(scope='module')
def patient():
    """A build with LOCK_OLD as it is installed, and a short LOGIN_DEADLINE; ALMOND_REGRESS names another."""
    if 'ALMOND_REGRESS' in os.environ:
        return os.environ['ALMOND_REGRESS']
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k not in ('CFLAGS', 'CPPFLAGS', 'LDFLAGS')}
    done = subprocess.run([MAKE, '-s', f'-j{os.cpu_count()}', 'O=build/regress', f'TEST_DEFS={DEFS}', 'test-build'], cwd=ROOT,
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=600)
    assert done.returncode == 0, done.stdout.decode()
    return str(ROOT / 'build/regress/test/almond')


@pytest.fixture
def boxed(spool):
    spool.account('user', 'secret', plain)
    spool.mails('user', [letter(1, b'a'), letter(2, b'b'), letter(3, b'c')])
    return spool


def letter(number, c, lines=100):
    return b'Subject: %d\n\n' % number + (c * 60 + b'\n') * lines


def soon(condition, seconds=SECONDS):
    """Wait until it holds, or for so long."""
    pause, end = threading.Event(), time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        pause.wait(0.02)
    return held


def children(pid):
    try:
        return [int(x) for x in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def leaf(pid):
    below = children(pid)
    return leaf(below[-1]) if below else pid


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    sock.close()


def narrow(server):
    """A client with a small window."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(('127.0.0.1', server.port))
    return Pop(sock)


def not_whole(pop, command):
    """Refused, or cut before the final dot."""
    pop.send(command + '\r\n')
    if pop.raw_line().startswith(b'-ERR'):
        return
    with contextlib.suppress(EOFError, ConnectionResetError):
        pop.until(END)
        pytest.fail(f'{command}: a final dot behind what is not the mail')


def rewrite(spool, header=9):
    """As mail readers do: message 1 is taken out in place; then longer mail comes, and the old end lies inside it.  With the
    header of the last it stands where the last stood."""
    path = spool.path / 'user'
    old = path.read_bytes()
    first = len(SEPARATOR + letter(1, b'a')) + 1
    new = old[first:] if header != 3 else old[first:2 * first] + old[first:2 * first]
    new += SEPARATOR + letter(header, b'N', 200) + b'\n'
    assert len(new) > len(old) > new.index(b'NNN')
    with open(path, 'r+b') as f:
        f.write(new)
    return new


headers = pytest.mark.parametrize('header', [9, 3], ids=['other-header', 'same-header'])


# ---- nothing is deleted that did not arrive

def test_reset_with_quit_behind_a_mail(spool, serve):
    spool.account('user', 'secret', plain)
    spool.mails('user', [BIG, letter(2, b'b')])
    server, before = serve(), spool.read('user')
    pop = narrow(server)
    pop.login()
    pop.send('RETR 1\r\nDELE 1\r\nQUIT\r\n')
    assert pop.raw_line().startswith(b'+OK')
    reset(pop.sock)
    server.wait_log('end user=user ')
    assert spool.read('user') == before


# ---- a box that is rewritten, and grows past the snapshot

@headers
def test_rewritten_before_retr(boxed, serve, header):
    with serve().pop('user') as pop:
        new = rewrite(boxed, header)
        not_whole(pop, 'RETR 3')
    assert boxed.read('user') == new


@headers
@pytest.mark.parametrize('late', [False, True], ids=['before-dele', 'before-quit'])
def test_rewritten_before_quit(boxed, serve, late, header):
    with serve().pop('user') as pop:
        if late:
            pop.ok('DELE 3')
        new = rewrite(boxed, header)
        if not late and pop.cmd('DELE 3').startswith('-ERR'):
            pop.quit()
        else:
            assert pop.quit().startswith('-ERR')
    assert boxed.read('user') == new


@pytest.mark.skipif(not SWITCHES['ENABLE_PRIVSEP'], reason='ENABLE_PRIVSEP is off')
def test_rewritten_during_the_scan(boxed):
    slow = [tool('strace'), '-D', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=pread64', '-e',
            'inject=pread64:delay_enter=2000000:when=1']
    box = str(boxed.path / 'user')
    with Server(boxed, prefix=slow) as server, server.pop() as pop:
        pop.ok('USER user')
        pop.send('PASS secret\r\n')

        def snapshot_is_taken():
            session = pathlib.Path(f'/proc/{leaf(server.process.pid)}')
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                return any(os.readlink(fd) == box for fd in (session / 'fd').iterdir())
            return False
        assert soon(snapshot_is_taken, 10)
        threading.Event().wait(0.3)
        new = rewrite(boxed)
        if pop.line().startswith('+OK'):
            not_whole(pop, 'RETR 3')
    assert boxed.read('user') == new


def test_appended_to_is_no_rewrite(boxed, serve):
    with serve().pop('user') as pop:
        with open(boxed.path / 'user', 'ab') as f:
            f.write(SEPARATOR + letter(4, b'd') + b'\n')
        assert pop.multi('RETR 3') == letter(3, b'c').replace(b'\n', b'\r\n')
        pop.ok('DELE 3')
        assert pop.quit().startswith('+OK')
    assert re.findall(rb'^Subject: (.)$', boxed.read('user'), re.M) == [b'1', b'2', b'4']


# ---- who does not read

def test_login_deadline_of_a_client_that_does_not_read(boxed, patient):
    with Server(boxed, almond=patient) as server:
        pop = narrow(server)
        pop.sock.setblocking(False)
        data, at = b'CAPA\r\n' * 1000, 0

        def is_closed():
            nonlocal at
            try:
                at = (at + pop.sock.send(data[at:])) % len(data)
            except BlockingIOError:
                return False
            except OSError:
                return True
        with pop:
            assert soon(is_closed, 15), 'no login, and still there'


def test_term_while_a_local_client_does_not_read(spool):
    spool.account('user', 'secret', plain)
    spool.mails('user', [BIG])
    before = spool.read('user')
    pop, program = inetd_style(spool)
    with pop:
        pop.login()
        below = children(program.process.pid)
        pop.send('RETR 1\r\nDELE 1\r\n')
        assert pop.raw_line().startswith(b'+OK')
        threading.Event().wait(0.3)     # the socket is full
        program.signal(signal.SIGTERM)
        try:
            assert soon(lambda: program.process.poll() is not None, 20), 'the monitor is still there'
            assert soon(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in below), 20), 'the session is still there'
        finally:
            program.process.kill()
    program.wait()
    program.check_log()
    assert spool.read('user') == before


# ---- a full disk

@needs_root
def test_deleting_on_a_full_disk(boxed):
    spool = boxed
    mount = ['unshare', '-m', 'sh', '-c', f'mount -t tmpfs -o size=256k,mode=755,uid={OWNER},gid={GROUP} none "$0" && exec "$@"',
             spool.path]
    with Server(spool, prefix=mount) as server:
        inside = pathlib.Path(f'/proc/{server.process.pid}/root{spool.path}')
        data = b''.join(SEPARATOR + letter(i, b'x', 500) + b'\n' for i in range(5))
        (inside / 'user').write_bytes(data)
        spool.own(inside / 'user')
        with open(inside / 'rest', 'wb', buffering=0) as f:
            for size in (4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        f.write(b'z' * size)
        assert os.statvfs(inside).f_bfree == 0
        with server.pop('user') as pop:
            assert pop.ok('STAT').startswith('+OK 5 ')
            for i in range(1, 6):
                pop.ok(f'DELE {i}')
            assert pop.quit().startswith('+OK')
        assert (inside / 'user').read_bytes() == b''
        assert not (inside / 'user.lock').exists()


# ---- descriptors at the start

def test_all_descriptors_closed(boxed):
    port = free_port()
    program = Program(['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh', ALMOND, '-F', '-d', boxed.path, '-u', boxed.users_file, '-l',
                       f'127.0.0.1:{port}'])
    try:
        session_at(port)
    finally:
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


def test_into_the_background_without_standard_input(boxed):
    port, log = free_port(), boxed.base / 'log'
    with open(log, 'wb') as err:
        done = subprocess.run(['sh', '-c', 'exec "$@" <&- >&-', 'sh', ALMOND, '-E', '-d', boxed.path, '-u', boxed.users_file,
                               '-l', f'127.0.0.1:{port}'], stderr=err, timeout=SECONDS)
    assert done.returncode == 0, log.read_text()
    assert soon(lambda: 'started' in log.read_text()), log.read_text()
    try:
        session_at(port)
    finally:
        os.kill(int(re.search(r'almond\[(\d+)\]: started', log.read_text())[1]), signal.SIGTERM)
    assert soon(lambda: 'stopped' in log.read_text()), log.read_text()


def session_at(port):
    def connect():
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(('127.0.0.1', port), timeout=10)
    sock = soon(connect)
    assert sock, 'nobody listens'
    with Pop(sock) as pop:
        sock.settimeout(10)
        pop.login()
        assert pop.ok('STAT').startswith('+OK 3 ')
        assert pop.quit().startswith('+OK')


def test_no_log_on_the_clients_line(boxed):
    """inetd gives the client as standard error too."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([ALMOND, '-i', '-E', '-d', boxed.path, '-u', boxed.users_file], stdin=theirs, stdout=theirs,
                                   stderr=theirs)
    with Pop(ours) as pop:
        pop.ok('USER user')
        pop.err('PASS wrong')
        pop.login()
        pop.ok('DELE 1')
        assert pop.quit().startswith('+OK')
        assert process.wait(SECONDS) == 0
        assert b'almond[' not in pop.got and b'user=' not in pop.got, pop.got


# ---- the configuration

@needs_root
def test_no_place_for_sessions_is_told(boxed):
    """/run can be read only."""
    done = subprocess.run(['unshare', '-m', 'sh', '-c', 'mount -t tmpfs -o ro none /run && exec "$@"', 'sh', ALMOND, '-T', '-d',
                           boxed.path, '-u', boxed.users_file], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=SECONDS)
    assert done.returncode > 0 and b'/run' in done.stderr, done


@pytest.mark.skipif(not SWITCHES['ENABLE_PASSWD'], reason='ENABLE_PASSWD is off')
@pytest.mark.parametrize('path', ['/' + 'x' * 5000, '/x' * 2500, 'x' * 5000], ids=['name', 'path', 'relative'])
def test_passwd_with_a_path_too_long(path):
    done = subprocess.run([ALMOND, 'passwd', '-s', '-u', path, 'user'], input=b'secret\n', stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=SECONDS)
    assert done.returncode in (64, 73, 74, 75, 78) and re.fullmatch(rb'almond\S*: [^\n]+\n', done.stderr), done
    assert not SANITIZER.search(done.stderr.decode()) and not done.stdout, done


# ---- one session behind the other

@pytest.mark.parametrize('delete', [False, True], ids=['quit', 'dele'])
def test_back_at_once(spool, serve, delete):
    """A login right behind the answer to QUIT finds the mailbox free."""
    spool.account('user', 'secret', plain)
    spool.mails('user', [letter(i, b'x', 2) for i in range(200)])
    server = serve()
    coming = server.pop()
    coming.ok('USER user')
    for i in range(200):
        with coming as pop:
            pop.ok('PASS secret')
            coming = server.pop()
            coming.ok('USER user')
            if delete:
                pop.ok('DELE 1')
            pop.ok('QUIT')
    coming.close()
    assert spool.read('user').count(SEPARATOR) == (0 if delete else 200)


@pytest.mark.parametrize('delete', [False, True], ids=['quit', 'dele'])
def test_back_while_the_old_session_ends_slowly(boxed, delete):
    slow = [tool('strace'), '-D', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=exit_group', '-e',
            'inject=exit_group:delay_enter=50000']
    with Server(boxed, prefix=slow) as server:
        coming = server.pop()
        coming.ok('USER user')
        for _ in range(3):
            with coming as pop:
                pop.ok('PASS secret')
                coming = server.pop()
                coming.ok('USER user')
                if delete:
                    pop.ok('DELE 1')
                pop.ok('QUIT')
        coming.close()


# ---- locks of others

def test_a_lock_that_replaced_ours_stays(boxed):
    """As maildrop breaks one, and takes its own."""
    slow = [tool('strace'), '-D', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=fsync', '-e', 'inject=fsync:delay_enter=1000000']
    lock, theirs = boxed.path / 'user.lock', boxed.path / 'theirs'
    with Server(boxed, prefix=slow) as server, server.pop('user') as pop:
        pop.ok('DELE 1')
        theirs.write_text('0')
        pop.send('QUIT\r\n')
        assert soon(lock.exists)
        theirs.rename(lock)
        assert pop.line().startswith('+OK')
        pop.closed()
        assert lock.read_text() == '0'


@pytest.mark.parametrize('old', [False, True], ids=['young', 'old'])
def test_a_lock_without_a_pid(boxed, patient, old):
    """Nobody knows whose it is: it is waited for as long as other programs would."""
    lock = boxed.path / 'user.lock'
    lock.write_text('0' if old else '')
    boxed.own(lock)
    if old:
        os.utime(lock, (time.time() - 3600,) * 2)
    with Server(boxed, almond=patient) as server, server.pop() as pop:
        pop.ok('USER user')
        reply = pop.cmd('PASS secret')
        assert reply.startswith('+OK' if old else '-ERR [IN-USE]'), reply
        assert lock.exists() != old


# ---- what a stranger may learn

@needs_root
def test_roots_mailbox_and_a_wrong_password(boxed, serve):
    server = serve()
    for path in (boxed.path, boxed.path / 'user'):
        os.chown(path, 0, 0)
    with server.pop() as pop:
        pop.ok('USER user')
        assert pop.cmd('PASS wrong').startswith('-ERR [AUTH]')
        pop.ok('USER user')
        assert pop.cmd('PASS secret').startswith('-ERR [SYS/PERM]')


def test_what_follows_quit_resets_nothing(boxed):
    """Octets that nobody reads would make the kernel reset the line, and take the last answer away."""
    with Server(boxed) as server:
        sock = socket.create_connection(('127.0.0.1', server.port), SECONDS)
        sock.sendall(b'USER user\r\nPASS secret\r\nQUIT\r\n' + b'NOOP\r\n' * 4000)
        got = b''
        while data := sock.recv(65536):         # a reset raises
            got += data
        assert got.endswith(b'server shutdown\r\n')
        sock.close()
