#!/usr/bin/env bash
# One tuning on several machines, by torchrun. Start it on each of them with the same HEAD:
#   HEAD=first-machine NODES=2 examples/cluster/torchrun.sh examples/cluster/run.yaml --name together
# PROCESSES: on each machine, by default one for each GPU, else one. LUTHIER_RUNS must be a directory that all of them see.
set -euo pipefail

PROCESSES=${PROCESSES:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NODES:-1}" --nproc-per-node "$((PROCESSES > 0 ? PROCESSES : 1))" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-127.0.0.1}:${PORT:-29500}" --rdzv-id "${JOB:-luthier}" \
  -m luthier tune "$@"
