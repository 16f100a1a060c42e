#!/usr/bin/env bash
# What a GPU does with this repository, in at most ten minutes and most valuable first.
#
#   benchmarks/gpu_check.sh                                   everything, on the first GPU
#   benchmarks/gpu_check.sh --parts tests+trainings,scan      some of it, in this order; + side by side
#   benchmarks/gpu_check.sh --train hparams/CTC/an4.yaml 300 --data_folder an4/LibriSpeech
#                                                             last, train a recipe for 300 seconds
#   benchmarks/gpu_check.sh --parts '' --train hparams/CTC/mini_librispeech.yaml 480 --data_folder \
#     mini_librispeech/LibriSpeech --number_of_epochs 30 --augment_from_epoch 4 --num_workers 2 \
#     --max_batch_length_train 160 --num_bucket 12 --lr_adam 0.0015 --n_warmup_steps 300 \
#     --n_hold_steps 2000 --ema_decay 0.995 --cuda_graphs 80
#                                                             nothing but a training of eight minutes
#   benchmarks/gpu_check.sh --dry                             all of it, small, on a CPU
#
# Each part has its own time limit and may fail; the others go on. Rows come as they are measured.
# Results are left under $OUT (results/gpu_check): log.txt, reports.tar.gz, and of a training its
# bundle in pieces of 15 MiB (cat bundle.tar.* | tar x).
#
# AN4 names a folder with CMU AN4 in LibriSpeech layout; without it the recipes of an4 train on noise.
# PYTHON is the interpreter (python3). What follows --train's seconds goes to the recipe.
set -u
cd "$(dirname "$0")/.." || exit 1

PARTS=steps,an4,small,graphs,decode,scan,sweep,tests+trainings,encoder,kernels,host
LIMIT_S=600 DRY= TRAIN_YAML= TRAIN_S= TRAIN_ARGS=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry) DRY=1 ;;
    --parts) PARTS=$2; shift ;;
    --limit) LIMIT_S=$2; shift ;;
    --train) TRAIN_YAML=$2 TRAIN_S=$3; TRAIN_ARGS=("${@:4}"); break ;;
    *) sed -n '2,22s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
  shift
done
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-results/gpu_check}
WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT" "$WORK/reports" && : >"$OUT/log.txt" && rm -f "$OUT"/bundle.tar.*
export PYTHONUNBUFFERED=1 BENCHMARK_REPORTS=$WORK/reports
STARTED=$SECONDS

left() { echo $((LIMIT_S - (SECONDS - STARTED))); }
say() { echo "$@" | tee -a "$OUT/log.txt"; }

# within SECONDS NAME COMMAND...: runs it under its limit, output to a file of its own; prints the
# lines that match ROWS (an extended regular expression) as they come, and of a failure the last lines.
within() {
  local limit=$1 name=$2 rest began=$SECONDS status shown=0 total file
  shift 2
  file=$WORK/reports/$name.txt rest=$(left)
  if [ "$rest" -lt 10 ]; then say "== $name: no time left"; return; fi
  [ "$limit" -gt "$rest" ] && limit=$rest
  timeout -k 5 "$limit" "$@" >"$file" 2>&1 &
  local job=$! running=1
  while [ -n "$running" ]; do
    sleep 0.5
    kill -0 $job 2>/dev/null || running=
    total=$(wc -l <"$file")
    if [ "$total" -gt "$shown" ]; then
      sed -n "$((shown + 1)),${total}p" "$file" | grep -E "${ROWS:-.}" | sed "s/^/$name: /" | tee -a "$OUT/log.txt"
    fi
    shown=$total
  done
  wait $job; status=$?
  case $status in
    0) say "== $name: done in $((SECONDS - began)) s" ;;
    124 | 137) say "== $name: ran past $limit s" ;;
    *) say "== $name: FAILED with $status after $((SECONDS - began)) s" ;;
  esac
  [ $status -eq 0 ] || tail -n 25 "$file" | sed "s/^/   | /" | tee -a "$OUT/log.txt"
  keep
}

# Whatever happens next, what there is so far is under $OUT.
keep() {
  find "$WORK/reports" -name '*.txt' -size +4M -exec truncate -s 4M {} \;
  local part=$WORK/$BASHPID.tar.gz
  tar -C "$WORK" -czf "$part" reports && mv "$part" "$OUT/reports.tar.gz"
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

if [ -n "$DRY" ]; then
  DEVICE=cpu PRECISIONS=(bf16)
  export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
  DEVICE=cuda PRECISIONS=(bf16 fp16)
fi
TINY=(--d_model 16 --nhead 2 --num_encoder_layers 1 --d_ffn 32 --mamba_config '{d_state: 4}')

corpus_keys() {
  if [ -n "${AN4:-}" ]; then echo "--data_folder $AN4"; else echo "--utterances 400 --utterance_s 4"; fi
}

run_tests() {  # NAME LIMIT FILES...
  local name=$1 limit=$2
  shift 2
  local options=(-m "${DRY:+not }gpu and not slow" -p no:cacheprovider -v --tb=short --durations=8)
  # Ends itself before its limit does, so that what failed is told.
  "$PYTHON" -m pytest --help 2>/dev/null | grep -q -- --session-timeout &&
    options+=(--timeout $((limit - 30)) --session-timeout $((limit - 20)))
  has xdist && [ -z "$DRY" ] && options+=(-n 12)
  ROWS='FAILED|ERROR|^E  |passed|failed|s (call|setup) ' within "$limit" "$name" \
    "$PYTHON" -m pytest "${options[@]}" $(printf "tests/gpu/test_%s.py " "$@")
}

# Graphs first: other parts train with them.
steps() { run_tests steps 100 steps; }
tests() { run_tests tests 170 synchronisation training networks decoding kernels; }

scan() {
  if [ -n "$DRY" ]; then
    ROWS='cuda|device' within 60 scan "$PYTHON" -m benchmarks.bench_scan --help
  else
    ROWS='ms$|ms,|^missed|^\|' \
      within 110 scan "$PYTHON" -m benchmarks.bench_scan --device cuda --report --rounds 3
  fi
}

sweep() {
  if [ -n "$DRY" ]; then
    ROWS='sweep' within 60 sweep "$PYTHON" -m benchmarks.scan_gpu --help
  else
    ROWS=' \| ' within 70 sweep "$PYTHON" -m benchmarks.scan_gpu --sweep
  fi
}

host() {
  ROWS='^\| (ConMamba|Conformer) | at most |^missed' within 100 host "$PYTHON" -m benchmarks.bench_host --check
}

encoder() {
  local size=(--batch_size 16 --seconds 4 16 60 --repeats 10)
  [ -n "$DRY" ] && size=(--batch_size 1 --seconds 1 --repeats 1)
  ROWS='^\[|^\|' within 120 encoder \
    "$PYTHON" -m benchmarks.bench_encoder --report --device $DEVICE --precision bf16 "${size[@]}"
}

graphs() {
  [ -n "$DRY" ] || ROWS='^\[' within 80 graphs "$PYTHON" -m benchmarks.bench_encoder --report \
    --device $DEVICE --precision bf16 --batch_size 16 --seconds 60 16 4 --repeats 10 --cuda_graphs
}

kernels() {
  local size=(--batch_size 16 --seconds 4 16 --repeats 5)
  [ -n "$DRY" ] && size=(--batch_size 1 --seconds 1 --repeats 1)
  ROWS='^\||a step, ' within 70 kernels \
    "$PYTHON" -m benchmarks.bench_encoder --report --kernels --device $DEVICE --precision bf16 "${size[@]}"
}

train_rate() {  # NAME LIMIT ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  ROWS='trained on per second|last line of the log|^error' \
    within "$limit" "$name" "$PYTHON" -m benchmarks.bench_train "$@" --device $DEVICE
}

an4() {
  local size=(--warmup 25 --steps 60 --num_workers 4) small=()
  [ -n "$DRY" ] && size=(--warmup 1 --steps 2 --num_workers 0) small=("${TINY[@]}" --max_batch_length_train 8
    --inter_ctc_layers '[]' --self_conditioning False)
  # As in the later epochs: two augmented copies of every utterance.
  size+=(--augment_from_epoch 1 --flat_start_epochs 0)
  train_rate an4 60 hparams/CTC/an4.yaml $(corpus_keys) "${size[@]}" "${small[@]}"
  # Shapes are captured when they come for the second time.
  [ -n "$DRY" ] || train_rate an4_graphs 70 hparams/CTC/an4.yaml $(corpus_keys) "${size[@]}" \
    --warmup 50 --steps 35 --cuda_graphs 24
}

small() {
  local size=(--utterances 5600 --warmup 25 --steps 60 --num_workers 8 --max_batch_length_train 900) small=()
  [ -n "$DRY" ] && size=(--utterances 12 --utterance_s 2 --warmup 1 --steps 2 --num_workers 0
    --max_batch_length_train 5) small=("${TINY[@]}")
  train_rate small 100 hparams/CTC/conmamba_small.yaml "${size[@]}" "${small[@]}"
  [ -n "$DRY" ] || train_rate small_graphs 80 hparams/CTC/conmamba_small.yaml "${size[@]}" --cuda_graphs 24
}

trainings() {
  local corpus=$WORK/tones precision
  "$PYTHON" -c "import sys; from pathlib import Path; from tests.generated_corpus import make_corpus
make_corpus(Path(sys.argv[1]), {'train-clean-100': 40, 'dev-clean': 3, 'test-clean': 3})" "$corpus"
  local keys=("${TINY[@]}" --data_folder "$corpus" --train_splits '[train-clean-100]'
    --test_splits '[test-clean]' --number_of_epochs 2 --max_batch_length_train 8 --num_bucket 4
    --num_workers 2 --log_interval_steps 1 --grad_accumulation_factor 1 --lr_adam 0.005
    --n_warmup_steps 10 --test_beam_size 4 --device $DEVICE --noprogressbar)
  local s2s=(--num_decoder_layers 1 --token_type char --output_neurons 31 --no_lm True
    --pretrained_lm_tokenizer_path null --valid_beam_size 2)
  local port=29600 runs=()
  # They measure nothing: side by side.
  for precision in "${PRECISIONS[@]}"; do
    port=$((port + 2))
    ROWS='rror|epoch: |test WER' within 110 "train_CTC_$precision" "$PYTHON" -m torch.distributed.run \
      --nproc-per-node 1 --master-port $port train_CTC.py hparams/CTC/conmamba_small.yaml \
      "${keys[@]}" --precision "$precision" --output_folder "$WORK/CTC_$precision" &
    runs+=($!)
    ROWS='rror|epoch: |test WER' within 110 "train_S2S_$precision" "$PYTHON" -m torch.distributed.run \
      --nproc-per-node 1 --master-port $((port + 1)) train_S2S.py \
      hparams/S2S/conmambamamba_small.yaml "${keys[@]}" "${s2s[@]}" --precision "$precision" \
      --output_folder "$WORK/S2S_$precision" &
    runs+=($!)
  done
  wait "${runs[@]}"
  local file
  for file in "$WORK"/*_*/metrics.jsonl; do
    say "$(basename "$(dirname "$file")") last lines of metrics.jsonl:"
    tail -n 2 "$file" | tee -a "$OUT/log.txt"
  done
}

decode() {
  local size=(--tokens 20 --joint_tokens 8 --rounds 1)
  [ -n "$DRY" ] && size=(--tokens 3 --rounds 1 --only memory per_token)
  ROWS=': ' within 80 decode "$PYTHON" -m benchmarks.bench_decode --device $DEVICE "${size[@]}"
}

# Trains until the time is up, evaluates what there is, and leaves the bundle.
recipe() {
  local run=$WORK/run script=train_CTC.py seconds=$TRAIN_S
  case $TRAIN_YAML in */S2S/*) script=train_S2S.py ;; esac
  [ "$seconds" -gt $(($(left) - 60)) ] && seconds=$(($(left) - 60))
  local command=("$PYTHON" "$script" "$TRAIN_YAML" --output_folder "$run" --device $DEVICE
    --noprogressbar "${TRAIN_ARGS[@]}")
  # SIGINT ends a run with a checkpoint; a second one would end it without.
  ROWS='rror|epoch: |Going on|WER' within $((seconds + 30)) recipe timeout --foreground -s INT "$seconds" "${command[@]}"
  [ -d "$run/bundle" ] || ROWS='rror|WER|^\|' within 120 recipe_scores "${command[@]}" --test_only
  "$PYTHON" -m inference.bundle "$run" "$WORK/bundle" --precision fp16 2>&1 | tee -a "$OUT/log.txt"
  cp "$run"/{metrics.jsonl,results.json,train_log.txt,curves.png} "$WORK/reports" 2>/dev/null
  keep
  [ -d "$WORK/bundle" ] && tar -C "$WORK" -cf - bundle | split -b 15M - "$OUT/bundle.tar."
}

[ -n "$DRY" ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$OUT/log.txt"
for group in ${PARTS//,/ }; do
  jobs=()
  for part in ${group//+/ }; do
    case $part in
      steps | an4 | small | graphs | decode | scan | sweep | tests | trainings | encoder | kernels | host)
        $part &
        jobs+=($!)
        ;;
      *) say "== $part: there is no such part" ;;
    esac
  done
  wait "${jobs[@]}"
done
[ -n "$TRAIN_YAML" ] && recipe
keep
say "== all in $((SECONDS - STARTED)) s"
