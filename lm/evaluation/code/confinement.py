"""Confinement of a process, which then runs a script: the entry point of a `sandbox` process.

Uses only the standard library: `sandbox` starts this file directly, with a clean environment. Stdin
has a JSON object: `script` (its source), `layers`, `system_calls` (a filter, base64), `readable`
(paths), `folder` (writable) and `limits`. The kernel confines the process, not patches to Python,
so a script that takes over its interpreter gains nothing.

Two layers protect the file system, each sufficient by itself: "namespaces" (own file system,
process table, network and IPC; Linux man pages user_namespaces(7), pivot_root(2)) and "landlock"
(rules on paths, landlock(7)). The system-call filter, seccomp(2), blocks everything else: starting
processes or threads, opening sockets, sending signals, and changing file attributes.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC = 1, 2, 4, 4096, 16384
_MS_PRIVATE = 1 << 18
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
# System calls without a C library wrapper; the numbers are the same on all architectures.
_MOUNT_SETATTR, _CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 442, 444, 445, 446
# Landlock: file access rights by the ABI version that introduced them.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_ALL_FILES = {3: (1 << 15) - 1, 5: (1 << 16) - 1}
_ALL_TCP, _ALL_SCOPES = 3, 3  # bind, connect; abstract Unix sockets, signals

_libc = ctypes.CDLL(None, use_errno=True)


def confine() -> None:
    """Confine this process as stdin says, then run the script."""
    wanted = json.load(sys.stdin.buffer)
    _call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if "namespaces" in wanted["layers"]:
        _enter_namespaces()
        _mount_root(wanted)
        wanted["folder"] = "/tmp"
    os.chdir(wanted["folder"])
    _set_limits(wanted["limits"])
    _drop_privileges()
    if "landlock" in wanted["layers"]:
        _restrict_paths(wanted["readable"], wanted["folder"])
    script = compile(wanted["script"], "<sandbox>", "exec")
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in (0, 2):
        os.dup2(nothing, number)
    _filter_system_calls(base64.b64decode(wanted["system_calls"]))
    exec(script, {"__name__": "__main__", "wanted": wanted})


def _call(function: Any, *arguments: Any) -> int:
    found = function(*arguments)
    if found < 0:
        number = ctypes.get_errno()
        name = getattr(function, "__name__", "syscall")
        raise OSError(number, f"{name}{arguments[:1]}: {os.strerror(number)}")
    return found


def _enter_namespaces() -> None:
    """Continue as process 1 of new namespaces; this process waits for it and exits with it.

    The user id stays the same, but its privileges are limited to the namespaces.
    """
    user, group = os.geteuid(), os.getegid()
    new = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET
    _call(_libc.unshare, new | _CLONE_NEWIPC | _CLONE_NEWUTS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    if child := os.fork():
        os.closerange(0, 1 << 20)  # so that the pipes close when the child exits
        _, status = os.waitpid(child, 0)
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    _call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = (None if x is None else x.encode() for x in (source, target, kind))
    _call(_libc.mount, *texts, ctypes.c_ulong(flags), data.encode() if data else None)


def _mount_root(wanted: dict[str, Any]) -> None:
    """Replace the root by an empty one with readable paths, devices, and a size-limited /tmp.

    Parent folders of a readable path can be traversed, but not listed.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    root = wanted["folder"]
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=1000,mode=111")
    os.umask(0o666)
    for name in ("/tmp", "/old"):
        os.makedirs(root + name)
    most = f"size={wanted['limits']['disk']},nr_inodes=1000,mode=700"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, most)
    for path in (*wanted["readable"], *_DEVICES):
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            _mount(path, target, None, _MS_BIND | _MS_REC)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
            _mount(path, target, None, _MS_BIND)
    os.umask(0o077)
    os.chdir(root)
    _call(_libc.pivot_root, b".", b"old")
    os.chdir("/")
    _call(_libc.umount2, b"/old", _MNT_DETACH)
    os.rmdir("/old")
    _set_attributes("/", _AT_RECURSIVE, add=_MS_RDONLY | _MS_NOSUID)
    _set_attributes("/tmp", 0, remove=_MS_RDONLY)


def _set_attributes(path: str, flags: int, add: int = 0, remove: int = 0) -> None:
    attributes = (ctypes.c_uint64 * 4)(add, remove, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.byref(attributes), size)


def _syscall(number: int, *arguments: Any) -> int:
    return _call(_libc.syscall, ctypes.c_long(number), *arguments)


def _set_limits(limits: dict[str, int]) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, limits["seconds"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _drop_privileges() -> None:
    """Drop all capabilities, and prevent gaining new ones."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call(_libc.capset, ctypes.byref(header), ctypes.byref(nothing))
    _call(_libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(_libc.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)


def _restrict_paths(readable: list[str], folder: str) -> None:
    """Restrict file access by Landlock to the readable paths, devices and a folder."""
    version = _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < min(_ALL_FILES):
        raise OSError(f"Landlock ABI {version} cannot prevent truncating files")
    everything = max(rights for since, rights in _ALL_FILES.items() if since <= version)
    tcp, scopes = _ALL_TCP if version >= 4 else 0, _ALL_SCOPES if version >= 6 else 0
    handled = (ctypes.c_uint64 * 3)(everything, tcp, scopes)
    size = ctypes.c_size_t(8 * (1 + (version >= 4) + (version >= 6)))
    rules = _syscall(_CREATE_RULESET, ctypes.byref(handled), size, 0)
    read = _EXECUTE | _READ_FILE | _READ_DIR
    rights = dict.fromkeys(readable, read) | dict.fromkeys(_DEVICES, _READ_FILE | _WRITE_FILE)
    for path, allowed in (rights | {folder: everything}).items():
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= _EXECUTE | _READ_FILE | _WRITE_FILE
        rule = allowed.to_bytes(8, sys.byteorder) + parent.to_bytes(4, sys.byteorder)
        _syscall(_ADD_RULE, rules, 1, rule, 0)
        os.close(parent)
    _syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _filter_system_calls(instructions: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    program = Program(len(instructions) // 8, instructions)
    _call(_libc.prctl, _PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


if __name__ == "__main__":
    confine()
