#!/usr/bin/env bash
# Translate and evaluate the test split with the weights of a run, on one machine, 20 slices at a time in each process.
# What was interrupted goes on after the last finished batch.
#
#   PROCESSES=4 examples/hae_v2/launch/translate.sh runs/brats
#
# The first argument is the run folder, all others go to `memopt run ... translate`. PROCESSES: one per GPU (default 1).
# BATCH (20) and PORT (12364) can be set in the same way.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 RUN_FOLDER [options of memopt run examples/hae_v2 translate]" >&2; exit 2; }
run=$1; shift
exec python -m torch.distributed.run --nproc_per_node "${PROCESSES:-1}" --master_port "${PORT:-12364}" \
  -m memopt.cli run "$(dirname "$0")/.." translate --checkpoint "$run" --batch-size "${BATCH:-20}" "$@"
