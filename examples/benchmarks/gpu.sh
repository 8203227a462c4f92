#!/usr/bin/env bash
# What a GPU is asked, step by step; what was done is kept, so run it again to go on.
#
#   examples/benchmarks/gpu.sh [OUTPUT] [options of gpu/steps.py: --backend cpu, --tiny]
#
# Steps: the whole loop with the tiny pair; training both kinds of drafter; greedy identity on both model runners, eager and
# with CUDA graphs; the tests of sampling, of the adaptive window, of hot swap and of what serving is combined with; the
# cost profile of a Qwen3-8B-shaped target with an EAGLE-3 head, random weights, K = 1..10, batch 1..64; and under
# synthetic acceptance no speculation, every fixed K and the adaptive window, in as many groups as the memory asks for
# (arms-1, …), each beside no speculation. Needs about 24 GB of GPU memory; with less than 52 GB arms run one after the
# other.
#
# Environment:
#   PYTHON     an interpreter with vllm-ppow[train] and vLLM; by default .venv/bin/python, else python3
#   VLLM_SITE  a folder with vLLM to put before that interpreter's own packages
#   STEP_LIMIT seconds a step may take, 600 by default
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$([[ -x $root/.venv/bin/python ]] && echo "$root/.venv/bin/python" || echo python3)}
export PYTHONPATH=${VLLM_SITE:+$VLLM_SITE:}$root/train:$root${PYTHONPATH:+:$PYTHONPATH}

output=runs/gpu
if [[ $# -gt 0 && $1 != --* ]]; then
  output=$1
  shift
fi
steps=$("$python" "$here/gpu/steps.py" list --output "$output" "$@") || exit 2
failed=()
for step in $steps; do
  echo "== $step"
  timeout "${STEP_LIMIT:-600}" "$python" "$here/gpu/steps.py" "$step" --output "$output" "$@"
  status=$?
  if [[ $status -ne 0 ]]; then
    [[ $status -eq 124 ]] && echo "$step took longer than ${STEP_LIMIT:-600} s." >&2
    failed+=("$step")
  fi
done
"$python" "$here/gpu/summary.py" "$output" | tee "$output/summary.md"
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "Failed: ${failed[*]}. Run the same command again to try these, and only these, once more." >&2
  exit 1
fi
