#!/usr/bin/env bash
# Train an adapter on your own prompts: TARGET and DRAFTER are directories or Hub repo ids.
#   TARGET=Qwen/Qwen3-8B DRAFTER=./my-eagle3-head PROMPTS=prompts.jsonl HELD_OUT=held_out.jsonl examples/train.sh
# For traffic like the drafter's own training data add --learning-rate 3e-4; unsure, run both and keep the better on HELD_OUT.
# Without variables it trains on the tiny pair of this repository.
set -euo pipefail
tiny=$(dirname "$0")/tiny
ppow train \
  --target "${TARGET:-$tiny/target}" \
  --drafter "${DRAFTER:-$tiny/eagle3}" \
  --prompts "${PROMPTS:-$tiny/prompts/tests_train.jsonl}" \
  --held-out "${HELD_OUT:-$tiny/prompts/tests_held_out.jsonl}" \
  --config "$(dirname "$0")/train.yaml" \
  --output "${OUTPUT:-runs/adapter}" "$@"
