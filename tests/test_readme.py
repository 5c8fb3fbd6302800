"""Every command of the pages parses; the README's blocks marked `bash run` run in order."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for path in ("README.md", "CONTRIBUTING.md", *sorted(ROOT.glob("ideas/*.md")))
    if (ROOT / path).exists()
]
BLOCK = re.compile(r"^```bash( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, runnable=False):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for run, body in BLOCK.findall(text) if run or not runnable]


def commands(page):
    """Each command of a page's blocks as words, comments left out and lines that go on joined."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def python_commands():
    """(module, arguments) of every command that runs one, also by torchrun."""
    found = []
    for page in PAGES:
        for words in commands(page):
            if "-m" in words and words[0] in ("python", "torchrun"):
                module, *arguments = (
                    re.sub(r"\$\w+", "0", word) for word in words[words.index("-m") + 1 :]
                )
                found.append((module, [word for word in arguments if word not in ("...", "…")]))
    return found


@pytest.mark.parametrize(
    ("module", "arguments"), python_commands(), ids=lambda value: str(value)[:60]
)
def test_a_command_of_the_pages_has_flags_that_exist(module, arguments):
    if module in ("pip", "venv"):
        return
    parse_args = importlib.import_module(module).parse_args
    assert parse_args(arguments) is not None  # else it has ended the test by SystemExit


def test_scripts_of_the_pages_exist():
    named = {
        word for page in PAGES for words in commands(page) for word in words if word.endswith(".sh")
    }
    assert "runs/test.sh" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_the_readme_runs_in_a_clean_clone(tmp_path):
    """Run the blocks in one shell, with a folder of text and the installation of this
    environment; only blocks that need no network but packages are marked."""
    clone, home = tmp_path / "clone", tmp_path / "home"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    (clone / ".venv").mkdir()
    (clone / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    wanted = subprocess.run(
        "cksum < pyproject.toml", shell=True, cwd=clone, text=True, capture_output=True
    ).stdout
    (clone / ".venv" / ".installed").write_text(
        f"dev,report {wanted}", encoding="utf-8"
    )  # as runs/setup.sh has it
    text = clone / "my_folder"
    text.mkdir()
    for number, path in enumerate(sorted((Path(os.__file__).parent / "email").glob("*.py")) * 4):
        (text / f"{number}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    script = "set -euo pipefail\n" + "\n".join(blocks("README.md", runnable=True))
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(clone)}
    run = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
