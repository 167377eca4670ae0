"""A training script as it is given on a command line, and running it as Python would."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def add_script(parser: argparse.ArgumentParser) -> None:
    """Declare the script and its arguments."""
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module's name, as for python -m")
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="SCRIPT [ARGS...]", help="what to run")


def split_command_line(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the script and its arguments.

    Raises:
        ValueError: no script was given.
        FileNotFoundError: there is no such script.
    """
    words = arguments.command_line[arguments.command_line[:1] == ["--"] :]
    if not words:
        raise ValueError("give a SCRIPT to run.")
    script, *rest = words
    if arguments.module:
        with _first_on_path(os.getcwd()):
            found = _has_module(script)
    else:
        found = Path(script).is_file()
    if not found:
        raise FileNotFoundError(f"there is no {'module' if arguments.module else 'script'} {script!r}.")
    return script, rest


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package that it would be in
        return False


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def run_script(script: str, rest: Sequence[str], module: bool) -> int:
    """Run a script, or a module by its name, as Python would: it is ``__main__`` until the process ends."""
    sys.argv = [script, *rest]
    add_folder = not getattr(sys.flags, "safe_path", False)
    if module:
        if add_folder:
            sys.path[0] = os.getcwd()
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return 0
    path = os.path.join(os.getcwd(), script)
    if add_folder:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    main = ModuleType("__main__")
    main.__file__ = path
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    vars(main)["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(main))
    return 0


_SECRET = re.compile(r"(hub|hf|auth|access|api)_?token$|^_*token$|(?<!mon)key$|password|secret")


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return arguments with the values of tokens, keys and passwords left out.

    Example:
        >>> without_secrets(["--hub_token", "hf_x", "--lr=1", "--api-key=y"])
        ['--hub_token', '...', '--lr=1', '--api-key=...']
    """
    shown, hide = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = word.startswith("-") and _SECRET.search(flag.lower().replace("-", "_")) is not None
        shown.append(f"{flag}=..." if secret and equals else "..." if hide and not word.startswith("-") else word)
        hide = secret and not equals
    return shown
