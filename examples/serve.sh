#!/usr/bin/env bash
# Serve a target with an adapter through the OpenAI-compatible API.
#   TARGET=Qwen/Qwen3-8B ADAPTER=runs/adapter examples/serve.sh --port 8000
set -euo pipefail
target=${TARGET:-$(dirname "$0")/tiny/target}
adapter=${ADAPTER:-runs/adapter}
exec vllm serve "$target" \
  --speculative-config "{\"method\": \"ppow\", \"model\": \"$adapter\", \"num_speculative_tokens\": ${K:-8}}" "$@"
