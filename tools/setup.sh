#!/bin/sh
# What `make` needs, made when it is missing: tools/setup.sh [venv] [engine] [demo] [test]
# Each step says what it does and why before it does it, and does nothing when nothing changed.
set -eu
cd "$(dirname "$0")/.."

: "${VLLMD_DEV_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/vllmd-dev}"
: "${ENGINES:=$VLLMD_DEV_CACHE/engines}"
: "${PORT:=8000}"
: "${MODEL:=}"
: "${ENGINE_FLAGS:=}"
umask 022

say() { printf '%s\n' "setup: $*" >&2; }
die() { printf '%s\n' "setup: $*" >&2; exit 1; }

# packages WHY PACKAGE...: only root installs; anyone else is told the one command.
packages() {
    why=$1
    shift
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "$why. Run: sudo apt-get install -y --no-install-recommends $*"
        return 1
    fi
    say "$why: installing $*"
    DEBIAN_FRONTEND=noninteractive apt-get -qq update >&2 || say "apt-get update failed; trying with the lists that are here"
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >&2
}

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for python in ${PYTHON:-} python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        if fits "$python"; then
            command -v "$python"
            return 0
        fi
    done
    return 1
}

venv_stamp() { # of whatever makes the environment another one
    { cat pyproject.toml; pwd; .venv/bin/python -c 'import sys; print(sys.version, sys.base_prefix)'; } 2>/dev/null | sha256sum | cut -d' ' -f1
}

venv() {
    stamp=.venv/.vllmd-setup
    if [ -x .venv/bin/vllmd ] && [ "$(cat $stamp 2>/dev/null)" = "$(venv_stamp)" ]; then
        return
    fi
    if [ ! -x .venv/bin/python ]; then
        if ! python=$(find_python); then
            if command -v python3 >/dev/null && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
                die "$(python3 -V) is too old: 3.11 or newer is needed (PYTHON=/path/to/python3.11 make setup)"
            fi
            packages "Python 3.11 or newer with venv is missing" python3 python3-venv ||
                exit 1
            python=$(find_python) || die "there is no Python 3.11 or newer with the venv module: PYTHON=/path make setup"
        fi
        say "making .venv with $python ($("$python" -V)): the project runs in an environment of its own"
        "$python" -m venv .venv
    fi
    say "installing the project and its test tools into .venv (pyproject.toml is new or changed)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
    venv_stamp >$stamp
}

engine() {
    mkdir -p .local "$ENGINES"
    if [ ! -L .local/engines ] || [ "$(readlink .local/engines)" != "$ENGINES" ]; then
        [ -d .local/engines ] && [ ! -L .local/engines ] && die ".local/engines is a directory; move its engines to $ENGINES and remove it"
        ln -sfn "$ENGINES" .local/engines
    fi
    [ -e "$ENGINES/current/vllmd-engine.json" ] && return
    if ! ldconfig -p 2>/dev/null | grep -q libnuma.so.1 && ! ls /usr/lib/*/libnuma.so.1 >/dev/null 2>&1; then
        packages "vLLM's CPU build needs libnuma" libnuma1 || say "going on without it"
    fi
    say "installing the real vLLM into $ENGINES (several GB, once; outside of the tree, so that every clone shares it)"
    # shellcheck disable=SC2086 # several flags in one variable, on purpose
    .venv/bin/vllmctl --root .local engine install $ENGINE_FLAGS
}

cpu_build() { grep -q '"variant": "cpu"' "$ENGINES/current/vllmd-engine.json"; }

demo() {
    model=$MODEL
    if [ -z "$model" ]; then
        model=$(pwd)/.local/demo-model
        if [ ! -e "$model/config.json" ]; then
            say "making a tiny demo model (random weights, under 1 MB, no network) in .local/demo-model"
            .venv/bin/python -m vllmd.models.demo .local/demo-model
        fi
    fi
    case $model in
    /*) ;;
    *) model=$(cd "$model" 2>/dev/null && pwd) || die "MODEL: there is no directory $MODEL" ;;
    esac
    [ -e "$model/config.json" ] || die "MODEL: there is no config.json in $model"
    mkdir -p .local/etc
    demo_config "$model" >.local/etc/.demo.yaml.new
    if cmp -s .local/etc/.demo.yaml.new .local/etc/demo.yaml; then
        rm .local/etc/.demo.yaml.new
    else
        say "writing .local/etc/demo.yaml: what \`make run\` serves"
        mv .local/etc/.demo.yaml.new .local/etc/demo.yaml
    fi
}

yaml_string() { printf "'%s'" "$(printf '%s' "$1" | sed "s/'/''/g")"; }

demo_config() {
    echo "# Written by \`make run\` (MODEL= and PORT= change it); your own instances are files beside this one."
    echo "model: {path: $(yaml_string "$1")}"
    echo "serve: {port: $PORT, served_model_name: demo}"
    if cpu_build; then
        echo "# Without a GPU: bf16 ends with SIGILL on some virtual machines, and compiling takes a minute."
        echo "gpus: none"
        echo "engine:"
        echo "  args: {dtype: float32, enforce-eager: true}"
        echo "  env: {VLLM_CPU_KVCACHE_SPACE: '1'}"
    fi
}

# The system tests boot a real systemd in a container; without these they are skipped by name.
test_tools() {
    missing=
    command -v debootstrap >/dev/null || missing="$missing debootstrap"
    command -v systemd-nspawn >/dev/null || missing="$missing systemd-container"
    command -v zstd >/dev/null || missing="$missing zstd"
    [ -z "$missing" ] && return
    # shellcheck disable=SC2086 # a list of packages
    packages "the system tests need tools" $missing || say "going on: the tests that need them are skipped"
}

[ $# -gt 0 ] || die "usage: tools/setup.sh [venv] [engine] [demo] [test]"
for step in "$@"; do
    case $step in
    venv | engine | demo) $step ;;
    test) test_tools ;;
    *) die "no such step: $step" ;;
    esac
done
