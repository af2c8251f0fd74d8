#!/usr/bin/env python3
"""How many whole sentences of an evaluation occur in training text.

    elleci-eval -m MODEL --suite bundled --log LOG
    python3 bench/overlap.py LOG/samples_*.jsonl -- TEXT.jsonl TEXT.txt …

Sentences are compared without case and punctuation, and have at least three words. Prompts and templates of the evaluation
that are no sentences (choices of one word, numbers) do not count. Accuracy is given again without the items that hold one
of them. Exit code 1 if any occurs.
"""

import json
import re
import sys


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


def main():
    """Command line."""
    if "--" not in sys.argv:
        sys.exit(__doc__)
    cut = sys.argv.index("--")
    trained = {s for path in sys.argv[cut + 1:] for text in texts(path) for s in sentences(text)}
    print(f"{len(trained):,} different sentences in training text")
    found = 0
    for path in sys.argv[1:cut]:
        with open(path, encoding="utf-8") as lines:
            items = [json.loads(line) for line in lines]
        held = [{s for text in strings(item["doc"]) for s in sentences(text)} for item in items]
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
