"""The rules of Windows, given to a process on Linux: what Windows refuses is refused here too, in its own numbers.

Each rule is as strict as Windows on NTFS without long paths and without the right to make links. Sources: CreateFileW,
MoveFileExW, DeleteFileW, FlushFileBuffers, "Naming Files, Paths, and Namespaces" (learn.microsoft.com); `os`, `signal`
and `subprocess` in Python's manual, under "Availability".

Who holds a file is read from /proc: open handles and mappings of this process and of those it started, so nothing that
a library opens or maps in C escapes. What is *not* shown: other letters in paths, another encoding of text files (a
test of the sources demands that each names its own), locks of `msvcrt`, pipes that cannot be polled.
"""

from __future__ import annotations

import builtins
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NoReturn

NO_MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
NOT_IN_OS = (
    "O_CLOEXEC", "O_DIRECTORY", "O_DSYNC", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "WNOHANG", "chown", "chroot",
    "ctermid", "fchmod", "fchown", "fdatasync", "fork", "forkpty", "fstatvfs", "getegid", "geteuid", "getgid",
    "getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "lchown", "mkfifo",
    "mknod", "nice", "openpty", "posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev",
    "sched_getaffinity", "sched_setaffinity", "sched_yield", "sendfile", "setpgid", "setpriority", "setsid", "statvfs",
    "sync", "sysconf", "uname", "wait", "wait3", "wait4",
)  # fmt: skip
SIGNALS = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM")
SIGBREAK = 21
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE)
MAX_PATH = 259
DENIED, SHARED, EXISTS, BAD_NAME, NOT_FOUND, MAPPED, NO_PRIVILEGE = 5, 32, 183, 123, 3, 1224, 1314
OUTSIDE = ("/proc/", "/sys/", "/dev/")
_ERRNO = {EXISTS: errno.EEXIST, BAD_NAME: errno.EINVAL, NOT_FOUND: errno.ENOENT, MAPPED: errno.EINVAL}


def impose() -> None:
    """Give this process the rules, for good."""
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    _allow_only_windows_signals()
    _start_as_windows_does()
    os.fsync, os.rename = _fsync(os.fsync), _rename(os.rename)
    _hide(os, NOT_IN_OS)
    _hide(signal, [name for name in dir(signal) if re.fullmatch("SIG[A-Z0-9]+", name) and name not in SIGNALS])
    for name, number in {"SIGBREAK": SIGBREAK, "CTRL_C_EVENT": 0, "CTRL_BREAK_EVENT": 1}.items():
        setattr(signal, name, number)
    builtins.__import__ = _import(builtins.__import__)
    sys.addaudithook(_judge)


def _is_ours(scope: Any) -> bool:
    """Whether code of this scope must do without: libraries have code of their own for Windows, not seen here."""
    return _is_of(scope, "lora_booth", "__main__")


def _is_of(scope: Any, *packages: str) -> bool:
    return scope is not None and str(scope.get("__name__")).partition(".")[0] in packages


def _hide(module: ModuleType, names: Iterable[str]) -> None:
    """Take `names` away from `module`, for those who must do without."""
    hidden = {name: vars(module).pop(name) for name in names if name in vars(module)}

    class Hiding(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in hidden and not _is_ours(sys._getframe(1).f_globals):
                return hidden[name]
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    module.__class__ = Hiding


def _import(honest: Callable[..., Any]) -> Callable[..., Any]:
    def find(name: str, globals: Any = None, *rest: Any, **more: Any) -> Any:
        if name in NO_MODULES and _is_ours(globals):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return honest(name, globals, *rest, **more)

    return find


def _judge(event: str, words: tuple[Any, ...]) -> None:
    """Python tells its every use of the disk here before it happens."""
    if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"):
        return
    if not isinstance(words[0], (str, bytes, os.PathLike)):
        return
    path = os.path.abspath(os.fsdecode(words[0]))
    if path.startswith(OUTSIDE):
        return
    if event == "open":
        _judge_open(path, words[2])
    elif event == "os.rename":
        _judge_rename(path, os.path.abspath(os.fsdecode(words[1])))
    elif event == "os.mkdir":
        judge_new(path)
    elif event == "os.symlink":
        _refuse(NO_PRIVILEGE, path)
    elif not _is_lock():
        _judge_removal(path)


def _is_lock() -> bool:
    """Whether `filelock` is asking, which removes its file in another way on Windows."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "pathlib":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and _is_of(frame.f_globals, "filelock")


def _judge_open(path: str, flags: int) -> None:
    if os.path.isdir(path):
        _refuse(DENIED, path)
    if flags & os.O_CREAT:
        judge_new(path)
    is_written = flags & (os.O_WRONLY | os.O_RDWR)
    if is_written and os.path.exists(path):
        if not os.stat(path).st_mode & 0o200:
            _refuse(DENIED, path)
        if flags & os.O_TRUNC and os.path.realpath(path) in set(_mapped()):
            _refuse(MAPPED, path)


def _judge_rename(source: str, target: str) -> None:
    judge_new(target)
    is_folder = os.path.isdir(source)
    if is_held(source):
        _refuse(DENIED if is_folder else SHARED, source)
    if os.path.isdir(target) or (os.path.exists(target) and is_held(target)):
        _refuse(DENIED, target)
    if os.path.exists(target) and not os.stat(target).st_mode & 0o200:
        _refuse(DENIED, target)


def _judge_removal(path: str) -> None:
    if os.path.exists(path):
        if is_held(path):
            _refuse(SHARED, path)
        if not os.stat(path).st_mode & 0o200:
            _refuse(DENIED, path)


def judge_new(path: str) -> None:
    """Names that Windows refuses, and those that it would change or take for another file's, which no test may want."""
    folder, name = os.path.split(path)
    if re.search(r'[<>:"|?*\\\x00-\x1f]', name) or name.endswith((" ", ".")) or DEVICE.fullmatch(name):
        _refuse(BAD_NAME, path)
    if len(path) > MAX_PATH or len(name.encode("utf-16-le", "surrogatepass")) > 2 * 255:
        _refuse(NOT_FOUND, path)
    if os.path.isdir(folder) and not os.path.lexists(path):
        alike = [other for other in os.listdir(folder) if other.upper() == name.upper()]
        if alike:
            _refuse(EXISTS, path)


def is_held(path: str) -> bool:
    """Whether this process, or one that it started, has `path` or something in it open or mapped."""
    path = os.path.realpath(path)
    return any(held == path or held.startswith(path + os.sep) for held in _open_and_mapped())


def _open_and_mapped() -> Iterator[str]:
    for pid in ("self", *_children("self")):
        try:
            handles = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # it has just ended
        for handle in handles:
            try:
                yield os.readlink(f"/proc/{pid}/fd/{handle}")
            except OSError:
                continue
        yield from _mapped(pid)


def _mapped(pid: str = "self") -> Iterator[str]:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            yield from {line.split(maxsplit=5)[5].rstrip("\n") for line in file if line.count("/")}
    except OSError:
        return


def _children(pid: str) -> list[str]:
    found: list[str] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += file.read().split()
        except OSError:
            continue
    return found


def _refuse(number: int, path: str) -> NoReturn:
    error = OSError(_ERRNO.get(number, errno.EACCES), f"refused as Windows does, error {number}", path)
    error.winerror = number  # type: ignore[attr-defined]
    raise error


def _fsync(honest: Callable[[int], None]) -> Callable[[int], None]:
    import fcntl

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        honest(descriptor)

    return fsync


def _rename(honest: Callable[..., None]) -> Callable[..., None]:
    def rename(source: Any, target: Any, **more: Any) -> None:
        if os.path.lexists(target):
            _refuse(EXISTS, os.fsdecode(target))
        honest(source, target, **more)

    return rename


def _allow_only_windows_signals() -> None:
    honest = signal.signal
    allowed = {int(getattr(signal, name)) for name in SIGNALS} | {SIGBREAK}

    def set_handler(number: int, handler: Any) -> Any:
        if int(number) not in allowed:
            raise ValueError("invalid signal value")
        return honest(number, handler)

    signal.signal = set_handler  # type: ignore[assignment]


def _start_as_windows_does() -> None:
    honest = subprocess.Popen.__init__

    def start(self: Any, *words: Any, **more: Any) -> None:
        if more.get("preexec_fn") is not None:
            raise ValueError("preexec_fn is not supported on Windows platforms")
        honest(self, *words, **more)

    def kill(self: Any) -> None:
        if self.poll() is None:
            os.kill(self.pid, 9)

    subprocess.Popen.__init__ = start  # type: ignore[method-assign]
    subprocess.Popen.kill = subprocess.Popen.terminate = kill  # type: ignore[method-assign]
