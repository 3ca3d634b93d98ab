"""Says in one sentence whether TruthGPT can be installed here; `make install` asks before it builds anything.

Standard library only and no syntax newer than Python 3.6: it has to run where TruthGPT does not.
"""

import importlib.util
import os
import platform
import sys

MIN_GLIBC = (2, 35)
PYTHONS = ((3, 11), (3, 12))
SYSTEM_HINT = "use an x86-64 machine with Debian 12 or newer, or Ubuntu 24.04 or newer"
PYTHON_HINT = "install Python 3.11 or 3.12 and name it: make install PYTHON=python3.12"


def fault(system, machine, glibc, python, has_venv):
    """What is wrong and what to do about it, or None.

    `system` is sys.platform, `machine` platform.machine(), `glibc` the version of the GNU C library or "" for another
    one, `python` the interpreter's (major, minor), `has_venv` whether it can make virtual environments with pip.
    """
    if not system.startswith("linux"):
        return f"TruthGPT runs on Linux, this is {system}", SYSTEM_HINT
    if machine not in ("x86_64", "AMD64"):
        return f"TruthGPT needs an x86-64 processor, this one is {machine}", SYSTEM_HINT
    numbers = tuple(int(part) for part in glibc.split(".")[:2] if part.isdigit())
    if numbers < MIN_GLIBC:
        found = "glibc " + glibc if glibc else "another C library"
        return "Triton's server needs glibc 2.35 or newer, this system has " + found, SYSTEM_HINT
    if tuple(python) not in PYTHONS:
        return "TruthGPT needs Python 3.11 or 3.12, this is {}.{}".format(*python), PYTHON_HINT
    if not has_venv:
        package = "python{}.{}-venv".format(*python)
        return "this Python cannot make virtual environments", "install them first: apt-get install " + package
    return None


def glibc_version():
    """Version of the GNU C library, such as "2.36"; "" when the C library is another one."""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
    except (AttributeError, OSError, ValueError):
        name, version = platform.libc_ver()
    return version if name == "glibc" else ""


def has_venv():
    # Debian ships venv without ensurepip until python3-venv is installed.
    return all(importlib.util.find_spec(name) is not None for name in ("venv", "ensurepip"))


def main():
    found = fault(sys.platform, platform.machine(), glibc_version(), sys.version_info[:2], has_venv())
    if found is None:
        return 0
    sys.stderr.write("error: {}\nhint: {}\n".format(*found))
    return 1


if __name__ == "__main__":
    sys.exit(main())
