"""Ctrl-C while the libraries are imported, which takes seconds, ends a script without a traceback.

The scripts import this first; `one_line_errors` puts Python's own handler back.
"""

import os
import signal
import sys


def leave(number, frame):
    os.write(2, b"interrupted\n")
    os._exit(130)


if "pytest" not in sys.modules:
    signal.signal(signal.SIGINT, leave)
