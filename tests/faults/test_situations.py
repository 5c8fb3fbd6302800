"""A few of the situations in the normal run, all of them with -m slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, drops Linux's capabilities")
@pytest.mark.parametrize("share", [["--every", "97"], pytest.param([], marks=pytest.mark.slow)], ids=["few", "all"])
def test_nothing_ends_in_a_traceback_a_hang_or_silence(tmp_path, share):
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.parent), *sys.path])}
    done = subprocess.run([sys.executable, folder / "situations.py", tmp_path, *share], env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
