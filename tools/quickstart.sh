#!/usr/bin/env bash
# From nothing to a Hugging Face model on a CPU: sample data, three chained stages on two ranks, export, questions.
# Arguments are overrides for all three stages:
#
#     tools/quickstart.sh
#     tools/quickstart.sh train.max_steps=20
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh

# The tests have data, runs and a Python of their own.
data=${QUICKSTART_DATA:-data/sample}
runs=${QUICKSTART_RUNS:-runs/quickstart}
python=${QUICKSTART_PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1

say() { printf '\n== %s\n' "$*"; }

# A second run with the same overrides keeps the stages that are finished; with others it starts over.
settings=(conf/schedule/quickstart.yaml conf/model/tiny.yaml conf/optim/from_scratch.yaml conf/blend/sample_stage*.yaml)
overrides="$* $(cat "${settings[@]}" | cksum)"
if [[ "$(cat "$runs/overrides" 2>/dev/null)" != "$overrides" ]]; then
  rm -rf "$runs"
  mkdir -p "$runs"
  echo "$overrides" > "$runs/overrides"
fi

say "sample data"
$python tools/make_sample_data.py --out "$data" --scale "${QUICKSTART_SCALE:-1.0}"

# stage NUMBER RECIPE LAYOUT [OVERRIDE...]: one stage of training; nothing if it is finished.
stage() {
  local number=$1 recipe=$2 layout=$3
  shift 3
  if [[ -f "$runs/stage$number/seconds" ]]; then
    say "stage $number: finished earlier, kept in $runs/stage$number"
    return
  fi
  say "stage $number: $recipe on 2 CPU ranks, parallel=$layout"
  local started=$SECONDS
  $python -m torch.distributed.run --standalone --nproc-per-node 2 "recipes/$recipe.py" model=tiny data=sample \
    data.root="$data" schedule=quickstart optim=from_scratch parallel="$layout" name=quickstart \
    run_dir="$runs/stage$number" train.vision_recompute=false train.generate_every=1000 \
    train.generate_examples=15 train.generate_max_tokens=32 "$@" \
    2> >(tee "$runs/stage$number.err" >&2) || {
      echo "stage $number failed. Its error is above and in $runs/stage$number.err;" \
        "docs/troubleshooting.md explains it." >&2
      exit 1
    }
  echo $((SECONDS - started)) > "$runs/stage$number/seconds"
}

stage 1 stage1_pretrain default train.log_every=50 train.micro_batch_size=2 "$@"
stage 2 stage2_sft tp2 train.log_every=50 train.init_from="$runs/stage1" "$@"
stage 3 stage3_long_context cp2 train.log_every=10 train.init_from="$runs/stage2" "$@"

say "export"
rm -rf "$runs/hf" "$runs/answers.jsonl"
$python tools/export_hf.py "$runs/stage3" "$runs/hf"

say "questions to the exported model"
$python tools/ask.py "$runs/hf" --batch "$data/quiz/quiz.json" --out "$runs/answers.jsonl" --max-new-tokens 64

say "report"
$python tools/report_quickstart.py "$runs" --data "$data"
