#!/usr/bin/env bash
# The container's first process. With a PUBLIC_KEY (RunPod) it leaves its environment for SSH logins and starts sshd; then
# it runs what it is told (KubeRay, docker compose), or waits for `ray up`, and gives its pod back where no raylet runs for long.
set -euo pipefail
umask 077

# A service account's key comes as text from a secret store; Google's libraries want a file.
if [ -n "${GOOGLE_CREDENTIALS_JSON:-}" ]; then
  printf '%s' "$GOOGLE_CREDENTIALS_JSON" > "$HOME/.google-credentials.json"
  export GOOGLE_APPLICATION_CREDENTIALS="$HOME/.google-credentials.json"
fi
unset GOOGLE_CREDENTIALS_JSON
for secret in RUNPOD_API_KEY RUNPOD_ACCOUNT_KEY RAY_AUTH_TOKEN WANDB_API_KEY; do # an empty one would count as a wrong one
  [ -n "${!secret:-}" ] || unset "$secret"
done

if [ -n "${PUBLIC_KEY:-}" ]; then
  mkdir -p "$HOME/.ssh"
  printf '%s\n' "$PUBLIC_KEY" > "$HOME/.ssh/authorized_keys"
  export -p | grep -vE '^declare -x (HOME|PWD|OLDPWD|SHLVL|USER|LOGNAME|SHELL|TERM)\b' > "$HOME/.node_environment"
  touch "$HOME/.bashrc"
  grep -q node_environment "$HOME/.bashrc" || sed -i '1i . ~/.node_environment' "$HOME/.bashrc"
  [ -s "$HOME/.bashrc" ] || echo '. ~/.node_environment' > "$HOME/.bashrc"
  [ -f "$HOME/.ssh/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/host_key"
  [ "$(id -u)" != 0 ] || mkdir -p /run/sshd
  /usr/sbin/sshd -f /dev/null -p "${MOMALISA_SSH_PORT:-2222}" -h "$HOME/.ssh/host_key" -o PidFile="$HOME/.ssh/sshd.pid" \
    -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o PermitRootLogin=prohibit-password -o UsePAM=no \
    -o AuthorizedKeysFile="$HOME/.ssh/authorized_keys" -o AllowTcpForwarding=local -o X11Forwarding=no -o MaxAuthTries=2
fi

if [ "$#" -gt 0 ]; then
  exec "$@"
fi
trap 'exit 0' TERM INT
# A raylet ends when its head is lost, and without a head nobody else would give this pod back or count what it costs. Before
# the first one Ray has its own patience with a new node, 900 s.
limit_s=${MOMALISA_ORPHAN_S:-} seen=$((SECONDS + 900))
while :; do
  sleep 5 & wait $!
  if [ -z "$limit_s" ] || pgrep -x raylet > /dev/null; then
    seen=$SECONDS
  elif [ $((SECONDS - seen)) -ge "$limit_s" ]; then
    echo "entrypoint: no raylet for $limit_s s: this pod gives itself back" >&2
    (cd "$MOMALISA_HOME" && python -m deploy.runpod leave) || sleep 60 # and again
  fi
done
