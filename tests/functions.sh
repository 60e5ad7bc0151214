# shellcheck shell=bash
# nbdferry - what shell tests share
# SPDX-License-Identifier: BSD-3-Clause
#
# A test begins with:
#
#     #!/bin/bash
#     source "$(dirname "$0")/functions.sh"
#     requires qemu-img
#
# It runs with "set -e" in $TMPDIR, which is its own.  Daemons that it starts
# here are killed when it ends, and their logs printed if it fails.  To run
# one by hand, from the build folder: SRC/tests/run test-NAME.sh

set -eu -o pipefail
: "${builddir:?run tests by tests/run}" "${srcdir:?}" "${TMPDIR:?}"
: "${FERRY_PLUGIN:?}" "${NBDFERRY:?}" "${FERRY_PRELOAD=}"
cd "$TMPDIR"

# fail MESSAGE: end the test.
fail ()
{
  echo "$0: $*" >&2
  exit 1
}

# skip REASON: end the test without a result.
skip ()
{
  echo "$*"
  exit 77
}

# requires COMMAND [ARG...]: skip the test if that does not work.
requires ()
{
  if [ $# -eq 1 ]; then
    command -v "$1" >/dev/null || skip "$1 is not installed"
  else
    "$@" </dev/null >/dev/null 2>&1 || skip "'$*' does not work here"
  fi
}

# cleanup_fn COMMAND ARG...: run this when the test ends; the last one first.
_cleanup=()
cleanup_fn ()
{
  _cleanup=("$(printf '%q ' "$@")" "${_cleanup[@]}")
}

declare -A _pids                # of daemons, by name

_at_exit ()
{
  local status=$? name c

  set +e
  trap '' INT TERM
  for c in "${_cleanup[@]}"; do eval "$c"; done
  for name in "${!_pids[@]}"; do
    kill -9 "${_pids[$name]}" 2>/dev/null
    wait "${_pids[$name]}" 2>/dev/null
  done
  if [ $status -ne 0 ] && [ $status -ne 77 ]; then
    for c in "$TMPDIR"/*.log; do
      [ -f "$c" ] && { echo "== ${c##*/}"; tail -n 30 "$c"; }
    done
  fi
  exit $status
}
trap _at_exit EXIT
trap 'exit 1' INT TERM

# wait_for WHAT COMMAND ARG...: until the command succeeds, at most 20 s.
wait_for ()
{
  local what=$1 i

  shift
  for ((i = 0; i < 2000; i++)); do
    if "$@"; then return 0; fi
    sleep 0.01
  done
  fail "waited too long for $what"
}

_ready_or_dead ()
{
  [ -s "$1.pid" ] || ! kill -0 "${_pids[$1]}" 2>/dev/null
}

# start_nbdkit NAME ARG...: nbdkit with these arguments, on NAME.sock unless
# they name another place, logging to NAME.log; returns when it serves.
start_nbdkit ()
{
  local name=$1 arg
  local where=(-U "$name.sock")

  shift
  for arg; do
    case $arg in
      -U|--unix|--unix=*|-p|--port|--port=*|--vsock) where=() ;;
    esac
  done
  rm -f "$name.pid" "$name.sock"
  # p11-kit first: see ferrytest.py
  LD_PRELOAD=${FERRY_PRELOAD:+libp11-kit.so.0 $FERRY_PRELOAD} \
  ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 \
  TSAN_OPTIONS=${TSAN_OPTIONS-}:ignore_noninstrumented_modules=1 \
    nbdkit -f -P "$name.pid" "${where[@]}" "$@" >>"$name.log" 2>&1 &
  _pids[$name]=$!
  wait_for "nbdkit ($name)" _ready_or_dead "$name"
  [ -s "$name.pid" ] || { unset "_pids[$name]"; fail "nbdkit ($name) died"; }
}

# start_ferry NAME ARG...: the same with our plugin before the arguments.
start_ferry ()
{
  local name=$1

  shift
  start_nbdkit "$name" "$FERRY_PLUGIN" "$@"
}

# stop_nbdkit NAME: ask it to end; it must end well.
stop_nbdkit ()
{
  local pid=${_pids[$1]} status=0

  unset "_pids[$1]"
  kill "$pid"
  wait "$pid" || status=$?
  [ $status -eq 0 ] || fail "nbdkit ($1) ended with status $status"
}

# kill_nbdkit NAME: kill -9.
kill_nbdkit ()
{
  local pid=${_pids[$1]}

  unset "_pids[$1]"
  kill -9 "$pid"
  wait "$pid" 2>/dev/null || :
}

# uri NAME [EXPORT]: of a daemon that start_nbdkit started on its socket.
uri ()
{
  echo "nbd+unix:///${2-}?socket=$TMPDIR/$1.sock"
}
