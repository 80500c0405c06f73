#!/usr/bin/env bash
# A GKE cluster for MOMA Lisa, as deploy/gke/cluster.env says; `make manifests` writes that file from your settings.
#   bash deploy/gke.sh         (or `make gke`) makes it; run again, it makes what lacks
#   bash deploy/gke.sh down    (or `make gke-down`) deletes it; the bucket and its account stay
# Needs gcloud, kubectl and helm, and in the environment: OVERLAY (dev or prod), WANDB_API_KEY (may be empty).
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd) OVERLAY=${OVERLAY:-dev} WHAT=${1:-up}

fail() { echo "gke: $*" >&2; exit 1; }
there() { "$@" > /dev/null 2>&1; }

# The manifests hold the same values, so the environment may repeat one but not change it.
names=$(sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$HERE/gke/cluster.env")
for name in $names; do declare "given_$name=${!name:-}"; done
. "$HERE/gke/cluster.env"
for name in $names; do
  given=given_$name
  [ -z "${!given}" ] || [ "${!given}" = "${!name}" ] ||
    fail "$name=${!given}, but deploy/gke/cluster.env says $name=${!name}; change your settings and run \`make manifests\`"
  [ -n "${!name}" ] || fail "deploy/gke/cluster.env has no $name: \`root\` of your settings must be gs://BUCKET/...; then \`make manifests\`"
  [[ ${!name} != *YOUR-* ]] || fail "$name=${!name} is an example: set it in your settings (root, cluster), then \`make manifests\`"
done
NAMESPACE=momalisa-$OVERLAY ACCOUNT=momalisa@$PROJECT.iam.gserviceaccount.com
ROUTER=$CLUSTER-router PROXIES=$CLUSTER-proxies

[ "$WHAT" = up ] || [ "$WHAT" = down ] || fail "$WHAT is neither up nor down"
[ -d "$HERE/gke/overlays/$OVERLAY" ] || fail "OVERLAY=$OVERLAY is neither dev nor prod"
for tool in gcloud kubectl helm; do
  command -v "$tool" > /dev/null || fail "$tool is not installed"
done
number=$(gcloud projects describe "$PROJECT" --format='value(projectNumber)') || fail "no project $PROJECT, or you may not see it"
in_project=(--project "$PROJECT") in_region=(--project "$PROJECT" --region "$REGION")
pool=(--cluster "$CLUSTER" "${in_region[@]}")

# A cluster that somebody else has by this name is neither used nor deleted.
cluster_is_there() {
  there gcloud container clusters describe "$CLUSTER" "${in_region[@]}" || return 1
  label=$(gcloud container clusters describe "$CLUSTER" "${in_region[@]}" --format='value(resourceLabels.app)')
  [ "$label" = momalisa ] || fail "the cluster name $CLUSTER is taken in $REGION by another application; choose another cluster.name"
}

if [ "$WHAT" = down ]; then
  if cluster_is_there; then
    gcloud container clusters get-credentials "$CLUSTER" "${in_region[@]}"
    for namespace in momalisa-dev momalisa-prod; do # their load balancer and disk do not go with the cluster
      ! there kubectl get namespace "$namespace" ||
        kubectl -n "$namespace" delete rayservice,rayjob,raycluster --all --timeout 10m
      kubectl delete namespace "$namespace" --ignore-not-found --timeout 10m
    done
    gcloud container clusters delete "$CLUSTER" "${in_region[@]}" --quiet
  fi
  ! there gcloud compute routers describe "$ROUTER" "${in_region[@]}" ||
    gcloud compute routers delete "$ROUTER" "${in_region[@]}" --quiet # its NAT with it
  ! there gcloud compute networks subnets describe "$PROXIES" "${in_region[@]}" ||
    gcloud compute networks subnets delete "$PROXIES" "${in_region[@]}" --quiet
  echo "gke: deleted. gs://$BUCKET and the account $ACCOUNT stay"
  exit
fi

# Before anything is made: names that are taken, and GPUs that this project may not have or this region does not.
gcloud services enable compute.googleapis.com container.googleapis.com iam.googleapis.com storage.googleapis.com "${in_project[@]}"
if owner=$(gcloud storage buckets describe "gs://$BUCKET" --format='value(projectNumber)' 2> /dev/null); then
  [ -z "$owner" ] || [ "$owner" = "$number" ] ||
    fail "gs://$BUCKET belongs to project $owner, not to $PROJECT ($number); choose another bucket, or grant $ACCOUNT there by hand"
fi
cluster_is_there || true
if ! there gcloud container node-pools describe gpu "${pool[@]}"; then
  quotas=$(gcloud compute regions describe "$REGION" "${in_project[@]}" --flatten=quotas \
    --format='csv[no-heading](quotas.metric,quotas.limit,quotas.usage)') || fail "no region $REGION"
  free=$(awk -F, -v metric="$GPU_QUOTA" '$1 == metric {printf "%d", $2 - $3}' <<< "$quotas")
  [ "${free:-0}" -ge "$GPUS_PER_NODE" ] ||
    fail "the quota $GPU_QUOTA of $PROJECT in $REGION has ${free:-0} left, a node needs $GPUS_PER_NODE; ask for more (IAM, Quotas)"
  [ "$free" -ge $((MAX_NODES * GPUS_PER_NODE)) ] ||
    echo "gke: the quota $GPU_QUOTA is enough for $((free / GPUS_PER_NODE)) of $MAX_NODES nodes" >&2
  zones=$(gcloud compute accelerator-types list "${in_project[@]}" --filter="name=$GPU AND zone~$REGION-" \
    --format='value(zone.basename())' | paste -sd, -)
  [ -n "$zones" ] || fail "no zone of $REGION has $GPU; choose another cluster.gcp_region"
fi

# From here on a failure leaves things behind: it says which.
standing=
stopped() {
  [ "$?" = 0 ] || [ -z "$standing" ] ||
    echo "gke: stopped; what stands may be billed:$standing. Run it again to go on; \`make gke-down\` deletes all but the bucket" >&2
}
trap stopped EXIT

there gcloud storage buckets describe "gs://$BUCKET" ||
  gcloud storage buckets create "gs://$BUCKET" "${in_project[@]}" --location "$REGION" \
    --uniform-bucket-level-access --public-access-prevention ||
  fail "gs://$BUCKET can neither be seen nor made: the name is taken by somebody else's project; choose another bucket"
standing+=" gs://$BUCKET,"

# Nodes have no addresses of their own: NAT lets them fetch images, weights and pictures. The endpoint's internal load
# balancer runs in a subnet of its own.
standing+=" router $ROUTER with its NAT,"
there gcloud compute routers describe "$ROUTER" "${in_region[@]}" ||
  gcloud compute routers create "$ROUTER" "${in_region[@]}" --network default
there gcloud compute routers nats describe nat --router "$ROUTER" "${in_region[@]}" ||
  gcloud compute routers nats create nat --router "$ROUTER" "${in_region[@]}" \
    --auto-allocate-nat-external-ips --nat-all-subnet-ip-ranges
standing+=" subnet $PROXIES,"
there gcloud compute networks subnets describe "$PROXIES" "${in_region[@]}" ||
  gcloud compute networks subnets create "$PROXIES" "${in_region[@]}" --network default --range "$PROXY_RANGE" \
    --purpose REGIONAL_MANAGED_PROXY --role ACTIVE
standing+=" cluster $CLUSTER in $REGION"
cluster_is_there ||
  gcloud container clusters create "$CLUSTER" "${in_region[@]}" --labels app=momalisa --network default \
    --num-nodes 1 --machine-type "$CPU_MACHINE" --disk-size 50 --release-channel regular --enable-dataplane-v2 \
    --enable-shielded-nodes --enable-private-nodes --enable-ip-alias --gateway-api standard \
    --workload-pool "$PROJECT.svc.id.goog"
there gcloud container node-pools describe cpu "${pool[@]}" ||
  gcloud container node-pools create cpu "${pool[@]}" --machine-type "$CPU_MACHINE" --disk-size 50 \
    --enable-autoscaling --num-nodes 0 --total-min-nodes 0 --total-max-nodes "$MAX_CPU_NODES"
there gcloud container node-pools describe gpu "${pool[@]}" ||
  gcloud container node-pools create gpu "${pool[@]}" --spot --node-locations "$zones" \
    --machine-type "$MACHINE" --accelerator "type=$GPU,count=$GPUS_PER_NODE,gpu-driver-version=latest" --disk-size 200 \
    --enable-autoscaling --location-policy ANY --num-nodes 0 --total-min-nodes 0 --total-max-nodes "$MAX_NODES"
gcloud container clusters get-credentials "$CLUSTER" "${in_region[@]}"

# Workload Identity: pods of the namespace are this Google account, which may use this bucket and nothing else.
there gcloud iam service-accounts describe "$ACCOUNT" "${in_project[@]}" ||
  gcloud iam service-accounts create momalisa "${in_project[@]}"
gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --member "serviceAccount:$ACCOUNT" --role roles/storage.objectUser
gcloud iam service-accounts add-iam-policy-binding "$ACCOUNT" "${in_project[@]}" --role roles/iam.workloadIdentityUser \
  --member "serviceAccount:$PROJECT.svc.id.goog[$NAMESPACE/momalisa]"

gates=(--set 'featureGates[0].name=RayServiceIncrementalUpgrade' --set 'featureGates[0].enabled=true')
if [ "$TLS" = true ]; then
  helm upgrade --install cert-manager cert-manager --repo https://charts.jetstack.io --version "$CERT_MANAGER" \
    --namespace cert-manager --create-namespace --set crds.enabled=true --wait
  gates+=(--set 'featureGates[1].name=RayClusterMTLS' --set 'featureGates[1].enabled=true')
fi
helm upgrade --install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm --version "$KUBERAY" \
  --namespace kuberay --create-namespace --wait "${gates[@]}"

# Secrets go through a pipe: they are in no file and in no process list.
there kubectl get namespace "$NAMESPACE" || kubectl create namespace "$NAMESPACE"
there kubectl -n "$NAMESPACE" get secret momalisa-secrets ||
  printf 'REDIS_PASSWORD=%s\nWANDB_API_KEY=%s\n' "$(head -c 32 /dev/urandom | base64 | tr -d '/+=\n')" "${WANDB_API_KEY:-}" |
    kubectl -n "$NAMESPACE" create secret generic momalisa-secrets --from-env-file=/dev/stdin
kubectl apply -k "$HERE/gke/overlays/$OVERLAY"
echo "gke: done. kubectl -n $NAMESPACE get raycluster,rayservice,pods"
