"""Every file that is read, damaged: what comes back is what was written, or one line names the file."""

import contextlib

import pytest
from damage import CASES, STRANGE, damages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.common import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that read what is not theirs
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
MANY = settings(FEW, max_examples=500, derandomize=False)


@pytest.fixture(params=CASES)
def sound(request, tmp_path):
    """A case with its files in place: (case, folder, the files, their bytes, what is read of them)."""
    case = CASES[request.param]
    files = case.make(tmp_path)
    return case, tmp_path, files, [path.read_bytes() for path in files], case.read(tmp_path)


def check(sound, data):
    case, folder, files, contents, value = sound
    at = data.draw(st.integers(0, len(files) - 1), label="file")
    damaged = data.draw(damages(contents[at]), label="bytes")
    files[at].write_bytes(damaged)
    try:
        found = case.read(folder)
    except UserError as error:
        assert str(error).strip()
    else:
        assert not case.exact or found == value, f"{files[at].name}: other content, in silence"
    finally:
        files[at].write_bytes(contents[at])


@FEW
@given(st.data())
def test_damage_is_harmless_or_named(sound, data):
    check(sound, data)


@pytest.mark.slow
@MANY
@given(st.data())
def test_any_damage_is_harmless_or_named(sound, data):
    check(sound, data)


def test_strange_files_are_named_and_missing_ones_and_folders_in_their_place(sound):
    case, folder, files, contents, value = sound
    for path, content in zip(files, contents, strict=True):
        for strange in (*STRANGE, None, "folder"):
            path.unlink()
            if strange == "folder":
                path.mkdir()
            elif strange is not None:
                path.write_bytes(strange)
            with contextlib.suppress(UserError):
                assert case.read(folder) == value or not case.exact
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)
    assert case.read(folder) == value
