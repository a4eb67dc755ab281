#!/usr/bin/env bash
# What a machine with a GPU has to show, in one call: the GPU tests, the speed of a step, several runs at once, what a
# checkpoint costs, then the CIFAR-100 tables, seed after seed.
#   tests/gpu/run_all.sh OUT [CIFAR_ROOT]    results go to OUT; without CIFAR_ROOT the trainings are left out.
# IMAGES=DIR, a folder with train/ and val/ of JPEGs, adds the step from files and the loaders (both need DALI). BENCH
# holds more of the benchmarks' command line.
# Needs torch, torchvision, numpy, scipy, pyyaml, pydantic, safetensors, tqdm, scikit-learn, matplotlib and pytest; neither
# DALI nor MLflow. TERM saves (exit code 75), and the same call goes on from there: what has its file in OUT is not measured
# again. ONLY="step-cifar concurrent" measures these alone, so that a machine lent by the minute does them in several calls;
# no measurement takes longer than LIMIT seconds (300). SEEDS ("0 1 2") and SWEEP (more of the sweeps' command line) change
# what is trained.
# Rehearsal on a CPU: ONLY="step-cifar concurrent checkpoint" BENCH="--models resnet8 --batch-size 8 --steps 1 --rounds 1
# --precision fp32 --compile off" tests/gpu/run_all.sh /tmp/out
set -u
cd "$(dirname "$0")/../.." || exit
out=$(mkdir -p "$1" && cd "$1" && pwd)
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
# A child in the background and `wait`, so that this shell hears a signal and passes it on.
child=
trap '[ -z "$child" ] || kill -TERM "$child"; stopped=1' TERM INT
run() { "$@" & child=$!; wait "$child"; code=$?; [ "$code" -le 128 ] || { wait "$child"; code=$?; }; child=; return "$code"; }
stopped=
run python3 -m dl2pa doctor >"$out/doctor.txt" 2>&1
wanted() { [ -z "$stopped" ] && [[ " ${ONLY:-$1} " == *" $1 "* ]]; }
if wanted tests && [ ! -e "$out/tests.txt" ]; then
    run timeout "${LIMIT:-300}" python3 -m pytest -q tests/gpu >"$out/tests.tmp" 2>&1
    [ -n "$stopped" ] || mv "$out/tests.tmp" "$out/tests.txt"
fi
[ ! -e "$out/tests.txt" ] || tail -n 5 "$out/tests.txt"
bench() { # bench NAME BENCHMARK ARGUMENTS…: once
    if [ -e "$out/$1.json" ] || ! wanted "$1"; then return; fi
    # shellcheck disable=SC2086
    case $2 in concurrent | checkpoint) module=benchmarks ;; *) module="dl2pa bench" ;; esac
    run timeout "${LIMIT:-300}" python3 -m $module "$2" --json "${@:3}" ${BENCH:-} >"$out/$1.tmp" 2>"$out/$1.err" &&
        mv "$out/$1.tmp" "$out/$1.json"
    echo "== $1"
    tail -c 2000 "$out/$1.json" 2>/dev/null || tail -n 3 "$out/$1.err"
}
# An epoch of CIFAR: epoch_s of the rows "resident"; ours against the tutorial's loop: speed/reference.
bench step-cifar train --models resnet32 --loaders resident --compile off,on,graphs --batch-size 128 --steps 50
bench step-imagenet train --models resnet50,swin_t --loaders synthetic --batch-size 128 --steps 10
bench concurrent concurrent --models resnet32 --processes 3,6 --batch-size 128 --steps 100
# Side by side on the device, not in slices of time, where this machine lets a user start NVIDIA's server of many processes.
if wanted concurrent-mps && [ ! -e "$out/concurrent-mps.json" ] && command -v nvidia-cuda-mps-control >/dev/null; then
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) && CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    if nvidia-cuda-mps-control -d; then
        bench concurrent-mps concurrent --models resnet32 --processes 3,6 --batch-size 128 --steps 100
        echo quit | nvidia-cuda-mps-control
    fi
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
fi
bench matching matching --classes 1000,21841 --rounds 2
bench classes classes --classes 1000,100000,1000000 --batch-size 128 --steps 50
bench checkpoint checkpoint --models resnet50 --batch-size 128 --steps 40
bench step-compiled train --models resnet50,swin_t --loaders synthetic --compile on --batch-size 256 --steps 10
bench step-layout train --models resnet50,swin_t --loaders synthetic --channels-last off --batch-size 128 --steps 10
bench step-resnet101 train --models resnet101 --loaders synthetic --batch-size 128 --steps 10
[ -z "${IMAGES:-}" ] || bench step-files train --models resnet50 --loaders synthetic,dali,torchvision --data "$IMAGES" \
    --batch-size 256 --steps 10
[ -z "${IMAGES:-}" ] || bench pipeline pipeline --data "$IMAGES" # loaders on the CPU, side by side
for seed in ${SEEDS:-0 1 2}; do
    for sweep in cifar100 cifar100_lt; do
        if [ -n "${2:-}" ] && wanted "$sweep"; then
            # shellcheck disable=SC2086
            run python3 -m dl2pa sweep "configs/sweeps/$sweep.yaml" data.root="$2" tracking.uri=none --seeds "$seed" \
                --run-dir "$out/runs" ${SWEEP:-} >>"$out/$sweep.txt" 2>&1 || echo "$sweep, seed $seed: exit code $?"
        fi
    done
done
[ -z "${2:-}" ] || python3 -m dl2pa report --all "$out/runs" --published --out "$out/report"
[ -z "$stopped" ] || exit 75
