#!/usr/bin/env bash
# Copy this checkout to every worker of a slice and install it; then run --prepare there, such as
# 'sudo mount -t nfs HOST:/share /mnt/runs'.
#
#   tpu/install.sh --name NAME --zone ZONE [--slices N] [--project P] [--prepare COMMAND] [--dry_run]
. "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.." || exit
archive="$(mktemp -d)/lm.tar.gz"
trap 'rm -r "$(dirname "$archive")"' EXIT
[ -n "$dry_run" ] || git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf "$archive"
for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:lm.tar.gz" "${where[@]}" --worker=all
done
on_workers "mkdir -p lm && tar -xzf lm.tar.gz -C lm && lm/scripts/setup.sh tpu,gcs${prepare:+ && $prepare}"
