"""The protocol of journal, locks, appends and replay as a model (journal.pml), every state of it looked at by spin:
whatever is killed or cut, the mailbox is old or new with what was appended, once each.  A model that can reject nothing
proves nothing: each part of the protocol, left out, must be found missing."""
import os
import re
import shutil
import subprocess

import pytest

from conftest import ROOT, tool
from crash import report, scale

MODEL = ROOT / 'test/crash/journal.pml'
BUILD = ROOT / 'build/crash/spin'
DEPTH, MEGABYTES, SECONDS = 100_000, scale(2000, 12000), scale(120, 3000)
NOTE = {'NOTE': 1}
MODELS = scale([
    {'SIZE': 3, 'APPENDS': 1},
    {**NOTE, 'SIZE': 3, 'APPENDS': 2},
], [
    {'SIZE': 4, 'APPENDS': 2},
    {'SIZE': 4, 'APPENDS': 1, 'TORN_BLOCKS': 1},
    {'SIZE': 3, 'APPENDS': 2, 'COMMITS': 2},
    {'SIZE': 3, 'APPENDS': 2, 'CRASHES': 3},
    {'SIZE': 5, 'APPENDS': 1},
    {**NOTE, 'SIZE': 3, 'APPENDS': 2, 'COMMITS': 2},
    {**NOTE, 'SIZE': 2, 'APPENDS': 2, 'COMMITS': 2, 'CRASHES': 3},
])
# what is left out, and the smallest model that misses it
MUTANTS = {
    'no_sync_of_the_journal': {},
    'no_mark': {},
    'no_sync_of_the_mark': {},
    'no_sync_of_the_move': {},
    'no_sync_of_the_truncation': {},
    'no_sync_of_the_emptied': {},
    'old_journal_left': {'COMMITS': 2},
    'plain_truncation_inside_a_block': {},
    'mark_at_N': {'SIZE': 4},
    'zeros_are_no_mark': {},
    'zeros_of_a_torn_append': {'APPENDS': 2},
    'part_of_a_mark_will_do': {'SIZE': 4, 'APPENDS': 3, 'CRASHES': 1},
    'a_is_the_first_deletion': {'APPENDS': 2},
    'undo_whatever_the_size': {},
    'undo_in_one': {'SIZE': 4},
    'undo_with_a_journal_not_synced': {'APPENDS': 2, 'CRASHES': 3},
    'judged_by_size': {},
    'redo': {},
    'no_sync_of_the_note': NOTE,
    'first_octets_before_the_rest_is_synced': NOTE,
    'no_sync_of_what_was_taken_back': NOTE,
    'a_note_of_the_first_octets_only': {**NOTE, 'APPENDS': 2},
}


def search(name, figures, optimise='-O0'):
    """spin's verdict on the model with these constants: what pan printed."""
    home = BUILD / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    defines = [f'-D{key}={value}' for key, value in figures.items()]

    def run(*command, seconds=SECONDS):
        done = subprocess.run([str(word) for word in command], cwd=home, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors='replace', timeout=seconds, check=False)
        assert done.returncode == 0, f'{name}: {command[0]}\n{done.stdout[-3000:]}'
        return done.stdout

    run(tool('spin'), '-a', *defines, MODEL)
    run(os.environ.get('CC', 'cc'), optimise, '-w', '-DSAFETY', '-DCOLLAPSE', f'-DMEMLIM={MEGABYTES}', '-o', 'pan',
        'pan.c')
    # -E: an almond that has nothing left to do is no fault
    return run('./pan', '-E', '-n', f'-m{DEPTH}')


def figure(pattern, text):
    match = re.search(pattern, text)
    assert match, text[-3000:]
    return int(float(match[1]))


def label(figures):
    return '-'.join(f'{key}{value}'.lower() for key, value in figures.items())


@pytest.mark.parametrize('figures', MODELS, ids=label)
def test_no_mail_is_lost_or_doubled(figures):
    text = search(label(figures), figures, scale('-O1', '-O2'))
    errors, states = figure(r'errors: (\d+)', text), figure(r'([\d.e+]+) states, stored', text)
    depth = figure(r'depth reached (\d+)', text)
    report(f'SPIN: {label(figures)}', states=states, depth=depth, errors=errors)
    assert errors == 0, text[-3000:]
    assert 'Full statespace search' in text and 'BITSTATE' not in text
    for sign in ('Search not completed', 'max search depth too small', 'out of memory', 'hash-compact', 'aborted'):
        assert sign not in text, text[-3000:]
    assert states > 50_000 and depth < DEPTH


def test_what_is_left_out_is_missed():
    """Each part is needed: without it spin finds a mail lost or doubled, or our own work called another program's."""
    survived = []
    for name, figures in MUTANTS.items():
        text = search(name, {f'MUTANT_{name}': 1, **figures})
        if not ('assertion violated' in text and figure(r'errors: (\d+)', text)) or 'array index' in text:
            survived.append(name)
    report('SPIN: parts of the protocol left out', mutants=len(MUTANTS), rejected=len(MUTANTS) - len(survived))
    assert not survived
    assert len(MUTANTS) >= 15
    with MODEL.open() as f:
        assert set(re.findall(r'MUTANT_(\w+)', f.read())) - {'x'} == set(MUTANTS)
