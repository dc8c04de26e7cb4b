#!/usr/bin/env bash
# On a worker: start `lm WORDS…` so that it outlives the connection, ask how it is, stop it.
#
#   tpu/worker.sh [--dry_run] start WORDS …
#   tpu/worker.sh [--dry_run] status    prints `lm-status running`, an exit code, or `lost`
#   tpu/worker.sh [--dry_run] stop      lets the run save its state
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$HOME/lm-run"
if [ "${1:-}" = --dry_run ]; then
    case "${2:-}" in
    start) printf '%q ' "${LM:-.venv/bin/lm}" "${@:3}" && echo "# output to $folder/log" ;;
    status) echo "cat $folder/exit" ;;
    stop) echo "kill -TERM \$(cat $folder/pid) # after 300 s -KILL" ;;
    esac
    exit 0
elif [ "${1:-}" = --help ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
fi
mkdir -p "$folder"

alive() { [ -s "$folder/pid" ] && kill -0 "$(cat "$folder/pid")" 2>/dev/null; }

stop() { # SIGTERM, and SIGKILL after the seconds given
    alive || return 0
    pkill -TERM -P "$(cat "$folder/pid")" || true
    for _ in $(seq "$1"); do
        alive || return 0
        sleep 1
    done
    kill -KILL -- "-$(cat "$folder/pid")" || true
}

case "${1:-}" in
start)
    shift
    stop 5
    rm -f "$folder/exit" "$folder/pid"
    # shellcheck disable=SC2016  # expanded by the inner shell
    setsid nohup bash -c 'folder="$1"; shift; echo $$ >"$folder/pid"
        code=0; "$@" || code=$?
        echo "$code" >"$folder/exit"' \
        run "$folder" "${LM:-.venv/bin/lm}" "$@" >>"$folder/log" 2>&1 </dev/null &
    while [ ! -s "$folder/pid" ] && [ ! -e "$folder/exit" ]; do sleep 0.1; done
    ;;
status)
    if [ -s "$folder/exit" ]; then
        echo "lm-status $(cat "$folder/exit")"
    elif alive; then
        echo "lm-status running"
    else
        echo "lm-status lost" # the machine was restarted
    fi
    ;;
stop) stop 300 ;;
*) echo "error: start, status or stop" >&2 && exit 2 ;;
esac
