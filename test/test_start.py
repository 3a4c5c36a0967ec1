"""How almond starts, listens, takes signals and ends; who may have a session, and from where."""
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from conftest import (ALMOND, GROUP, IS_ROOT, OWNER, SECONDS, Pop, Program, Server, Spool, free_port, inetd_style,
                      needs_root, plain, switches, tool)

SWITCHES = switches(ALMOND)
MAIL = b'Subject: one\n\nbody\n'
alone = pytest.mark.skipif(not SWITCHES['ENABLE_ALONE'], reason='ENABLE_ALONE is off')
privsep = pytest.mark.skipif(not SWITCHES['ENABLE_PRIVSEP'], reason='ENABLE_PRIVSEP is off')


@pytest.fixture
def filled(spool):
    spool.users(user='secret')
    if SWITCHES['ENABLE_MBOX']:
        spool.mails('user', [MAIL, MAIL + b'second\n'])
    else:
        spool.maildir('user', {'new/1767600001.M1P1.h': MAIL, 'new/1767600002.M1P1.h': MAIL + b'second\n'})
    return spool


def session(pop):
    pop.login()
    assert pop.ok('STAT').startswith('+OK 2 ')
    assert pop.multi('RETR 1') == b'Subject: one\r\n\r\nbody\r\n'
    assert pop.quit().startswith('+OK')


def run(*args, **how):
    how.setdefault('stdin', subprocess.DEVNULL)
    return subprocess.run([ALMOND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=SECONDS,
                          **how)


# ---- options and exit codes

@pytest.mark.parametrize('args', [['-h'], ['--help'], ['-V'], ['--version']])
def test_says_it_on_standard_output(args):
    r = run(*args)
    assert r.returncode == 0 and r.stdout and not r.stderr
    assert (b'usage: almond' in r.stdout) == (args[0] in ('-h', '--help'))


def test_version():
    version = re.search(r'^#define VERSION "(.*)"', (pathlib.Path(__file__).parent.parent / 'config.h').read_text(), re.M)[1]
    assert run('--version').stdout.decode() == f'almond {version}\n'
    assert run('-V').stdout.decode().startswith(f'almond {version}\n')


def test_switches_are_all_named():
    config = (pathlib.Path(__file__).parent.parent / 'config.h').read_text()
    assert set(SWITCHES) == set(re.findall(r'^#ifndef (ENABLE_\w+)', config, re.M))


@pytest.mark.parametrize('args', [['-Z'], ['-d'], ['operand'], ['-F', '-l', '127.0.0.1:x'], ['-F', '-l', '0'],
                                  ['-F', '-l', '65536'], ['-F', '-l', ':'], ['-F', '-l', '[::1'], ['-n', 'x/8'],
                                  ['-n', '10.0.0.0/33'], ['-n', '::/129'], ['--nonsense'], ['-F', '-l', '1.2.3:1110']])
def test_bad_options(filled, args):
    if '-l' in args and not SWITCHES['ENABLE_ALONE']:
        pytest.skip('ENABLE_ALONE is off')
    r = run('-E', '-d', filled.path, *(['-u', filled.users_file] if SWITCHES['ENABLE_USERS'] else []), *args)
    assert r.returncode == 64 and r.stderr and not r.stdout, r


@alone
def test_port_in_use(filled):
    with Server(filled) as server:
        r = run('-F', '-E', '-d', filled.path, *server.argv[server.argv.index('-u'):][:2], '-l',
                f'127.0.0.1:{server.port}') if '-u' in server.argv else \
            run('-F', '-E', '-d', filled.path, '-s', '-l', f'127.0.0.1:{server.port}')
        assert r.returncode == 69 and str(server.port).encode() in r.stderr, r


@pytest.mark.skipif(not SWITCHES['ENABLE_USERS'], reason='no users file in this build')
class TestCheckOfTheConfiguration:
    def test_good(self, filled):
        r = run('-T', '-d', filled.path, '-u', filled.users_file)
        assert r.returncode == 0, r

    def test_no_users_file(self, filled):
        r = run('-T', '-d', filled.path, '-u', filled.base / 'none')
        assert r.returncode == 78 and b'none' in r.stderr, r

    def test_no_spool(self, filled):
        r = run('-T', '-d', filled.base / 'none', '-u', filled.users_file)
        assert r.returncode == 78 and b'none' in r.stderr, r

    def test_bad_lines_are_named(self, filled):
        filled.lines('user:' + plain('secret'), 'no colon', '../x:' + plain('a'), 'b:SCRAM-SHA-256$nonsense', '# a remark', '')
        r = run('-T', '-d', filled.path, '-u', filled.users_file)
        for number in (2, 3, 4):
            assert f'line {number}'.encode() in r.stderr, r
        assert b'line 5' not in r.stderr and b'line 1' not in r.stderr
        assert b'secret' not in r.stderr

    @needs_root
    def test_a_spool_that_leaves_only_root(self, filled):
        os.chown(filled.path, 0, 0)
        box = filled.path / 'user'
        os.chown(box, 0, 0)
        r = run('-T', '-d', filled.path, '-u', filled.users_file)
        assert r.returncode == 78 and b'root' in r.stderr, r

    @needs_root
    def test_not_readable(self, filled):
        r = run('-T', '-d', filled.path, '-u', filled.users_file, user=54321, group=54321, extra_groups=[])
        assert r.returncode == 77, r

    @needs_root
    def test_a_port_that_needs_root(self, filled):
        if not SWITCHES['ENABLE_ALONE']:
            pytest.skip('ENABLE_ALONE is off')
        if int(pathlib.Path('/proc/sys/net/ipv4/ip_unprivileged_port_start').read_text()) <= 110:
            pytest.skip('every port is free for all here')
        os.chown(filled.users_file, OWNER, GROUP)
        r = run('-F', '-E', '-d', filled.path, '-u', filled.users_file, '-l', '127.0.0.1:110', user=OWNER, group=GROUP,
                extra_groups=[])
        assert r.returncode == 77, r

    @needs_root
    def test_session_user(self, filled):
        for name in ('root', 'no-such-account'):
            r = run('-T', '-U', name, '-d', filled.path, '-u', filled.users_file)
            assert r.returncode == 78 and name.encode() in r.stderr, r


@needs_root
def test_spool_on_tmpfs_warns(filled):
    users = ['-u', str(filled.users_file)] if SWITCHES['ENABLE_USERS'] else ['-s']
    r = subprocess.run(['unshare', '-m', 'sh', '-c', 'mount -t tmpfs tmpfs "$0" && exec "$@"', filled.path, ALMOND, '-T',
                        '-d', filled.path, *users], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=SECONDS)
    assert b'tmpfs' in r.stderr, r


# ---- ways to start

@pytest.mark.parametrize('tcp', [False, True])
def test_standard_input_is_the_client(filled, tcp):
    how = system_way(filled)
    pop, program = inetd_style(filled, *how, tcp=tcp)
    session(pop)
    assert program.wait() == 0
    program.check_log()
    assert 'end user=user rip=' + ('127.0.0.1' if tcp else 'local') in program.log()


def system_way(spool):
    if SWITCHES['ENABLE_USERS']:
        return ()
    pytest.skip('no users file in this build')


def test_found_out_by_itself(filled):
    """A socket on descriptor 0 and no option: started from inetd."""
    system_way(filled)
    ours, theirs = socket.socketpair()
    with theirs:
        program = Program([ALMOND, '-E', '-d', filled.path, '-u', filled.users_file], stdin=theirs, stdout=theirs)
    session(Pop(ours))
    assert program.wait() == 0
    program.check_log()


def test_pipes(filled):
    """-i over two pipes, as a program that tests it may do."""
    system_way(filled)
    program = subprocess.run([ALMOND, '-i', '-E', '-d', filled.path, '-u', filled.users_file],
                             input=b'USER user\r\nPASS secret\r\nSTAT\r\nQUIT\r\n', timeout=SECONDS,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.returncode == 0
    assert [x[:3] for x in program.stdout.split(b'\r\n')] == [b'+OK'] * 5 + [b'']


@needs_root
def test_openbsd_inetd(filled):
    """The real one, with a configuration of its own, in the foreground."""
    system_way(filled)
    port = free_port()
    conf = filled.base / 'inetd.conf'
    conf.write_text(f'127.0.0.1:{port} stream tcp nowait root {ALMOND} almond -d {filled.path} -u {filled.users_file}\n')
    inetd = Program([tool('inetd'), '-d', conf], start_new_session=True)
    try:
        for _ in range(3):
            with connecting(port) as pop:
                session(pop)
    finally:
        inetd.signal(signal.SIGTERM)
        inetd.wait()


@contextlib.contextmanager
def connecting(port, family=socket.AF_INET, address='127.0.0.1'):
    """A client of a server that may not listen yet."""
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.05)):
        sock = socket.socket(family)
        try:
            sock.connect((address, port))
            break
        except ConnectionRefusedError:
            sock.close()
            pause.wait(0.05)
    else:
        raise AssertionError(f'nobody listens on {port}')
    with Pop(sock) as pop:
        yield pop


# Puts sockets from descriptor 3 on and says so as systemd does: LISTEN_PID is the program's own.
ACTIVATE = textwrap.dedent('''
    import os, sys
    fds = [int(x) for x in sys.argv[1].split(',')]
    high = [os.dup(fd) if fd < 20 else fd for fd in fds]
    high = [__import__('fcntl').fcntl(fd, 0, 30) for fd in fds]         # F_DUPFD: out of the way
    for i, fd in enumerate(high):
        os.dup2(fd, 3 + i)
    os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=sys.argv[2] if len(sys.argv[2]) > 1 else str(os.getpid()))
    os.execv(sys.argv[3], sys.argv[3:])
''')


def activated(spool, sockets, pid='-'):
    numbers = [s.fileno() for s in sockets]
    return Program([sys.executable, '-c', ACTIVATE, ','.join(map(str, numbers)), pid, ALMOND, '-E', '-d', spool.path, '-u',
                    spool.users_file], pass_fds=numbers)


@alone
class TestSystemd:
    def test_listening_sockets(self, filled):
        """Accept=no: two listening sockets."""
        system_way(filled)
        with socket.create_server(('127.0.0.1', 0)) as a, socket.create_server(('127.0.0.1', 0)) as b:
            program = activated(filled, [a, b])
            for s in (a, b, a):
                with Pop(socket.create_connection(s.getsockname())) as pop:
                    session(pop)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        program.check_log()

    def test_accepted_socket(self, filled):
        """Accept=yes: the client."""
        system_way(filled)
        ours, theirs = socket.socketpair()
        with theirs:
            program = activated(filled, [theirs])
        session(Pop(ours))
        assert program.wait() == 0
        program.check_log()

    def test_another_process_is_meant(self, filled):
        """LISTEN_PID of another: the sockets are not for us.  Without a socket on 0 almond then listens itself, here on a port
        that is taken."""
        system_way(filled)
        with socket.create_server(('127.0.0.1', 0)) as a, socket.create_server(('127.0.0.1', 0)) as b:
            numbers = [a.fileno()]
            program = Program([sys.executable, '-c', ACTIVATE, str(numbers[0]), '99999999', ALMOND, '-E', '-F', '-d',
                               filled.path, '-u', filled.users_file, '-l', f'127.0.0.1:{b.getsockname()[1]}'],
                              pass_fds=numbers)
            assert program.wait() == 69

    def test_systemd_socket_activate(self, filled):
        """systemd's own tool, where it is installed; the two tests above do the same by hand."""
        import shutil
        if not shutil.which('systemd-socket-activate'):
            return
        system_way(filled)
        port = free_port()
        program = Program(['systemd-socket-activate', '-l', f'127.0.0.1:{port}', ALMOND, '-E', '-d', filled.path, '-u',
                           filled.users_file], start_new_session=True)
        with connecting(port) as pop:
            session(pop)
        program.signal(signal.SIGTERM)
        program.wait()


@alone
def test_ipv4_and_ipv6_and_twice(filled):
    assert socket.has_ipv6
    six, extra = free_port(socket.AF_INET6, '::1'), free_port()
    with Server(filled, '-l', f'[::1]:{six}', '-l', f'127.0.0.1:{extra}') as server:
        session(server.pop())
        with connecting(extra) as pop:
            session(pop)
        with connecting(six, socket.AF_INET6, '::1') as pop:
            session(pop)
        server.wait_log(r'end user=user rip=[0:]*:1 ')


@alone
def test_a_lone_port_means_all_addresses(filled):
    port = free_port()
    with Server(filled, '-l', str(port)):
        with connecting(port) as pop:
            session(pop)
        with connecting(port, socket.AF_INET6, '::1') as pop:
            session(pop)


@alone
@needs_root
def test_without_root(filled):
    """An ordinary user, his own spool, a high port."""
    os.chown(filled.base, OWNER, GROUP)
    os.chown(filled.users_file, OWNER, GROUP)
    system_way(filled)
    with Server(filled, user=OWNER, group=GROUP, extra_groups=[]) as server:
        pop = server.pop('user')
        pop.ok('DELE 1')
        assert pop.quit().startswith('+OK')
        pop = server.pop('user')
        assert pop.ok('STAT').startswith('+OK 1 ')
        pop.quit()


@alone
def test_into_the_background(filled):
    """Without -F: the starter's exit code tells that it listens."""
    if not SWITCHES['ENABLE_USERS']:
        pytest.skip('no users file in this build')
    port = free_port()
    log = open(filled.base / 'log', 'wb')
    r = subprocess.run([ALMOND, '-E', '-d', filled.path, '-u', filled.users_file, '-l', f'127.0.0.1:{port}'],
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, timeout=SECONDS)
    text = lambda: (filled.base / 'log').read_text()
    assert r.returncode == 0, text()
    pause = threading.Event()
    while 'started' not in text():
        pause.wait(0.05)
    try:
        with connecting(port) as pop:
            session(pop)
    finally:
        os.kill(int(re.search(r'almond\[(\d+)\]: started', text())[1]), signal.SIGTERM)
    while 'stopped' not in text():
        pause.wait(0.05)


# ---- signals

@alone
class TestSignals:
    def test_term_with_an_open_session(self, filled):
        """It ends without UPDATE; a clean exit."""
        before = filled.picture()
        server = Server(filled)
        pop = server.pop('user')
        pop.ok('DELE 1')
        server.stop()
        pop.closed()
        assert filled.picture() == before
        if SWITCHES['ENABLE_PRIVSEP']:          # without a monitor nobody is left to say so
            assert 'why=stopped' in server.log()

    @pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='a matter of mboxes')
    def test_term_lets_an_update_finish(self, spool):
        """TERM while a large mbox is moved: the session finishes, the client hears of it, nothing is torn."""
        spool.users(user='secret')
        mails = [b'Subject: %d\n\n' % i + b'%063d\n' % i * 500_000 for i in range(4)]
        spool.mails('user', mails)
        want = spool.mails('expected', mails[1:]).read_bytes()
        server = Server(spool)
        pop = server.pop('user')
        pop.ok('DELE 1')
        pop.send('QUIT\r\n')
        lock, before = spool.path / 'user.lock', os.stat(spool.path / 'user').st_mtime_ns
        pause = threading.Event()
        while not lock.exists() and os.stat(spool.path / 'user').st_mtime_ns == before:
            pause.wait(0.001)
        server.stop()
        assert spool.read('user') == want
        assert pop.line().startswith('+OK')
        pop.closed()

    def test_int_is_term(self, filled):
        server = Server(filled)
        server.signal(signal.SIGINT)
        assert server.wait() == 0

    def test_hup_reads_the_users_again(self, filled):
        with Server(filled) as server:
            if SWITCHES['ENABLE_USERS']:
                filled.users(user='secret', other='hello')
            server.signal(signal.SIGHUP)
            server.wait_log('reload')
            if SWITCHES['ENABLE_USERS']:
                server.pop('other', 'hello').quit()
            session(server.pop())

    def test_usr1_is_one_line_of_counters(self, filled):
        with Server(filled) as server:
            session(server.pop())
            pop = server.pop()
            pop.ok('USER user')
            pop.err('PASS wrong')
            pop.ok('USER user')
            pop.ok('PASS secret')
            pop.ok('DELE 2')
            pop.quit()
            server.wait_log('end user', 2)
            server.signal(signal.SIGUSR1)
            line = server.wait_log('counters:')
            values = dict(re.findall(r'(\w+)=(\d+)', line))
            assert (values['logins'], values['failures'], values['retr'], values['dele']) == ('2', '1', '1', '1'), line
            assert server.log().count('counters:') == 1

    def test_a_session_survives_hup_and_usr1(self, filled):
        with Server(filled) as server:
            pop = server.pop('user')
            for number in (signal.SIGHUP, signal.SIGUSR1):
                server.signal(number)
            server.wait_log('counters:')
            assert pop.ok('STAT').startswith('+OK 2 ')
            pop.quit()


# ---- who, and from where

def test_several_sessions(spool, serve):
    spool.users(a='secret', b='secret', c='secret')
    server = serve()
    pops = [server.pop(name) for name in 'abc']
    for pop in pops:
        assert pop.ok('STAT') == '+OK 0 0'
    for pop in pops:
        assert pop.quit().startswith('+OK')


def test_in_use_and_free_again(filled, serve):
    server = serve()
    first = server.pop('user')
    second = server.pop()
    second.ok('USER user')
    assert second.cmd('PASS secret').startswith('-ERR [IN-USE]')
    second.closed()
    assert first.ok('STAT').startswith('+OK 2 ')
    first.ok('DELE 1')
    assert first.quit().startswith('+OK')
    third = server.pop('user')
    assert third.ok('STAT').startswith('+OK 1 ')
    third.quit()


@pytest.mark.skipif(not SWITCHES['ENABLE_USERS'], reason='two logins of one mailbox are a matter of the users file')
def test_in_use_is_of_the_mailbox(filled, serve):
    filled.lines('user:' + plain('secret'), 'again/user:' + plain('secret'))
    server = serve()
    first = server.pop('again')
    assert first.ok('STAT').startswith('+OK 2 ')
    second = server.pop()
    second.ok('USER user')
    assert second.cmd('PASS secret').startswith('-ERR [IN-USE]')
    first.quit()


def test_free_when_the_line_is_cut(filled, serve):
    server = serve()
    first = server.pop('user')
    first.close()
    server.wait_log('end user=')
    session(server.pop())


def test_takeover_of_a_silent_session(filled, serve):
    """A dead line must not lock the owner out.  The first one ends without UPDATE.  TAKEOVER_IDLE is 1500 ms here; how long it
    really takes is not looked at."""
    server = serve()
    first = server.pop('user')
    first.ok('DELE 1')
    pause = threading.Event()
    for _ in range(100):
        second = server.pop()
        second.ok('USER user')
        if second.cmd('PASS secret').startswith('+OK'):
            break
        second.close()
        pause.wait(0.1)
    else:
        raise AssertionError('never taken over')
    assert second.ok('STAT').startswith('+OK 2 ')
    first.closed()
    second.ok('DELE 2')
    assert second.quit().startswith('+OK')
    server.wait_log('why=taken over')
    pop = server.pop('user')
    assert pop.multi('RETR 1') == b'Subject: one\r\n\r\nbody\r\n'
    pop.quit()


@privsep
@needs_root
def test_identities(filled, serve):
    """The listener is root; the monitor of a session is the mailbox's owner, the session another user, in an empty root."""
    server = serve()
    pop = server.pop('user')
    main = server.process.pid if not server.inetd else None
    children = lambda pid: [int(x) for x in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    monitor = children(main)[0] if main else server.sessions[0].process.pid
    while not children(monitor) if main else False:
        pass
    worker = children(monitor)[0]

    def ids(pid, key):
        return set(re.search(rf'^{key}:[ \t]+(.*)$', pathlib.Path(f'/proc/{pid}/status').read_text(), re.M)[1].split())

    assert ids(monitor, 'Uid') == {str(OWNER)}, 'the monitor'
    assert ids(monitor, 'CapEff') == {'0' * 16}
    uid, = ids(worker, 'Uid')
    assert uid not in ('0', str(OWNER)), 'the session'
    assert ids(worker, 'CapEff') == {'0' * 16}
    assert not ids(worker, 'Groups') and '0' not in ids(worker, 'Gid')
    root = pathlib.Path(f'/proc/{worker}/root')
    assert os.stat(root).st_ino != os.stat('/').st_ino and os.listdir(root) == []
    for fd in os.listdir(f'/proc/{worker}/fd'):
        path = os.readlink(f'/proc/{worker}/fd/{fd}')
        assert path.startswith(('socket:', 'pipe:', 'anon_inode:')) or path in ('/dev/null', str(filled.path / 'user')), path
        flags = int(re.search(r'flags:\s+(\d+)', pathlib.Path(f'/proc/{worker}/fdinfo/{fd}').read_text())[1], 8)
        if path.startswith('/') and path != '/dev/null':
            assert flags & 3 == os.O_RDONLY, 'a session writes no mail'
    pop.quit()


IN_CLEAR = re.compile(r'-ERR \[AUTH\] .*clear')


@needs_root
@alone
class TestNetworks:
    """A network of its own: two name spaces and a wire between them; nothing of the machine's is touched."""

    CLIENT = textwrap.dedent('''
        import socket, sys
        s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)
        f = s.makefile('rwb')
        out = [f.readline()]
        for line in ('CAPA', 'USER user', 'PASS secret', 'QUIT'):
            f.write(line.encode() + b'\\r\\n')
            f.flush()
            out.append(f.readline())
            while line == 'CAPA' and out[-1] not in (b'.\\r\\n', b''):
                out.append(f.readline())
        sys.stdout.buffer.write(b''.join(out))
    ''')

    @pytest.fixture
    def net(self):
        name = f'almond{os.getpid()}'
        ip = tool('ip')
        script = [f'netns add {name}a', f'netns add {name}b',
                  f'link add v{os.getpid()}a netns {name}a type veth peer name v{os.getpid()}b netns {name}b']
        for side, number in (('a', 1), ('b', 2)):
            script += [f'-n {name}{side} link set lo up', f'-n {name}{side} link set v{os.getpid()}{side} up',
                       f'-n {name}{side} addr add 10.99.7.{number}/24 dev v{os.getpid()}{side}',
                       f'-n {name}{side} addr add fd99:7::{number}/64 dev v{os.getpid()}{side} nodad']
        try:
            for line in script:
                subprocess.run([ip, *line.split()], check=True, timeout=SECONDS)
            yield [ip, 'netns', 'exec', name + 'a'], [ip, 'netns', 'exec', name + 'b']
        finally:
            for side in 'ab':
                subprocess.run([ip, 'netns', 'del', name + side], timeout=SECONDS)

    def talk(self, where, address, port):
        r = subprocess.run([*where, sys.executable, '-c', self.CLIENT, address, str(port)], stdout=subprocess.PIPE,
                           check=True, timeout=SECONDS)
        return r.stdout.decode().split('\r\n')[:-1]

    def check(self, filled, net, args, address, clear):
        here, there = net
        with Server(filled, '-l', '4110', *args, prefix=here) as server:
            lines = self.talk(there, address, 4110)
            assert ('USER' in lines) == clear, 'CAPA says what is so'
            user, password = lines[lines.index('.') + 1:][:2]
            if clear:
                assert user.startswith('+OK') and password.startswith('+OK'), lines
            else:
                assert IN_CLEAR.match(user) and password.startswith('-ERR'), lines
                server.wait_log(r'note user=- rip=\S+: .*clear')
            assert any(x.startswith('+OK') for x in self.talk(here, '127.0.0.1', 4110)[-2:-1]), 'loopback always'

    def test_refused_from_elsewhere(self, filled, net):
        self.check(filled, net, [], '10.99.7.1', False)
        self.check(filled, net, [], 'fd99:7::1', False)

    def test_listed(self, filled, net):
        self.check(filled, net, ['-n', '10.99.7.0/24', '-n', 'fd99:7::/64'], '10.99.7.1', True)
        self.check(filled, net, ['-n', '10.99.7.0/24', '-n', 'fd99:7::/64'], 'fd99:7::1', True)

    def test_another_is_listed(self, filled, net):
        for other in ('10.99.6.0/24', '10.99.7.0/31', '10.99.7.3', 'fd99:7::/64', '192.168.0.0/16'):
            self.check(filled, net, ['-n', other], '10.99.7.1', False)
        for other in ('fd99:6::/64', 'fd99:7::/127', '10.0.0.0/8'):
            self.check(filled, net, ['-n', other], 'fd99:7::1', False)


# ---- mailboxes that are refused

@needs_root
@pytest.mark.parametrize('kind', ['symlink', 'hard link', 'fifo', 'foreign', 'directory', 'dangling', 'device', 'socket'])
def test_refused_mailboxes(spool, serve, kind):
    """Nothing is touched, the client hears of it, the log says why."""
    spool.users(user='secret')
    data = b'From a@example.org Mon Jan  5 10:00:00 2026\nSubject: private\n\nbody\n\n'
    box = spool.path / 'user'
    other = spool.base / 'other'
    other.write_bytes(data)
    spool.own(other)
    if kind == 'symlink':
        box.symlink_to(other)
    elif kind == 'dangling':
        box.symlink_to(spool.base / 'none')
    elif kind == 'hard link':
        os.link(other, box)
    elif kind == 'fifo':
        os.mkfifo(box, 0o600)
        spool.own(box)
    elif kind == 'foreign':
        if not SWITCHES['ENABLE_SYSTEM']:
            pytest.skip('whose the mailbox must be is told by the system accounts alone')
        spool.mbox('user', data)
        os.chown(box, 54321, 54321)
    elif kind == 'directory':
        box.mkdir()
        spool.own(box, 0o700)
    elif kind == 'device':
        os.mknod(box, 0o600 | 0o020000, os.makedev(1, 3))
        spool.own(box)
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(box))
        spool.own(box)
    for path in (box,):
        os.lchown(path, OWNER, GROUP) if kind in ('symlink', 'dangling') else None
    before = spool.picture() if kind != 'fifo' and kind != 'device' and kind != 'socket' else None
    if kind == 'foreign':
        server = serve('-s', users=False, prefix=spool.with_system())
    else:
        server = serve()
    pop = server.pop()
    pop.ok('USER user')
    assert pop.cmd('PASS secret').startswith('-ERR [SYS/'), kind
    pop.closed()
    server.wait_log('mailbox user refused|note user=user')
    assert before is None or spool.picture() == before
    assert other.read_bytes() == data
