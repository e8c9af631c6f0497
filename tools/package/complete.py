"""Shell completion for bash, zsh and fish, from the parsers themselves.

All three walk the words before the cursor to the innermost verb and offer its verbs, its options once a `-` is typed, the
names of instances where a NAME is wanted, and files where a file is.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping

from tools.package.commands import Command, Option, commands

INSTANCE = "NAME"
_FILES = ("FILE", "DIR", "PATH", "WHEELS", "PYTHON", "LOCK")
LIST_INSTANCES = "for f in /etc/vllmd/*.yaml; do f=${f##*/}; f=${f%.yaml}; case $f in vllmd|\\*) ;; *) printf '%s\\n' \"$f\" ;; esac; done"
PRESET = "PRESET|MODEL"
LIST_PRESETS = "for f in /usr/share/vllmd/presets/*.yaml /usr/local/share/vllmd/presets/*.yaml /etc/vllmd/presets/*.yaml; do f=${f##*/}; f=${f%.yaml}; case $f in \\*) ;; *) printf '%s\\n' \"$f\" ;; esac; done"
_HEAD = "Made from the command's own parser by the package's build."


def _path(command: Command) -> str:
    return " ".join(command.words)


def wants_instance(command: Command) -> bool:
    return any(each.metavar == INSTANCE for each in command.arguments)


def wants_preset(command: Command) -> bool:
    return any(each.metavar == PRESET for each in command.arguments)


def wants_file(command: Command) -> bool:
    return any(each.metavar in _FILES for each in command.arguments)


def _words(command: Command) -> str:
    return " ".join([*(verb.words[-1] for verb in command.verbs), *(choice for each in command.arguments for choice in each.choices)])


def _flags(command: Command) -> str:
    """Inherited too: --user and --root may stand behind the verb."""
    return " ".join(flag for option in command.options for flag in option.flags)


def _with_value(command: Command) -> list[Option]:
    return [option for option in command.options if option.metavar]


def _function(name: str) -> str:
    return "_" + name.replace("-", "_")


def _cases(top: Command, row: Callable[[Command], str]) -> str:
    return "\n".join(f"    {shlex.quote(_path(each))}) {row(each)} ;;" for each in top.walk())


def _values(top: Command) -> str:
    """What follows an option that takes a value, as cases of `PATH OPTION`."""
    rows = []
    for each in top.walk():
        for option in _with_value(each):
            what = "kind=files" if option.metavar in _FILES else f"kind=words offers={shlex.quote(' '.join(option.choices))}"
            rows.append(f"    {'|'.join(shlex.quote(f'{_path(each)} {flag}') for flag in option.flags)}) {what} ;;")
    return "\n".join(rows)


def _walk(top: Command) -> str:
    nested = [shlex.quote(_path(each)) for each in top.walk() if len(each.words) > 1]
    return f'    case "$at $word" in\n      {"|".join(nested)}) at="$at $word" ;;\n    esac' if nested else "    :"


def _row(command: Command) -> str:
    kind = "presets" if wants_preset(command) else "instances" if wants_instance(command) else "files" if wants_file(command) else "words"
    return f"kind={kind} offers={shlex.quote(_words(command))} flags={shlex.quote(_flags(command))}"


def _body(top: Command) -> str:
    return f"""  for word in "${{before[@]}}"; do
{_walk(top)}
  done
  case $at in
{_cases(top, _row)}
  esac
  case "$at $previous" in
{_values(top) or "    *) ;;"}
  esac
  case $current in -*) kind=words offers=$flags ;; esac
  case $kind in instances|presets) offers="$offers $({LIST_INSTANCES})" ;; esac
  if [ "$kind" = presets ]; then offers="$offers $({LIST_PRESETS})"; fi"""


def bash(top: Command) -> str:
    name = top.words[0]
    return f"""# bash completion for {name}. {_HEAD}
{_function(name)}() {{
  local at={name} word kind=words offers= flags= current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
  local before=("${{COMP_WORDS[@]:1:COMP_CWORD-1}}")
{_body(top)}
  if [ "$kind" = files ]; then
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
  else
    mapfile -t COMPREPLY < <(compgen -W "$offers" -- "$current")
  fi
}}
complete -F {_function(name)} {name}
"""


def zsh(top: Command) -> str:
    name = top.words[0]
    return f"""#compdef {name}
# {_HEAD}
local at={name} word kind=words offers= flags= current=${{words[CURRENT]}} previous=${{words[CURRENT-1]}}
local -a before=("${{(@)words[2,CURRENT-1]}}")
() {{
  setopt localoptions nonomatch
{_body(top)}
}}
if [ "$kind" = files ]; then
  _files
else
  compadd -- ${{=offers}}
fi
"""


def fish(top: Command) -> str:
    name = top.words[0]
    function = f"__{name.replace('-', '_')}_at"
    nested = " ".join(shlex.quote(_path(each)) for each in top.walk() if len(each.words) > 1)
    lines = [
        f"# fish completion for {name}. {_HEAD}",
        f"function {function} --description 'whether the words so far lead to this verb'",
        f"    set -l at {name}",
        "    for word in (commandline -opc)[2..-1]",
        f'        if contains -- "$at $word" {nested}' if nested else "        if false",
        '            set at "$at $word"',
        "        end",
        "    end",
        '    test "$at" = "$argv[1]"',
        "end",
        f"complete -c {name} -f",
    ]
    for each in top.walk():
        lines += _fish_rows(name, f"-n {shlex.quote(f'{function} {shlex.quote(_path(each))}')}", each)
    return "\n".join(lines) + "\n"


def _fish_rows(name: str, where: str, command: Command) -> list[str]:
    start = f"complete -c {name} {where}"
    rows = [f"{start} -a {verb.words[-1]} -d {_fish_text(verb.help)}" for verb in command.verbs]
    if wants_instance(command):
        rows.append(f"{start} -a '(string replace -rf \".*/(.*)\\.yaml\" \"\\$1\" /etc/vllmd/*.yaml | string match -v vllmd)'")
    if wants_preset(command):
        # `set`: to any other command a pattern without a match is an error.
        rows.append(f"{start} -a '(set -l f /usr/share/vllmd/presets/*.yaml /usr/local/share/vllmd/presets/*.yaml /etc/vllmd/presets/*.yaml; string replace -rf \".*/(.*)\\.yaml\" \"\\$1\" $f)'")
    if wants_file(command):
        rows.append(f"{start} -F")
    for option in command.options:
        flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
        value = ""
        if option.metavar:
            value = " -r -F" if option.metavar in _FILES else f" -x -a {shlex.quote(' '.join(option.choices))}"
        rows.append(f"{start} {flags}{value} -d {_fish_text(option.help)}")
    return rows


def _fish_text(text: str) -> str:
    """In fish's single quotes a backslash escapes itself and the quote, and nothing else."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


PLACES: Mapping[str, tuple[Callable[[Command], str], str]] = {
    "bash": (bash, "{share}/bash-completion/completions/NAME"),
    "zsh": (zsh, "{zsh}/_NAME"),
    "fish": (fish, "{fish}/NAME.fish"),
}


def scripts() -> Iterator[tuple[str, str]]:
    """Each with its place (layout.py)."""
    for command in commands():
        for make, place in PLACES.values():
            yield place.replace("NAME", command.words[0]), make(command)
