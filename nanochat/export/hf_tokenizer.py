"""A tokenizer in the format of Hugging Face's `tokenizers` (tokenizer.json), which gives the same ids."""

from nanochat.common import UserError

# The printable characters that stand for their own byte in a byte-level vocabulary; the other bytes follow from 256 on.
_OWN = (*range(33, 127), *range(161, 173), *range(174, 256))


def byte_characters():
    """The character that stands for each byte, by byte: 256 printable ones, none of them a blank."""
    others = iter(range(256, 512))
    return [chr(byte if byte in _OWN else next(others)) for byte in range(256)]


def tokenizer_json(ranks, special_tokens, pattern):
    """The content of tokenizer.json, as a dict, of {bytes: id}, {name: id} and the split pattern.

    tiktoken merges the two neighbours that make the token of the lowest rank, whichever two they are: so every split
    of a token into two is a merge here, by the token's rank. Special tokens are in the vocabulary and no text makes
    them, also a text that spells one. Errors: UserError where a token's characters are those of a special one.
    """
    characters = byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocabulary = {**{spelled[token]: token_id for token, token_id in ranks.items()}, **special_tokens}
    if len(vocabulary) < len(ranks) + len(special_tokens):
        raise UserError("an ordinary token spells a special one, which tokenizer.json cannot hold apart; use --format "
                        "upstream")
    merges = [(spelled[token[:cut]], spelled[token[cut:]])
              for token in sorted(ranks, key=ranks.get) for cut in range(1, len(token))
              if token[:cut] in ranks and token[cut:] in ranks]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocabulary, "merges": merges},
    }
