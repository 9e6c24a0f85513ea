"""A script: locks its own process down, then runs programs that nobody trusts, each in a process of its own.

It imports the standard library only. The module `sandbox` starts it, with a plan as JSON on stdin, and reads its report as JSON.
Three locks of the kernel are tried, and the report says which of them hold:

- Namespaces (user, mount, network, process, IPC): a file system of the interpreter's folders, read-only, and a scratch folder in
  memory; no network; no other process to be seen.
- Landlock: the same rule for files, from the kernel's security module.
- seccomp: system calls for sockets, signals, new processes, tracing and mounting fail.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import struct
import sys
import time
from contextlib import suppress
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW = {"user": 0x10000000, "mount": 0x20000, "network": 0x40000000, "process": 0x20000000, "ipc": 0x8000000, "uts": 0x4000000}
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_MOUNT_SETATTR, _LANDLOCK = 442, 444  # numbers that all machines share
_INSIDE = 1000  # the user id inside the namespace: not 0, so that a program starts without any capability
_LOOK_S = 0.005
_GRACE, _MORE_S = 20.0, 10.0  # by the clock a program may take so many times its processor seconds, and so many seconds more

# system calls that fail, as (x86_64, aarch64)
_DENIED = {
    "socket": (41, 198),
    "fork": (57, None),
    "vfork": (58, None),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
}
_CLONE, _CLONE3 = (56, 220), 435
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def call(name: str, *arguments: Any) -> None:
    """A function of the C library that returns 0. Raises OSError."""
    if getattr(_LIBC, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def system(number: int, *arguments: Any) -> int:
    """A system call by its number. Raises OSError."""
    result = int(_LIBC.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


# ---- namespaces ----------------------------------------------------------------------------------------------------------


def enter_namespaces() -> bool:
    """New namespaces for the children of this process. False where the kernel, or a container around it, allows none."""
    user, group = os.geteuid(), os.getegid()
    try:
        call("unshare", sum(_NEW.values()))
    except OSError:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_INSIDE} {user} 1"), ("gid_map", f"{_INSIDE} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def change_root(root: str, visible: list[str], scratch_mb: int) -> bool:
    """Let this process see the paths `visible`, read-only, and a new /tmp, and nothing else. False where it may not mount."""
    try:
        call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        _mount_memory(root, 4)
        for path in visible:
            _show(path, root)
        os.mkdir(f"{root}/tmp")
        _mount_memory(f"{root}/tmp", scratch_mb)
        _make_read_only(root, recursive=False)
        os.chdir(root)
        call("pivot_root", b".", b".")
        call("umount2", b".", 2)  # MNT_DETACH: the old root, which lies over the new one
        os.chdir("/tmp")
    except OSError:
        return False
    return True


def _mount_memory(path: str, size_mb: int) -> None:
    options = f"size={size_mb}m,mode=755,nr_inodes=4096".encode()
    call("mount", b"tmpfs", path.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)


def _show(path: str, root: str) -> None:
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        with open(target, "w"):
            pass
    call("mount", path.encode(), target.encode(), None, _MS_BIND | _MS_REC, None)
    _make_read_only(target, recursive=True)


def _make_read_only(path: str, recursive: bool) -> None:
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    system(_MOUNT_SETATTR, -100, path.encode(), 0x8000 if recursive else 0, attributes, len(attributes))


# ---- Landlock ------------------------------------------------------------------------------------------------------------


def restrict_files(visible: list[str], scratch: str) -> bool:
    """Landlock: read and execute below `visible`, everything below `scratch`, nothing elsewhere. False where there is none."""
    try:
        version = system(_LANDLOCK, None, 0, 1)
        files = (1 << (13 if version < 2 else 14 if version < 3 else 15)) - 1
        network = 3 if version >= 4 else 0
        rules = struct.pack("QQ", files, network)[: 16 if version >= 4 else 8]
        ruleset = system(_LANDLOCK, rules, len(rules), 0)
        for path, rights in [*((path, 1 | 4 | 8) for path in visible), (scratch, files & ~1)]:
            place = os.open(path, os.O_PATH)
            allowed = rights if os.path.isdir(path) else rights & (1 | 4)
            system(_LANDLOCK + 1, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
        call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        system(_LANDLOCK + 2, ruleset, 0)
        os.close(ruleset)
    except OSError:
        return False
    return True


# ---- seccomp -------------------------------------------------------------------------------------------------------------


def refuse_system_calls() -> bool:
    """seccomp: the calls of _DENIED fail, and so does every new process; threads are allowed. False where it does not exist."""
    known = _MACHINES.get(platform.machine())
    if known is None:
        return False
    program = _filter(*known)
    code = ctypes.create_string_buffer(b"".join(program))
    length = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    try:
        call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("prctl", _PR_SET_SECCOMP, 2, length, 0, 0)
    except OSError:
        return False
    return True


def _filter(column: int, architecture: int) -> list[bytes]:
    """The filter as instructions of classic BPF. Calls of another architecture end the process."""

    def step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        """One instruction; `then` and `otherwise` are instructions to skip."""
        return struct.pack("HBBI", code, then, otherwise, value)

    load, equal, above, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    steps = [step(load, 4), step(equal, architecture, 1), step(end, kill), step(load, 0), step(above, 0x40000000, 0, 1)]
    steps.append(step(end, kill))
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            steps += [step(equal, number, 0, 1), step(end, refuse)]
    steps += [step(equal, _CLONE3, 0, 1), step(end, unknown)]  # "no such call": libraries then use clone
    steps += [step(equal, _CLONE[column], 0, 3), step(load, 16), step(any_bit, 0x10000, 1), step(end, refuse)]
    return [*steps, step(end, allow)]


# ---- programs ------------------------------------------------------------------------------------------------------------


def run(program: dict[str, str], plan: dict[str, Any], locks: dict[str, bool], scratch: str) -> dict[str, Any]:
    """Run one program, and say how it ended, what it printed and what it told through its second pipe."""
    for name in os.listdir(scratch):
        path = os.path.join(scratch, name)
        shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    fds = {0: _filled(program["stdin"]), 3: _filled(program["secret"])}
    (out, fds[1]), (told, fds[4]) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _become(program, plan, locks, scratch, fds)
        finally:
            os._exit(125)
    for fd in fds.values():
        os.close(fd)
    ended, printed = _watch(child, out, plan)
    os.set_blocking(told, False)
    said = b""
    with suppress(OSError):
        said = os.read(told, 256)
    os.close(told)
    os.close(out)
    return {"ended": ended, "stdout": printed.decode("utf-8", "replace"), "told": said.decode("utf-8", "replace")}


def _filled(text: str) -> int:
    """A file in memory that holds the text, at its beginning."""
    fd = os.memfd_create("given")
    with open(os.dup(fd), "wb") as file:
        file.write(text.encode("utf-8", "replace"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _become(program: dict[str, str], plan: dict[str, Any], locks: dict[str, bool], scratch: str, fds: dict[int, int]) -> None:
    """In a new process: take the locks and limits, and turn into the program. It does not return."""
    _end_with(plan["parent"])
    os.setsid()
    moved = {target: fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for target, fd in fds.items()}
    with open(os.path.join(scratch, "answer.py"), "w", encoding="utf-8", errors="replace") as file:
        file.write(program["answer"])
    os.chdir(scratch)
    for target, fd in moved.items():
        os.dup2(fd, target)
    os.dup2(plan["silence"], 2)
    os.closerange(5, 65_536)
    _limit(plan)
    if plan["landlock"]:
        locks["landlock"] = restrict_files(plan["visible"], scratch)
    if plan["seccomp"]:
        locks["seccomp"] = refuse_system_calls()
    if "probe" in program:  # the report on the locks themselves
        os.write(4, json.dumps(locks).encode())
        os._exit(0)
    os.execve(plan["python"], [plan["python"], "-s", "-P", "-B", "-S", "-c", program["main"]], plan["environment"])


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, also where there are no namespaces. It outlives execve."""
    call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _limit(plan: dict[str, Any]) -> None:
    mb, cpu = 1 << 20, max(1, round(plan["time_s"] + 0.5))
    for name, most in (
        ("AS", plan["memory_mb"] * mb),
        ("CPU", cpu),
        ("FSIZE", plan["scratch_mb"] * mb),
        ("CORE", 0),
        ("NOFILE", 64),
        *([("NPROC", 64)] if plan["alone"] else []),  # elsewhere it would count all processes of the user
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        with suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _watch(child: int, out: int, plan: dict[str, Any]) -> tuple[str, bytes]:
    """Wait for a program: how it ended (see `sandbox.Ended`), and what it printed. All its processes are dead afterwards."""
    os.set_blocking(out, False)
    end, most = time.monotonic() + longest_s(plan["time_s"]), plan["output_kb"] * 1024
    used, moved = -1.0, time.monotonic()
    printed, ended, pause = b"", "", 0.0005
    while not ended:
        pid, status = os.waitpid(child, os.WNOHANG)
        with suppress(BlockingIOError):
            while len(printed) <= most and (part := os.read(out, 65_536)):
                printed += part
        if len(printed) > most:
            ended = "output"
        elif pid:
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
            ended = "time" if killed else "exit" if status == 0 else "failed"
        elif time.monotonic() > min(end, moved + plan["still_s"]):
            ended = "still"
        else:
            if (now := _processor_s(child)) != used:
                used, moved = now, time.monotonic()
            pause = min(_LOOK_S, 2 * pause)
            time.sleep(pause)
    _kill(child, plan["alone"])
    return ended, printed[:most]


def longest_s(time_s: float) -> float:
    """Seconds by the clock that a program may take: so many that a loaded machine ends none which computes."""
    return _GRACE * time_s + _MORE_S


def _processor_s(pid: int) -> float:
    """Processor seconds of a process, by its own clock: there is no /proc here."""
    with suppress(OSError):
        return time.clock_gettime(((-pid - 1) << 3) | 2)  # as clock_getcpuclockid computes it
    return -1.0


def _kill(child: int, alone: bool) -> None:
    """Kill a program and whatever it started. `alone`: this process is the first of its namespace, and all others are its."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(-1, signal.SIGKILL) if alone else os.killpg(child, signal.SIGKILL)
    with suppress(ChildProcessError):
        while alone or os.waitpid(child, 0) == (0, 0):
            os.waitpid(-1, 0)


def serve(plan: dict[str, Any]) -> dict[str, Any]:
    """All programs of a plan, in order, and which locks hold."""
    locks = {"namespaces": plan["alone"], "landlock": False, "seccomp": False, "root": False}
    plan["silence"], plan["parent"] = os.open("/dev/null", os.O_WRONLY), os.getpid()
    scratch = plan["scratch"]
    if plan["alone"]:
        locks["root"] = change_root(f"{scratch}/root", plan["visible"], plan["scratch_mb"])
        scratch = "/tmp" if locks["root"] else scratch
    if not locks["root"]:
        scratch = os.path.join(scratch, "tmp")
        os.makedirs(scratch, exist_ok=True)
    probe = {"answer": "", "stdin": "", "secret": "", "probe": ""}
    found = json.loads(run(probe, plan, locks, scratch)["told"] or "{}")
    held = {
        "network": plan["alone"] or found.get("seccomp", False),
        "files": locks["root"] or found.get("landlock", False),
        "processes": found.get("seccomp", False),
    }
    report: dict[str, Any] = {"locks": held, "by": sorted(name for name, held_ in found.items() if held_), "runs": []}
    if plan["required"] and not all(held.values()):
        return report
    report["runs"] = [run(program, plan, dict(locks), scratch) for program in plan["programs"]]
    return report


def main() -> None:
    """Read the plan, lock down, run, report."""
    plan = json.load(sys.stdin)
    call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory ends, the kernel ends this process first
    os.mkdir(os.path.join(plan["scratch"], "root"))
    plan["alone"] = bool(plan["namespaces"]) and enter_namespaces()
    above = os.getpid()
    child = os.fork()  # the first process of the new namespace
    if child == 0:
        _end_with(0 if plan["alone"] else above)
        report = json.dumps(serve(plan))
        with open(1, "w", encoding="utf-8") as out:
            out.write(report)
        os._exit(0)
    os.close(1)
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
