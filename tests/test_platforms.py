"""What other platforms lack is not needed: macOS, ARM and WSL without a GPU have no Triton."""

import os
import subprocess
import sys
from pathlib import Path

from corpus import TINY_FLAGS, write_corpus

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails, as where it is not installed
from scripts.base_train import main
main(sys.argv[1:])
"""


def test_training_needs_no_triton(tmp_path):
    flags = [*map(str, TINY_FLAGS), "--dataset", str(write_corpus(tmp_path / "text")), "--num-iterations", "2",
             "--run-id", "run", "--model-tag", "run"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, *flags], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "runs" / "run" / "summary.json").exists()
