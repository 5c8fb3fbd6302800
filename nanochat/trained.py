"""What a training run leaves, ready for use: the checkpoint's model and the tokenizer it was trained with."""

from dataclasses import dataclass
from pathlib import Path

from nanochat import checkpoint
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Trained:
    """A checkpoint of ours or of upstream, in `folder`. model: in evaluation mode."""

    folder: Path
    step: int
    model: GPT
    tokenizer: Tokenizer
    meta: dict

    @property
    def tag(self):
        """The folder's name."""
        return self.folder.name

    @property
    def name(self):
        """The tag and the step in one, for files."""
        return f"{self.tag}_{self.step:06d}"

    @property
    def row_tokens(self):
        """The longest sequence it was trained on."""
        return self.model.config.sequence_len

    @property
    def max_tokens(self):
        """The longest sequence it takes."""
        return self.model.cos.size(1)

    @property
    def user_config(self):
        """The flags of the run, as far as the checkpoint has them."""
        return self.meta.get("user_config") or {}

    @property
    def tokens(self):
        """Tokens trained on."""
        return self.step * self.meta.get("total_batch_size_tokens", self.meta.get("total_batch_size", 0))


def trained_folder(model_tag):
    """The checkpoints' folder of a tag, or the absolute path itself."""
    return Path(model_tag) if Path(model_tag).is_absolute() else checkpoint.checkpoint_folder(model_tag)


def load_trained(model_tag, step, device, compute_dtype, tokenizer_dir=""):
    """Trained from a tag or an absolute path, at `step` (a number, digits, or "latest").

    tokenizer_dir: empty for what the checkpoint says, else the cache's. Errors: UserError where there is no such
    checkpoint, it is damaged, or the tokenizer is not the one it was trained with.
    """
    folder = trained_folder(model_tag)
    step = checkpoint.find_checkpoint(folder, step)
    user_config = checkpoint.read_meta(folder, step).get("user_config") or {}
    tokenizer = load_tokenizer(tokenizer_dir or user_config.get("tokenizer_dir"))
    model, meta = checkpoint.load_model(folder, step, device, compute_dtype)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(f"the model's vocabulary is {model.config.vocab_size}, the tokenizer's "
                        f"{tokenizer.vocab_size}; give the one it was trained with (--tokenizer-dir)")
    if meta.get("tokenizer_id", tokenizer.tokenizer_id) != tokenizer.tokenizer_id:
        raise UserError(f"the model was trained with tokenizer {meta['tokenizer_id']}, this one is "
                        f"{tokenizer.tokenizer_id}; give the one it was trained with (--tokenizer-dir)")
    return Trained(folder, step, model.eval(), tokenizer, meta)
