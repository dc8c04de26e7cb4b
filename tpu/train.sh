#!/usr/bin/env bash
# Train on a TPU slice, or several, from nothing: create, install, run, and delete at the end even
# on error. Runs again from the last checkpoint after exit code 75, a crash, maintenance or
# preemption (the slice is then created anew). --workdir is a bucket or a disk that all mount.
#
#   tpu/train.sh --name NAME --zone ZONE --type v5p-128 [--slices N] [--spot | --reserved]
#                [--project P] [--version RUNTIME] [--prepare COMMAND] [--restarts N]
#                [--poll SECONDS] [--keep] [--dry_run] -- train --config FILE.py --workdir DIR …
here="$(dirname "$0")"
. "$here/common.sh"
[ ${#words[@]} -gt 0 ] || fail "after -- comes the lm command, such as train; see $0 --help"
start="lm/tpu/worker.sh start $(printf '%q ' "${words[@]}")"

# shellcheck disable=SC2329  # called by the trap
finish() {
    local code=$?
    trap '' TERM INT
    if [ -z "$keep" ] && ! "$here/delete.sh" "${options[@]}"; then
        echo "error: $name may still be there and cost money: tpu/delete.sh --name $name" \
            "--zone $zone" >&2
    fi
    exit "$code"
}

# shellcheck disable=SC2329  # called by the trap
asked_to_stop() {
    echo "asked to stop: letting the workers save" >&2
    on_workers "lm/tpu/worker.sh stop" || true
    exit 75
}

fresh() { # a slice with this checkout installed, whatever is there now
    [ -z "$(state)" ] || "$here/delete.sh" "${options[@]}" || true
    "$here/create.sh" "${options[@]}" && "$here/install.sh" "${options[@]}"
}

watch() { # wait for the run; its exit code, or 1 when workers are lost
    local unreachable=0 found
    while :; do
        sleep "$poll" &
        wait $! # so that a signal is not kept waiting
        if ! found="$(on_workers "lm/tpu/worker.sh status" | grep -o 'lm-status [a-z0-9]*')"; then
            [ "$(state)" = ACTIVE ] && ((++unreachable < 5)) && continue
            return 1
        fi
        unreachable=0
        if grep -qx 'lm-status 2' <<<"$found"; then return 2; fi
        if grep -qvxE 'lm-status (running|0|75)' <<<"$found"; then return 1; fi
        if grep -qx 'lm-status running' <<<"$found"; then continue; fi
        if grep -qx 'lm-status 75' <<<"$found"; then return 75; fi
        return 0
    done
}

trap finish EXIT
trap asked_to_stop TERM INT
if [ -n "$dry_run" ]; then
    "$here/create.sh" "${options[@]}"
    "$here/install.sh" "${options[@]}"
    on_workers "$start"
    on_workers "lm/tpu/worker.sh status"
    exit 0
fi
fresh
failures=0
while ((failures <= restarts)); do
    [ "$(state)" = ACTIVE ] || fresh
    code=1
    if on_workers "$start"; then
        code=0
        watch || code=$?
    fi
    case "$code" in
    0) exit 0 ;;
    2) fail "a user's error, which would only be repeated; with --keep see it by tpu/logs.sh" ;;
    75) echo "the run was stopped and continues" >&2 ;;
    *) echo "the run broke ($((++failures)) of at most $restarts times): it starts again" >&2 ;;
    esac
    on_workers "lm/tpu/worker.sh stop" || true
done
echo "error: gave up after $restarts restarts" >&2
exit 1
