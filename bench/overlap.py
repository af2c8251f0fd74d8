#!/usr/bin/env python3
"""How many whole sentences of an evaluation occur in training text.

    elleci-eval -m MODEL --suite bundled --log LOG
    python3 bench/overlap.py LOG/samples_*.jsonl -- TEXT.jsonl TEXT.txt …
    python3 bench/overlap.py --drop LOG/samples_*.jsonl -- TEXT.jsonl TEXT.txt …    takes the texts that hold one out of the files

Sentences are compared without case and punctuation, and have at least three words. Prompts and templates of the evaluation
that are no sentences (choices of one word, numbers) do not count. Accuracy is given again without the items that hold one
of them. Exit code 1 if any occurs.
"""

import json
import os
import re
import sys

SEPARATOR = "\n---\n"  # of the texts of a plain file, as fixtures/generate.py writes them


def sentences(text):
    """The sentences of a text, normalised."""
    for part in re.split(r"[.!?…:«»\"\n]+", text):
        words = re.findall(r"\w+", part.lower())
        if len(words) >= 3:
            yield " ".join(words)


def strings(value):
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from strings(v)


def texts(path):
    """The texts of a file, plain or JSON lines."""
    with open(path, encoding="utf-8") as lines:
        if not path.endswith(".jsonl"):
            yield lines.read()
            return
        for line in lines:
            yield from strings(json.loads(line))


def read_items(path):
    """The items of a file of samples, and the sentences that each holds."""
    with open(path, encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines]
    return items, [{s for text in strings(item["doc"]) for s in sentences(text)} for item in items]


def drop(asked, path):
    """Writes the file again without the texts that hold one of the sentences asked."""
    plain = not path.endswith(".jsonl")
    with open(path, encoding="utf-8") as file:
        parts = file.read().split(SEPARATOR) if plain else list(file)
    kept = [p for p in parts
            if not any(s in asked for text in ([p] if plain else strings(json.loads(p))) for s in sentences(text))]
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.write((SEPARATOR if plain else "").join(kept))
    os.replace(path + ".part", path)
    print(f"{path}: {len(parts) - len(kept):,} of {len(parts):,} texts taken out")


def main():
    """Command line."""
    argv = sys.argv[1:]
    dropping = argv[:1] == ["--drop"]
    argv = argv[dropping:]
    if "--" not in argv:
        sys.exit(__doc__)
    cut = argv.index("--")
    if dropping:
        asked = {s for path in argv[:cut] for held in read_items(path)[1] for s in held}
        for path in argv[cut + 1:]:
            drop(asked, path)
        return 0
    trained = {s for path in argv[cut + 1:] for text in texts(path) for s in sentences(text)}
    print(f"{len(trained):,} different sentences in training text")
    found = 0
    for path in argv[:cut]:
        items, held = read_items(path)
        asked = set().union(*held)
        common = sorted(asked & trained)
        found += len(common)
        print(f"{path}: {len(asked):,} different sentences, {len(common)} of them in training text", *common[:20], sep="\n    ")
        if common and "acc" in items[0]:
            clean = [item["acc"] for item, h in zip(items, held) if not h & trained]
            whole = sum(item["acc"] for item in items) / len(items)
            print(f"    acc {whole:.4f} on all {len(items)} items, {sum(clean) / len(clean):.4f} on the {len(clean)} without them")
    return found > 0


if __name__ == "__main__":
    sys.exit(main())
