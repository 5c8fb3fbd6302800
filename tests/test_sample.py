"""scripts.sample as a user runs it."""

import subprocess
import sys

import pytest
from checkpoints import write_model
from corpus import GOLDEN_TOKENIZER, golden_tokenizer

from nanochat.engine import stream
from scripts.sample import main

MODEL = ["--model-tag", "tiny", "--tokenizer-dir", GOLDEN_TOKENIZER]


@pytest.fixture
def model(fp32):
    return write_model()


def expected(model, prompt, seed=42, n=128, top_k=50, temperature=0.8):
    tokenizer = golden_tokenizer()
    tokens = stream(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], n, seed=seed,
                    temperature=temperature, top_k=top_k,
                    stop_ids=range(tokenizer.vocab_size - 9, tokenizer.vocab_size))
    return prompt + tokenizer.decode(list(tokens)) + "\n"


def sampled(capsys, *arguments):
    assert main([*MODEL, *arguments]) == 0
    return capsys.readouterr()


def test_prompts_are_continued_as_the_flags_say(model, capsys):
    done = sampled(capsys, "the red", "", "--num-samples", "2")
    assert done.out == "".join(expected(model, prompt, seed)
                               for prompt in ("the red", "") for seed in (42, 43))
    assert "tiny_000007 in torch.float32" in done.err
    done = sampled(capsys, "a", "--max-new-tokens", "9", "--top-k", "0", "--temperature", "2",
                   "--seed", "5")
    assert done.out == expected(model, "a", 5, 9, None, 2.0)
    done = sampled(capsys, "a", "--max-new-tokens", "9", "--temperature", "0")
    assert done.out == expected(model, "a", n=9, temperature=0)


def test_without_a_tag_the_newest_checkpoint_is_used_and_named(model, capsys):
    write_model("newest", step=9)
    main(["--tokenizer-dir", GOLDEN_TOKENIZER, "a", "--max-new-tokens", "1"])
    assert "newest_000009 (the newest checkpoint)" in capsys.readouterr().err


def test_lines_of_the_standard_input_are_prompts(model):
    program = [sys.executable, "-m", "scripts.sample", *MODEL, "--max-new-tokens", "3"]
    done = subprocess.run(program, capture_output=True, timeout=120,
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
    (["--step", "3"], "no checkpoint of step 3"),
    (["--model-tag", "large"], "tiny"),
    (["--temperature", "nan"], "temperature"),
    (["--max-new-tokens", "1000"], "ask for fewer"),
])
def test_a_mistake_is_one_line_with_exit_code_2(model, refusal, arguments, words):
    assert words in refusal(main, [*MODEL, "a", *arguments]).splitlines()[-1]
