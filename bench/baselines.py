#!/usr/bin/env python3
"""What a language model must beat: `xz -9` and an interpolated Kneser-Ney 5-gram, on the same held-out text.

    python3 bench/baselines.py --tokenizer data/tokenizer.json data/it data/en data/instructions

Every folder is a shard set of `elleci-data prepare`; the 5-gram trains on the tokens of all their training splits
together and predicts each held-out split. Bits per byte are of the UTF-8 text that the targets stand for, as the
trainer reports them. Needs numpy and the tokenizers package.
"""
import argparse
import json
import lzma
import math
from pathlib import Path

import numpy as np


def read_split(folder, split):
    index = json.loads((folder / "index.json").read_text())
    tokens, masks = [], []
    for shard in index[split]["shards"]:
        t = np.fromfile(folder / shard["bin"]["file"], dtype="<u2").astype(np.int64)
        if shard.get("mask"):
            bits = np.fromfile(folder / shard["mask"]["file"], dtype=np.uint8)
            m = np.unpackbits(bits, bitorder="little")[: len(t)].astype(bool)
        else:
            m = np.ones(len(t), bool)
        tokens.append(t)
        masks.append(m)
    join = lambda parts, kind: np.concatenate(parts) if parts else np.zeros(0, kind)
    return index, join(tokens, np.int64), join(masks, bool)


class KneserNey:
    """Interpolated Kneser-Ney with one discount an order. An n-gram is its context's rank times the vocabulary plus
    its last token, so that keys of any order fit 64 bits."""

    def __init__(self, tokens, vocab, order=5):
        self.vocab, self.order = vocab, order
        ranks, self.keys = [tokens], [np.arange(vocab)]
        first, counts = [None], [np.bincount(tokens, minlength=vocab).astype(float)]
        for k in range(2, order + 1):
            key = ranks[-1][:-1] * vocab + tokens[k - 1 :]
            keys, at, rank, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
            self.keys.append(keys)
            ranks.append(rank)
            first.append(at)
            counts.append(count.astype(float))
        # Lower orders count the different tokens that precede an n-gram, not its occurrences.
        for k in range(1, order):
            suffix = ranks[k - 1][first[k] + 1]
            counts[k - 1] = np.bincount(suffix, minlength=len(self.keys[k - 1])).astype(float)
        self.counts, self.discount, self.total, self.types = counts, [], [], []
        for k in range(1, order + 1):
            c = counts[k - 1]
            n1, n2 = (c == 1).sum(), (c == 2).sum()
            self.discount.append(n1 / (n1 + 2 * n2) if n1 else 0.0)
            context = np.zeros(len(c), np.int64) if k == 1 else self.keys[k - 1] // vocab
            size = 1 if k == 1 else len(self.keys[k - 2])
            self.total.append(np.bincount(context, weights=c, minlength=size))
            self.types.append(np.bincount(context, weights=(c > 0).astype(float), minlength=size))

    def log2(self, tokens):
        """log2 P of every token given the ones before it."""
        n = len(tokens)
        p = np.full(n, 1.0 / self.vocab)
        rank = tokens.copy()
        for k in range(1, self.order + 1):
            if k == 1:
                context, gram = np.zeros(n, np.int64), tokens
            else:
                context = np.concatenate([[-1], rank[:-1]])
                key = np.where(context >= 0, context * self.vocab + tokens, -1)
                at = np.minimum(np.searchsorted(self.keys[k - 1], key), len(self.keys[k - 1]) - 1)
                gram = np.where(self.keys[k - 1][at] == key, at, -1)
                rank = gram
            total = np.where(context >= 0, self.total[k - 1][context], 0.0)
            seen = total > 0
            count = np.where(gram >= 0, self.counts[k - 1][gram], 0.0)
            d, safe = self.discount[k - 1], np.where(seen, total, 1.0)
            types = np.where(seen, self.types[k - 1][context], 0.0)
            p = np.where(seen, np.maximum(count - d, 0) / safe + d * types / safe * p, p)
        return np.log2(p)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folders", nargs="+", type=Path)
    ap.add_argument("--tokenizer", type=Path, required=True)
    a = ap.parse_args()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(a.tokenizer))
    text = lambda tokens: tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode()
    sets = [(f, *read_split(f, "train"), *read_split(f, "val")[1:]) for f in a.folders]
    vocab = sets[0][1]["vocab_size"]
    train = np.concatenate([t for _, _, t, _, _, _ in sets])
    model = KneserNey(train, vocab)
    corpus = b"".join(text(t) for _, _, t, _, _, _ in sets)
    print(f"5-gram trained on {len(train):,} tokens ({len(corpus):,} bytes)")
    xz = lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    base = xz(corpus)
    total = np.zeros(2)
    print(f"{'source':<16} {'held-out bytes':>14} {'5-gram':>8} {'xz -9e':>8} {'xz primed':>10}   bits per byte")
    for folder, index, _, _, tokens, mask in sets:
        bits, size = -model.log2(tokens)[mask].sum(), index["val"]["target_bytes"]
        total += [bits, size]
        held = text(tokens)
        primed = 8 * (xz(corpus + held) - base) / len(held)
        print(f"{folder.name:<16} {size:>14,} {bits / size:>8.4f} {8 * xz(held) / len(held):>8.4f} {primed:>10.4f}")
    if not math.isclose(total[1], 0):
        print(f"{'all':<16} {int(total[1]):>14,} {total[0] / total[1]:>8.4f}")


if __name__ == "__main__":
    main()
