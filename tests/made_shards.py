"""Token shards of made documents whose tokens say where they come from."""

from nanochat.tokens import TokenShard, write_token_shard

BOS = 0
LONGEST = 10_000  # the token at position p > 0 of document d is d * LONGEST + p


def make_shards(folder, lengths_by_shard):
    """Return a TokenShard per list of document lengths; documents are numbered through."""
    folder.mkdir(exist_ok=True)
    shards, d = [], 0
    for number, lengths in enumerate(lengths_by_shard):
        tokens = []
        for length in lengths:
            tokens += [BOS, *range(d * LONGEST + 1, d * LONGEST + length)]
            d += 1
        path = folder / f"shard_{number:05d}.bin"
        write_token_shard(path, [(lengths, tokens)], {"vocab_size": 10**9, "bos_id": BOS})
        shards.append(TokenShard(path))
    return shards
