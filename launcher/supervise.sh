# shellcheck shell=bash
# Run one attempt of a training under SLURM and decide whether to requeue the job.
#
# slurm/train.sbatch sources this file; `dl2pa submit` copies it into the script it submits. It runs in the batch
# shell, outside any container, because it needs scontrol. Its input is the run directory and the job's SLURM state.
#
#   guard "$@"                 call first: end the batch shell when SLURM's daemon ends
#   supervise RUN COMMAND...   run COMMAND (an srun) once, then finish, fail or requeue
#
# The array `notifier`, if it is set, is the command that sends the messages of notify.* (dl2pa/notify/__main__.py).

# Maximum number of failures in a row without a new checkpoint, and of requested stops.
: "${DL2PA_MAX_FAILURES:=3}" "${DL2PA_MAX_STOPS:=20}"

# If slurmstepd is killed with its node, an orphaned batch shell would requeue the job that replaces it.
guard() {
  if [[ -z ${DL2PA_GUARDED-} ]] && command -v setpriv >/dev/null; then
    DL2PA_GUARDED=1 exec setpriv --pdeathsig KILL bash "$0" "$@"
  fi
  unset DL2PA_GUARDED
}

supervise() {
  local run=$1 before_attempt before_step child code=0
  # Lines of a site file may have set these; the code below tests exit codes and expands patterns itself.
  set +eEfuC
  shopt -u failglob
  trap - ERR
  # The owner record before this launch, to detect that another launch has taken over the run.
  before_owner=$(cat "$1/owner.json" 2>/dev/null)
  shift
  mkdir -p "$run/slurm" || return 1
  restarts=${SLURM_RESTART_COUNT:-0}
  rm -f "$run/stop" # before the test of `cancelled`: `dl2pa cancel` writes `cancelled` first
  if [[ -e $run/cancelled ]]; then
    _say "the run was cancelled: not started. Use \`dl2pa resume\` or remove $run/cancelled to start it"
    return 75
  fi
  trap '_request_stop "$run"' USR2 TERM
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # left over from the shell of `dl2pa submit`
  export DL2PA_SUPERVISED=1 DL2PA_LAUNCHED="$SLURM_JOB_ID.$restarts"
  export DL2PA_HEAD=${DL2PA_HEAD:-${SLURMD_NODENAME:-$(hostname)}} DL2PA_PORT
  DL2PA_PORT=$(_free_port)
  before_attempt=$(_attempt "$run")
  before_step=$(_saved_step "$run")
  _say "job $(_job), restart ${restarts}, on ${SLURM_JOB_NODELIST-this node}, from step ${before_step:-0}"
  _start_notifier "$run"
  _child "$@" &
  child=$!
  # A trapped signal ends `wait` early: repeat it until the child has ended.
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  _decide "$run" "$code" "$before_attempt" "$before_step"
  code=$?
  _end_notifier
  return "$code"
}

# Start the notifier. It reads one line, EVENT MESSAGE, and sends a message; it ends at the end of its input.
_start_notifier() {
  notifier_pid=
  [[ -n ${notifier[*]-} ]] || return 0
  exec 4>&1
  coproc _NOTIFIER {
    trap '' USR2 TERM
    exec "${notifier[@]}" --run-dir "$1" >&4 4>&-
  }
  exec 4>&-
  notifier_pid=$! notifier_input=${_NOTIFIER[1]}
}

# Send a message about the end of the run. Arguments: event, message. Failing to send it changes nothing.
_notify() {
  [[ -n $notifier_pid ]] || return 0
  trap '' PIPE # the notifier may have failed to start
  printf '%s %s\n' "$1" "$2" >&"$notifier_input"
  trap - PIPE
} 2>/dev/null

# Let the notifier send its message, which it does within time limits of its own, and wait for it.
_end_notifier() {
  [[ -n $notifier_pid ]] || return 0
  exec {notifier_input}>&-
  # A signal interrupts wait, with a status above 128; otherwise the notifier has ended.
  while kill -0 "$notifier_pid"; do
    wait "$notifier_pid"
    (($? > 128)) || break
  done
} 2>/dev/null

# Run srun so that it ends with this shell and ignores the signals sent to this shell.
_child() {
  trap '' USR2 TERM
  if command -v setpriv >/dev/null; then exec setpriv --pdeathsig KILL "$@"; fi
  exec "$@"
}

_request_stop() {
  if _is_taken_over "$1"; then
    _say "stop requested, but another process owns the run now"
    return
  fi
  _say "stop requested: saving at the next step that all processes agree on"
  touch "$1/stop"
}

# Decide what follows an attempt. Arguments: RUN, exit code of srun, attempt and saved step before it.
_decide() {
  local run=$1 code=$2 attempt state step
  attempt=$(_attempt "$run")
  state=$(_status "$run" state)
  step=$(_saved_step "$run")
  if _is_taken_over "$run"; then
    _say "another process has taken over the run: not requeued"
    return $((code ? code : 1))
  fi
  # If the attempt did not start, the status is from an earlier one. A finished run starts no new attempt.
  [[ ${attempt:-0} -gt ${3:-0} || $state == finished && $code == 0 && ! -e $run/stop ]] || state="never started"
  if _has_final_error "$run"; then
    _say "failed with an error that another attempt would repeat (exit code $code); see above and $run/logs"
    _notify failed "exit code $code"
    return $((code ? code : 1))
  fi
  if [[ $state == finished ]]; then
    _say "finished"
    _notify finished ""
    return 0
  fi
  if [[ -e $run/cancelled ]]; then
    _say "cancelled ($state, last checkpoint at step ${step:-0}); \`dl2pa resume $run\` continues"
    return 75
  fi
  _may_requeue || return 0
  if [[ $state == stopped ]]; then
    _within_limit "$run" stops "${4:-0}" "${step:-0}" "$DL2PA_MAX_STOPS" || return 1
    _say "stopped on request, saved at step ${step:-0}: requeueing"
  else
    _within_limit "$run" failures "${4:-0}" "${step:-0}" "$DL2PA_MAX_FAILURES" || return 1
    _say "exit code $code, run $state, last checkpoint at step ${step:-0}: requeueing"
  fi
  _requeue "$run"
}

# True if a rank or node of this launch reported an error that another attempt would repeat.
_has_final_error() {
  local file
  for file in "$1"/logs/*.error.json; do
    [[ -e $file ]] || continue
    if grep -q "\"launch\": \"$DL2PA_LAUNCHED\"" "$file" && grep -q '"final": true' "$file"; then return 0; fi
  done
  return 1
}

# True if the job may be requeued: not cancelled, and not requeued by SLURM itself, as after a node failure.
_may_requeue() {
  local job now state
  job=$(scontrol show job -o "$(_job)" 2>/dev/null) || return 0 # of an array, only this task
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

# True if a process of another launch has become the owner of the run since this launch began.
_is_taken_over() {
  local owner
  owner=$(cat "$1/owner.json" 2>/dev/null)
  [[ $owner != "$before_owner" && $owner == *'"launch": "'* && $owner != *"\"launch\": \"$DL2PA_LAUNCHED\""* ]]
}

# Count attempts of one kind without a new checkpoint. Arguments: RUN, kind, step before and after, limit.
_within_limit() {
  local file=$1/slurm/without-progress.$2 count=0
  if (($4 > $3)); then
    rm -f "$1"/slurm/without-progress.*
    return 0
  fi
  [[ -f $file ]] && read -r count <"$file"
  # Bash arithmetic would run a command in the file, so accept digits only.
  [[ $count =~ ^[0-9]{1,9}$ ]] || count=0
  count=$((10#$count + 1))
  echo "$count" >"$file"
  ((count < $5)) && return 0
  _say "$count attempts in a row without a checkpoint after step $4: not requeued. \`dl2pa resume $1\` tries again"
  _notify gave_up "$count attempts in a row without a checkpoint after step $4"
  return 1
}

# Requeue the job; retry because the controller may be unavailable for a while.
_requeue() {
  local try
  trap '' USR2 TERM
  for try in 1 2 3 4 5 6 7 8 9 10; do
    scontrol requeue "$(_job)" && return 0
    _may_requeue || return 0
    ((try < 10)) && sleep $((try * 3))
  done
  _say "SLURM did not requeue the job; \`dl2pa resume $1\` continues the run"
  _notify gave_up "SLURM did not requeue the job"
  return 75
}

# Job id for scontrol; ARRAY_TASK for a task of an array.
_job() { echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }

_say() { printf '%(%F %T)T dl2pa: %s\n' -1 "$*"; }

# Print one value of status.json, which RunDirectory.write_status writes with one key per line.
_status() { sed -n "s/^ \"$2\": \"\{0,1\}\([A-Za-z0-9_]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$1/status.json" 2>/dev/null; }

# Number of attempts of the run; digits only, because bash arithmetic would run a command in the file.
_attempt() {
  local attempt
  attempt=$(_status "$1" attempt)
  [[ $attempt =~ ^[0-9]{1,9}$ ]] && echo $((10#$attempt))
}

# Step of the newest complete checkpoint, without leading zeros.
_saved_step() {
  local marker step=
  for marker in "$1"/checkpoints/step-*/COMPLETE; do
    [[ $marker =~ /step-([0-9]{1,18})/COMPLETE$ && -e $marker ]] && step=$((10#${BASH_REMATCH[1]}))
  done
  echo "$step"
}

# Port for the rendezvous: derived from the job id, below the ephemeral range, free on this first node.
_free_port() {
  local port=$((10000 + (SLURM_JOB_ID * 13 + restarts * 211) % 20000)) try
  for try in {1..50}; do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    port=$((10000 + (port - 10000 + 1) % 20000))
  done
  echo "$port"
}
