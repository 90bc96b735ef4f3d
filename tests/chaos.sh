#!/usr/bin/env bash
# Breaks a cluster of real processes under load, and audits what came of it. The last line is
#
#   answered=… errors=… wrong=0 leaked=0 gaps=0
#
# and the exit status is 0 only with these zeros. `errors` are those that a fault accounts for, told as they should be.
#
#   tests/chaos.sh --seeds 1,2,3        three seeds of faults; a seed that failed fails again under its number
#   tests/chaos.sh --minutes 30         the seeds after them, until the time is over
#   tests/chaos.sh --device fake        much load on executors without a model
#   tests/chaos.sh --device fake --seeds 1,2,3,4,5,6 --json FILE
#                                       each seed without its faults too: how long first tokens took without and with them
#   tests/chaos.sh --seeds 7 --dry-run  what a seed would do
#   tests/chaos.sh --soak --minutes 60 --rate 1
#                                       no faults: what do memory, files, threads and blocks do in an hour?
set -euo pipefail
exec "$(dirname "$0")/program.sh" chaos "$@"
