"""What runs in the sandbox: a process that gives up its rights, and a child of it for each run of a program.

A bare interpreter starts this file once and then forks: its start takes longer than most programs. The first process
takes orders on a socket. Each child closes that, gives up the rights that are left, runs one program with two pipes of
its own, and ends. Orders are a length and marshal's bytes; towards the trainer goes nothing but numbers and text.
"""

from __future__ import annotations

import _socket
import builtins
import ctypes
import gc
import marshal
import os
import resource
import sys
import types

_SIGKILL = 9
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_MAX_FILE_BYTES = 1 << 20  # of each file that a program writes
_MAX_OPEN_FILES = 32
# What programs import most, if it keeps no state that two runs could share.
_POPULAR = ("bisect", "collections", "copy", "functools", "heapq", "itertools", "math", "operator", "re", "typing")


def main() -> None:
    """Say "ready", or "failed: …". Then for each pair of pipes that comes: fork, and see the child to its end."""
    for name in _POPULAR:
        __import__(name)
    trainer = _socket.socket(fileno=os.dup(0))
    order = marshal.loads(_receive(0))
    try:
        _give_up_rights(order)
        os.write(0, b"ready\n")
    except OSError as error:
        os.write(0, f"failed: {error}\n".encode())
        os._exit(1)
    gc.freeze()  # what is here now is garbage in no child
    own = os.getpid()
    while True:
        _, passed, *_ = trainer.recvmsg(1, _socket.CMSG_LEN(8))
        if not passed:  # the trainer has closed its end
            os._exit(0)
        pipes = [int.from_bytes(passed[0][2][i : i + 4], sys.byteorder) for i in (0, 4)]
        child = os.fork()
        if child == 0:
            break
        _follow(child, pipes, trainer)
    trainer.close()
    for standard, pipe in enumerate(pipes):
        os.dup2(pipe, standard)
        os.close(pipe)
    _give_up_the_rest(order, own)
    run = marshal.loads(_receive(0))
    (_answer_questions if run["questions"] else _run_script)(run["source"])


def _follow(child: int, pipes: list[int], trainer: _socket.socket) -> None:
    """Tell the child's number, then how it ended. It is not waited for before the trainer has a hold on it."""
    for pipe in pipes:
        os.close(pipe)
    trainer.sendall(child.to_bytes(4, "big"))
    trainer.recv(1)
    trainer.sendall(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]).to_bytes(4, "big", signed=True))


def _give_up_rights(order: dict) -> None:
    """From here on the kernel refuses this process and its children most of what a run has no need of.

    Raises:
        OSError: the kernel did not do one of these; the message says which.
    """
    _limit(resource.RLIMIT_AS, order["memory_bytes"])
    _limit(resource.RLIMIT_FSIZE, _MAX_FILE_BYTES)
    _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _must("dropping capabilities", _libc.capset(header, nothing))  # root could raise its limits again
    _prctl("no core dumps", _PR_SET_DUMPABLE, 0)  # a limit of 0 does not stop a core_pattern that is a pipe
    _prctl("no new privileges", _PR_SET_NO_NEW_PRIVS, 1)
    _die_with(order["parent"])
    _must("Landlock", _libc.syscall(*map(ctypes.c_long, (order["restrict_self"], order["rules"], 0))))
    os.close(order["rules"])


def _give_up_the_rest(order: dict, parent: int) -> None:
    """In the child: no system call is left but those of a computation. Say "ready", or "failed: …"."""

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    instructions = Filter(len(order["filter"]) // 8, order["filter"])
    try:
        _limit(resource.RLIMIT_CPU, order["cpu_seconds"])  # should the trainer be too busy to keep the deadline
        _die_with(parent)
        _prctl("seccomp", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(instructions))
        os.write(1, b"ready\n")
    except OSError as error:
        os.write(1, f"failed: {error}\n".encode())
        os._exit(1)


def _run_script(source: str) -> None:
    """The program has standard input and output to itself; what it raises ends it with status 1."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)


def _answer_questions(source: str) -> None:
    """Run the program as a module, say "loaded", and answer questions about it, a line each.

    The questions come after "loaded": (source, secret) each. With a secret the source is statements, and the answer is
    the secret if they ran to their end. Without, it is an expression, and the answer its value. "-" for what raised.
    """
    questions, answers = os.dup(0), os.dup(1)
    os.dup2(2, 0)  # standard error is /dev/null
    os.dup2(2, 1)
    # The program may replace what hangs on modules and in builtins: keep what is needed here, and for the tests.
    own_exec, own_eval, own_compile, write, wire, receive = exec, eval, compile, os.write, _wire, _receive
    loads, leave = marshal.loads, os._exit
    own_builtins = dict(vars(builtins))
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        own_exec(own_compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException:  # SystemExit too: a module that exits is of no use
        leave(1)
    write(answers, b"loaded\n")
    names = module.__dict__
    names["__builtins__"] = own_builtins
    for question, secret in loads(receive(questions)):
        answer = "-"
        try:
            code = own_compile(question, "tests.py", "exec" if secret else "eval", dont_inherit=True)
            if secret:
                own_exec(code, names)
                answer = secret
            else:
                answer = wire(own_eval(code, names))
        except BaseException:  # whatever the program raises, the other questions count
            pass
        write(answers, answer.encode() + b"\n")
    leave(0)


def _wire(value: object) -> str:
    """Plain data as JSON, each value as [kind, content]; `values.same` reads it. Subclasses become what they extend.

    Raises:
        TypeError: the value is none of these types, or holds one that is not.
    """
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return f'["int", "{int(value):x}"]'  # hexadecimal: linear in its length
    if isinstance(value, float):
        return f'["float", "{float.hex(value)}"]'
    if isinstance(value, complex):
        return f'["complex", "{value.real.hex()}", "{value.imag.hex()}"]'
    if isinstance(value, str):
        return f'["str", "{value.encode("utf-8", "surrogatepass").hex()}"]'
    if isinstance(value, bytes | bytearray):
        return f'["bytes", "{value.hex()}"]'
    if isinstance(value, dict):
        return f'["dict"{"".join(f", [{_wire(key)}, {_wire(item)}]" for key, item in value.items())}]'
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return f'["{kind.__name__}"{"".join(f", {_wire(item)}" for item in value)}]'
    if hasattr(value, "as_integer_ratio"):  # Fraction, Decimal
        top, bottom = value.as_integer_ratio()
        return f'["ratio", "{top:x}", "{bottom:x}"]'
    raise TypeError(f"a {type(value).__name__} is not plain data")


def _receive(source: int) -> bytes:
    """The next order: four bytes of length, and as many bytes. No more is read: a script's own input follows."""
    return _exactly(source, int.from_bytes(_exactly(source, 4), "big"))


def _exactly(source: int, length: int) -> bytes:
    received = b""
    while len(received) < length:
        part = os.read(source, length - len(received))
        if not part:
            os._exit(1)
        received += part
    return received


_libc = ctypes.CDLL(None, use_errno=True)


def _must(what: str, result: int) -> None:
    if result != 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _prctl(what: str, option: int, value: int, pointer: int = 0) -> None:
    _must(what, _libc.prctl(option, *map(ctypes.c_ulong, (value, pointer, 0, 0))))


def _limit(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _die_with(parent: int) -> None:
    _prctl("dying with the parent", _PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above


if __name__ == "__main__":
    main()
