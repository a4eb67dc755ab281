#!/usr/bin/env bash
# What a machine with a GPU has to show: tests, speed, trainings, in order of information.
#   tests/gpu/run_all.sh OUT [CIFAR_ROOT]    each group writes OUT/GROUP.txt; summary.txt lists the results.
#                                            Without CIFAR_ROOT the trainings of CIFAR-100 are left out.
# A call lasts at most SLICE seconds (540). Exit code 75: something is left, and the same call continues; groups that
# have OUT/GROUP.txt are skipped. A group that is stopped (its time, the slice, TERM) leaves what it has measured in
# OUT/GROUP.partial.txt and is repeated; trainings save and resume. Exit code 1: all groups ended, and one failed.
# Where each call begins on a fresh machine, copy the results of the last call to OUT first.
#   ONLY="environment step-cifar"    these groups only (tests/gpu/run.py lists them)
#   IMAGES=DIR     a folder with train/ and val/ of JPEGs: adds the step from files and the loaders
#   WHEELS=DIR     installs wheels of this folder whose packages are missing (DALI, MLflow, submitit, pydantic); tests
#                  that need a package that is absent are skipped
#   SEEDS="0 1 2", SWEEP="…"         seeds and more of the command line of the trainings
#   REHEARSE=1     runs on the CPU everything that can, with small sizes, in one slice
# Needs torch 2.11 or newer, torchvision, numpy, scipy, pyyaml, safetensors, tqdm, scikit-learn, matplotlib and pytest.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/tests/gpu/run.py" "$@"
