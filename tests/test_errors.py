import os
import shlex
import subprocess
import sys

import pytest

from nanochat.common import UserError, command


class Refusal(UserError):
    exit_code = 3


def main_that(result):
    @command
    def main(argv=None):
        """What it does."""
        if isinstance(result, BaseException):
            raise result
        return result, argv

    return main


@pytest.mark.parametrize(("error", "code"), [(UserError("no shards; run x"), 2), (Refusal("no shards; run x"), 3)])
def test_user_error_is_one_line_on_stderr_and_its_exit_code(capsys, error, code):
    with pytest.raises(SystemExit) as exit_info:
        main_that(error)()
    assert exit_info.value.code == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: no shards; run x\n")


def test_message_of_several_lines_is_printed_as_one(refusal):
    lines = "first\n  second\r\n\tthird\u2028fourth"
    assert refusal(main_that(UserError(lines))) == "error: first second third fourth\n"


def test_ranks_above_0_say_which_one_they_are(refusal, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert refusal(main_that(UserError("no shards; run x"))) == "error (rank 3): no shards; run x\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), AssertionError(), RuntimeError("a bug")])
def test_errors_that_are_not_the_users_pass_through(error):
    with pytest.raises(type(error)) as caught:
        main_that(error)()
    assert caught.value is error


@pytest.mark.parametrize(("error", "said", "exit_code"), [
    (KeyboardInterrupt(), "interrupted", 130),
    (PermissionError(13, "Permission denied", "/cache/x"), "/cache/x: Permission denied", 2),
    (OSError(28, "No space left on device"), "error: No space left on device", 2),
    (MemoryError(), "out of memory (no more is to be had); lower --device-batch-size", 2),
    (RuntimeError("CUDA out of memory. Tried 2 GiB\nmore"), "Tried 2 GiB); lower --device-batch-size", 2),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower --device-batch-size", 2)],
    ids=lambda value: type(value).__name__)
def test_what_the_machine_refuses_is_one_line(refusal, error, said, exit_code):
    printed = refusal(main_that(error), exit_code=exit_code)
    assert said in printed and printed.count("\n") == 1


def test_a_rank_that_is_gone_is_named_where_there_are_several(refusal, monkeypatch):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError):
        main_that(lost)()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another rank is gone" in refusal(main_that(lost))
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3600000ms for recv")
    assert "within its time limit" in refusal(main_that(late))


def test_result_and_arguments_pass_through():
    assert main_that(7)() == (7, None)
    assert main_that(7)(["--flag"]) == (7, ["--flag"])


def test_wrapped_main_keeps_its_name_and_docstring():
    main = main_that(0)
    assert (main.__name__, main.__doc__) == ("main", "What it does.")


def test_an_ascii_terminal_shows_what_it_can():
    code = "from nanochat.common import command\ncommand(lambda argv: print('Stra\\xdfe \\u4e2d'))()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout == b"Stra\\xdfe \\u4e2d\n"


def test_output_that_cannot_be_written_is_said_once_and_then_goes_nowhere():
    code = "from nanochat.common import say\nfor i in range(3):\n    say('line', i)"
    done = subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} > /dev/full"],
                          capture_output=True, check=True)
    assert done.stderr.count(b"warning: the output cannot be written") == 1 == done.stderr.count(b"\n")
