#!/usr/bin/env bash
# What a machine with a GPU has to show, in one call: the GPU tests, then a timed CIFAR-100 training.
#   tests/gpu/run_all.sh OUT [CIFAR_ROOT]    results go to OUT; without CIFAR_ROOT the training is left out.
# Needs torch, torchvision, numpy, scipy, pyyaml, pydantic, safetensors, tqdm, scikit-learn and pytest; neither DALI nor
# MLflow. The training resumes when called again with the same OUT.
set -u
cd "$(dirname "$0")/../.."
out=$1
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python3 -m dl2pa doctor >"$out/doctor.txt" 2>&1
python3 -m pytest -q tests/gpu >"$out/tests.txt" 2>&1
tail -n 5 "$out/tests.txt"
if [ -n "${2:-}" ]; then
    for d in 10 25 50 100; do
        python3 -m dl2pa train "configs/balanced/cifar100_d$d.yaml" data.root="$2" tracking.uri=none \
            --run-dir "$out/cifar100_d$d" --json >"$out/cifar100_d$d.json" 2>"$out/cifar100_d$d.log" &
    done
    wait
    tail -qn 1 "$out"/cifar100_d*.json
fi
