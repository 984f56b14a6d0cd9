#!/usr/bin/env bash
# Train HAE V2 on one machine; the batch of 28 is shared by the processes. A run that was interrupted goes on.
#
#   PROCESSES=4 examples/hae_v2/launch/train.sh runs/brats --data /data/BraTS2021
#
# The first argument is the run folder, all others go to `memopt train`. PROCESSES: one per GPU (default 1).
# PRESET (brats128), BATCH (28) and PORT (12362) can be set in the same way.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 RUN_FOLDER [options of memopt train]" >&2; exit 2; }
out=$1; shift
exec python -m torch.distributed.run --nproc_per_node "${PROCESSES:-1}" --master_port "${PORT:-12362}" \
  -m memopt.cli train "$(dirname "$0")/.." --preset "${PRESET:-brats128}" --batch-size "${BATCH:-28}" \
  --out "$out" --resume "$@"
