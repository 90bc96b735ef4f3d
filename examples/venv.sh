#!/usr/bin/env bash
# Makes an environment in the root of the sources and installs pinned Python packages into it. Quick when nothing changed.
#
#   examples/venv.sh REQUIREMENTS.txt [DIRECTORY]     DIRECTORY: .venv if it is not given
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=$1
venv=${2:-.venv}

# A python3 that can make environments; Debian's own needs a package for that.
python3 -c 'import venv, ensurepip' 2>/dev/null || container/install-deps.sh python

# The checksum of all requirements, kept per file: the tests' environment serves the quickstart too.
wanted=$(cat examples/requirements.txt "$requirements" | sha256sum | cut -d ' ' -f 1)
stamp=$venv/baton-$(basename "$(dirname "$requirements")").sha256
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "venv: installing $requirements into $venv" >&2
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || python3 -m venv --clear "$venv"
# Modules are compiled when they are first loaded: most never are.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement "$requirements" >&2
echo "$wanted" >"$stamp"
