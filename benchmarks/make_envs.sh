#!/usr/bin/env bash
# Makes one virtual environment per peer under benchmarks/.envs/ (git-ignored), from PyPI. This package and the bare loop run in
# the environment that runs the driver, so they need none here.
#   benchmarks/make_envs.sh                      # all of them
#   benchmarks/make_envs.sh devinterp2 canonical # only these
# An environment that is already complete is left as it is; remove its folder to make it anew.
# PYTHON names the interpreter (3.10 or newer). torch comes first and pinned, so that no peer's "torch>=..." pulls another
# build; on Linux without a CPU wheel at hand, pass e.g. TORCH="torch==2.13.0 --index-url <PyTorch's CPU index>".
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
envs="$here/.envs"
python="${PYTHON:-python3}"
torch_requirement="${TORCH:-torch==2.13.0}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

new_env() { # NAME: an empty environment with torch in it
    rm -rf "${envs:?}/$1"
    "$python" -m venv "$envs/$1"
    # shellcheck disable=SC2086  # the requirement may carry options
    "$envs/$1/bin/python" -m pip install -q $torch_requirement numpy
}

supply_batched() { # NAME: itertools.batched for an interpreter older than 3.12 (canonical-interp imports it)
    local site
    site="$("$envs/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cat >"$site/_supply_itertools_batched.py" <<'PY'
import itertools

if not hasattr(itertools, "batched"):

    def batched(iterable, n):
        if n < 1:
            raise ValueError("n must be at least one")
        iterator = iter(iterable)
        while chunk := tuple(itertools.islice(iterator, n)):
            yield chunk

    itertools.batched = batched
PY
    # a .pth line and not sitecustomize.py: Debian's own sitecustomize comes earlier on the path and would win
    echo "import _supply_itertools_batched" >"$site/_supply_itertools_batched.pth"
}

make_one() {
    local name="$1" pip="$envs/$1/bin/python -m pip install -q"
    new_env "$name"
    case "$name" in
    devinterp1)
        $pip "devinterp==1.3.2" setuptools
        ;;
    devinterp2)
        $pip "devinterp==2.0.1"
        ;;
    kronfluence)
        # held to constraints.txt, so that its own "torch>=..." and torchvision bring no CUDA build
        $pip -c "$here/../constraints.txt" "kronfluence==1.0.*"
        ;;
    canonical)
        # 0.2.7 says Python >= 3.12; on an older one the metadata is overruled and itertools.batched supplied
        if "$envs/$name/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
            $pip "canonical-interp==0.2.7"
        else
            $pip "pandas>=2.3.3" "tqdm>=4.67.3"
            $pip --no-deps --ignore-requires-python "canonical-interp==0.2.7"
            supply_batched "$name"
        fi
        ;;
    esac
    touch "$envs/$name/.complete"
}

for name in "${@:-devinterp1 devinterp2 canonical kronfluence}"; do
    for one in $name; do
        case "$one" in devinterp1 | devinterp2 | canonical | kronfluence) ;; *)
            echo "make_envs.sh: no environment is called '$one' (devinterp1, devinterp2, canonical, kronfluence)" >&2
            exit 2
            ;;
        esac
        if [ -e "$envs/$one/.complete" ]; then
            echo "$one: there"
        else
            echo "$one: making"
            make_one "$one"
            echo "$one: done"
        fi
    done
done
