"""The bare interpreter that sandboxed programs run in: its command line, its environment, and what it has to read."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from reward_models.sandbox.landlock import READ_DIR, READ_FILE

# No site-packages, no working directory on the path, no bytecode written, UTF-8 whatever the locale.
COMMAND = (sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8")
START = (*COMMAND, os.path.join(os.path.dirname(os.path.abspath(__file__)), "inside.py"))
_THIRD_PARTY = ("site-packages", "dist-packages")

# Shared libraries are loaded when an extension module is imported: import them all once, and see what is mapped.
_DISCOVER = """
import ctypes, importlib, importlib.machinery, os, sys
for folder in filter(os.path.isdir, sys.path):
    for entry in os.listdir(folder):
        name = entry.partition(".")[0]
        if entry.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)) and not name.startswith(("_test", "_tkinter")):
            try:
                importlib.import_module(name)
            except Exception:
                pass
try:
    ctypes.CDLL("libgcc_s.so.1")  # the C library loads it when a thread ends
except OSError:
    pass
with open("/proc/self/maps") as maps:
    files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
print(*filter(os.path.exists, sys.path), sep="\\n")
print()
print(*files, sep="\\n")
"""


class InterpreterError(RuntimeError):
    """The bare interpreter does not start."""


def environment(folder: str) -> dict[str, str]:
    """All that a program sees of the environment. A fixed hash seed: the same program gives the same output."""
    return {"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"}


@functools.cache
def readable() -> tuple[tuple[str, int], ...]:
    """(path, rights) of the standard library and the shared libraries under it, without third-party packages.

    Raises:
        InterpreterError: with what the interpreter said.
    """
    try:
        found = subprocess.run(
            [*COMMAND, "-c", _DISCOVER], env=environment("/"), cwd="/", capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InterpreterError(f"{sys.executable} does not start: {error}") from error
    if found.returncode != 0:
        raise InterpreterError(f"{sys.executable} does not start without site-packages: {found.stderr[-500:]}")
    library, _, mapped = found.stdout.partition("\n\n")
    granted = {path: READ_FILE for path in (*mapped.splitlines(), "/etc/ld.so.cache") if os.path.isfile(path)}
    for path in library.splitlines():
        if os.path.isfile(path):
            granted[path] = READ_FILE  # a zipped library
            continue
        granted[path] = READ_DIR  # names only, of site-packages in it too
        for entry in os.scandir(path):
            if entry.name not in _THIRD_PARTY and os.path.exists(entry.path):  # not a link to nowhere
                granted[entry.path] = READ_FILE | READ_DIR
    return tuple(granted.items())
