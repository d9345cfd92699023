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
