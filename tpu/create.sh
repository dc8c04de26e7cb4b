#!/usr/bin/env bash
# Queue a TPU slice, or several, and wait until it is there.
#
#   tpu/create.sh --name NAME --zone ZONE --type v5p-128 [--slices N] [--spot | --reserved]
#                 [--project P] [--version RUNTIME] [--poll SECONDS] [--dry_run]
. "$(dirname "$0")/common.sh"
[ -n "$type" ] || fail "--type TYPE is missing, such as v5p-128; see $0 --help"
if [ -z "$version" ]; then
    case "$type" in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "no runtime is known for --type $type: give --version RUNTIME" ;;
    esac
fi
if [ "$slices" = 1 ]; then
    members=(--node-id "$name")
else
    members=(--node-prefix "$name" --node-count "$slices")
fi
run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${members[@]}" \
    --accelerator-type "$type" --runtime-version "$version" "${capacity[@]}"
[ -z "$dry_run" ] || exit 0
while :; do
    now="$(state)"
    case "$now" in
    ACTIVE) break ;;
    FAILED | SUSPENDED | SUSPENDING | "")
        echo "error: $name is ${now:-gone}: see gcloud compute tpus queued-resources describe $name" >&2
        exit 1
        ;;
    esac
    echo "$name is $now …" >&2
    sleep "$poll"
done
