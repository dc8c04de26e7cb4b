# Sourced by the scripts of this folder: their common options, and helpers.
# shellcheck shell=bash disable=SC2034  # the variables are for the scripts
set -euo pipefail

usage() { # the comment at the top of the script that was called
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
}

fail() {
    echo "error: $*" >&2
    exit 2
}

name="" zone="" project="" type="" version="" slices=1 prepare="" keep="" dry_run=""
restarts=20 poll=30 capacity=() words=() options=("$@")
while (($#)); do
    case "$1" in
    --spot | --reserved) capacity=("$1") ;;
    --keep) keep=1 ;;
    --dry_run) dry_run=1 ;;
    --name | --zone | --project | --type | --version | --slices | --prepare | --restarts | --poll)
        [ $# -ge 2 ] || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --)
        shift
        words=("$@")
        options=("${options[@]:0:${#options[@]}-$#-1}")
        break
        ;;
    --help | -h) usage ;;
    *) fail "unknown option $1; see $0 --help" ;;
    esac
    shift
done
[ -n "$name" ] || fail "--name NAME is missing; see $0 --help"
[ -n "$zone" ] || fail "--zone ZONE is missing; see $0 --help"
where=(--zone "$zone" ${project:+--project "$project"})

run() { # run a command, or with --dry_run print it
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

nodes() { # the names of the slices
    if [ "$slices" = 1 ]; then echo "$name"; else seq -f "$name-%.0f" 0 $((slices - 1)); fi
}

on_workers() { # run a shell command on every worker of every slice, all at once
    local node pid ssh pids=() code=0
    for node in $(nodes); do
        ssh=(gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command "$1")
        if [ -n "$dry_run" ]; then
            run "${ssh[@]}"
        else
            "${ssh[@]}" &
            pids+=($!)
        fi
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    return "$code"
}

state() { # of the queued resource: ACTIVE, SUSPENDED, …; nothing if it is not there
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        --format 'value(state.state)' 2>/dev/null || true
}
