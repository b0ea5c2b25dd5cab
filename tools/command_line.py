"""How the scripts meet their user: a mistake is one line that names the cause and the cure.

Every `main` here is wrapped by `one_line_errors` and reads its arguments with a `Parser`.
"""

import argparse
import functools
import math
import re
import signal
import sys
import threading
from pathlib import Path

import torch.distributed


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line that names the cause and the cure."""


# Words of a RuntimeError, and what the user can do about it. Any other RuntimeError is a bug of
# ours.
CURES = {
    "out of memory|can't allocate memory|not enough memory": "out of memory, lower --batch-seconds",
    "gloo|NCCL": "another process of this run has ended, its own message says why",
    "DataLoader worker": "a process that reads audio was killed, lower --workers",
}


def cure_of(error):
    """What the user can do about a RuntimeError of torch, or None if it is a bug of ours."""
    for words, cure in CURES.items():
        if re.search(words, str(error)):
            return cure
    return None


def first_line(error):
    """The first line of what an exception of a library says, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line_errors(main):
    """Wrap a script's main: what its user can mend becomes one line on stderr and exit code 2.

    Ctrl-C ends with exit code 130. Bugs keep their traceback.
    """

    @functools.wraps(main)
    def wrapper(argv=None):
        script = Path(sys.modules[main.__module__].__file__).name
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # see quiet_start.py
        try:
            code = main(argv) or 0
        except KeyboardInterrupt:
            print(f"{script}: interrupted", file=sys.stderr)
            return 130
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            message = " ".join(str(error).splitlines()) or "out of memory, lower --batch-seconds"
            if isinstance(error, OSError):
                message += "; mend that and give the same command again"
            if isinstance(error, RuntimeError):
                if cure_of(error) is None:
                    raise
                message = f"{cure_of(error)} ({message[:200]})"
            print(f"{script}: error: {message}", file=sys.stderr)
            return 2
        # Only after success: a process that failed would wait here for the others,
        # and they would wait for its gradients.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return code

    return wrapper


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help begins with the script's docstring; a mistake is one line."""

    def __init__(self, description):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; --help shows all options")


# ---------------------------------------- types of options


def whole_number(text):
    """argparse type: ... -1, 0, 1 ..."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")


def positive_int(text):
    """argparse type: 1, 2, 3 ..."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, found {text}")
    return number


def count(text):
    """argparse type: 0, 1, 2 ..."""
    number = whole_number(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, found {text}")
    return number


def positive_float(text):
    """argparse type: a finite number above 0"""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, found {text}")
    return number


def not_negative(text):
    """argparse type: a finite number, 0 or more"""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must not be negative, found {text}")
    return number


def share(text):
    """argparse type: a number from 0 to below 1"""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and below 1, found {text}")
    return number
