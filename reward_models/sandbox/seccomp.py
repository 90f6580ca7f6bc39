"""Which system calls a sandboxed process may make: a list of those that a computation needs, and nothing else.

The filter is classic BPF, run by the kernel before each system call, whatever code makes it. It can look at numbers but
not behind pointers, so it decides on calls and flags; paths are Landlock's part.
"""

from __future__ import annotations

import errno
import struct
import sys

# name: (x86_64, aarch64); None where the architecture never had the call. Left out on purpose, beside much else: what
# makes a process (fork, vfork, clone3, execve), talks (socket, pipe, memfd_create, shmget), signals (kill, tgkill),
# looks into others (ptrace, process_vm_readv, pidfd_open), changes what it is (prctl, seccomp, setuid, unshare), and
# what Landlock does not rule (chmod, chown, utime, setxattr, truncate by path, mount).
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # open files
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "lseek": (8, 62),
    "close": (3, 57),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "ftruncate": (77, 46),
    "fstat": (5, 80),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # paths
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    # memory
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # threads and its own signals
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # time, chance, and what it is itself
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
}
# These depend on an argument; `_conditions` says how.
_CONDITIONAL: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None),
    "openat": (257, 56),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "clone": (56, 220),
    "prlimit64": (302, 261),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_…

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_IF_EQUAL, _IF_AT_LEAST = 0x15, 0x35
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000

_X32 = 0x40000000  # x86_64's second table of calls: the same calls under other numbers
_FIRST_OF_2019 = 424  # newer calls: the C library has an older way where it is told that the kernel lacks them
_O_TRUNC, _O_ACCMODE = 0o1000, 0o3
_F_SETLKW, _F_DUPFD_CLOEXEC = 7, 1030
_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020000  # the namespaces' bits together

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def machines() -> tuple[str, ...]:
    """The machines, as platform.machine() names them, that the filter is written for."""
    return tuple(_ARCHITECTURES)


def bpf(machine: str) -> bytes:
    """The filter as an array of struct sock_filter.

    A foreign architecture kills the process. A call that is not allowed fails with EPERM, a newer one with ENOSYS, on
    which the C library falls back (clone3 → clone).

    Raises:
        KeyError: the machine is none of `machines()`.
    """
    column, architecture = _ARCHITECTURES[machine]
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),  # struct seccomp_data: nr at 0, arch at 4, six arguments of 8 bytes from 16
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_IF_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for numbers in _ALLOWED.values():
        if (number := numbers[column]) is not None:
            program += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for name, numbers in _CONDITIONAL.items():
        if (number := numbers[column]) is not None:
            block = _conditions(name)
            program += [(_IF_EQUAL, 0, len(block), number), *block]
    program += [
        (_IF_AT_LEAST, 0, 1, _FIRST_OF_2019),
        _fails(errno.ENOSYS),
        _fails(errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _conditions(name: str) -> list[Instruction]:
    """Decide a call on its arguments. All of these are 32 bits wide in the kernel: the upper halves do not matter."""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), _fails(errno.EPERM)
    if name in ("open", "openat"):  # before Landlock's third version, truncating needs no right to write
        return [
            _argument(1 if name == "open" else 2),
            (_AND, 0, 0, _O_TRUNC | _O_ACCMODE),
            (_IF_EQUAL, 2, 0, _O_TRUNC),
            (_IF_EQUAL, 1, 0, _O_TRUNC | _O_ACCMODE),
            allow,
            refuse,
        ]
    if name == "fcntl":  # F_SETOWN and F_SETSIG would send any signal to any process
        return [
            _argument(1),
            (_IF_AT_LEAST, 0, 2, _F_SETLKW + 1),
            (_IF_EQUAL, 1, 0, _F_DUPFD_CLOEXEC),
            refuse,
            allow,
        ]
    if name == "ioctl":  # nothing here is a terminal or a device, and this is how they say so
        return [_fails(errno.ENOTTY)]
    if name == "clone":  # threads, and they stay where they are
        return [
            _argument(0),
            (_AND, 0, 0, _CLONE_THREAD | _CLONE_NEW),
            (_IF_EQUAL, 0, 1, _CLONE_THREAD),
            allow,
            refuse,
        ]
    return [_argument(0), (_IF_EQUAL, 0, 1, 0), allow, refuse]  # prlimit64 on itself; raising needs a capability


def _argument(index: int) -> Instruction:
    low = 16 + 8 * index + (0 if sys.byteorder == "little" else 4)
    return (_LOAD, 0, 0, low)


def _fails(error: int) -> Instruction:
    return (_RETURN, 0, 0, _ERROR | error)
