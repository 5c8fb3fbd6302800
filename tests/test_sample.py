"""The program that tries a model, as a person runs it."""

import os
import pty
import select
import shlex
import signal
import subprocess
import sys

import pytest
from checkpoints import write_model
from corpus import GOLDEN_TOKENIZER, golden_tokenizer

from nanochat.checkpoint import checkpoint_folder
from nanochat.engine import generate
from scripts.sample import main

PROGRAM = [sys.executable, "-m", "scripts.sample", "--model-tag", "tiny", "--tokenizer-dir", GOLDEN_TOKENIZER]


@pytest.fixture
def model(monkeypatch):
    """A small model; what it samples is the same text in every process."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return write_model()


def expected(model, prompt, seed=42, n=128, top_k=50, temperature=0.8):
    tokenizer = golden_tokenizer()
    stops = [tokenizer.vocab_size - 1 - i for i in range(9)]
    [new] = generate(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], n, temperature=temperature, top_k=top_k,
                     seed=seed, stop_ids=stops)
    return prompt + tokenizer.decode(new) + "\n"


def sampled(capsys, *arguments):
    assert main(["--model-tag", "tiny", "--tokenizer-dir", GOLDEN_TOKENIZER, *arguments]) == 0
    return capsys.readouterr()


def test_prompts_are_continued_and_the_end_says_what_to_do_next(model, capsys):
    done = sampled(capsys, "the red", "", "--num-samples", "2")
    assert done.out == "".join(expected(model, prompt, seed) for prompt in ("the red", "") for seed in (42, 43))
    assert "tiny_000007 on " in done.err
    assert "4 sample(s), " in done.err and "python -m scripts.export --model-tag tiny" in done.err


def test_the_next_command_is_of_the_same_checkpoint_as_a_shell_takes_it(model, tmp_path, capsys):
    folder = tmp_path / "with space" / "tiny"
    folder.parent.mkdir()
    folder.symlink_to(checkpoint_folder("tiny"))
    assert main(["--model-tag", str(folder), "--tokenizer-dir", GOLDEN_TOKENIZER, "--step", "7", "a",
                 "--max-new-tokens", "1"]) == 0
    assert shlex.split(capsys.readouterr().err.splitlines()[-1]) == [
        "python", "-m", "scripts.export", "--model-tag", str(folder), "--step", "7", "--tokenizer-dir",
        GOLDEN_TOKENIZER, "--to", "tiny"]


def test_the_flags_are_those_of_the_sampler(model, capsys):
    done = sampled(capsys, "a", "--max-new-tokens", "9", "--top-k", "0", "--temperature", "2", "--seed", "5")
    assert done.out == expected(model, "a", 5, 9, None, 2.0)
    assert sampled(capsys, "a", "--max-new-tokens", "9", "--temperature", "0").out == expected(
        model, "a", n=9, temperature=0)


def test_lines_of_the_standard_input_are_prompts(model):
    done = subprocess.run([*PROGRAM, "--max-new-tokens", "3"], input="the red\na \xff\n".encode("latin1"),
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == expected(model, "the red", n=3) + expected(model, "a \ufffd", n=3)


def test_control_characters_are_codes_in_a_terminal_alone(model, capsys, monkeypatch):
    prompt = "a\x1b[2J\x9b\tb\n\r"
    few = ["--max-new-tokens", "1", "--temperature", "0"]
    assert sampled(capsys, prompt, *few).out.startswith(prompt)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert sampled(capsys, prompt, *few).out.startswith("a\\x1b[2J\\x9b\tb\n\\x0d")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--num-samples", "0"], "--num-samples"), (["--seed", "-1"], "--seed"),
    (["--step", "3"], "no checkpoint of step 3"),
    (["--temperature", "nan"], "temperature"), (["--max-new-tokens", "1000"], "ask for fewer"),
])
def test_a_mistake_is_one_line_with_exit_code_2(model, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main(["--model-tag", "tiny", "--tokenizer-dir", GOLDEN_TOKENIZER, "a", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and words in said.err.splitlines()[-1] and not said.out


def started(*arguments, **streams):
    """The program; Ctrl-C reaches it also where these tests run in the background of a shell, which ignores it."""
    return subprocess.Popen([*PROGRAM, *arguments], stderr=subprocess.PIPE, **streams,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_text_comes_as_it_is_made_and_ctrl_c_is_one_line(model):
    with started("a", "--max-new-tokens", "600", "--num-samples", "1000", stdout=subprocess.PIPE) as process:
        assert process.stdout.read(20)  # long before the end
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    lines = said.decode().splitlines()
    assert process.returncode == 130 and len(lines) == 2 and lines[1].startswith("error: interrupted")


def test_a_closed_pipe_is_one_line(model):
    with started("a", "--max-new-tokens", "600", "--num-samples", "1000", stdout=subprocess.PIPE) as process:
        process.stdout.read(20)
        process.stdout.close()
        lines = process.stderr.read().decode().splitlines()
        process.wait(60)
    assert process.returncode == 0 and lines[1:] == ["warning: the output was closed; stopped"]


def test_a_terminal_is_asked_for_prompts_and_outlives_a_mistake_and_ctrl_c(model):
    terminal, inner = pty.openpty()
    with started("--max-new-tokens", "600", stdin=inner, stdout=inner) as process:
        os.close(inner)

        shown = bytearray()

        def until(words):
            """Read what the terminal shows up to these words; what came after them is for the next call."""
            while words not in shown:
                assert select.select([terminal], [], [], 60)[0], bytes(shown)
                shown.extend(os.read(terminal, 1000))
            end = shown.index(words) + len(words)
            before, shown[:] = bytes(shown[:end]), shown[end:]
            return before

        until(b"> ")
        os.write(terminal, b"x" * 300 + b"\n")  # with the new tokens, more than the model takes
        until(b"> ")
        os.write(terminal, b"the red\n")
        until(b"the red")  # as typed
        sample = until(b"the red")
        process.send_signal(signal.SIGINT)
        sample += until(b"> ")
        os.write(terminal, b"\x04")
        said = process.stderr.read().decode()
        process.wait(60)
        os.close(terminal)
    assert process.returncode == 0, said
    assert "ask for fewer" in said and "interrupted" in said and "0 sample(s)" in said
    assert not any(byte < 32 and byte not in b"\r\n\t\x1b" for byte in sample)
