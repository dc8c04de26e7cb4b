#!/usr/bin/env bash
# Run a shell command on every worker of a slice, in its home directory.
#
#   tpu/run.sh --name NAME --zone ZONE [--slices N] [--project P] [--dry_run] -- COMMAND …
. "$(dirname "$0")/common.sh"
[ ${#words[@]} -gt 0 ] || fail "after -- comes the command; see $0 --help"
on_workers "$(printf '%q ' "${words[@]}")"
