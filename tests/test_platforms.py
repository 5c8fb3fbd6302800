"""Training needs no Triton, which macOS, ARM and machines without a GPU lack."""

import os
import subprocess
import sys
from pathlib import Path

from corpus import TINY_FLAGS

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails, as if it were not installed
from scripts.base_train import main
main(sys.argv[1:])
"""


def test_training_needs_no_triton(corpus, base_dir):
    flags = [*TINY_FLAGS, "--dataset", corpus, "--num-iterations", "2", "--run-id", "run"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, *flags], text=True,
                          capture_output=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.returncode == 0, done.stderr
    assert (base_dir / "runs" / "run" / "summary.json").exists()
