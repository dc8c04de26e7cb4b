#!/usr/bin/env bash
# Train under a real SLURM on this machine: a job of two processes is signaled, requeued and resumed;
# its losses equal those of an undisturbed job. Then `lm corpus`: the same files as without SLURM. Debian or Ubuntu, as root.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "error: installs and starts SLURM: run it as root" >&2 && exit 2; }
lm="${LM:-}"
if [ -z "$lm" ]; then
    scripts/setup.sh
    lm="$PWD/.venv/bin/lm"
fi
if ! command -v slurmctld munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge >/dev/null
fi

folder="$(mktemp -d)"
export SLURM_CONF="$folder/slurm.conf"
pids=()
finish() {
    scancel --user root 2>/dev/null || true
    sleep 1
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
}
trap finish EXIT

# --- a cluster of this machine alone, in a temporary folder
dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
chmod 600 "$folder/munge.key"
chmod 755 "$folder"
munged --foreground --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munge.pid" --log-file "$folder/munge.log" --seed-file "$folder/seed" \
    2>"$folder/munge.err" &
pids+=($!)
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=2
ReturnToService=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$folder/state" "$folder/spool"
slurmctld -D -f "$SLURM_CONF" >"$folder/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D -f "$SLURM_CONF" >"$folder/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 60); do
    [[ "$(sinfo --noheader --format %T 2>/dev/null)" != idle ]] || break
    sleep 1
done
sinfo

# --- the same job twice; the second is signaled in the middle
submit() { # NAME: its job number
    sbatch --parsable --overcommit --ntasks-per-node 2 --output "$folder/$1.log" \
        scripts/train.sbatch train --config experiments/stdlib.py:tiny --workdir "$folder/$1" \
        --cpu_devices 1 --config.train.steps="${STEPS:-200}" --config.data.sequence_length=32 \
        --config.data.tokenizer=byte --config.model.vocab_size=257 --config.eval.max_batches=1 \
        --config.checkpoint.every_steps=50 --config.log.tensorboard=false
}
field() { scontrol show job --oneliner "$1" | grep -o "$2=[^ ]*" | cut -d= -f2; }
ended() { # wait for a job to be COMPLETED
    local now=""
    for _ in $(seq 900); do
        now="$(field "$1" JobState)"
        case "$now" in COMPLETED) return 0 ;; FAILED | CANCELLED | TIMEOUT) break ;; esac
        sleep 1
    done
    echo "error: job $1 is $now; see $folder" >&2
    return 1
}
export LM="$lm"
calm="$(submit calm)"
ended "$calm"
shaken="$(submit shaken)"
until grep -qs '"step": 60,' "$folder/shaken/metrics.jsonl"; do sleep 0.05; done
scancel --signal TERM --batch "$shaken"
ended "$shaken"
[ "$(field "$shaken" Restarts)" = 1 ] || { echo "error: it was not queued again" >&2 && exit 1; }
losses() { grep '"loss"' "$folder/$1/metrics.jsonl" | grep -oE '"(step|loss)": [^,]*'; }
diff <(losses calm) <(losses shaken)
[ "$(losses calm | wc -l)" = "$((2 * ${STEPS:-200}))" ]
echo "queued again once, ${STEPS:-200} equal losses"

# --- a corpus, whose stages are jobs that wait for each other
cat >"$folder/corpus.py" <<PYTHON
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.sources = {"python": {"source": "stdlib"}}
    config.rules = ("exact_duplicates", "near_duplicates")
    config.cluster = {"partition": "all", "time": "30", "mem_per_cpu_gb": 1}
    return config
PYTHON
corpus=("$lm" corpus --config "$folder/corpus.py")
"${corpus[@]}" --output "$folder/local"
"${corpus[@]}" --output "$folder/slurm" --executor slurm --workers 2
for _ in $(seq 900); do
    [ ! -e "$folder/slurm/card.json" ] || break
    sleep 1
done
"${corpus[@]}" --output "$folder/slurm" # it is complete: what was in between is removed
diff -r "$folder/local" "$folder/slurm"
echo "the same corpus from SLURM"
rm -r "$folder"
