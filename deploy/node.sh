# Sourced before `ray start` on a rented node: its address in the private network, and the interface that gradients take.
NODE_IP=$(getent ahostsv4 "${RUNPOD_POD_ID}.runpod.internal" | awk 'NR == 1 {print $1}')
if [ -z "$NODE_IP" ]; then
  echo "node: ${RUNPOD_POD_ID}.runpod.internal has no address: is global networking on (NVIDIA GPU pods only)?" >&2
  exit 1
fi
GLOO_SOCKET_IFNAME=$(ip -o -4 addr show | awk -v ip="$NODE_IP" '{split($4, cidr, "/")} cidr[1] == ip {print $2; exit}')
NCCL_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME
export NODE_IP GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
