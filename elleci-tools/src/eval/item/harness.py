#!/usr/bin/env python3
"""Writes harness.json: what lm-evaluation-harness asks about the rows of rows.json.

Needs `pip install --no-deps lm-eval==0.4.13` and jinja2, pyyaml. Each entry is [context, continuations, target].
"""

import ast, glob, importlib.util, json, os, re, sys, types
from pathlib import Path

import yaml
from jinja2 import BaseLoader, Environment, StrictUndefined

HERE = Path(__file__).parent
TASKS = os.path.join(os.path.dirname(importlib.util.find_spec("lm_eval").origin), "tasks")
sys.modules["datasets"] = types.SimpleNamespace(Dataset=object)
ENV = Environment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: ("function", node.value))


def load(path):
    config = yaml.load(open(path), Loader)
    if "include" in config:
        base = load(os.path.join(os.path.dirname(path), config.pop("include")))
        config = {**base, **config}
    return {**config, "dir": os.path.dirname(path)}


def function(config, name):
    module, attribute = name.rsplit(".", 1)
    source = open(os.path.join(config["dir"], module + ".py")).read()
    # Metrics need packages that prompts do not.
    space = {}
    exec(re.sub(r"^from (evaluate|sklearn).*$", "", source, flags=re.M), space)
    return space[attribute]


def field(config, value, doc):
    if isinstance(value, tuple):
        return function(config, value[1])(doc)
    if isinstance(value, str):
        return doc[value] if value in doc else ENV.from_string(value).render(**doc)
    return value


def ask(config, row):
    doc = dict(row)
    if "process_docs" in config:
        mapped = types.SimpleNamespace(map=lambda f: f(doc))
        doc = {**doc, **function(config, config["process_docs"][1])(mapped)}
    choices = field(config, config.get("doc_to_choice"), doc)
    if isinstance(choices, str):
        choices = ast.literal_eval(choices)
    target = field(config, config["doc_to_target"], doc)
    if choices is None:
        return [field(config, config["doc_to_text"], doc), [target], None]
    if isinstance(target, str):
        target = int(target) if target.isdigit() else choices.index(target)
    delimiter = config.get("target_delimiter", " ")
    return [field(config, config["doc_to_text"], doc), [delimiter + c for c in choices], target]


def main():
    files = {}
    for path in glob.glob(TASKS + "/**/*.yaml", recursive=True):
        name = re.search(r"^task:\s*(\S+)\s*$", open(path).read(), re.M)
        if name:
            files[name.group(1)] = path
    out = {}
    for name, row in json.load(open(HERE / "rows.json")).items():
        names = [f"{name}_prompt-{i}" for i in range(1, 7)] if name.startswith("evalita") else [name]
        names += ["truthfulqa_it_mc2"] if name == "truthfulqa_it_mc1" else []
        out.update({n: ask(load(files[n]), row) for n in names})
    lines = [f" {json.dumps(n)}: {json.dumps(v, ensure_ascii=False)}" for n, v in out.items()]
    (HERE / "harness.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


main()
