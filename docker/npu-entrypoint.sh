#!/usr/bin/env bash
# Sets CANN's environment, adds the driver's libraries that the host lends, and becomes siirl.
set -eo pipefail

# shellcheck source=/dev/null
source "${CANN_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}"
driver=/usr/local/Ascend/driver/lib64
export LD_LIBRARY_PATH=$driver:$driver/common:$driver/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec siirl "$@"
