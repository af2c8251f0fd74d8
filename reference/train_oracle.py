#!/usr/bin/env python3
"""Trains the PyTorch oracle on exactly the batches and rates that `elleci-train` used, and compares.

    python3 reference/train_oracle.py init --preset nano --out init/              # weights both sides start from
    elleci-train … --init init/ --record-batches batches/                         # our run
    python3 reference/train_oracle.py train --init init/ --batches batches/ --max-tokens 2000000 \
        --metrics runs/mine/metrics.jsonl --val data/italian data/english

`train` prints loss and gradient norm of every step (beside ours, with --metrics) and ends with the held-out bits per byte
of each --val shard set. Needs torch, numpy and safetensors.
"""
import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import elleci_torch as oracle


def build(folder):
    config = json.loads((folder / "config.json").read_text())
    fields = {k: config[k] for k in asdict(oracle.Config()) if k in config}
    model = oracle.Elleci(oracle.Config(**fields))
    weights = load_file(str(folder / "model.safetensors"))
    with torch.no_grad():
        for name, tensor in oracle.spec_state(model).items():
            tensor.copy_(weights[name].reshape(tensor.shape))
    return model


def init(a):
    config = oracle.Config(**asdict(oracle.PRESETS[a.preset]))
    model = oracle.initialise(oracle.Elleci(config), a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    save_file(oracle.spec_state(model), str(a.out / "model.safetensors"))
    flat = {"model_type": "elleci", **asdict(config), "tie_embeddings": False}
    (a.out / "config.json").write_text(json.dumps(flat, indent=1))


def layer_of(name, n_layers):
    """Embedding counts as the first layer, final norm and head as the last."""
    if name.startswith("layers."):
        return int(name.split(".")[1])
    return 0 if name.startswith("tok_emb") else n_layers - 1


def groups(model):
    """One group a layer and decay: matrices decay, norms, taps and scalars do not."""
    out = {}
    for name, p in model.named_parameters():
        decays = p.dim() == 2 and "conv" not in name
        out.setdefault((layer_of(name, model.c.n_layers), decays), []).append(p)
    return [{"params": ps, "layer": layer, "decays": decays} for (layer, decays), ps in sorted(out.items())]


@torch.no_grad()
def bits_per_byte(forward, folder, seq, batch=16):
    index = json.loads((folder / "index.json").read_text())
    bits = 0.0
    for shard in index["val"]["shards"]:
        tokens = np.fromfile(folder / shard["bin"]["file"], dtype="<u2").astype(np.int64)
        mask = np.ones(len(tokens), bool)
        if shard.get("mask"):
            mask = np.unpackbits(np.fromfile(folder / shard["mask"]["file"], dtype=np.uint8), bitorder="little")[: len(tokens)].astype(bool)
        rows = -(-len(tokens) // seq)
        x = np.full(rows * seq, index["end_of_text"])
        x[1 : len(tokens)] = tokens[:-1]
        y = np.full(rows * seq, -100)
        y[: len(tokens)] = np.where(mask, tokens, -100)
        x, y = (torch.from_numpy(v.reshape(rows, seq)) for v in (x, y))
        for i in range(0, rows, batch):
            logits = forward(x[i : i + batch])
            bits += F.cross_entropy(logits.flatten(0, 1), y[i : i + batch].flatten(), ignore_index=-100, reduction="sum").item()
    return bits / math.log(2) / index["val"]["target_bytes"]


def train(a):
    if a.threads:
        torch.set_num_threads(a.threads)
    model = build(a.init)
    forward = torch.compile(model, dynamic=False) if a.compile else model
    optimizer = torch.optim.AdamW(groups(model), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    ours = {}
    if a.metrics:
        records = (json.loads(line) for line in a.metrics.read_text().splitlines())
        ours = {r["step"]: r for r in records if "grad_norm" in r}
    seen, start, differences = 0, time.time(), []
    for path in sorted(a.batches.glob("batch-*.safetensors")):
        step = int(path.stem.split("-")[1])
        with safe_open(str(path), "pt") as f:
            data = {k: f.get_tensor(k) for k in f.keys()}
        micro = sum(k.endswith(".tokens") for k in data)
        weight = sum(data[f"micro.{i}.weights"].sum().item() for i in range(micro))
        loss = 0.0
        for i in range(micro):
            x, y, w = (data[f"micro.{i}.{k}"] for k in ("tokens", "targets", "weights"))
            ce = F.cross_entropy(forward(x).flatten(0, 1), y.flatten(), ignore_index=-100, reduction="none")
            part = (ce * w.flatten()).sum() / weight
            part.backward()
            loss += part.item()
            seen += x.numel()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip).item()
        for g in optimizer.param_groups:
            g["lr"] = data["lr"][g["layer"]].item()
            g["weight_decay"] = data["weight_decay"].item() if g["decays"] else 0.0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        line = {"step": step, "tokens": seen, "loss": round(loss, 5), "grad_norm": round(norm, 5), "tok_s": round(seen / (time.time() - start), 1)}
        if step in ours:
            line["ours"] = round(ours[step]["loss"], 5)
            differences.append(loss - ours[step]["loss"])
        if step <= 10 or step % a.log_every == 0:
            print(json.dumps(line), flush=True)
        if seen >= a.max_tokens:
            break
    result = {"tokens": seen, "seconds": round(time.time() - start, 1)}
    if differences:
        last = differences[-50:]
        result["mean_loss_difference_last_50"] = round(sum(last) / len(last), 5)
    model.eval()
    for folder in a.val:
        result[f"bpb {folder.name}"] = round(bits_per_byte(model, folder, model.c.max_seq_len), 5)
    print(json.dumps(result))
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
        save_file(oracle.spec_state(model), str(a.out / "model.safetensors"))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = ap.add_subparsers(dest="verb", required=True)
    i = verbs.add_parser("init")
    i.add_argument("--preset", default="nano")
    i.add_argument("--seed", type=int, default=0)
    i.add_argument("--out", type=Path, required=True)
    t = verbs.add_parser("train")
    t.add_argument("--init", type=Path, required=True)
    t.add_argument("--batches", type=Path, required=True)
    t.add_argument("--max-tokens", type=int, default=2_000_000)
    t.add_argument("--metrics", type=Path)
    t.add_argument("--val", type=Path, nargs="*", default=[])
    t.add_argument("--clip", type=float, default=1.0)
    t.add_argument("--threads", type=int, default=0)
    t.add_argument("--compile", action="store_true")
    t.add_argument("--log-every", type=int, default=20)
    t.add_argument("--out", type=Path)
    a = ap.parse_args()
    {"init": init, "train": train}[a.verb](a)


if __name__ == "__main__":
    main()
