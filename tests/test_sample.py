"""scripts.sample as a user runs it."""

import signal
import subprocess
import sys

import pytest
from checkpoints import write_model
from corpus import GOLDEN_TOKENIZER, golden_tokenizer

from nanochat.engine import stream
from scripts.sample import main

MODEL = ["--model-tag", "tiny", "--tokenizer-dir", GOLDEN_TOKENIZER]
PROGRAM = [sys.executable, "-m", "scripts.sample", *MODEL]


@pytest.fixture
def model(monkeypatch):
    """A small model whose samples are the same in every process."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return write_model()


def expected(model, prompt, seed=42, n=128, top_k=50, temperature=0.8):
    tokenizer = golden_tokenizer()
    new = stream(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], n, seed=seed,
                 temperature=temperature, top_k=top_k,
                 stop_ids=range(tokenizer.vocab_size - 9, tokenizer.vocab_size))
    return prompt + tokenizer.decode(list(new)) + "\n"


def sampled(capsys, *arguments):
    assert main([*MODEL, *arguments]) == 0
    return capsys.readouterr()


def test_prompts_are_continued(model, capsys):
    done = sampled(capsys, "the red", "", "--num-samples", "2")
    assert done.out == "".join(expected(model, prompt, seed)
                               for prompt in ("the red", "") for seed in (42, 43))
    assert "tiny_000007 in torch.float32" in done.err and "4 samples, " in done.err


def test_the_flags_are_those_of_the_sampler(model, capsys):
    done = sampled(capsys, "a", "--max-new-tokens", "9", "--top-k", "0", "--temperature", "2",
                   "--seed", "5")
    assert done.out == expected(model, "a", 5, 9, None, 2.0)
    for temperature in ("0", "1e-38", "1e-300"):
        done = sampled(capsys, "a", "--max-new-tokens", "9", "--temperature", temperature)
        assert done.out == expected(model, "a", n=9, temperature=0)


def test_lines_of_the_standard_input_are_prompts(model):
    done = subprocess.run([*PROGRAM, "--max-new-tokens", "3"], capture_output=True, timeout=120,
                          input="the red\na \xff\n".encode("latin1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "".join(
        expected(model, prompt, n=3) for prompt in ("the red", "a \ufffd"))


def test_control_characters_are_escaped_in_a_terminal_only(model, capsys, monkeypatch):
    prompt, few = "a\x1b[2J\x9b\tb\n\r", ["--max-new-tokens", "1", "--temperature", "0"]
    assert sampled(capsys, prompt, *few).out.startswith(prompt)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert sampled(capsys, prompt, *few).out.startswith("a\\x1b[2J\\x9b\tb\n\\x0d")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--num-samples", "0"], "--num-samples"),
    (["--seed", "-1"], "--seed"),
    (["--step", "3"], "no checkpoint of step 3"),
    (["--temperature", "nan"], "temperature"),
    (["--max-new-tokens", "1000"], "ask for fewer"),
])
def test_a_mistake_is_one_line_with_exit_code_2(model, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main([*MODEL, "a", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and words in said.err.splitlines()[-1] and not said.out


@pytest.mark.parametrize("end", ["Ctrl-C", "closed pipe"])
def test_text_appears_as_it_is_generated_and_an_early_end_is_one_line(model, end):
    process = subprocess.Popen(
        [*PROGRAM, "a", "--max-new-tokens", "600", "--num-samples", "1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with process:
        assert process.stdout.read(20)  # long before the end
        if end == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        process.stdout.close()
        lines = process.stderr.read().decode().splitlines()
        code = process.wait(60)
    if end == "Ctrl-C":
        assert code == 130 and len(lines) == 2 and "interrupted" in lines[1]
    else:
        assert code == 0 and lines[1:] == ["the output was closed; stopped"]
