"""Attacks that are really tried, each by a program that says if it got through, and honest programs beside them."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from reward_models import sandbox
from reward_models.sandbox import (
    Limits,
    Room,
    Sandbox,
    SandboxError,
    interpreter,
    landlock,
    process,
    seccomp,
    values,
    why_unavailable,
)
from reward_models.sandbox import room as room_module

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no sandbox here: {why_unavailable()}")


ELSEWHERE: set[int] = set()  # workers that other tests of this process keep


@pytest.fixture(scope="module", autouse=True)
def nothing_of_others():
    ELSEWHERE.update(first_processes())


@pytest.fixture(scope="module")
def furnished(nothing_of_others):
    with Room(Limits(deadline_s=3.0, memory_bytes=256 << 20)) as room:
        yield room


@pytest.fixture
def room(furnished):
    yield furnished
    assert os.listdir(furnished.folder) == []
    assert len(living_with(first_processes())) <= 1  # the one that waits for the next run


@pytest.fixture
def secret(tmp_path, room):
    """A file of this user's, beside the room's folder."""
    path = Path(room.folder).parent / f"secret-{os.path.basename(room.folder)}"
    path.write_text("hunter2")
    yield path
    path.unlink()


def processes() -> dict[int, tuple[int, int]]:
    """Of this machine, without zombies: number → (parent, session)."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent, _, session = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state != "Z":
            found[int(name)] = int(parent), int(session)
    return found


def first_processes(trainer: int | None = None) -> set[int]:
    """The sandboxes' first processes of this trainer, or another. What they fork is in the session that each leads."""
    parent = trainer or os.getpid()
    leaders = {pid for pid, (its_parent, session) in processes().items() if its_parent == parent and session == pid}
    return leaders - ELSEWHERE


def living_with(leaders: set[int]) -> set[int]:
    return {pid for pid, (_, session) in processes().items() if session in leaders}


def attack_program(attack: str, **names) -> str:
    """A program that prints "escaped" if the attack went through, else what refused it."""
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    lines += ["import ctypes, os, sys", "libc = ctypes.CDLL(None, use_errno=True)"]
    lines += [
        "def must(result):",
        "    if result == -1: raise OSError(ctypes.get_errno(), 'refused')",
        "    return result",
    ]
    lines += ["try:", *textwrap.indent(attack, "    ").splitlines()]
    lines += ["except (OSError, ValueError, ImportError) as error:"]
    lines += ["    print('refused:', type(error).__name__, error)", "else:", "    print('escaped')"]
    return "\n".join(lines)


def attempt(room: Room, attack: str, **names) -> str:
    ending = room.script(attack_program(attack, **names))
    assert ending.well, ending
    return ending.output.decode().strip()


def unconfined(attack: str, folder: Path, **names) -> str:
    """The same attack without a sandbox, to know that it is one."""
    command = [sys.executable, "-S", "-c", attack_program(attack, **names)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20).stdout.strip()


READS = {
    "open": "open(path).read()",
    "os.open": "os.read(os.open(path, os.O_RDONLY), 10)",
    "C's open": "must(libc.open(path.encode(), 0))",
    "relative": "open('../' + os.path.basename(path)).read()",
    "by proc": "open('/proc/self/cwd/../' + os.path.basename(path)).read()",
    "by proc's root": "open('/proc/self/root' + path).read()",
    "symlink": "os.symlink(path, 'link'); open('link').read()",
    "hard link": "os.link(path, 'link'); open('link').read()",
    "moved here": "os.rename(path, 'mine'); open('mine').read()",
    "handle": "handle, mount = (ctypes.c_uint * 40)(128), ctypes.c_int()\n"
    "must(libc.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(mount), 0))\n"
    "os.read(must(libc.open_by_handle_at(os.open('/', os.O_RDONLY), handle, 0)), 10)",
    "copied": "import shutil; shutil.copyfile(path, 'mine')",
    "mapped": "import mmap; mmap.mmap(os.open(path, os.O_RDONLY), 1, prot=mmap.PROT_READ)",
    "imported": "import importlib.machinery as m; m.SourceFileLoader('x', path).get_data(path)",
    "linker": "try: ctypes.CDLL(path)\nexcept OSError as error:\n    if 'denied' in str(error): raise",
    "watched": "must(libc.inotify_add_watch(must(libc.inotify_init()), path.encode(), 0xfff))",
}
WRITES = {
    "overwrite": "open(path, 'w')",
    "append": "open(path, 'a')",
    "new file": "open(path + '.new', 'w')",
    "new folder": "os.mkdir(path + '.d')",
    "remove": "os.remove(path)",
    "truncate": "os.truncate(path, 0)",
    "truncate while reading": "os.open(path, os.O_RDONLY | os.O_TRUNC)",
    "truncate without access": "os.open(path, 3 | os.O_TRUNC)",
    "truncate the library": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "write the library": "open(os.__file__, 'r+')",
    "chmod": "os.chmod(path, 0o777)",
    "chmod the library": "os.chmod(os.__file__, 0o600)",
    "chown": "os.chown(path, 1000, 1000)",
    "utime": "os.utime(path, (0, 0))",
    "xattr": "os.setxattr(path, 'user.x', b'x')",
    "temporary": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "mount": "must(libc.mount(b'none', os.path.dirname(path).encode(), b'tmpfs', 0, None))",
}


@pytest.mark.parametrize("version", [1, None], ids=["oldest Landlock", "this Landlock"])
def test_no_file_outside_is_read_or_changed(room, secret, monkeypatch, version):
    if version is not None:
        monkeypatch.setattr(landlock, "version", lambda: version)
    library = Path(os.__file__).stat()
    with Room(Limits(deadline_s=3.0)) as room:
        for path in ("/etc/passwd", str(secret)):
            for name, attack in READS.items():
                assert attempt(room, attack, path=path).startswith("refused"), (name, path)
        for name, attack in WRITES.items():
            assert attempt(room, attack, path=str(secret)).startswith("refused"), name
    assert secret.read_text() == "hunter2" and secret.stat().st_mode & 0o777 != 0o777
    assert not secret.with_name(secret.name + ".new").exists()
    assert (library.st_size, library.st_mode) == (Path(os.__file__).stat().st_size, Path(os.__file__).stat().st_mode)


@pytest.mark.parametrize(
    "path", ["/", "/root", "/home", "/proc", "/proc/self", "/proc/self/fd", "/dev", "..", str(ROOT)]
)
def test_no_folder_outside_is_listed(room, path):
    if os.path.exists(path):
        assert attempt(room, "os.listdir(path)", path=path).startswith("refused")


def test_third_party_packages_and_the_project_are_not_read(room):
    for module in (pytest, sandbox):
        assert attempt(room, "open(path).read()", path=module.__file__).startswith("refused")
    assert attempt(room, "import torch").startswith("refused")


def test_the_environment_is_empty_and_no_process_s_is_read(room, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_THE_TRAINER", "hunter2")
    seen = room.script("import os; print(sorted(os.environ), os.environ)").output.decode()
    assert "HOME" in seen and "TOKEN" not in seen and "hunter2" not in seen
    assert "PATH" not in seen and "USER" not in seen
    for whose in ("self", "{os.getppid()}", "1"):
        for what in ("environ", "cmdline", "maps", "mem", "status"):
            attack = f"open(f'/proc/{whose}/{what}', 'rb').read()"
            assert attempt(room, attack).startswith("refused"), (whose, what)
    assert attempt(room, "os.readlink(f'/proc/{os.getppid()}/cwd')").startswith("refused")
    everything = room.script(
        "import ctypes; print(ctypes.string_at(ctypes.c_char_p.in_dll(ctypes.CDLL(None), 'environ')))"
    )
    assert b"hunter2" not in everything.output


SOCKET = {"x86_64": 41, "aarch64": 198}[platform.machine()]
NETWORK = {
    "tcp": "import socket; socket.create_connection(('127.0.0.1', port), timeout=1)",
    "udp": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "unix": "import socket; socket.socket(socket.AF_UNIX)",
    "pair": "import socket; socket.socketpair()",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "C's socket": "must(libc.socket(2, 1, 0))",
    "bare call": "must(libc.syscall(number, 2, 1, 0))",
    "ring": "must(libc.syscall(425, 8, ctypes.create_string_buffer(120)))",  # io_uring opens sockets without a call
}


@pytest.mark.parametrize("name", NETWORK)
def test_no_socket_is_opened(room, name):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        assert attempt(room, NETWORK[name], port=port, number=SOCKET).startswith("refused")
        with pytest.raises(BlockingIOError):
            server.accept()


CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]
PROCESSES = {
    "fork": "if os.fork() == 0: os._exit(0)",
    "bomb": "while True: os.fork()",
    "subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "shell": "must(-(os.system('true') != 0))",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process(target=int).start()",
    "spawned": "import multiprocessing as m; m.get_context('spawn').Process(target=int).start()",
    "pool": "import concurrent.futures as c; c.ProcessPoolExecutor().submit(int).result()",
    "exec": "os.execv('/bin/echo', ['echo', 'escaped'])",
    "exec itself": "os.execv(sys.executable, [sys.executable, '-c', 'print(\"escaped\")'])",
    "C's fork": "if must(libc.fork()) == 0: os._exit(0)",
    "C's vfork": "if must(libc.vfork()) == 0: os._exit(0)",
    "bare clone": "if must(libc.syscall(clone, 17, None, None, None, None)) == 0: os._exit(0)",
    "clone3": "if must(libc.syscall(435, (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17), 64)) == 0: os._exit(0)",
    "pty": "import pty; pty.fork()",
}


@pytest.mark.parametrize("name", PROCESSES)
def test_no_process_is_started(room, name):
    assert attempt(room, PROCESSES[name], clone=CLONE).startswith("refused")


OTHERS = {
    "kill the parent": "os.kill(os.getppid(), 9)",
    "kill all": "os.kill(-1, 9)",
    "kill the group": "os.killpg(os.getpgid(os.getppid()), 9)",
    "kill a process": "os.kill(victim, 9)",
    "kill a thread": "must(libc.tgkill(victim, victim, 9))",
    "by descriptor": "import signal; signal.pidfd_send_signal(os.pidfd_open(victim), 9)",
    "by owning a pipe": "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, victim); fcntl.fcntl(0, fcntl.F_SETSIG, 9)",
    "queue a signal": "must(libc.sigqueue(victim, 9, None))",
    "trace": "must(libc.ptrace(16, victim, 0, 0))",
    "read memory": "must(libc.process_vm_readv(victim, None, 0, None, 0, 0))",
    "its limits": "import resource; resource.prlimit(victim, resource.RLIMIT_CPU, (1, 1))",
    "its priority": "os.setpriority(os.PRIO_PROCESS, victim, 19)",
    "its cores": "os.sched_setaffinity(victim, {0})",
    "own session": "os.setsid()",
    "another user": "os.setuid(65534)",
    "root again": "os.setresuid(0, 0, 0); os.chroot('/')",
    "new namespaces": "must(libc.unshare(0x10000000))",
    "other namespaces": "must(libc.setns(0, 0))",
    "no leash": "must(libc.prctl(1, 0, 0, 0, 0))",
    "another filter": "must(libc.prctl(22, 1, 0, 0, 0))",
    "capabilities": "must(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)))",
    "shared memory": "must(libc.shmget(1, 4096, 0o1666))",
    "message queue": "must(libc.msgget(1, 0o1666))",
    "memory file": "os.memfd_create('x')",
    "keys": "must(libc.syscall({'x86_64': 248, 'aarch64': 217}[os.uname().machine], b'user', b'x', b'x', 1, -3))",
    "bpf": "must(libc.syscall({'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, None, 0))",
    "perf": "must(libc.syscall({'x86_64': 298, 'aarch64': 241}[os.uname().machine], None, 0, -1, -1, 0))",
    "page faults": "must(libc.syscall({'x86_64': 323, 'aarch64': 282}[os.uname().machine], 0))",
    "typing on the terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0)",
    "host name": "os.uname(); must(libc.sethostname(b'x', 1))",
    "unknown call": "must(libc.syscall(9999))",
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_process_is_touched_and_no_right_comes_back(room, name):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        assert attempt(room, OTHERS[name], victim=victim.pid).startswith("refused")
        assert victim.poll() is None
        victim.kill()


# What only root may, what the kernel need not have, and what would hurt without a sandbox.
NOT_TRIED_OUTSIDE = {"xattr", "temporary", "mount", "ring", "bomb", "C's vfork"}
NOT_TRIED_OUTSIDE |= {name for name in WRITES if "library" in name} | ({"handle", "chown"} if os.geteuid() else set())


def test_the_attacks_are_attacks(tmp_path):
    for name, attack in {**READS, **WRITES, **PROCESSES, **NETWORK, **OTHERS}.items():
        if name in NOT_TRIED_OUTSIDE or (name in OTHERS and "victim" not in attack):
            continue
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        secret = folder / "secret"
        secret.write_text("hunter2")
        cwd = folder / "room"
        cwd.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "60"]) as victim:
            port = server.getsockname()[1]
            said = unconfined(attack, cwd, path=str(secret), port=port, number=SOCKET, clone=CLONE, victim=victim.pid)
            victim.kill()
        assert said.split()[-1] == "escaped", (name, said)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86_64's older tables of calls")
@pytest.mark.parametrize("how", ["int 0x80", "x32"])
def test_the_machine_s_other_tables_of_calls_end_the_process(room, how):
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3" if how == "int 0x80" else b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"
    program = f"""
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=7)
        page.write({code!r})
        print("before", flush=True)
        call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        print("escaped", call(), flush=True)
    """
    ending = room.script(textwrap.dedent(program))
    assert (ending.status, ending.output) == (-signal.SIGSYS, b"before\n")


def test_four_gigabytes_are_not_had(room):
    attacks = ["bytearray(4 << 30)", "import mmap; mmap.mmap(-1, 4 << 30)", "[bytearray(1 << 20) for _ in range(4096)]"]
    attacks += ["import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"]
    attacks += ["import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))"]
    for attack in attacks:
        program = f"try:\n    {attack}\nexcept (MemoryError, OSError, ValueError):\n    print('refused')"
        assert room.script(program).output == b"refused\n", attack
    malloc = (
        "import ctypes; m = ctypes.CDLL(None).malloc; m.restype = ctypes.c_void_p; print(m(ctypes.c_size_t(1 << 32)))"
    )
    assert room.script(malloc).output == b"None\n"


@pytest.mark.parametrize("flood", ["print('x' * 1000)", "os.write(1, b'x' * 65536)", "os.write(1, b'x')"])
def test_a_flood_of_output_is_cut(flood):
    with Room(Limits(deadline_s=1.0)) as room:
        ending = room.script(f"import os\nwhile True: {flood}")
    assert ending.cause == "output" or (ending.cause == "deadline" and flood == "os.write(1, b'x')")
    assert len(ending.output) < process.MAX_OUTPUT_BYTES + (1 << 17)


def test_files_are_few_small_and_flat(room):
    assert room.script("for i in range(10**9): open(str(i), 'w')").cause == "files"
    assert attempt(room, "with open('big', 'wb') as f: f.write(bytes(2 << 20))").startswith("refused")
    assert attempt(room, "os.posix_fallocate(os.open('big', os.O_CREAT | os.O_RDWR), 0, 2 << 20)").startswith("refused")
    assert attempt(room, "[open('x', 'w') for _ in range(100)]; must(-1)").startswith("refused")
    for attack in ("os.mkdir('d')", "os.mkfifo('f')", "os.symlink('a', 'b')", "os.mknod('n')", "os.link('big', 'c')"):
        assert attempt(room, attack).startswith("refused"), attack


def test_a_bomb_of_threads_is_stopped(room):
    bomb = """
        import threading, time
        threading.stack_size(32768)
        while True:
            threading.Thread(target=time.sleep, args=(60,)).start()
    """
    started = time.monotonic()
    assert room.script(textwrap.dedent(bomb)).cause == "threads"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "7 ** 10 ** 9",
        "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import os; os.close(0); os.close(1)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
        "import atexit, time; atexit.register(time.sleep, 60)",
        "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
    ],
)
def test_the_deadline_is_kept_and_nothing_lives_on(program):
    others = first_processes()
    with Room(Limits(deadline_s=0.4)) as room:
        started = time.monotonic()
        ending = room.script(program)
        assert ending.cause == "deadline" and not ending.well
        assert 0.4 <= time.monotonic() - started < 3
        first = first_processes() - others
        assert living_with(first) == first
    assert not living_with(first)


def test_a_program_has_three_open_files_and_they_are_its_own(room):
    program = """
        import os, stat
        for fd in range(1000):
            try:
                mode = os.fstat(fd).st_mode
            except OSError:
                continue
            print(fd, "pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) else "other")
    """
    assert room.script(textwrap.dedent(program)).output == b"0 pipe\n1 pipe\n2 device\n"


def test_one_run_leaves_nothing_for_the_next(room):
    room.script("open('note', 'w').write('from the first'); import builtins; builtins.print = None")
    assert room.script("import os; print(os.listdir('.'))").output == b"[]\n"


HONEST = {
    "input()": "print(int(input()) + int(input()))",
    "sys.stdin": "import sys; print(sum(map(int, sys.stdin)))",
    "sys.stdin.buffer": "import sys; print(sum(map(int, sys.stdin.buffer.read().split())))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin'))))",
    "main guard": "def main(): print(3)\nif __name__ == '__main__': main()",
    "sys.exit": "import sys; print(3); sys.exit()",
    "own file": "open('n', 'w').write('3'); print(open('n').read())",
    "renamed": "import os; open('n', 'w').write('3'); os.rename('n', 'm'); print(open('m').read()); os.remove('m')",
    "temporary": "import tempfile; f = tempfile.TemporaryFile('w+'); f.write('3'); f.seek(0); print(f.read())",
    "null": "print('x', file=open('/dev/null', 'w')); print(3)",
    "thread": "import threading; t = threading.Thread(target=print, args=(3,)); t.start(); t.join()",
    "executor": "import concurrent.futures as c; print(sum(c.ThreadPoolExecutor(8).map(int, '0111')))",
    "deep recursion": textwrap.dedent("""
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(128 << 20)
        def depth(n): return 3 if n == 0 else depth(n - 1)
        thread = threading.Thread(target=lambda: print(depth(50_000)))
        thread.start()
        thread.join()
    """),
    "own limits": "import resource as r; r.setrlimit(3, (1 << 20, r.getrlimit(3)[1])); print(3)",
    "alarm": "import signal, time; signal.signal(14, lambda *a: print(3)); signal.setitimer(0, 0.05); time.sleep(0.1)",
    "clock": "import time, datetime; time.sleep(0.01); datetime.datetime.now(); print(3)",
    "chance": "import random, os, secrets, uuid; uuid.uuid4(); os.urandom(8); print(random.choice([3]))",
    "hash": "import hashlib; hashlib.sha256(b'x').hexdigest(); print(3)",
    "sqlite": "import sqlite3; print(*sqlite3.connect(':memory:').execute('select 1 + 2').fetchone())",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\nprint(P(3).x)",
    "typing": "from typing import *\nclass P(NamedTuple):\n    x: int\nprint(P(3).x)",
    "half its memory": "x = bytearray(100 << 20); print(3)",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_run(room, name):
    ending = room.script(HONEST[name], "1\n2\n")
    assert (ending.well, ending.output) == (True, b"3\n")


def test_every_extension_module_that_the_interpreter_has_loads(room):
    program = """
        import importlib, os, sys
        names = sorted(e.partition(".")[0] for f in sys.path if f.endswith("lib-dynload") for e in os.listdir(f))
        failed = []
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:
                failed.append(name)
        print(*failed)
    """
    program = textwrap.dedent(program)
    bare = [sys.executable, "-s", "-P", "-S", "-c", program]
    outside = subprocess.run(bare, env={}, capture_output=True, text=True).stdout.split()
    inside = room.script(program).output.decode().split()
    assert [name for name in inside if name not in outside and not name.startswith(("_test", "_tkinter"))] == []


def test_megabytes_and_any_text_pass_both_ways(room):
    text = "é\u2028π\n" * 300_000
    assert room.script("import sys; sys.stdout.write(sys.stdin.read())", text).output.decode() == text
    assert room.script("print(1)", "x" * 5_000_000).well  # nobody reads it
    assert not room.script("\ud800").well and not room.script("\0").well and not room.script("(" * 10_000).well


def test_output_before_the_end_is_kept_and_the_status_told(room):
    assert room.script("print(1, flush=True); raise ValueError").output == b"1\n"
    assert room.script("raise ValueError").status == 1
    assert room.script("import sys; sys.exit(7)").status == 7
    assert room.script("import ctypes; ctypes.string_at(0)").status == -signal.SIGSEGV


PLAIN = ["None", "True", "False", "0", "-2**100", "1.5", "float('inf')", "-0.0", "1j", "'é\\ud800\\'\\n'", "b'\\0'"]
PLAIN += ["[]", "()", "{}", "set()", "frozenset([1])", "{1: [2, (3, {4})], 'a': {'b': None}}", "[[], [[]]]", "10**5000"]


def test_values_come_out_as_they_are_and_equal_what_python_says_they_equal(room):
    for left, answer in zip(PLAIN, room.answers("", [(code, True) for code in PLAIN]), strict=True):
        for right in PLAIN:
            assert values.same(answer, eval(right)) is (eval(left) == eval(right)), (left, right)


def test_what_extends_plain_data_is_read_as_that_and_pretenders_are_not(room):
    program = """
        import collections, decimal, enum, fractions
        class One(enum.IntEnum): ONE = 1
        class Equal:
            def __eq__(self, other): return True
            def __hash__(self): return hash(1)
        class Liar(int):
            def __eq__(self, other): return True
            def __index__(self): return 1
            def __hash__(self): return hash(1)
        Point = collections.namedtuple("Point", "x y")
    """
    honest = {"One.ONE": 1, "Point(1, 2)": (1, 2), "collections.Counter('aab')": {"a": 2, "b": 1}, "True": 1, "2.0": 2}
    honest |= {"fractions.Fraction(1, 2)": 0.5, "decimal.Decimal(3)": 3, "collections.OrderedDict(a=1)": {"a": 1}}
    answers = room.answers(textwrap.dedent(program), [(code, True) for code in honest])
    assert [values.same(a, v) for a, v in zip(answers, honest.values(), strict=True)] == [True] * len(honest)
    pretenders = ["Equal()", "[Equal()]", "{Equal()}", "Liar(5)", "iter([1])", "x", "[" * 99 + "]" * 99, "Equal"]
    for answer in room.answers(textwrap.dedent(program), [(code, True) for code in pretenders]):
        assert answer is None or not values.same(answer, 1)


NONSENSE = ["", "-", "x", "[]", "{}", '"int"', "[1]", '["int"]', '["int", 5]', '["int", "zz"]', '["list", ["int"]]']
NONSENSE += ['["dict", 1]', '["set", ["list"]]', '["dict", [["list"], null]]', '["ratio", "1", "0"]', '["str", "ff"]']
NONSENSE += ['["float", []]', '["no", 1]', "NaN", "1e999", "9" * 5000, "[" * 100_000, '["list", ' * 100_000]
NONSENSE += ['["ratio", "' + "f" * 3_000_000 + '", "3"]']


@pytest.mark.parametrize("answer", NONSENSE)
def test_answers_that_nobody_honest_writes_equal_nothing(answer):
    for expected in (1, [1], {1}, {"a": 1}, "x", None, 0.5):
        assert values.same(answer, expected) is False


def test_comparing_a_hostile_answer_takes_little_time():
    colliding = ", ".join(f'["int", "{k * (2**61 - 1):x}"]' for k in range(100_000))
    started = time.monotonic()
    assert not values.same(f'["set", {colliding}]', {1, 2})
    assert not values.same(f'["set", ["frozenset", {colliding}]]', {frozenset([1])})
    assert not values.same('["dict"' + f", [{colliding[:30]}, null]" * 10 + "]", {})
    assert time.monotonic() - started < 2


def test_questions_are_answered_in_order_and_one_that_raises_costs_itself_only(room):
    program = "state = []\ndef f(x): state.append(x); return sum(state)\ndef stop(): raise SystemExit"
    questions = [("f(1)", True), ("f(2)", True), ("1/0", True), ("stop()", False), ("y = f(3)", False), ("y", True)]
    first, second, *rest, third, wrong = room.answers(program, [*questions, ("assert y == 7", False)])
    assert values.same(first, 1) and values.same(second, 3) and values.same(third, 6)
    assert rest == [None, None, True] and wrong is None


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "print('passed'); print('ready'); print('loaded'); print('-')",
        "import os\nfor fd in 1, 3, 4, 5:\n    try: os.write(fd, b'loaded\\nnull\\nnull\\n')\n    except OSError: pass",
        "import os\nfor fd in 1, 3, 4, 5:\n    try: os.write(fd, b'loaded\\ntrue\\ntrue\\n')\n    finally: os._exit(0)",
        "import builtins\nbuiltins.exec = builtins.eval = builtins.compile = lambda *a, **k: True",
        "import builtins, os\nbuiltins.assert_ = print\nbuiltins.AssertionError = Warning\nos.write = print",
        "f = lambda: __import__('os')._exit(0)",
        "import sys\ndef f(): sys.settrace(None); raise SystemExit(0)",
        "def f(): import os; os._exit(0)",
        "class Equal:\n    def __eq__(self, other): return True\ndef f(): return Equal()",
    ],
)
def test_faked_answers_do_not_count(room, program):
    value, statement = room.answers(program, [("f()", True), ("assert 1 == 2", False)])
    assert not (isinstance(value, str) and values.same(value, 42)) and statement is None


def test_questions_are_not_there_before_the_program_has_been_run(room):
    program = """
        import fcntl, os, select
        waiting = []
        for fd in range(16):
            try:
                if select.select([fd], [], [], 0.05)[0]:
                    waiting.append(os.read(fd, 1000))
            except (OSError, ValueError):
                pass
    """
    assert values.same(room.answers(textwrap.dedent(program), [("b''.join(waiting)", True)])[0], b"")


def test_the_map_keeps_the_order_runs_side_by_side_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool = Sandbox(workers=4, limits=Limits(deadline_s=5))
    started = time.monotonic()
    results = pool.map(lambda room, n: room.script(f"import time; time.sleep(0.5); print({n})").output, range(4))
    assert results == [b"0\n", b"1\n", b"2\n", b"3\n"] and time.monotonic() - started < 1.5
    assert pool.map(lambda room, n: room.script("print(1)").well, []) == []
    assert os.listdir(tmp_path) == [] and pool.errors == 0


def test_a_job_s_own_error_reaches_the_caller_and_ends_the_others():
    def job(room, n):
        if n == 0:
            raise KeyError("the job's own")
        return room.script("while True: pass")

    started = time.monotonic()
    with pytest.raises(KeyError, match="own"):
        Sandbox(workers=2, limits=Limits(deadline_s=30)).map(job, [1, 0])
    assert time.monotonic() - started < 5


def test_an_interrupt_ends_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    others = first_processes()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        Sandbox(workers=2, limits=Limits(deadline_s=30)).map(lambda room, n: room.script("while True: pass"), [0] * 8)
    assert first_processes() == others and os.listdir(tmp_path) == []


def test_nothing_outlives_the_trainer(tmp_path):
    program = """
        import tempfile
        tempfile.tempdir = {folder!r}
        from reward_models.sandbox import Limits, Sandbox
        Sandbox(2, Limits(deadline_s=60)).map(lambda room, n: room.script("while True: pass"), [0, 0])
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program.format(folder=str(tmp_path)))], cwd=ROOT)
    until = time.monotonic() + 20
    while len(started := living_with(first_processes(trainer.pid))) < 4 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(started) == 4  # two that fork, and two that run
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 5
    while started & processes().keys() and time.monotonic() < until:
        time.sleep(0.02)
    assert not started & processes().keys()


def test_a_sandbox_that_does_not_start_is_an_error_and_no_result(monkeypatch):
    pool = Sandbox(workers=1)
    good = interpreter.START
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "START", ("/bin/echo", "no such interpreter"))
        with pytest.raises(SandboxError, match="did not start: no such interpreter"):
            pool.map(lambda room, n: room.script("print(1)"), [1, 2])
        assert pool.errors == 2 and "did not start" in pool.last_error

    def job(room, n):
        monkeypatch.setattr(interpreter, "START", ("/bin/false",) if n == 1 else good)
        return room.script(f"print({n})").output

    assert pool.map(job, [1, 2, 3]) == [None, b"2\n", b"3\n"]
    monkeypatch.setattr(interpreter, "START", ("/no/such/file",))
    with pytest.raises(SandboxError, match="No such file"):
        pool.map(lambda room, n: room.script("print(1)"), [1])


def test_a_process_killed_from_outside_says_nothing_about_the_program():
    others = first_processes()
    with Room(Limits(deadline_s=30)) as room:
        assert room.script("print(1)").well
        (nursery,) = first_processes() - others
        threading.Timer(0.3, os.kill, (nursery, signal.SIGKILL)).start()
        with pytest.raises(SandboxError, match="lost"):
            room.script("while True: pass")
        assert room.script("print(1)").well
        (nursery,) = first_processes() - others
        os.kill(nursery, signal.SIGKILL)  # while it is idle
        with pytest.raises(SandboxError, match="did not start"):
            room.script("print(1)")
        assert room.script("print(1)").well
    assert first_processes() == others


def no_landlock():
    raise landlock.LandlockError("no Landlock (Function not implemented): it needs Linux 5.13")


def test_where_isolation_is_missing_it_says_what(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(landlock, "version", no_landlock)
        assert "Landlock" in why_unavailable() and "5.13" in why_unavailable()
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "riscv64")
        assert "riscv64" in why_unavailable()
        with pytest.raises(SandboxError, match="x86_64 or aarch64"):
            Room(Limits())
    with monkeypatch.context() as patch:
        patch.setattr(platform, "system", lambda: "Darwin")
        assert "Darwin" in why_unavailable()
    with monkeypatch.context() as patch:
        patch.setattr(seccomp, "bpf", lambda machine: b"\xff" * 16)  # the kernel refuses such a filter
        assert "seccomp: Invalid argument" in why_unavailable()
    assert why_unavailable() is None


def test_where_isolation_does_not_hold_the_probe_finds_it(monkeypatch):
    allow_all = b"\x06\x00\x00\x00\x00\x00\xff\x7f"
    with monkeypatch.context() as patch:
        patch.setattr(seccomp, "bpf", lambda machine: allow_all)
        said = why_unavailable()
        assert "start a process" in said and "socket" in said and "read a file" not in said
    everything = (("/", landlock.READ_FILE | landlock.READ_DIR),)
    with monkeypatch.context() as patch:
        patch.setattr(room_module, "readable", lambda: everything)
        assert "read a file outside its folder" in why_unavailable()
    with monkeypatch.context() as patch:
        patch.setattr(room_module, "readable", lambda: ())
        assert "harmless program" in why_unavailable() or "did not start" in why_unavailable()


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_the_calls_have_the_kernel_s_numbers(machine, header):
    if not os.path.exists(header):
        pytest.skip("no kernel headers")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    numbers["newfstatat"] = numbers.get("newfstatat") or numbers["fstatat"]
    column = seccomp._ARCHITECTURES[machine][0]
    for name, call in (seccomp._ALLOWED | seccomp._CONDITIONAL).items():
        if call[column] is None:
            assert name not in numbers or machine == "aarch64", name
        else:
            assert int(numbers[name]) == call[column], name


@pytest.mark.parametrize(
    "limits", [{"deadline_s": 0}, {"deadline_s": float("nan")}, {"deadline_s": float("inf")}, {"memory_bytes": 1}]
)
def test_senseless_limits_are_refused(limits):
    with pytest.raises(ValueError):
        Limits(**limits)
    with pytest.raises(ValueError):
        Sandbox(workers=0)


def test_the_sandbox_does_not_import_torch():
    code = "import sys; import reward_models.sandbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
