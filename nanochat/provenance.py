"""What made a result, and when: the time, the commit and the versions of what computed it."""

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path


def utc_now():
    """Now in UTC, as records write it: 2026-01-31T23:59:59Z."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_commit():
    """(commit, dirty) of the checkout this package runs from; (None, None) outside one.

    Dirty: a tracked file differs, other than the ledgers and logs that experiments themselves write to.
    """
    def git(*words):
        done = subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        code = (":(top)", ":(top,exclude)*.csv", ":(top,exclude)*.md")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", *code))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def versions():
    """Versions of Python and of the packages that decide the numbers."""
    packages = ("torch", "triton", "numpy", "nanochat")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
