# What of Debian's packages is missing, and their installation: read by setup.sh and install.sh, which say what for.
# shellcheck shell=sh

PATH=$PATH:/usr/sbin:/sbin # where an unprivileged user's shell does not look: ldconfig, debootstrap

has() { command -v "$1" >/dev/null 2>&1; }

python_fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Of the CPU build of vLLM: it has its OpenMP with it, and not its libnuma.
numa_is_missing() {
    ! ldconfig -p 2>/dev/null | grep -q 'libnuma\.so\.1 ' && ! ls /usr/lib/*/libnuma.so.1 /usr/lib64/libnuma.so.1 >/dev/null 2>&1
}

has_nvidia_driver() {
    has nvidia-smi || [ -e /proc/driver/nvidia/version ] || ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1 '
}

# Whether the engine in a directory of engines is, or will be, the CPU build.
engine_is_cpu_build() {
    if [ -e "$1/current/vllmd-engine.json" ]; then
        grep -q '"variant": "cpu"' "$1/current/vllmd-engine.json"
    else
        ! has_nvidia_driver
    fi
}

# Whether the chosen engine's Python still finds it: after an upgrade of the system's Python it does not.
engine_works() {
    [ -e "$1/current/vllmd-engine.json" ] || return 1
    "$1/current/bin/python3" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' 2>/dev/null
}

# how_to_install PACKAGE...: the one command that anyone but root is told.
how_to_install() {
    if has apt-get; then
        printf 'sudo apt-get install -y --no-install-recommends %s' "$*"
    else
        printf 'install what your distribution calls %s (these are names of Debian)' "$*"
    fi
}

may_install() { [ "$(id -u)" -eq 0 ] && has apt-get; }

# install_packages PACKAGE...: as root. Its hundred lines are shown only when it fails. A fresh machine has no lists yet.
install_packages() {
    apt_log=$(mktemp)
    DEBIAN_FRONTEND=noninteractive apt-get -qq update >"$apt_log" 2>&1 || cat "$apt_log" >&2
    if DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >"$apt_log" 2>&1 </dev/null; then
        rm -f "$apt_log"
        return 0
    fi
    cat "$apt_log" >&2
    rm -f "$apt_log"
    return 1
}
