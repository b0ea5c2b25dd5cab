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


def number(kind, allows, words):
    """-> argparse type: an int or a float that `allows` accepts; `words` say which these are"""

    def parse(text):
        value = kind(text)
        if not allows(value):
            raise argparse.ArgumentTypeError(f"must be {words}, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


count = number(int, lambda x: x >= 0, "0 or more")
positive_int = number(int, lambda x: x > 0, "above 0")
positive_float = number(float, lambda x: 0 < x < math.inf, "above 0")
not_negative = number(float, lambda x: 0 <= x < math.inf, "0 or more")
share = number(float, lambda x: 0 <= x < 1, "0 or more and below 1")
