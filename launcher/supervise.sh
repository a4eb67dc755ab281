# shellcheck shell=bash
# One attempt of a training under SLURM, and the decision whether the cluster starts another.
#
# Sourced by slurm/train.sbatch and copied into every script that `dl2pa submit` writes, so that it runs in the
# batch shell: outside any container, where scontrol is. Everything it knows it reads from the run directory.
#
#   guard "$@"                 first of all: the batch shell must not outlive SLURM's own daemon
#   supervise RUN COMMAND...   run COMMAND (an srun) once, then finish, give up or requeue

# Failures in a row without a new checkpoint after which the run gives up, and the same for requested stops.
: "${DL2PA_MAX_FAILURES:=3}" "${DL2PA_MAX_STOPS:=20}"

# A batch shell whose slurmstepd was killed with its node would go on as an orphan and requeue its successor.
guard() {
  if [[ -z ${DL2PA_GUARDED-} ]] && command -v setpriv >/dev/null; then
    DL2PA_GUARDED=1 exec setpriv --pdeathsig KILL bash "$0" "$@"
  fi
  unset DL2PA_GUARDED
}

supervise() {
  local run=$1 before_attempt before_step child code=0
  shift
  mkdir -p "$run/slurm" || return 1
  restarts=${SLURM_RESTART_COUNT:-0}
  rm -f "$run/stop" # before the look at `cancelled`, which `dl2pa cancel` writes first
  if [[ -e $run/cancelled ]]; then
    _say "the run was cancelled: nothing is started; \`dl2pa resume\`, or removing $run/cancelled, undoes that"
    return 75
  fi
  trap '_ask_to_stop "$run"' USR2 TERM
  export DL2PA_SUPERVISED=1 DL2PA_LAUNCHED="$SLURM_JOB_ID.$restarts"
  export DL2PA_HEAD=${DL2PA_HEAD:-${SLURMD_NODENAME:-$(hostname)}} DL2PA_PORT
  DL2PA_PORT=$(_free_port)
  before_attempt=$(_attempt "$run")
  before_step=$(_saved_step "$run")
  _say "start ${restarts} of job $(_job) on ${SLURM_JOB_NODELIST-this node}, from step ${before_step:-0}"
  _child "$@" &
  child=$!
  # A trapped signal ends `wait` early: ask again until the child is gone.
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  _decide "$run" "$code" "$before_attempt" "$before_step"
}

# srun does not outlive this shell, and the signals meant for this shell are not its business.
_child() {
  trap '' USR2 TERM
  if command -v setpriv >/dev/null; then exec setpriv --pdeathsig KILL "$@"; fi
  exec "$@"
}

_ask_to_stop() {
  _say "asked to stop: saving at the next step all processes agree on"
  touch "$1/stop"
}

# What to do after an attempt. Arguments: RUN, srun's exit code, attempt and saved step before.
_decide() {
  local run=$1 code=$2 attempt state step
  attempt=$(_attempt "$run")
  state=$(_status "$run" state)
  step=$(_saved_step "$run")
  # Without an attempt of its own the status is an old one; a finished run has none when nothing was left to do.
  [[ ${attempt:-0} -gt ${3:-0} || $state == finished && $code == 0 && ! -e $run/stop ]] || state="never started"
  if _is_final "$run"; then
    _say "failed in a way that another attempt would repeat (code $code); see above and $run/logs"
    return $((code ? code : 1))
  fi
  if [[ $state == finished ]]; then
    _say "finished"
    return 0
  fi
  if [[ -e $run/cancelled ]]; then
    _say "cancelled ($state, saved up to step ${step:-0}); \`dl2pa resume $run\` goes on"
    return 75
  fi
  _is_ours || return 0
  if [[ $state == stopped ]]; then
    _within_limit "$run" stops "${4:-0}" "${step:-0}" "$DL2PA_MAX_STOPS" || return 1
    _say "stopped as asked, saved at step ${step:-0}: requeueing"
  else
    _within_limit "$run" failures "${4:-0}" "${step:-0}" "$DL2PA_MAX_FAILURES" || return 1
    _say "ended with code $code while $state, saved up to step ${step:-0}: requeueing"
  fi
  _requeue "$run"
}

# Whether a rank or node reported an error of this launch that time does not heal.
_is_final() {
  local file
  for file in "$1"/logs/*.error.json; do
    [[ -e $file ]] || continue
    if grep -q "\"launch\": \"$DL2PA_LAUNCHED\"" "$file" && grep -q '"final": true' "$file"; then return 0; fi
  done
  return 1
}

# Whether this is still the attempt that SLURM runs: it requeues by itself after a node failure, and a cancelled
# job stays cancelled.
_is_ours() {
  local job now state
  job=$(scontrol show job -o "$(_job)" 2>/dev/null) || return 0 # an array's own number would show all its elements
  now=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<<"$job")
  state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$job")
  if [[ $state == CANCELLED ]]; then
    _say "the job was cancelled: not requeued"
    return 1
  fi
  if [[ -n $now && $now != "$restarts" || $state == PENDING || $state == REQUEUED || $state == NODE_FAIL ]]; then
    _say "SLURM requeued the job itself"
    return 1
  fi
}

# Count attempts of one kind that saved nothing new. Arguments: RUN, kind, step before and after, limit.
_within_limit() {
  local file=$1/slurm/without-progress.$2 count=0
  if (($4 > $3)); then
    rm -f "$1"/slurm/without-progress.*
    return 0
  fi
  [[ -f $file ]] && read -r count <"$file"
  # A file is only text: bash's arithmetic would run a command that it holds.
  [[ $count =~ ^[0-9]{1,9}$ ]] || count=0
  count=$((10#$count + 1))
  echo "$count" >"$file"
  ((count < $5)) && return 0
  _say "$count attempts in a row without progress beyond step $4: giving up; \`dl2pa resume $1\` tries again"
  return 1
}

# The controller may be away for a while; the run is worth some patience.
_requeue() {
  local try
  trap '' USR2 TERM
  for try in 1 2 3 4 5 6 7 8 9 10; do
    scontrol requeue "$(_job)" && return 0
    _is_ours || return 0
    ((try < 10)) && sleep $((try * 3))
  done
  _say "the cluster refuses to requeue; \`dl2pa resume $1\` goes on by hand"
  return 75
}

# As scontrol wants it: an element of an array is requeued by the array's number and its own.
_job() { echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }

_say() { printf '%(%F %T)T dl2pa: %s\n' -1 "$*"; }

# One value of status.json, which has a line for each.
_status() { sed -n "s/^ \"$2\": \"\{0,1\}\([A-Za-z0-9_]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$1/status.json" 2>/dev/null; }

# How many attempts the run has counted; a file damaged by hand is none of bash's arithmetic.
_attempt() {
  local attempt
  attempt=$(_status "$1" attempt)
  [[ $attempt =~ ^[0-9]{1,9}$ ]] && echo $((10#$attempt))
}

# The newest complete checkpoint's step, without leading zeros.
_saved_step() {
  local marker step=
  for marker in "$1"/checkpoints/step-*/COMPLETE; do
    [[ $marker =~ /step-([0-9]{1,18})/COMPLETE$ && -e $marker ]] && step=$((10#${BASH_REMATCH[1]}))
  done
  echo "$step"
}

# A port for the processes to meet at: derived from the job, below the ephemeral range, free here on the head node.
_free_port() {
  local port=$((10000 + (SLURM_JOB_ID * 13 + restarts * 211) % 20000)) try
  for try in {1..50}; do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    port=$((10000 + (port - 10000 + 1) % 20000))
  done
  echo "$port"
}
