# Sourced by the other scripts, from the repository's root: makes or reuses the virtual environment
# and puts it first on PATH.
#   FASA_VENV           where it is; default .venv in the checkout
#   FASA_SGLANG_VERSION which SGLang to install; default the newest that was tested
#   PYTHON              the interpreter to make it with; default the first of 3.11 or newer found
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
  echo "Python 3.11 or newer is needed and none was found; set PYTHON to one" >&2
  return 1
}

# The stamp is written last and says what the environment was made for.
wanted="sglang==$FASA_SGLANG_VERSION $(sed -n '/^\[project.optional-dependencies\]/,/^$/p' pyproject.toml | cksum)"
if [ "$(cat "$FASA_VENV/made-for" 2>/dev/null)" != "$wanted" ]; then
  echo "setting up $FASA_VENV with SGLang $FASA_SGLANG_VERSION (about 4 minutes and 11 GB)" >&2
  python="$(find_python)"
  rm -rf "$FASA_VENV"
  "$python" -m venv "$FASA_VENV"
  "$FASA_VENV/bin/python" -m pip install --quiet "sglang==$FASA_SGLANG_VERSION" ".[eval,dev]"
  echo "$wanted" > "$FASA_VENV/made-for"
fi
# setuptools packs whatever an earlier build left behind.
rm -rf build
# The project itself, as it is now. Not editable: a type checker and the wheel's file list see
# what a user gets.
"$FASA_VENV/bin/python" -m pip install --quiet --no-deps --force-reinstall .
export PATH="$FASA_VENV/bin:$PATH"
