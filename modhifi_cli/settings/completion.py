"""Shell completion: what may stand at the end of a command line, and the few lines that a shell runs to ask for it.

Everything is read from the YAML files as text, so that the answer comes at once. Names of files are left to the shell.
"""

from collections.abc import Callable, Iterable

from modhifi_cli.errors import ConfigError
from modhifi_cli.settings.yamls import choices, config_directory, groups, inherited, read_verb, verbs

# In bash "=" ends a word, so only what follows it is to be offered; a key stays open behind its "=".
_BASH = """_modhifi() {
    local line="${COMP_LINE:0:COMP_POINT}" found IFS=$'\\n'
    local word="${line##*[[:space:]]}"
    found=($(modhifi completion words "$line" 2>/dev/null))
    case "$word" in *=*) found=("${found[@]#*=}") ;; esac
    COMPREPLY=("${found[@]}")
    case "${found[*]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _modhifi modhifi
"""
# PREFIX is the word in front of the cursor; files are named by what follows its "=".
_ZSH = """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_modhifi() {
    local -a found
    found=(${(f)"$(modhifi completion words "modhifi ${(j: :)words[2,CURRENT-1]} $PREFIX" 2>/dev/null)"})
    if (( $#found )); then
        compadd -Q -S '' -- ${(M)found:#*=}
        compadd -Q -- ${found:#*=}
    else
        compset -P '*='
        _files
    fi
}
compdef _modhifi modhifi
"""
SCRIPTS = {
    "bash": _BASH,
    "zsh": _ZSH,
    "fish": "complete -c modhifi -a '(modhifi completion words (commandline -cp))'\n",
}
_WITHOUT_YAML = ("list", "completion")
_RUNS = ("run", "model.run")
_LISTS = ("evaluation", "export")  # groups that take several choices in brackets


def script(shell: str) -> str:
    """What ``eval "$(modhifi completion SHELL)"`` runs.

    Raises:
        ConfigError: If the shell is not known.
    """
    if shell not in SCRIPTS:
        known = ", ".join(SCRIPTS)
        raise ConfigError(f"modhifi completion takes the name of a shell, {known}; got '{shell}'.")
    return SCRIPTS[shell]


def candidates(line: str, runs: Callable[[], Iterable[str]] = tuple) -> list[str]:
    """Whole words that may take the place of the last word of a command line, sorted.

    Args:
        line: Everything in front of the cursor, ``"modhifi prune data=fo"``; a space at its end begins a new word.
        runs: Gives the names of the runs there are; asked only for keys that take one, since it reads folders.
    """
    words = line.split()
    last = "" if not words or line[-1].isspace() else words.pop()
    if not words[1:]:
        return _beginning([*verbs(), *_WITHOUT_YAML, "--help", "--version"], last)
    verb, given = words[1], words[2:]
    if verb == "completion":
        return _beginning(SCRIPTS, last)
    if verb == "list":
        return _beginning((f"group={group}" for group in groups()), last)
    if verb not in verbs():
        return []
    key, equals, _ = last.partition("=")
    if equals and key in _RUNS:
        return _beginning((f"{key}={run}" for run in ("last", *runs())), last)
    if equals:
        return _beginning((f"{key}={value}" for value in _values(verb, key)), last)
    return _beginning([f"{key}=" for key in _keys(verb, given)] + ["--help", "-m"], last)


def _beginning(words: Iterable[str], start: str) -> list[str]:
    return sorted({word for word in words if word.startswith(start)})


def _values(verb: str, key: str) -> list[str]:
    known = choices(verb).get(key, ())
    if key in _LISTS:
        return [f"[{choice}]" for choice in known]
    default = inherited(verb)[0].get(key, ("", ""))[0]
    return ["true", "false"] if default in ("true", "false") else list(known)


def _keys(verb: str, given: Iterable[str]) -> list[str]:
    """Keys of the verb, its groups, and the keys of every group's choice, typed before or the verb's own."""
    own, chosen = inherited(verb)
    typed = dict(word.partition("=")[::2] for word in given)
    found = [*own, *(group for group in chosen if choices(verb).get(group))]
    for group, choice in chosen.items():
        path = config_directory() / group / f"{typed.get(group, choice)}.yaml"
        if path.is_file():
            found += [f"{group}.{key}" for key in read_verb(path)[0] if not key.startswith("_")]
    return found

