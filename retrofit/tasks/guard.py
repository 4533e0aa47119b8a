"""Runs one program under limits, in a process of its own; started by `execution.py`, imports nothing of ours.

    python -I guard.py PROGRAM VERDICT SECONDS BYTES        a word that says "passed" is read from standard input

A model wrote the program, so nothing of it is trusted, and it is not thought hostile either: limits of processor time,
memory and file size, no sockets, no other processes, no file written or removed.  VERDICT gets a line of JSON before
the program runs and one after it.
"""

import json
import os
import sys
import traceback
from pathlib import Path

FILE_BYTES = 1 << 20
OPEN_FILES = 64
FORBIDDEN = (
    *("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate"),
    *("shutil.", "pty.", "signal.pthread_kill"),
)
"""Beginnings of audit events that end the program."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(seconds: int, memory: int) -> None:
    """Limits of the system on this process."""
    import resource

    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError):  # macOS knows no limit of address space
            continue


def forbid(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: there is no way to take one off."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"not allowed here: {event}{' for writing' if writes else ''}")


def main() -> None:
    source, word = Path(sys.argv[1]).read_text(encoding="utf-8"), sys.stdin.readline().strip()
    verdict = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
    told: dict[str, object] = {"error": None, "word": None}
    limit(int(sys.argv[3]), int(sys.argv[4]))
    os.write(verdict, json.dumps(told).encode() + b"\n")
    sys.addaudithook(forbid)
    try:
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})
        told["word"] = word
    except BaseException as error:  # a program may end by SystemExit, KeyboardInterrupt or MemoryError
        told["error"] = traceback.format_exception_only(error)[-1].strip()[:200]
    os.write(verdict, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main()
