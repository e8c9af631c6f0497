#!/bin/sh
# Installs vllmd on this host from the checkout that this file lies in (`make install`), or undoes it (`make uninstall`).
#
#   tools/install.sh               program, units, user, /etc/vllmd, the engine, and an instance `demo`
#   tools/install.sh --uninstall   undoes it; configuration, models, engines and state are kept
#   tools/install.sh --uninstall --purge   removes those too, and the user
#
#   VLLMD_INSTALL_ENGINE=no        do not install an engine (else: `vllmctl engine install`, if none is there)
#   VLLMD_ENGINE_EXECUTABLE=PATH   let the demo instance run this engine; none is installed
#   PYTHON=PATH                    Python 3.11 or newer for the program's environment (default: python3)
#
# pip is used as it is configured (PIP_NO_INDEX and PIP_FIND_LINKS make an installation without network).
set -eu

LIB=/usr/local/lib/vllmd
BIN=/usr/local/bin
FILES=$LIB/files # what of the files below was made: uninstall removes those
UNITS=/usr/local/lib/systemd/system
SYSUSERS=/usr/local/lib/sysusers.d
TMPFILES=/usr/local/lib/tmpfiles.d
ENGINES=/opt/vllmd/engines
DEMO=/var/lib/vllmd/models/demo
COMMANDS="vllmd vllmctl vllm-preflight vllm-resolve-model vllm-serve"
PYTHON=${PYTHON:-python3}

say() { printf '%s\n' "$*"; }

die() {
    printf 'install: %s\n  hint: %s\n' "$1" "$2" >&2
    exit "${3:-1}"
}

checkout=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tools/packages.sh
. "$checkout/tools/packages.sh"

systemd_runs() { [ -d /run/systemd/system ]; }

need_root() {
    [ "$(id -u)" -eq 0 ] || die "this needs root: it writes under /usr/local, /etc and /var" "sudo make $1" 77
}

refuse_beside_package() {
    if has dpkg-query && [ "$(dpkg-query -W -f '${db:Status-Status}' vllmd 2>/dev/null || :)" = installed ]; then
        die "the Debian package vllmd is installed; the two would share units, user and state" "apt-get remove vllmd, or stay with the package" 78
    fi
    if has rpm && rpm -q vllmd >/dev/null 2>&1; then
        die "the RPM package vllmd is installed; the two would share units, user and state" "dnf remove vllmd, or stay with the package" 78
    fi
}

# install_or_die WHY PACKAGE...
install_or_die() {
    why=$1
    shift
    say "installing $*: $why"
    may_install && install_packages "$@" && return
    die "$why, and it could not be installed" "$(how_to_install "$@")"
}

need_python() {
    if [ "$PYTHON" = python3 ] && ! python_fits python3 && { ! has python3 || python_is_new_enough; }; then
        install_or_die "the program gets a virtual environment of its own" python3 python3-venv
    fi
    python_is_new_enough || die "$PYTHON is missing or older than Python 3.11" "install it, or name another one: PYTHON=/path make install"
    python_fits "$PYTHON" || die "$PYTHON cannot make virtual environments (no module ensurepip)" "install your distribution's package of it"
}

engine_is_wanted() { [ -z "${VLLMD_ENGINE_EXECUTABLE:-}" ] && [ "${VLLMD_INSTALL_ENGINE:-yes}" != no ]; }

need_libraries() {
    engine_is_wanted || return 0
    if engine_is_cpu_build "$ENGINES" && numa_is_missing; then
        install_or_die "vLLM's CPU build needs libnuma" libnuma1
    fi
}

python_is_new_enough() { "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# A copy, so that the build leaves nothing of root's in the checkout, and so that any user can read it.
copy_source() {
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 0755 "$scratch"
    mkdir "$scratch/source"
    for part in vllmd units etc share docs tools pyproject.toml README.md LICENSE NEWS.md; do
        if [ -e "$checkout/$part" ]; then cp -R "$checkout/$part" "$scratch/source/"; fi
    done
    chmod -R u=rwX,go=rX "$scratch/source"
    source=$scratch/source
}

# A new environment beside the old one, then one rename. The one before stays until the next installation: a running
# supervisor may still have modules of it to import.
install_program() {
    mkdir -p "$LIB"
    previous=$(readlink "$LIB/current" 2>/dev/null || :)
    number=1
    while [ -e "$LIB/program-$number" ]; do number=$((number + 1)); done
    fresh=$LIB/program-$number
    say "installing the program into $fresh"
    "$PYTHON" -m venv "$fresh" || { rm -rf "$fresh"; die "no virtual environment could be made" "see above"; }
    if ! "$fresh/bin/python" -m pip install --quiet --disable-pip-version-check "$source"; then
        rm -rf "$fresh"
        die "pip could not install the program; nothing was changed" "see above; is an index configured and reachable?"
    fi
    ln -s "program-$number" "$LIB/.current"
    mv -T "$LIB/.current" "$LIB/current"
    for old in "$LIB"/program-*; do
        case ${old##*/} in "program-$number" | "$previous") ;; *) rm -rf "$old" ;; esac
    done
    mkdir -p "$BIN"
    for command in $COMMANDS; do ln -sfn "$LIB/current/bin/$command" "$BIN/$command"; done
}

# Units, polkit's rule, man pages, completions, documents, what Prometheus and Grafana are pointed at: those of the packages.
install_files() {
    say "installing units, user, directories, man pages and completions"
    (cd "$source" && "$LIB/current/bin/python" -B -m tools.package.host "$FILES")
    systemd-sysusers "$SYSUSERS/vllmd.conf"
    systemd-tmpfiles --create "$TMPFILES/vllmd.conf"
    journalctl --update-catalog >/dev/null 2>&1 || :
    if systemd_runs; then systemctl daemon-reload; fi
    systemctl --quiet enable vllmd.target vllmd-gpu.service
    # A watch that runs is the old program's; instances bear its absence for a moment.
    if systemd_runs; then systemctl try-restart vllmd-gpu.service || :; fi
}

install_configuration() {
    mkdir -p /etc/vllmd
    keep_or_write /etc/vllmd/vllmd.yaml "$source/etc/vllmd.yaml" default_vllmd_yaml
    keep_or_write /etc/vllmd/demo.yaml "$source/etc/demo.yaml" default_demo_yaml
}

# What a person has edited stays as it is.
keep_or_write() {
    [ ! -e "$1" ] || return 0
    if [ -e "$2" ]; then cp "$2" "$1"; else "$3" >"$1"; fi
    if [ -n "${VLLMD_ENGINE_EXECUTABLE:-}" ] && [ "$1" = /etc/vllmd/demo.yaml ]; then
        mkdir -p /etc/vllmd/demo.d
        printf 'engine:\n  executable: %s\n' "$VLLMD_ENGINE_EXECUTABLE" >/etc/vllmd/demo.d/10-engine.yaml
    fi
}

default_vllmd_yaml() {
    say "# Settings of all instances of this host; /etc/vllmd/NAME.yaml has those of one. \`vllmd check\` reads them."
}

default_demo_yaml() {
    cat <<'YAML'
# A tiny model with random weights, which shows that the installation works: systemctl enable --now vllmd@demo
model: /var/lib/vllmd/models/demo
serve:
  served_model_name: demo
  max_model_len: 512
engine:
  args: {enforce-eager: true, dtype: float32}
  env: {VLLM_CPU_KVCACHE_SPACE: 1}
YAML
}

install_engine() {
    engine_is_wanted || return 0
    reinstall=
    if [ -e "$ENGINES/current" ]; then
        if engine_works "$ENGINES" || [ ! -e "$ENGINES/current/vllmd-engine.json" ]; then return 0; fi
        say "the engine in $ENGINES does not find itself (is its Python another one now?): it is made again"
        reinstall=--reinstall
    fi
    say "installing the engine (several gigabytes; VLLMD_INSTALL_ENGINE=no leaves it out)"
    # shellcheck disable=SC2086 # one flag or none
    "$BIN/vllmctl" engine install $reinstall
}

# As the service's user: root writes nothing into a directory that others could have prepared.
make_demo_model() {
    [ ! -e "$DEMO/config.json" ] || return 0
    say "making the demo model in $DEMO"
    runuser -u vllmd -- "$LIB/current/bin/python" -m vllmd.models.demo "$DEMO"
}

finish() {
    if systemd_runs; then
        say "done. Try it:  systemctl enable --now vllmd@demo  &&  vllmctl status"
    else
        say "done. systemd does not run here, so nothing can be started as a unit; in the foreground:  vllmd run demo"
    fi
}

install_all() {
    need_root install
    refuse_beside_package
    { has systemd-sysusers && has systemd-tmpfiles; } || die "systemd is not installed" "vllmd runs as a systemd unit; in a container: make run"
    need_python
    need_libraries
    copy_source
    install_program
    install_files
    install_configuration
    install_engine
    make_demo_model
    finish
}

stop_instances() {
    if systemd_runs; then systemctl stop 'vllmd@*.service' vllmd-gpu.service vllmd.target; fi
    for link in /etc/systemd/system/*.wants/vllmd@*.service /etc/systemd/system/*.wants/vllmd-gpu.service /etc/systemd/system/*.wants/vllmd.target; do
        if [ -L "$link" ]; then systemctl --quiet disable "${link##*/}"; fi
    done
}

# A directory that was made here, of a package that was installed later (polkit's).
belongs_to_a_package() {
    if has dpkg-query; then dpkg-query -S "$1" >/dev/null 2>&1; else has rpm && rpm -qf "$1" >/dev/null 2>&1; fi
}

remove_files() {
    [ -e "$FILES" ] || return 0
    while read -r path; do
        case $path in
        */) belongs_to_a_package "${path%/}" || rmdir --ignore-fail-on-non-empty "$path" 2>/dev/null || : ;;
        *) rm -f "$path" ;;
        esac
    done <"$FILES"
}

uninstall_program() {
    for command in $COMMANDS; do
        case $(readlink "$BIN/$command" 2>/dev/null || :) in "$LIB"/*) rm -f "$BIN/$command" ;; esac
    done
    remove_files
    rm -rf "$LIB" /run/vllmd
    journalctl --update-catalog >/dev/null 2>&1 || :
    if systemd_runs; then systemctl daemon-reload && systemctl reset-failed 'vllmd@*.service' vllmd-gpu.service 2>/dev/null || :; fi
}

purge() {
    rm -rf /etc/vllmd /var/lib/vllmd /var/cache/vllmd /opt/vllmd
    if has userdel && id vllmd >/dev/null 2>&1; then userdel vllmd; fi
}

uninstall_all() {
    need_root uninstall
    refuse_beside_package
    stop_instances
    uninstall_program
    if [ "${1:-}" = --purge ]; then
        purge
        say "removed, with configuration, models, engines and state"
    else
        say "removed. Kept: /etc/vllmd, /var/lib/vllmd, /var/cache/vllmd, /opt/vllmd (tools/install.sh --uninstall --purge removes them)"
    fi
}

case ${1:-} in
    '') install_all ;;
    --uninstall) uninstall_all "${2:-}" ;;
    *) die "unknown argument: $1" "tools/install.sh [--uninstall [--purge]]" 64 ;;
esac
