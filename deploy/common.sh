# Shared by the project's scripts: source it. Sets ROOT, and gives timed steps and a Python
# environment of the project's own (build/venv).

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"

# Compiled objects are found again in another checkout of the same sources.
export CCACHE_BASEDIR=$ROOT CCACHE_NOHASHDIR=true

_step_name=""
_step_started=0

# step NAME: prints the time of the step before it and starts a new one.
step() {
  step_done
  _step_name=$1
  _step_started=$(date +%s)
  printf '== %s\n' "$_step_name"
}

step_done() {
  if [ -n "$_step_name" ]; then
    printf '== %s: %d s\n' "$_step_name" $(($(date +%s) - _step_started))
    _step_name=""
  fi
}

# The project's Python environment; made on first use.
venv() {
  if [ ! -x build/venv/bin/python ]; then
    mkdir -p build
    python3 -m venv build/venv
    build/venv/bin/python -m pip install --quiet --upgrade pip
  fi
}

# venv_install REQUIREMENTS_FILE: installs it once per content of the file.
venv_install() {
  venv
  local stamp
  stamp=build/venv/.installed-$(sha256sum "$1" | cut -c1-16)
  if [ ! -e "$stamp" ]; then
    build/venv/bin/python -m pip install --quiet -r "$1"
    touch "$stamp"
  fi
}

# configure_and_build PRESET TARGETS...: CMake configure (once) and build.
build_preset() {
  local preset=$1
  shift
  mkdir -p build
  cmake --preset "$preset" ${CMAKE_EXTRA:-} > "build/$preset-configure.log" 2>&1 || {
    cat "build/$preset-configure.log" >&2
    return 1
  }
  cmake --build "build/$preset" --target "$@"
}

# Whether the machine has a CUDA compiler that the build can use (12.8 or newer).
nvcc_is_new_enough() {
  local nvcc version
  nvcc=$(PATH=$PATH:/usr/local/cuda/bin command -v nvcc) || return 1
  version=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
  [ "$(printf '%s\n' 12.8 "$version" | sort -V | head -n 1)" = 12.8 ]
}

# The architectures of this machine's GPUs as nvcc calls them; where there is none, all that the
# kernels are written for.
cuda_architectures() {
  local architectures
  architectures=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null |
    sort -u | sed 's/\.//; s/^90$/90a/' | paste -sd ';') || true
  echo "${architectures:-80;89;90a;100}"
}
