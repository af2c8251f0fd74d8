#!/usr/bin/env bash
# The bundled model from nothing to fixtures/model/talk-nano.elleci: corpora, tokenizer, training, conversion. Needs Debian's apt-get
# and python3. What is there already is kept; training goes on where it stopped.
#
#   bench/talk-nano.sh DIR [--steps N] [--threads N] …      further arguments are elleci-train's
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?a directory for data and run}
shift
mkdir -p "$dir/prose"
cargo build --release --locked --bins
bin=${CARGO_TARGET_DIR:-target}/release

[ -e "$dir/corpus/it" ] || "$bin/elleci-data" fetch --demo --out "$dir/corpus"
[ -e "$dir/talk.jsonl" ] || python3 fixtures/generate.py --talk 80000 "$dir/talk.jsonl"
[ -e "$dir/grammar.jsonl" ] || python3 fixtures/generate.py --grammar 16000 "$dir/grammar.jsonl"
[ -e "$dir/prose/stories.txt" ] || python3 fixtures/generate.py --stories 2000 "$dir/prose/stories.txt"
cp fixtures/text/it-*.txt "$dir/prose/"
rm -f "$dir/prose/it-stories-generated.txt" # the first 200 of stories.txt
if [ ! -e "$dir/suite" ]; then # no sentence of the suite is trained on; the answers of the model that is there do not matter
    "$bin/elleci-eval" --suite bundled --no-cache --log "$dir/suite.part"
    python3 bench/overlap.py --drop "$dir"/suite.part/samples_*.jsonl -- "$dir"/{talk,grammar}.jsonl "$dir/prose/stories.txt"
    mv "$dir/suite.part" "$dir/suite"
fi

it=("$dir"/corpus/it/{debian-handbook,debian-edu-doc-it,developers-reference-it}.jsonl)
[ -e "$dir/data/tokenizer.json" ] || "$bin/elleci-data" tokenizer --vocab 4096 --text-split rule --out "$dir/data/tokenizer.json" \
    "$dir/talk.jsonl" "$dir/grammar.jsonl" "$dir/prose" "${it[@]}" "$dir/corpus/en/debian-handbook.jsonl"
prepare() {
    local name=$1
    shift
    [ -e "$dir/data/$name" ] || "$bin/elleci-data" prepare --tokenizer "$dir/data/tokenizer.json" --holdout 0.02 --text-split rule --out "$dir/data/$name" "$@"
}
prepare talk "$dir/talk.jsonl"
prepare grammar "$dir/grammar.jsonl"
prepare prose "$dir/prose"
prepare italian "${it[@]}"

if [ -d "$dir/run/checkpoints" ]; then
    "$bin/elleci-train" --resume "$dir/run" "$@"
else
    "$bin/elleci-train" --config bench/talk-nano.toml --data "$dir/data" --out "$dir/run" "$@"
fi
"$bin/elleci-convert" "$dir/run/final" fixtures/model/talk-nano.elleci --pack t5 --force
