"""What an export consists of: for Hugging Face's `transformers`, or in upstream's layout. Neither needs a library."""

import struct
from pathlib import Path

import numpy as np
import torch

from nanochat.checkpoint import load_model_state
from nanochat.common import atomic_path, json_bytes, model_path, write_json, write_text
from nanochat.export.hf_tokenizer import tokenizer_json
from nanochat.tokenizer import BOS

MODELING = Path(__file__).with_name("modeling_nanochat.py")
CARD = """# {name}

A language model of {millions:,.1f} million parameters, trained on {tokens:,} tokens, for `transformers`. Its code is
in this folder, which is why `trust_remote_code` is asked for: read modeling_nanochat.py first, it is short.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("The")]])  # every document began with BOS
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0, 1:]))
```
"""


def write_hf(folder, trained, name):
    """Write safetensors in fp32, configuration, tokenizer.json, modelling file and a card into an empty folder.

    trained: a Trained in fp32. name: what the folder will be called.
    """
    config, bos_id = trained.model.config, trained.tokenizer.bos_id
    weights = {key: _of_vocabulary(key, value, config.vocab_size) for key, value in trained.model.state_dict().items()}
    write_safetensors(folder / "model.safetensors", weights)
    ends = {"bos_token_id": bos_id, "eos_token_id": bos_id}  # where the next document would begin
    write_json(folder / "config.json", {
        "architectures": ["NanochatForCausalLM"], "model_type": "nanochat_speedrun", "dtype": "float32",
        "auto_map": {"AutoConfig": "modeling_nanochat.NanochatConfig",
                     "AutoModelForCausalLM": "modeling_nanochat.NanochatForCausalLM"},
        "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len, "windows": config.windows, **ends})
    write_json(folder / "generation_config.json", {**ends, "do_sample": True, "temperature": 0.8, "top_k": 50,
                                                   "use_cache": False})
    write_json(folder / "tokenizer.json", tokenizer_json(*trained.tokenizer.vocabulary))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": BOS,
        "clean_up_tokenization_spaces": False, "split_special_tokens": True,  # a text that spells one is text
        "model_max_length": config.sequence_len})
    write_text(folder / MODELING.name, MODELING.read_text(encoding="utf-8"))
    n_parameters = sum(value.numel() for value in weights.values())
    write_text(folder / "README.md", CARD.format(name=trained.name, folder=name, tokens=trained.tokens,
                                                 millions=n_parameters / 1e6))


def write_upstream(folder, trained, name):
    """Write a cache folder of upstream's (base_checkpoints/<tag>, tokenizer) for its programs and ours, without the
    optimizer's state."""
    checkpoints = folder / "base_checkpoints" / trained.tag
    state = load_model_state(trained.folder, trained.step, trained.meta, "cpu")
    with atomic_path(model_path(checkpoints, trained.step)) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
    meta = {key: value for key, value in trained.meta.items() if key != "files_sha256"}
    meta["user_config"] = {key: value for key, value in trained.user_config.items() if key != "tokenizer_dir"}
    write_json(checkpoints / f"meta_{trained.step:06d}.json", {"step": trained.step, **meta})
    trained.tokenizer.save(folder / "tokenizer")


FORMATS = {"hf": write_hf, "upstream": write_upstream}


def write_safetensors(path, tensors):
    """Write {name: tensor} as fp32 in the safetensors format: header's length, header in JSON, the bytes end to end."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json_bytes(header)
    head += b" " * (-len(head) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.float().numpy(), "<f4"))


def _of_vocabulary(name, tensor, vocab_size):
    """The rows that stand for tokens: those that only fill the vocabulary up are left out."""
    has_vocabulary = name.startswith("value_embeds.") or name in ("transformer.wte.weight", "lm_head.weight")
    return tensor[:vocab_size] if has_vocabulary else tensor
