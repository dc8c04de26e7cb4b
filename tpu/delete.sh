#!/usr/bin/env bash
# Delete a queued resource with its slices.
#
#   tpu/delete.sh --name NAME --zone ZONE [--project P] [--dry_run]
. "$(dirname "$0")/common.sh"
run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
