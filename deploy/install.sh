#!/usr/bin/env bash
# What the image installs, in two layers; `make image-check` runs it in a clean virtual environment.
#   install.sh libraries VENV LOCKFILE     every library, by hash
#   install.sh project VENV FOLDER         this project, without libraries
set -euo pipefail
what=$1 venv=$2 source=$3
case $what in
  libraries)
    "${PYTHON:-python3.11}" -m venv "$venv"
    "$venv/bin/pip" install --disable-pip-version-check --no-deps --require-hashes \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "$source"
    ;;
  project)
    "$venv/bin/pip" install --disable-pip-version-check --no-deps "$source"
    ;;
  *)
    echo "install.sh: libraries or project, not '$what'" >&2
    exit 2
    ;;
esac
