"""getmail6, less a race of its own: it forks for each delivery and asks for SIGCHLD only then, so that it waits for a minute
and gives up where the child was faster.  Here it waits for the child with waitpid; all else is Debian's getmail."""
import os
import runpy
import shutil

from getmailcore.baseclasses import ForkingBase

ForkingBase._prepare_child = lambda self: None
ForkingBase._wait_for_child = lambda self, child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
runpy.run_path(shutil.which('getmail'), run_name='__main__')
