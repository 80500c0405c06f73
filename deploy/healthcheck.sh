#!/usr/bin/env bash
# 0: no raylet was started here yet, or it is alive and its agent answers.
set -euo pipefail
if ! pgrep -u "$(id -u)" -x raylet > /dev/null; then
  [ ! -e /tmp/ray/session_latest ] # a raylet that was there and is gone
  exit
fi
wget -q -T 5 -O - http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success
