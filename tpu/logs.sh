#!/usr/bin/env bash
# Follow what worker 0 of the (first) slice prints.
#
#   tpu/logs.sh --name NAME --zone ZONE [--slices N] [--project P] [--dry_run]
. "$(dirname "$0")/common.sh"
run gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" "${where[@]}" --worker=0 \
    --command "tail -n 100 -F lm-run/log"
