#!/usr/bin/env python3
"""Writes the seeds of fuzz/corpus that are no copies of fixtures: `fuzz/seeds.py`, from anywhere. The same bytes every time."""

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"
SPECIALS = ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["e r", "o n", "Ġ d", "l l", "Ġd e", "Ġde ll", "a t", "at o", "Ġ ,", "Ã ¨", "Ġ Ã¨"]


def write(target, name, data):
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    (CORPUS / target / name).write_bytes(data)


def byte_chars():
    """The characters that stand for bytes in a byte-level vocabulary, in the order of its tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]


def tokenizer(merges):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, s in enumerate(SPECIALS)
    ]
    vocab = SPECIALS + byte_chars() + [merge.replace(" ", "") for merge in merges]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(vocab)}, "merges": [merge.split(" ") for merge in merges],
    }
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    }
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()


def sampler(temperature, top_k, top_p, min_p, penalty, window, history, logits):
    state = struct.pack("<IfIfffIQQ", 1, temperature, top_k, top_p, min_p, penalty, window, 7, 3)
    return state + bytes(history) + struct.pack(f"<{len(logits)}f", *logits)


def main():
    for merges in (0, len(MERGES)):
        write("tokenizer_json", f"merges_{merges}", tokenizer(MERGES[:merges]))
    logits = [0.5, -1.25, 3.0, float("-inf"), 3.0, float("nan"), 1e30, -0.0]
    history = [1, 2, 3, 4, 4, 9, 2, 255]
    write("sampler", "greedy", sampler(0.0, 0, 1.0, 0.0, 1.0, 0, history, logits))
    write("sampler", "all_filters", sampler(0.8, 4, 0.9, 0.05, 1.1, 64, history, logits * 20))
    write("sampler", "nucleus", sampler(1.0, 0, 0.3, 0.0, 1.0, 0, history, logits[:3] * 50))
    write("sampler", "no_candidate", sampler(1.0, 0, 0.9, 0.0, 1.0, 0, history, [float("-inf")] * 4))
    for name, packing, tokens, rows, cols, stride, data in (
        ("i2", 0, 3, 70, 21, 31, [0x55, 0xAA, 0x12, 0x80, 0x7F]),
        ("i2_extreme", 0, 1, 64, 256, 0, [0xFF]),
        ("t5", 1, 3, 70, 21, 7, range(0, 256, 5)),
        ("t5_long", 1, 1, 4, 255, 31, [0x5A, 0xFF, 0x1F, 0xE0, 0x1C]),
        ("t5_tokens", 1, 8, 65, 16, 1, range(0, 251)),
        ("c5", 2, 1, 321, 41, 5, range(3, 256, 7)),
        ("c5_tokens", 2, 7, 130, 12, 29, [0x00, 0x5A, 0x00, 0x80, 0x7F]),
        ("no_bytes", 2, 1, 1, 1, 0, []),
    ):
        write("packing", name, bytes([packing, tokens - 1]) + struct.pack("<HH", rows - 1, cols - 1) + bytes([stride, *data]))
    # Changes to a sound file: place, in two bytes, and value.
    write("session", "sound", b"")
    write("session", "cut", bytes([0, 0, 0, 0]))
    write("session", "position", b"".join(struct.pack("<HB", at, at) for at in range(0, 64)))
    write("archive", "sound", b"")
    write("archive", "header", b"".join(struct.pack("<HB", 64 + at, at) for at in range(0, 256, 3)))


if __name__ == "__main__":
    main()
