# Makes the virtual environment of the project and installs the project into it; sourced by the other scripts.
# It is made once; when pyproject.toml, the constraints or the wanted extras change, what is missing is added to it.
#   MODHIFI_VENV          where it is (.venv at the top of the project)
#   MODHIFI_CONSTRAINTS   which versions: a constraints file (constraints/tested.txt), or none for the newest allowed
#   PYTHON                which Python makes it (the first of 3.11 or newer that is found)
# A script that needs more than the core sets EXTRAS, words for pip's square brackets, before it sources this file.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${MODHIFI_VENV:-$PWD/.venv}"
constraints="${MODHIFI_CONSTRAINTS:-constraints/tested.txt}"
extras="${EXTRAS:-}"

if [ "$constraints" != none ] && [ ! -f "$constraints" ]; then
    echo "error: MODHIFI_CONSTRAINTS: no file at $constraints; give a constraints file, or none." >&2
    exit 2
fi

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if suits "$candidate"; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11 or newer was found; install one, or set PYTHON=/path/to/python." >&2
    exit 1
fi

# One stamp for each set of extras: what a script needs is installed once, whichever script came first.
stamp="$({ echo "$PWD $constraints"; cat pyproject.toml; [ "$constraints" = none ] || cat "$constraints"; } | cksum)"
stamp_file="$venv/modhifi.${extras:-core}.stamp"
if [ ! -f "$stamp_file" ] || [ "$(cat "$stamp_file")" != "$stamp" ]; then
    echo "installing into $venv (downloads PyTorch the first time; minutes)"
    if ! suits "$venv/bin/python" && ! "$python" -m venv --clear "$venv"; then
        echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv." >&2
        exit 1
    fi
    versions=()
    [ "$constraints" = none ] || versions=(--constraint "$constraints")
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${versions[@]}" \
        --editable ".${extras:+[$extras]}"
    echo "$stamp" >"$stamp_file"
fi
