#!/bin/sh
# Put before each script of the packages by tools/package; @...@ are filled in there.
# Everything here acts on what belongs to root: nothing that the service's account could have written is run or trusted.
set -e

LIB=/usr/lib/vllmd
PROGRAM=$LIB/@PROGRAM@
KEPT=$LIB/.kept
STATE=/var/lib/vllmd

systemd_runs() { [ -d /run/systemd/system ]; }

instances_in() { # instances_in STATE,...: the units of instances, one a line
    systemctl list-units --plain --no-legend --full --state="$1" 'vllmd@*.service' 2>/dev/null | cut -d' ' -f1
}

one_line() { printf '%s' "$1" | tr '\n' ' '; }

users_and_directories() {
    systemd-sysusers vllmd.conf
    systemd-tmpfiles --create vllmd.conf
}

catalog() { journalctl --update-catalog >/dev/null 2>&1 || :; }

# -f: all files of a reproducible package have one time, so that of two versions of a file one could pass for the other.
compile() { # compile DIRECTORY
    [ -x "$1/bin/python3" ] || return 0
    "$1/bin/python3" -I -m compileall -q -f "$1/lib/python3/site-packages" || :
}

forget_byte_code() { find "$1" -depth -type d -name __pycache__ -exec rm -rf {} +; }

in_use() { # in_use DIRECTORY: by a process; the pattern comes from stdin, since grep is a process as well
    printf '%s' "$1/" | grep -qsaF -f - /proc/[0-9]*/cmdline
}

# A supervisor that runs goes on with the program it was started from, of which it may still have modules to import: a copy
# (of links) stands aside while the files of the package are exchanged, and then takes their place.
# What an upgrade that was cut short has kept already stays.
keep_program() {
    rm -rf "$KEPT/${PROGRAM##*/}"
    if [ -d "$PROGRAM" ] && in_use "$PROGRAM"; then
        mkdir -p "$KEPT"
        cp -al "$PROGRAM" "$KEPT/"
    fi
}

restore_kept_programs() {
    for kept in "$KEPT"/*; do
        if [ -d "$kept" ] && [ ! -d "$LIB/${kept##*/}/lib" ]; then
            rm -rf "${LIB:?}/${kept##*/}"
            mv -T "$kept" "$LIB/${kept##*/}"
        fi
    done
    rm -rf "$KEPT"
}

forget_unused_programs() {
    for program in "$LIB"/*; do
        if [ -d "$program" ] && [ "$program" != "$PROGRAM" ] && ! in_use "$program"; then rm -rf "$program"; fi
    done
}

restart_is_wanted() {
    [ "$(sed -n 's/^[[:space:]]*RESTART_ON_UPGRADE=["'\'']\{0,1\}\([a-z]*\).*/\1/p' /etc/default/vllmd 2>/dev/null | tail -n1)" = yes ]
}

# --no-block: a model loads for minutes, and apt must not wait for it. A stop lets requests in flight finish.
after_upgrade() {
    systemd_runs || return 0
    systemctl --no-block try-restart vllmd-gpu.service || :
    running=$(instances_in active,activating,reloading)
    [ -n "$running" ] || return 0
    if restart_is_wanted; then
        printf 'vllmd: restarting %s\n' "$(one_line "$running")"
        # shellcheck disable=SC2086 # a list
        systemctl --no-block try-restart $running || :
    else
        printf 'vllmd: %s: still the version before; restart when it suits, or set RESTART_ON_UPGRADE=yes in /etc/default/vllmd\n' \
            "$(one_line "$running")"
    fi
}

reload_systemd() { if systemd_runs; then systemctl daemon-reload || :; fi; }

stop_everything() {
    if systemd_runs; then systemctl stop 'vllmd@*.service' vllmd-gpu.service vllmd.target || :; fi
}

# What is left below the program's directory once the package manager has taken what is its own.
forget_program() {
    rm -rf "$LIB"
    if systemd_runs; then systemctl reset-failed 'vllmd@*.service' vllmd-gpu.service 2>/dev/null || :; fi
}
