"""The builds: every switch flipped, built and tested; contradictions told; compilers and C libraries; what the static file is.

Builds lie below build/flip; the flipped ones run the dialogues (line by line) and the tests of starting."""
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ALMOND, IS_ROOT, ROOT, SECONDS, Server, Spool, switches, tool

MAKE = os.environ.get('MAKE', 'make').split()[0]
BUILDING = 900


def make(*args):
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k not in ('CFLAGS', 'CPPFLAGS', 'LDFLAGS')}
    return subprocess.run([MAKE, '-s', *args], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL, timeout=BUILDING)


def flips():
    lines = subprocess.run(['tools/flip'], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=SECONDS).stdout.decode()
    return [line.split(' ', 2) for line in lines.splitlines()]


FLIPS = flips()
# Settings that are no switches, and that change which code is there.
SETTINGS = {
    'shape-0': '-DFROM_SHAPE=0', 'shape-1': '-DFROM_SHAPE=1', 'dot': '-DLOCK_ORDER=LOCK_DOT', 'fcntl':
    '-DLOCK_ORDER=LOCK_FCNTL', 'flock': '-DLOCK_ORDER=LOCK_FLOCK', 'small': '-DWIRE_OUT=4096 -DWIRE_IN=510 -DSCAN_BUFFER=2048',
    'minimal': '-DENABLE_MAILDIR=0 -DENABLE_SYSTEM=0 -DENABLE_APOP=0 -DENABLE_LAST=0 -DENABLE_ALONE=0 -DENABLE_PRIVSEP=0 '
    '-DENABLE_PASSWD=0 -DENABLE_DELIVER=0 -DENABLE_CHECK=0 -DENABLE_SHA_CRYPT=0 -DENABLE_MD5_CRYPT=0',
}


@pytest.fixture(scope='module')
def built():
    """name: (make's result, binary), for all of them, side by side."""
    def build(name, flags):
        out = f'build/flip/{name}'
        crypt = ['ENABLE_CRYPT=1'] if '-DENABLE_CRYPT=1' in flags else []
        return name, (make(f'O={out}', f'CPPFLAGS={flags}', *crypt, 'test-build'), str(ROOT / out / 'test/almond'))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(build, name, flags) for name, _, flags in FLIPS]
        jobs += [pool.submit(build, name, flags) for name, flags in SETTINGS.items()]
        return dict(job.result() for job in jobs)


def binary(built, name):
    result, path = built[name]
    assert result.returncode == 0, result.stdout.decode()
    return path


def run_tests(almond, *args):
    env = dict(os.environ, ALMOND=almond, DIALOGUE_MODES='step')
    r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-x', '--tb=short', '-p', 'no:cacheprovider', *args],
                       cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                       timeout=BUILDING)
    text = r.stdout.decode(errors='replace')
    assert r.returncode == 0, text
    assert re.search(r'\b[1-9]\d* passed', text), text


@pytest.mark.parametrize('name,value', [f[:2] for f in FLIPS])
def test_switch_flipped(built, name, value):
    almond = binary(built, name)
    assert switches(almond)[name] == (value == '1')
    run_tests(almond, 'test/test_dialogues.py', 'test/test_start.py')


@pytest.mark.parametrize('name', SETTINGS)
def test_settings(built, name):
    almond = binary(built, name)
    run_tests(almond, 'test/test_dialogues.py', *(['-k', 'not from-shape'] if name.startswith('shape') else []))


def test_shape_of_separators(built):
    """FROM_SHAPE 0 splits at a paragraph "From here on", 1 does not; 1 takes a separator without a weekday, 2 does not."""
    box = (b'From a@example.org Mon Jan  5 10:00:00 2026\nSubject: one\n\nx\n\nFrom here on\n\n'
           b'From b@example.org 5 Jan 2026 10:00:00\nSubject: two\n\ny\n\n')
    for almond, count in ((binary(built, 'shape-0'), 3), (binary(built, 'shape-1'), 2), (ALMOND, 1)):
        spool = Spool()
        spool.users(user='secret')
        spool.mbox('user', box)
        with Server(spool, almond=almond) as server:
            pop = server.pop('user')
            assert len(pop.sizes()) == count, almond
            pop.quit()
        spool.remove()


@pytest.mark.parametrize('flags,sentence', [
    ('-DENABLE_MBOX=0 -DENABLE_MAILDIR=0', 'set ENABLE_MBOX or ENABLE_MAILDIR to 1'),
    ('-DENABLE_USERS=0 -DENABLE_SYSTEM=0', 'set ENABLE_USERS or ENABLE_SYSTEM to 1'),
    ('-DENABLE_USERS=0 -DENABLE_PASSWD=0', 'set ENABLE_USERS to 1 or ENABLE_APOP to 0'),
    ('-DENABLE_USERS=0 -DENABLE_APOP=0', 'set ENABLE_USERS to 1 or ENABLE_PASSWD to 0'),
    ('-DENABLE_MBOX=0 -DENABLE_CONTENT_LENGTH=1', 'set ENABLE_MBOX to 1 or ENABLE_CONTENT_LENGTH to 0'),
    ('-DFROM_SHAPE=3', 'FROM_SHAPE is 0, 1 or 2'),
    ('-DLOCK_STALE=20000', 'LOCK_STALE must be below LOCK_WAIT'),
    ('-DWIRE_OUT=100', 'A buffer is too small'),
])
def test_contradictions_are_told(flags, sentence):
    r = subprocess.run(['cc', '-E', *flags.split(), '-x', 'c', 'config.h', '-o', '/dev/null'], cwd=ROOT, timeout=SECONDS,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert r.returncode != 0 and sentence in r.stdout.decode(), r


def test_a_misspelt_switch_is_an_error():
    r = make('O=build/flip/misspelt', 'CPPFLAGS=-Dif_APOP=ENABLE_APOPP', 'help')
    assert r.returncode == 0
    r = subprocess.run(['cc', '-Wundef', '-Werror', '-E', '-x', 'c', '-', '-o', '/dev/null'], cwd=ROOT, timeout=SECONDS,
                       input=b'#include "config.h"\n#if ENABLE_APOPP\n#endif\n', stderr=subprocess.PIPE)
    assert r.returncode != 0 and b'ENABLE_APOPP' in r.stderr


@pytest.mark.parametrize('target', ['all', 'test-build', 'clang-build', 'musl-build', 'asan-build', 'static'])
def test_builds_without_a_warning(target):
    r = make(target)
    assert r.returncode == 0 and b'warning' not in r.stdout, r.stdout.decode()


def test_the_users_flags_are_honoured():
    r = make('-n', '-B', 'O=build/flip/mine', 'CC=my-cc', 'CFLAGS=-my-cflag', 'CPPFLAGS=-my-cppflag', 'LDFLAGS=-my-ldflag',
             'WERROR=', 'all')
    text = r.stdout.decode()
    compile_line = next(x for x in text.splitlines() if x.startswith('my-cc') and ' -c ' in x)
    link_line = next(x for x in text.splitlines() if x.startswith('my-cc') and ' -c ' not in x)
    assert '-my-cflag' in compile_line and '-my-cppflag' in compile_line and '-Werror' not in compile_line
    assert '-my-ldflag' in link_line
    assert 'x-y-gcc ' in make('-n', '-B', 'O=build/flip/cross', 'CROSS=x-y-', 'all').stdout.decode()


def test_install(tmp_path):
    r = make('install', f'DESTDIR={tmp_path}', 'PREFIX=/usr')
    assert r.returncode == 0, r.stdout.decode()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file()) == [
        'usr/sbin/almond', 'usr/share/man/man5/almond.users.5', 'usr/share/man/man8/almond.8']
    assert (tmp_path / 'usr/sbin/almond').stat().st_mode & 0o7777 == 0o755
    r = make('uninstall', f'DESTDIR={tmp_path}', 'PREFIX=/usr')
    assert r.returncode == 0 and not [p for p in tmp_path.rglob('*') if p.is_file()]


def readelf(*args):
    return subprocess.run([tool('readelf'), '-W', *args], stdout=subprocess.PIPE, check=True, timeout=SECONDS,
                          env=dict(os.environ, LC_ALL='C')).stdout.decode()


@pytest.mark.parametrize('target,file,machine', [
    ('static', 'build/almond-static', 'X86-64'), ('static-armhf', 'build/almond-armhf', 'ARM')])
def test_static_file(target, file, machine):
    """One file: no loader, no libraries, no symbols, no text relocations, no executable stack."""
    if target == 'static' and os.uname().machine != 'x86_64':
        machine = ''
    r = make(target)
    assert r.returncode == 0, r.stdout.decode()
    path = ROOT / file
    segments = readelf('-l', path)
    assert 'INTERP' not in segments and 'DYNAMIC' not in segments
    stack = re.search(r'GNU_STACK.* (\S+) +0x\w+$', segments, re.M)
    assert stack and 'E' not in stack[1]
    assert 'NEEDED' not in readelf('-d', path)
    assert '.symtab' not in readelf('-S', path) and '.debug' not in readelf('-S', path)
    assert machine in readelf('-h', path)


def test_static_file_runs():
    r = subprocess.run([ROOT / 'build/almond-static', '--version'], env={}, stdout=subprocess.PIPE, timeout=SECONDS)
    assert r.returncode == 0 and r.stdout.startswith(b'almond ')


def test_static_file_with_crypt():
    r = make('static', 'ENABLE_CRYPT=1')
    assert r.returncode == 0, r.stdout.decode()
    path = ROOT / 'build/crypt/almond-static'
    assert 'INTERP' not in readelf('-l', path)
    assert switches(str(path))['ENABLE_CRYPT'] and not switches(str(ROOT / 'build/almond-static'))['ENABLE_CRYPT']


@pytest.mark.skipif(not IS_ROOT, reason='only root can take the tools away')
def test_make_needs_a_compiler_and_make_only(tmp_path):
    """With a PATH of nothing but the compiler, make and what POSIX has."""
    bin_ = tmp_path / 'bin'
    bin_.mkdir()
    for name in ('sh', 'gcc', 'as', 'ld', 'make', 'mkdir', 'cmp', 'mv', 'rm', 'cp', 'echo'):
        (bin_ / name).symlink_to(shutil.which(name))
    source = tmp_path / 'almond'
    source.mkdir()
    for path in [*ROOT.glob('*.[ch]'), ROOT / 'Makefile']:
        shutil.copy(path, source)
    r = subprocess.run(['make', '-s'], cwd=source, env={'PATH': str(bin_)}, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=BUILDING)
    assert r.returncode == 0, r.stdout.decode()
    assert (source / 'build/almond').exists()
