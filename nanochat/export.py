"""Export a trained model: a folder for Hugging Face's transformers, or in upstream's layout.

Neither format needs another library here; the transformers folder carries modeling_nanochat.py.
"""

import contextlib
import os
import secrets
import shutil
import struct
from pathlib import Path

import numpy as np

from nanochat.common import UserError, json_bytes, write_json, write_text
from nanochat.tokenizer import BOS

MODELING = Path(__file__).with_name("modeling_nanochat.py")
ALIGNMENT = 64  # bytes; a matmul on other addresses may sum in another order
CARD = """# {name}

A language model of {millions:,.1f} million parameters, trained on {tokens:,} tokens, for
`transformers`. Its code is in this folder, so loading it needs `trust_remote_code`: read
modeling_nanochat.py first, it is short.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("The")]])  # documents begin with BOS
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0, 1:]))
```
"""


@contextlib.contextmanager
def new_folder(folder):
    """Yield a temporary folder that becomes `folder` when the block succeeds.

    Raise UserError if `folder` is there and not empty, or cannot be written. Whatever fails leaves
    nothing behind; a SIGKILL can leave a `.<name>.*.tmp` beside it.
    """
    folder = Path(folder).absolute()
    check_new(folder)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, folder)  # fails if another process has filled `folder` meanwhile
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--to {folder} cannot be written ({reason}); make room there, or give "
                        "another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(folder):
    """Raise UserError unless `folder` is missing or an empty folder."""
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--to {folder} is not a folder; give a new one")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--to {folder} is not empty; remove it, or give a new folder")


def write_hf(folder, trained, name):
    """Write weights (fp32), configuration, tokenizer, modelling code and a card for transformers.

    trained: a Trained in fp32. name: the final name of the folder.
    """
    config, bos_id = trained.model.config, trained.tokenizer.bos_id
    weights = {key: _vocabulary_rows(key, value, config.vocab_size)
               for key, value in trained.model.state_dict().items()}
    write_safetensors(folder / "model.safetensors", weights)
    ends = {"bos_token_id": bos_id, "eos_token_id": bos_id}  # BOS begins the next document
    code = "modeling_nanochat."
    write_json(folder / "config.json", {
        "architectures": ["NanochatForCausalLM"], "model_type": "nanochat_speedrun",
        "dtype": "float32", "vocab_size": config.vocab_size, "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "max_position_embeddings": config.sequence_len,
        "windows": config.windows, **ends,
        "auto_map": {"AutoConfig": code + "NanochatConfig",
                     "AutoModelForCausalLM": code + "NanochatForCausalLM"}})
    write_json(folder / "generation_config.json", {
        **ends, "do_sample": True, "temperature": 0.8, "top_k": 50, "use_cache": False})
    write_json(folder / "tokenizer.json", tokenizer_json(*trained.tokenizer.vocabulary))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": BOS,
        "clean_up_tokenization_spaces": False, "model_max_length": config.sequence_len,
        "split_special_tokens": True})  # text that spells a special token is text
    write_text(folder / MODELING.name, MODELING.read_text(encoding="utf-8"))
    n_parameters = sum(value.numel() for value in weights.values())
    write_text(folder / "README.md", CARD.format(
        name=trained.name, folder=name, tokens=trained.tokens, millions=n_parameters / 1e6))


def write_upstream(folder, trained, name):
    """Write a cache folder of upstream's, with weights and tokenizer but no optimizer state."""
    checkpoints = folder / "base_checkpoints" / trained.tag
    checkpoints.mkdir(parents=True)
    weights = f"model_{trained.step:06d}.pt"
    shutil.copyfile(trained.folder / weights, checkpoints / weights)
    meta = {key: value for key, value in trained.meta.items() if key != "files_sha256"}
    flags = trained.user_config.items()
    meta["user_config"] = {key: value for key, value in flags if key != "tokenizer_dir"}
    write_json(checkpoints / f"meta_{trained.step:06d}.json", {"step": trained.step, **meta})
    trained.tokenizer.save(folder / "tokenizer")


FORMATS = {"hf": write_hf, "upstream": write_upstream}


def _vocabulary_rows(name, tensor, vocab_size):
    """Return a table without the rows that pad the vocabulary; other tensors as they are."""
    is_table = name.startswith("value_embeds.") or name in ("transformer.wte.weight",
                                                            "lm_head.weight")
    return tensor[:vocab_size] if is_table else tensor


def write_safetensors(path, tensors):
    """Write {name: tensor} in fp32: the header's length, the header in JSON, then the bytes.

    Large tensors come first, since their sizes keep the alignment and the format has no gaps.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].numel()))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json_bytes(header)
    head += b" " * (-(8 + len(head)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.float().numpy(), "<f4"))


def byte_characters():
    """Return the character that stands for each byte in a byte-level vocabulary."""
    printable = (*range(33, 127), *range(161, 173), *range(174, 256))
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json(ranks, special_tokens, pattern):
    """Return the content of tokenizer.json for {bytes: id}, {name: id} and the split pattern.

    tiktoken merges the neighbours that make the token of the lowest rank, however they are cut. So
    every cut of a token into two tokens is a merge here. Special tokens are in the vocabulary, but
    no text makes them. Raise UserError if an ordinary token has the spelling of a special one.
    """
    characters = byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: token_id for token, token_id in ranks.items()} | special_tokens
    if len(vocabulary) < len(ranks) + len(special_tokens):
        raise UserError("an ordinary token has the spelling of a special one, which tokenizer.json "
                        "cannot tell apart; use --format upstream")
    merges = [(spelled[token[:cut]], spelled[token[cut:]])
              for token in sorted(ranks, key=ranks.get) for cut in range(1, len(token))
              if token[:cut] in ranks and token[cut:] in ranks]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": True, "vocab": vocabulary,
                  "merges": merges},
    }
