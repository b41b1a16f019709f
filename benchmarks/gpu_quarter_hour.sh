#!/usr/bin/env bash
# Ten minutes on a borrowed GPU without a network, made the most of.
#
#   benchmarks/gpu_quarter_hour.sh pack [FOLDER] [--part-mb 60] [--python 3.12] [--have torch,numpy,…]
#       here, with network: the wheels that the GPU machine lacks and SmolLM2's weights, in parts that travel one by one
#   benchmarks/gpu_quarter_hour.sh run OUT [FOLDER] [--seconds 600] [--steps tests,gpu,laptop,blocks]
#       there, without: joins and installs them, runs the steps, and ends by itself; what is done is in OUT (7 files)
#   benchmarks/gpu_quarter_hour.sh run OUT --rehearse
#       both on a CPU with tiny numbers, in about a minute
#
# FOLDER is .quarter; `pack --help` and `run --help` tell the rest. PYTHON=… for another interpreter than .venv's.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
# exec, so that a signal to this script reaches the one that saves what is finished.
exec "$python" "$root/benchmarks/gpu_quarter_hour.py" "$@"
