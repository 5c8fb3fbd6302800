"""A causal language model of Hugging Face's `transformers` (the extra `hf`), evaluated as ours are: its score anchors
theirs. Only its own architectures: code that comes with a model is not run."""

import hashlib
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import UserError

LONGEST_ROW = 2048  # tokens in a row of bits per byte, however much more a model takes


class HFModel(nn.Module):
    """Logits (B, T, vocab) in fp32 of idx (B, T), or with `targets` (B, T; -1 is ignored) the loss, as GPT has them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets=None, loss_reduction="mean"):
        logits = self.model(input_ids=idx, use_cache=False).logits.float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction=loss_reduction)


class HFTokenizer:
    """A `tokenizers` tokenizer with the methods of ours that evaluations use; BOS is its BOS, else its end of text."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        bos_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if bos_id is None:
            raise UserError("the model's tokenizer has neither a BOS nor an end-of-text token, and every prompt begins "
                            "with one; give another --hf-path")
        self.bos_id = bos_id
        self.tokenizer_id = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:12]

    def encode(self, text):
        """Token ids of a text, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids):
        """The text of token ids."""
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def token_bytes(self):
        """int32 (vocab_size): as Tokenizer has it. Errors: UserError where the vocabulary is not one of bytes."""
        if type(self._tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
            raise UserError("bits per byte need a byte-level vocabulary, which the model's tokenizer has not; "
                            "use --eval core")
        lengths = np.zeros(self.vocab_size, np.int32)
        special = set(self._tokenizer.all_special_ids)
        for token, token_id in self._tokenizer.get_vocab().items():  # a character of such a token stands for a byte
            lengths[token_id] = 0 if token_id in special else len(token)
        return lengths


@dataclass(frozen=True)
class HFSubject:
    """A model of Hugging Face with what `training.trained.Trained` has of ours; max_tokens: None without a limit."""

    tag: str  # the path or name on the hub
    model: HFModel
    tokenizer: HFTokenizer
    max_tokens: int | None
    step = tokens = None
    user_config: dict = field(default_factory=dict)

    @property
    def name(self):
        """The last part of the tag, for files."""
        return PurePath(self.tag).name

    @property
    def row_tokens(self):
        """The length of rows for bits per byte."""
        return min(self.max_tokens or LONGEST_ROW, LONGEST_ROW)


def load_hf(path, device, dtype):
    """HFSubject of a folder or of a model on the Hugging Face hub.

    Errors: UserError where `transformers` is missing, or the model cannot be had or asks for code of its own.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError("--hf-path needs the package transformers: pip install 'nanochat[hf]', or -e '.[hf]' in the "
                        "repository") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--hf-path {path} cannot be loaded ({reason}); give a folder or a name on the hub of a causal "
                        "language model") from None
    max_tokens = getattr(model.config, "max_position_embeddings", None)
    return HFSubject(path, HFModel(model).eval(), HFTokenizer(tokenizer), max_tokens)
