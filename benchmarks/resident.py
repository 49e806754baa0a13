"""Resident memory of this process, as Linux tells it, and a limit on it. It imports nothing of
solpath, so that other versions can be measured."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

GROUPS = {  # where control groups are, by the file that limits their memory
    "memory.max": Path("/sys/fs/cgroup"),
    "memory.limit_in_bytes": Path("/sys/fs/cgroup/memory"),
}


def resident(field: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` at its peak, ``RssAnon`` what no
    file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"no {field} in /proc/self/status; resident memory needs Linux.")


class Watch:
    """Watches, while its block runs, the most bytes that no file backs (``anonymous``)."""

    def __enter__(self) -> "Watch":
        self.anonymous = resident("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.anonymous = max(self.anonymous, resident("RssAnon"))


@contextlib.contextmanager
def limited(count: int) -> Iterator[str]:
    """Limit this process, for good, to so many bytes; yield by what.

    A control group counts all its resident memory and the files that it has in the system's cache,
    and kills it beyond the limit; making one takes the rights of root. Else it is RLIMIT_DATA, by
    which allocations fail. Use it in a process that ends with the block.
    """
    for name, root in GROUPS.items():
        group = root / f"solpath-{os.getpid()}"
        try:
            group.mkdir()
            rest = count - resident("VmRSS")  # which another group has been charged for
            for file, value in ((name, rest), ("cgroup.procs", os.getpid())):
                with (group / file).open("r+") as handle:  # the kernel has made it, or it is none
                    handle.write(str(value))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield "control group"
        finally:
            (root / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()
        return
    resource.setrlimit(resource.RLIMIT_DATA, (count, count))
    yield "RLIMIT_DATA"
