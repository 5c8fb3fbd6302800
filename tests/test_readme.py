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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("ideas/*.md"))]


def blocks(page, marked="(?: run)?"):
    return re.findall(rf"^```bash{marked}\n(.*?)^```$", page.read_text(encoding="utf-8"),
                      re.MULTILINE | re.DOTALL)


def commands():
    """Return the words of each command in the pages, without comments."""
    text = "\n".join(body for page in PAGES for body in blocks(page)).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def python_commands():
    """Return (module, arguments) of every command that runs a module, also by torchrun."""
    for words in commands():
        if "-m" in words and words[0] in ("python", "torchrun"):
            module, *arguments = words[words.index("-m") + 1:]
            arguments = [re.sub(r"\$\w+", "0", word) for word in arguments]
            if module not in ("pip", "venv"):
                yield module, [word for word in arguments if word not in ("...", "…")]


@pytest.mark.parametrize(("module", "arguments"), [*python_commands()],
                         ids=lambda value: str(value)[:60])
def test_a_command_of_the_pages_has_flags_that_exist(module, arguments):
    parse_args = importlib.import_module(module).parse_args
    assert parse_args(arguments) is not None  # else it has ended the test by SystemExit


def test_scripts_of_the_pages_exist():
    named = {word for words in commands() for word in words if word.endswith(".sh")}
    assert "runs/test.sh" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_the_readme_runs_in_a_clean_clone(tmp_path):
    """Run the marked blocks in one shell, with a folder of text and this environment's packages."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    (clone / ".venv").mkdir()
    (clone / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    wanted = subprocess.run("cksum < pyproject.toml", shell=True, cwd=clone, text=True,
                            capture_output=True).stdout
    (clone / ".venv" / ".installed").write_text(f"dev,report {wanted}")  # as runs/setup.sh has it
    text = clone / "my_folder"
    text.mkdir()
    for number, path in enumerate(sorted((Path(os.__file__).parent / "email").glob("*.py")) * 4):
        (text / f"{number}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    script = "set -euo pipefail\n" + "\n".join(blocks(ROOT / "README.md", " run"))
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(clone)}
    run = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
