#!/usr/bin/env bash
# Builds, tests, checks and times the CUDA backend on a bare machine with a GPU: Python, torch with CUDA (2.10 or newer),
# pytest, nvcc, CMake and ninja, and no network.
#
#   bench/gpu_check.sh [--part build|tests|sanitize|times|nets] [--out DIR]
#
# Without --part all of them; each takes less than nine minutes, and one that fails leaves the others' results whole.
# Ends with a short table, and writes report.json and report.md to DIR (default: gpu_check).
set -uo pipefail
cd "$(dirname "$0")/.."

parts=(build tests sanitize times nets)
out=gpu_check
while (($#)); do
  case $1 in
    --part) parts=("${2:?--part: expected a name}"); shift 2 ;;
    --out) out=${2:?--out: expected a folder}; shift 2 ;;
    *) echo "usage: bench/gpu_check.sh [--part build|tests|sanitize|times|nets] [--out DIR]" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUTF8=1

build() {
  # For the cards that are here only.
  DIA_KERNELS_BUILD=cuda DIA_KERNELS_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader |
    tr -d . | sort -u | paste -sd';') python3 setup.py --quiet build_ext --inplace &&
    python3 -m dia_kernels info
}

# By four processes where pytest-xdist is there: more would not find room for the largest maps on 80 GB.
tests() {
  local parallel=()
  python3 -c 'import xdist' 2> /dev/null && parallel=(-n 4)
  python3 -m pytest -q -m gpu "${parallel[@]}" tests/test_cuda.py tests/test_triton_gpu.py tests/test_trials.py \
    tests/test_amp.py -p no:cacheprovider
}

# Our kernels alone, and each tensor in an allocation of its own, so that what lies behind it is nobody's.
sanitize() {
  local tool status=0
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name kernel_substring=dia \
      --error-exitcode 1 python3 bench/gpu.py small || status=1
  done
  return $status
}

times() {
  local status=0
  python3 bench/gpu.py times --out "$out" --seconds 120 || status=1
  python3 bench/gpu.py cells --out "$out" --seconds 60 || status=1
  python3 bench/gpu.py compile --out "$out" --seconds 240 || status=1
  # The pytest-benchmark suite, on the card.
  python3 -m pytest bench/test_step_bench.py --device cuda --dtype bfloat16 --layouts channels_last \
    --shapes 32x256x56x56,32x512x28x28,128x64x32x32 --benchmark-json "$out/step-bench.json" \
    -p no:cacheprovider || status=1
  return $status
}

nets() { python3 bench/gpu.py nets --out "$out"; }

failed=()
for part in "${parts[@]}"; do
  declare -F "$part" > /dev/null || { echo "--part: no part '$part'" >&2; exit 2; }
  printf '== %s\n' "$part"
  started=$SECONDS
  # In a shell of its own: what one part does to its environment is gone with it.
  if (timeout 540 bash -c "$(declare -f "$part"); out='$out'; $part") > "$out/$part.log" 2>&1; then
    verdict=passed
  else
    verdict=FAILED
    failed+=("$part")
  fi
  echo "$verdict in $((SECONDS - started)) s" | tee -a "$out/$part.log"
done
python3 bench/gpu.py report --out "$out"
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}; see $out/*.log"; exit 1; }
