"""Resident memory of this process, as Linux tells it. It imports nothing of solpath, so that other
versions can be measured."""

import threading
from pathlib import Path


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
