"""One session of everything under valgrind: no octet is used that was not set, none outside of its place."""
import re

import pytest

from conftest import ALMOND, Spool, inetd_style, switches, tool, wire

SWITCHES = switches(ALMOND)
MAILS = [b'Subject: one\nStatus: RO\n\nbody\n.\n', b'Subject: two\n\n' + b'z' * 100000 + b'\n.no end', b'Subject: one\n\nbody\n.\n',
         b'\n', b'Subject: four\n\n' + b'line\n' * 3000]


@pytest.mark.skipif('asan' in ALMOND, reason='a sanitizer has looked already')
@pytest.mark.parametrize('box', ['mbox', 'maildir'])
def test_valgrind(spool, box):
    if not SWITCHES['ENABLE_' + box.upper()] or not SWITCHES['ENABLE_USERS']:
        pytest.skip('not in this build')
    spool.users(user='secret')
    if box == 'mbox':
        spool.mails('user', MAILS)
    else:
        spool.maildir('user', {f'cur/176760000{i}.M1P1.h:2,S': mail for i, mail in enumerate(MAILS)})
    pop, program = inetd_style(spool, prefix=[tool('valgrind'), '-q', '--trace-children=yes', '--vgdb=no'])
    pop.ok('CAPA')
    pop.text()
    pop.ok('USER user')
    pop.err('PASS wrong')
    pop.err('APOP user ' + '0' * 32)
    pop.login()
    assert len(pop.sizes()) == len(MAILS)
    assert len(set(pop.uidl())) == len(MAILS)
    for n in range(1, len(MAILS) + 1):
        assert pop.multi(f'RETR {n}').startswith(wire(MAILS[n - 1])[:20])
        pop.multi(f'TOP {n} 3')
    pop.err('RETR 99')
    pop.err('nonsense')
    pop.send(b'x' * 5000 + b'\r\n')
    assert pop.line().startswith('-ERR')
    pop.ok('DELE 1')
    pop.ok('RSET')
    pop.ok('DELE 2')
    pop.ok('DELE 5')
    assert pop.quit().startswith('+OK')
    assert program.wait() == 0
    assert not re.search(r'^==\d+==', program.log(), re.M), program.log()
    program.check_log()
