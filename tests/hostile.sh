#!/usr/bin/env bash
# Attacks a cluster of real processes while good clients ask, and looks at what each attack leaves. The last line is
#
#   attacks=… held=… broken=0 others: answered=… errors=0 ttft_ratio=… leaked=0
#
# and the exit status is 0 only with these zeros. `others` are the good clients; `ttft_ratio` is the highest ratio of their
# median time to the first token, during an attack to undisturbed: it is told, and depends on the machine.
#
#   tests/hostile.sh                        every attack, some two minutes
#   tests/hostile.sh --list                 what they are
#   tests/hostile.sh --only digits,echo     some of them
#   tests/hostile.sh --soak --minutes 20    hostile clients among good ones: what do memory, files, threads and blocks do?
set -euo pipefail
exec "$(dirname "$0")/program.sh" hostile "$@"
