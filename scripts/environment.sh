# Sourced by the other scripts, in the repository's root. Creates or reuses a virtual environment and
# puts it first on PATH.
#   FASA_VENV            its folder; default: .venv in the checkout
#   FASA_SGLANG_VERSION  the SGLang version to install; default: the newest tested one
#   PYTHON               the interpreter to create it with; default: the first of 3.11 or newer
set -euo pipefail

FASA_SGLANG_VERSION="${FASA_SGLANG_VERSION:-0.5.23}"
FASA_VENV="${FASA_VENV:-$PWD/.venv}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13; do
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed and was not found; set PYTHON to an interpreter" >&2
  return 1
}

# The stamp marks an environment as ours, and says what it was created for once it is complete.
stamp="$FASA_VENV/made-for"
needed="sglang==$FASA_SGLANG_VERSION $(sed -n '/^\[project.optional-dependencies\]/,/^$/p' pyproject.toml | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$needed" ]; then
  if [ -n "$(ls -A "$FASA_VENV" 2>/dev/null)" ] && [ ! -f "$stamp" ]; then
    echo "$FASA_VENV was not created by these scripts and is left alone; set FASA_VENV to another" \
      "folder" >&2
    exit 1
  fi
  echo "creating $FASA_VENV with SGLang $FASA_SGLANG_VERSION (about 4 minutes and 11 GB)" >&2
  python="$(find_python)"
  rm -rf "$FASA_VENV"
  mkdir -p "$FASA_VENV"
  echo "incomplete" > "$stamp"
  "$python" -m venv "$FASA_VENV"
  "$FASA_VENV/bin/python" -m pip install --quiet "sglang==$FASA_SGLANG_VERSION" ".[eval,dev]"
  echo "$needed" > "$stamp"
fi
# setuptools would pack what an earlier build left behind.
rm -rf build
# The project as it is now, not editable, so that type checker and tests see what a user installs.
"$FASA_VENV/bin/python" -m pip install --quiet --no-deps --force-reinstall .
export PATH="$FASA_VENV/bin:$PATH"
