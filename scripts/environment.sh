# Makes the virtual environment of the project and installs the project into it; sourced by the other scripts.
# It is made once; when pyproject.toml changes, what is missing is added to it.
#   MODHIFI_VENV   where it is (.venv at the top of the project)
#   PYTHON         which Python makes it (the first of 3.11 or newer that is found)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${MODHIFI_VENV:-$PWD/.venv}"

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

stamp="$({ echo "$PWD"; cat pyproject.toml; } | cksum)"
if [ ! -f "$venv/modhifi.stamp" ] || [ "$(cat "$venv/modhifi.stamp")" != "$stamp" ]; then
    echo "installing into $venv (downloads PyTorch the first time; minutes)"
    if ! suits "$venv/bin/python" && ! "$python" -m venv --clear "$venv"; then
        echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv." >&2
        exit 1
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[test]"
    echo "$stamp" >"$venv/modhifi.stamp"
fi
