"""Say where a figure comes from."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("solpath", "torch", "transformers", "numpy")


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return where a figure comes from: command, commit, versions, machine, load and time (UTC).

    Args:
        device: The device that the figure was taken on.

    Returns:
        Plain values, for JSON. What cannot be found out is None.

    Example:
        >>> sorted(provenance())
        ['command', 'commit', 'cpus', 'device', 'load', 'platform', 'threads', 'time', 'versions']
    """
    return {
        "command": _command(),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in _PACKAGES},
        },
        "device": _device_name(torch.device(device)),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def peak_resident_bytes() -> int | None:
    """Return the most bytes of memory that this process has held; None where it is not known.

    Example:
        >>> peak_resident_bytes() is None or peak_resident_bytes() > 1e6
        True
    """
    with contextlib.suppress(OSError):  # Linux: the other way counts the parent of the process, too
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _command() -> str:
    """Return the command line, without the folders of other places than the working directory."""
    prefix = str(Path.cwd()) + os.sep
    program = Path(sys.argv[0] or "python")
    name = str(program).removeprefix(prefix)
    if Path(name).is_absolute():
        name = program.name
    start = ["python"] if name.endswith(".py") else []
    return shlex.join([*start, name, *(_shown(argument, prefix) for argument in sys.argv[1:])])


def _shown(argument: str, prefix: str) -> str:
    """Return an argument with a path relative to the working directory, or else without folders."""
    option, sign, value = argument.rpartition("=")
    path = value.removeprefix(prefix)
    return option + sign + (Path(path).name if Path(path).is_absolute() else path)


def _commit() -> str | None:
    """Return the commit of the checkout that this package is in; None for an installed copy."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        for command in (
            [*git, "ls-files", "--error-unmatch", here.name],
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            if done.returncode:
                return None
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
