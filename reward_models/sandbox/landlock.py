"""Which files a sandboxed process may touch: rules that the kernel keeps, for any user, root too (Landlock).

The rules are made here, in the trainer, and handed over as a file descriptor; the process binds itself with them. A
path that no rule names, or lies beneath, can be neither read nor written. Whether it exists can still be asked.
"""

from __future__ import annotations

import ctypes
import functools
import os
import stat
import struct
from collections.abc import Iterable

_CREATE, _ADD, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture

_WRITE_FILE, READ_FILE, READ_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 5
_MAKE_FILE, _TRUNCATE, _DEVICE_IOCTL = 1 << 8, 1 << 14, 1 << 15
_OF_FILES = 1 | _WRITE_FILE | READ_FILE | _TRUNCATE | _DEVICE_IOCTL  # the kernel refuses others in a file's rule
# Every right there is, by the version that brought it; what is handled and not granted is refused.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # version → number of rights, bits from 0
_TCP_RIGHTS = 0b11  # version 4: bind, connect
_SCOPES = 0b11  # version 6: abstract sockets and signals reach no process outside


class LandlockError(OSError):
    """The kernel has no Landlock, or it is switched off."""


def version() -> int:
    """Landlock's version in the running kernel, from 1.

    Raises:
        LandlockError: it has none; the message says what to do.
    """
    try:
        return _system_call(_CREATE, None, 0, 1)  # the flag that asks for the version
    except OSError as error:
        raise LandlockError(
            f"no Landlock ({error.strerror}): it needs Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK, 'landlock' "
            "among the kernel's lsm= list, and a container that lets its system calls through"
        ) from error


def ruleset(granted: Iterable[tuple[str, int]], folder: str, supported: int | None = None) -> int:
    """A file descriptor of rules, for `restrict_self`: the granted paths, and files in the folder.

    Args:
        granted: (path, READ_FILE | READ_DIR) of what may be read; for a folder, everything beneath it. /dev/null may
            be written too.
        folder: regular files in it may be made, read, written and removed; folders, links and sockets may not be made.
        supported: the version to keep to, by default the kernel's.

    Raises:
        LandlockError: no Landlock.
        OSError: a path does not exist.
    """
    supported = version() if supported is None else supported
    handled = (1 << max(bits for since, bits in _FILE_RIGHTS.items() if since <= supported)) - 1
    attributes = struct.pack("=Q", handled)
    if supported >= 4:
        attributes += struct.pack("=Q", _TCP_RIGHTS)
    if supported >= 6:
        attributes += struct.pack("=Q", _SCOPES)
    rules = _system_call(_CREATE, attributes, len(attributes), 0)
    in_folder = READ_FILE | READ_DIR | _WRITE_FILE | _TRUNCATE | _MAKE_FILE | _REMOVE_FILE
    to_null = READ_FILE | _WRITE_FILE | _TRUNCATE
    try:
        for path, rights in (*granted, ("/dev/null", to_null), (folder, in_folder)):
            _grant(rules, path, rights & handled)
    except BaseException:
        os.close(rules)
        raise
    return rules


def _grant(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = rights if stat.S_ISDIR(os.fstat(place).st_mode) else rights & _OF_FILES
        _system_call(_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)  # 1: a rule about what lies beneath
    finally:
        os.close(place)


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    result = _libc().syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
