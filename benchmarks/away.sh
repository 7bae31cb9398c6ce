#!/usr/bin/env bash
# A table's runs on a machine without internet, in pieces that continue each other, and its speed.
#
#   benchmarks/away.sh pack BUNDLE DATA_DIR NAME [WHEEL...]     here: what has to be carried
#   BUNDLE/away.sh run MINUTES [ARGUMENTS OF kafjax experiment] there, again and again
#   BUNDLE/away.sh measure [ARGUMENTS OF benchmarks.cuda]       there, once
#   BUNDLE/away.sh results TARGET.tar.gz                        there: what has to come back
#
# `pack` puts the prepared dataset NAME of DATA_DIR, kafjax's wheel and the named packages into the
# folder BUNDLE; name those that the other machine lacks, as in "ml-collections tensorflow-datasets",
# with what pip download needs for it in PIP_DOWNLOAD, as in
# "--no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64".
# `run` stops after MINUTES with checkpoints, and ends with status 0 when the table is complete, with
# 143 while there is more to do. On a fresh machine unpack the last results in BUNDLE first.
# `measure` compares networks and losses with the golden values, by pytest, which may have to be
# carried too (with iniconfig, pluggy and packaging), and then times the step against PyTorch's.
set -euo pipefail

pack() {
    local bundle=$1 data_dir=$2 name=$3 root
    shift 3
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    mkdir -p "$bundle/data" "$bundle/wheels"
    cp -r "$data_dir/$name" "$bundle/data/"
    cp "${BASH_SOURCE[0]}" "$bundle/away.sh"
    mkdir -p "$bundle/source/tests" "$bundle/source/benchmarks"
    cp "$root"/benchmarks/*.py "$bundle/source/benchmarks/"
    cp -r "$root"/tests/{__init__,test_golden,release_weights}.py "$root/tests/golden" \
        "$bundle/source/tests/"
    python -m pip wheel --quiet --no-deps --wheel-dir "$bundle/wheels" "$root"
    for wheel in "$@"; do
        # shellcheck disable=SC2086 - several options
        python -m pip download --quiet ${PIP_DOWNLOAD:-} --dest "$bundle/wheels" "$wheel"
    done
    du -sh "$bundle"
}

set_up() {
    bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    if [ ! -d "$bundle/site" ]; then
        python -m pip install --quiet --no-index --no-deps --target "$bundle/site" "$bundle"/wheels/*.whl
    fi
    export PYTHONPATH="$bundle/site${PYTHONPATH:+:$PYTHONPATH}"
    export JAX_COMPILATION_CACHE_DIR="$bundle/runs/xla"
}

run() {
    local minutes=$1 bundle
    shift
    set_up
    # The runs save their state at the signal.
    timeout --signal=TERM "${minutes}m" python -m kafjax.experiment "$@" \
        --data_dir "$bundle/data" --workdir "$bundle/runs" && return 0
    local status=$?
    if [ "$status" -eq 124 ]; then status=143; fi
    return "$status"
}

measure() {
    local bundle
    set_up
    cd "$bundle/source"
    # Also if a golden value is missed; the status is then 1 all the same.
    local status=0
    python -m pytest -q --noconftest -p no:cacheprovider tests/test_golden.py || status=1
    python -m benchmarks.cuda --output "$bundle/runs/benchmarks" "$@"
    return "$status"
}

results() {
    local target=$1 bundle
    bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    tar -czf "$target" -C "$bundle" runs
}

case "${1:-}" in
    pack | run | measure | results) "$@" ;;
    *)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 2
        ;;
esac
