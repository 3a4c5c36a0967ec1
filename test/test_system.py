"""The system's accounts: the server sees copies of passwd and shadow in a mount name space of its own; the machine's are not
touched.  All of it is root's."""
import os
import pathlib
import re
import subprocess
import warnings

import pytest

from conftest import ALMOND, IS_ROOT, OWNER, ROOT, SEPARATOR, Server, switches, wire
from test_trace import calls, child, place, status, strace

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from crypt import crypt

SWITCHES = switches(ALMOND)
pytestmark = pytest.mark.skipif(not IS_ROOT or not SWITCHES['ENABLE_SYSTEM'] or not SWITCHES['ENABLE_ALONE'],
                                reason='only root can read shadow; or a build without ENABLE_SYSTEM or ENABLE_ALONE')
SECRET = 'right one'
MAIL = b'Subject: one\n\nbody\n'
SETTINGS = {'$1$': '$1$saltsalt$', '$5$': '$5$saltstring$', '$5$ with rounds': '$5$rounds=1400$anotherlongsalt$',
            '$6$': '$6$saltstring$', '$6$ with rounds': '$6$rounds=10000$saltstringsaltst$', '$y$': '$y$j9T$F5Jx5fExrKuPp53xLKQ..1$',
            '$2b$': '$2b$05$abcdefghijklmnopqrstuu', 'DES': 'ab'}
KNOWN = [s for s in SETTINGS if (s[:3] in ('$5$', '$6$') and SWITCHES['ENABLE_SHA_CRYPT'] or s == '$1$' and
                                SWITCHES['ENABLE_MD5_CRYPT'] or SWITCHES['ENABLE_CRYPT'])]


def verifier(setting='$5$ with rounds', secret=SECRET):
    return crypt(secret, SETTINGS[setting])


@pytest.fixture
def accounts(spool):
    """accounts(name=shadow's second field or a whole line, ...): one user each, with mail."""
    def make(uid=OWNER, gid=OWNER, **fields):
        (spool.base / 'passwd').write_text('root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' + ''.join(
            f'{name}:x:{uid}:{gid}::/nonexistent:/bin/false\n' for name in fields))
        (spool.base / 'shadow').write_text('root:*:19000:0:99999:7:::\n' + ''.join(
            f'{name}:{f if f.count(":") > 1 else f + ":19000:0:99999:7:::"}\n' for name, f in fields.items()))
        (spool.base / 'shadow').chmod(0o600)
        for name in fields:
            if SWITCHES['ENABLE_MBOX']:
                spool.mails(name, [MAIL])
            else:
                spool.maildir(name, {'new/1.a': MAIL})
        return spool
    return make


def system(spool, *args, **how):
    return Server(spool, '-s', *args, users=False, prefix=[*spool.with_system(), *how.pop('then', [])], **how)


def login(server, name, secret):
    with server.pop() as pop:
        pop.ok(f'USER {name}')
        reply = pop.cmd(f'PASS {secret}')
        if reply.startswith('+OK'):
            assert pop.multi('RETR 1') == wire(MAIL)
            pop.quit()
        return reply


# ---- formats ----

@pytest.mark.parametrize('setting', KNOWN)
def test_formats(accounts, setting):
    with system(accounts(user=verifier(setting))) as server:
        assert login(server, 'user', SECRET).startswith('+OK')
        for wrong in ('wrong', SECRET + ' ', SECRET[:-1], '', verifier(setting)):
            assert login(server, 'user', wrong).startswith('-ERR [AUTH]')


@pytest.mark.parametrize('setting', [s for s in SETTINGS if s not in KNOWN])
def test_a_format_that_is_not_built_in(accounts, setting):
    """Refused by name, not guessed; the client learns nothing."""
    with system(accounts(user=verifier(setting), other=verifier())) as server:
        reply = login(server, 'user', SECRET)
        assert reply == login(server, 'other', 'wrong') == login(server, 'nobody-at-all', 'x')
        named = re.escape(setting[:setting.rindex('$') + 1]) if '$' in setting else 'unknown'
        server.wait_log(f'user user: .*{named}.*not built in')
        assert verifier(setting)[-10:] not in server.log() and SECRET not in server.log()


@pytest.mark.skipif(SWITCHES['ENABLE_CRYPT'], reason='this is the other build')
@pytest.mark.parametrize('setting', SETTINGS)
def test_crypt(accounts, setting):
    """With ENABLE_CRYPT, crypt(3) knows the rest; "$y$" is Debian's own."""
    if 'asan' in ALMOND:
        pytest.skip('the build of this test is not sanitized')
    built = subprocess.run([os.environ.get('MAKE', 'make'), '-C', ROOT, 'ENABLE_CRYPT=1', 'test-build'], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    assert built.returncode == 0, built.stdout.decode()
    almond = str(ROOT / 'build/crypt/test/almond')
    assert switches(almond)['ENABLE_CRYPT']
    with system(accounts(user=verifier(setting), bad='$y$nonsense', locked='!' + verifier(setting)), almond=almond) as server:
        assert login(server, 'user', SECRET).startswith('+OK')
        for name, wrong in (('user', 'wrong'), ('user', ''), ('bad', SECRET), ('locked', SECRET)):
            assert login(server, name, wrong).startswith('-ERR [AUTH]')


# ---- accounts that have no way in ----

LOCKED = {'star': '*', 'bang': '!', 'bangs': '!!', 'empty': '', 'x': 'x', 'locked': '!' + verifier(), 'starred': '*' + verifier(),
          'expired': verifier() + ':19000:0:99999:7::1:', 'expired long ago': verifier() + ':19000:0:99999:7::0:'}


@pytest.mark.parametrize('how', LOCKED)
def test_locked(accounts, how):
    """The same words as for a wrong password, whatever is tried."""
    with system(accounts(user=LOCKED[how], other=verifier())) as server:
        wrong = login(server, 'other', 'wrong')
        assert wrong.startswith('-ERR [AUTH]')
        for secret in (SECRET, '', LOCKED[how], 'x'):
            if ':' not in secret:
                assert login(server, 'user', secret) == wrong
        if how.startswith('expired'):
            server.wait_log('user user refused: .*expired')
        assert login(server, 'other', SECRET).startswith('+OK')


def test_not_yet_expired(accounts):
    with system(accounts(user=verifier() + ':19000:0:99999:7::99999:')) as server:
        assert login(server, 'user', SECRET).startswith('+OK')


def test_root_fetches_no_mail(accounts):
    """By any name; and the others still do."""
    spool = accounts(root=verifier(), toor=verifier(), user=verifier())
    passwd = spool.base / 'passwd'
    passwd.write_text(passwd.read_text().replace(f'toor:x:{OWNER}', 'toor:x:0').replace(f'root:x:{OWNER}', 'root:x:0'))
    with system(spool) as server:
        for name in ('root', 'toor'):
            assert login(server, name, SECRET) == login(server, 'user', 'wrong')
            server.wait_log(f'user {name} refused: ')
        assert login(server, 'user', SECRET).startswith('+OK')


def test_no_line_in_passwd(accounts):
    spool = accounts(user=verifier())
    (spool.base / 'passwd').write_text('nobody:x:65534:65534::/:/bin/false\n')
    with system(spool) as server:
        assert login(server, 'user', SECRET).startswith('-ERR [AUTH]')
        server.wait_log('user user refused: .*passwd')


def test_same_words(accounts):
    """Unknown and wrong: one text, one kind of line in the log."""
    with system(accounts(user=verifier())) as server:
        replies = {login(server, name, 'wrong') for name in ('user', 'nosuch', 'nobody', 'root', 'user2', 'use')}
        assert len(replies) == 1 and replies.pop().startswith('-ERR [AUTH]')
        for name in ('user', 'nosuch'):
            server.wait_log(f'auth fail user={name} rip=127.0.0.1 method=PASS$')
        assert 'wrong' not in server.log()


def test_no_shadow(accounts):
    """Then nobody gets in, and the log says why."""
    spool = accounts(user=verifier())
    etc = spool.base / 'etc'
    etc.mkdir()
    (etc / 'passwd').write_text((spool.base / 'passwd').read_text())
    prefix = ['unshare', '-m', 'sh', '-c', 'mount --bind "$0" /etc && exec "$@"', etc]
    argv = [*prefix, ALMOND, '-i', '-E', '-s', '-d', spool.path]
    done = subprocess.run([str(a) for a in argv], input=f'USER user\r\nPASS {SECRET}\r\nQUIT\r\n'.encode(), timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    replies = done.stdout.decode().split('\r\n')
    assert replies[2].startswith('-ERR'), replies
    assert '+OK 1 ' not in done.stdout.decode()
    assert '/etc/shadow' in done.stderr.decode()


@pytest.mark.skipif(not SWITCHES['ENABLE_USERS'], reason='a build without a users file')
def test_the_users_file_is_asked_first(accounts):
    spool = accounts(user=verifier(), other=verifier())
    spool.lines('user:{PLAIN}of the file')
    with system(spool, '-u', spool.users_file) as server:
        assert login(server, 'user', 'of the file').startswith('+OK')
        assert login(server, 'user', SECRET).startswith('-ERR [AUTH]')
        assert login(server, 'other', SECRET).startswith('+OK')


# ---- with whose rights ----

@pytest.mark.skipif(not SWITCHES['ENABLE_PRIVSEP'], reason='a build without ENABLE_PRIVSEP')
def test_the_users_own_rights(accounts):
    """No group but the user's, none of the spool's where that is not group-writable; and no mailbox of another's."""
    spool = accounts(user=verifier(), other=verifier())
    other = spool.path / 'other'
    os.chown(other, OWNER + 1, OWNER + 1)
    other.chmod(0o600 if other.is_file() else 0o700)
    with system(spool) as server, server.pop() as pop:
        monitor = child(server.process.pid)
        assert status(monitor, 'Uid') == ['0'] * 4
        pop.login('user', SECRET)
        assert status(monitor, 'Uid') == status(monitor, 'Gid') == [str(OWNER)] * 4
        assert status(monitor, 'Groups') == []
        pop.quit()
        assert login(server, 'other', SECRET).startswith('-ERR [SYS/')
        server.wait_log('mailbox other refused: ')


def test_an_account_with_roots_group(accounts):
    """Its rights cannot be taken: a reply and a line in the log, no mail."""
    with system(accounts(user=verifier(), gid=0)) as server:
        reply = login(server, 'user', SECRET)
        assert reply.startswith('-ERR [SYS/'), reply
        server.wait_log('user user')


@pytest.mark.skipif(not SWITCHES['ENABLE_MBOX'], reason='a build without mbox')
@pytest.mark.skipif(not SWITCHES['ENABLE_PRIVSEP'], reason='a build without ENABLE_PRIVSEP')
def test_debians_spool(accounts):
    """root:mail 02775, the mailbox user:mail 0660: the dot-lock is made with the group's right, and it is gone afterwards."""
    mail = 8
    spool = accounts(user=verifier())
    os.chown(spool.path, 0, mail)
    spool.path.chmod(0o2775)
    box = spool.mails('user', [MAIL, MAIL + b'second\n'])
    os.chown(box, OWNER, mail)
    box.chmod(0o660)
    with system(spool, then=strace(spool)) as server, server.pop() as pop:
        monitor = child(server.process.pid)
        pop.login('user', SECRET)
        assert status(monitor, 'Uid') == status(monitor, 'Gid') == [str(OWNER)] * 4
        assert status(monitor, 'Groups') == [str(mail)]
        pop.ok('DELE 1')
        assert pop.quit().startswith('+OK')
    made = [(arguments, result) for mine in calls(spool).values() for name, arguments, result in mine
            if name == 'openat' and '"user.lock"' in arguments and 'O_EXCL' in arguments]
    assert len(made) == 1 and made[0][1].isdigit() and place(made[0][0]) == str(spool.path)
    assert spool.names() == ['user']
    assert box.read_bytes() == SEPARATOR + MAIL + b'second\n\n'
    st = box.stat()
    assert (st.st_uid, st.st_gid, st.st_mode & 0o7777) == (OWNER, mail, 0o660)


def test_the_machines_files_are_as_they_were(accounts):
    """What these tests change is seen by their servers alone."""
    before = [pathlib.Path(p).read_bytes() for p in ('/etc/passwd', '/etc/shadow')]
    with system(accounts(user=verifier())) as server:
        assert login(server, 'user', SECRET).startswith('+OK')
    assert [pathlib.Path(p).read_bytes() for p in ('/etc/passwd', '/etc/shadow')] == before
