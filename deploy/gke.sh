#!/usr/bin/env bash
# A GKE cluster for MOMA Lisa: PROJECT=... BUCKET=... bash deploy/gke.sh   (or `make gke`). Run again, it makes what lacks.
# Needs gcloud, kubectl and helm, and in the environment: WANDB_API_KEY (may be empty).
set -euo pipefail
PROJECT=${PROJECT:-} BUCKET=${BUCKET:-} REGION=${REGION:-us-central1} CLUSTER=${CLUSTER:-momalisa}
OVERLAY=${OVERLAY:-dev} GPU=${GPU:-nvidia-a100-80gb} MACHINE=${MACHINE:-a2-ultragpu-1g} MAX_NODES=${MAX_NODES:-4}
NAMESPACE=momalisa-$OVERLAY ACCOUNT=momalisa@$PROJECT.iam.gserviceaccount.com
HERE=$(cd "$(dirname "$0")" && pwd)

fail() { echo "gke: $*" >&2; exit 1; }
[ -n "$PROJECT" ] || fail "PROJECT is not set; gcloud projects list shows yours"
[ -n "$BUCKET" ] || fail "BUCKET is not set; it is made if it is not there"
[ -d "$HERE/gke/overlays/$OVERLAY" ] || fail "OVERLAY=$OVERLAY is neither dev nor prod"
for tool in gcloud kubectl helm; do
  command -v "$tool" > /dev/null || fail "$tool is not installed"
done
there() { "$@" > /dev/null 2>&1; }

number=$(gcloud projects describe "$PROJECT" --format='value(projectNumber)') || fail "no project $PROJECT, or you may not see it"

# Before anything is made: a bucket of another project, and a cluster that somebody else has by this name.
if owner=$(gcloud storage buckets describe "gs://$BUCKET" --format='value(projectNumber)' 2> /dev/null); then
  [ -z "$owner" ] || [ "$owner" = "$number" ] ||
    fail "gs://$BUCKET belongs to project $owner, not to $PROJECT ($number); choose another BUCKET, or grant $ACCOUNT there by hand"
else
  gcloud storage buckets create "gs://$BUCKET" --project "$PROJECT" --location "$REGION" \
    --uniform-bucket-level-access --public-access-prevention ||
    fail "gs://$BUCKET can neither be seen nor made: the name is taken by somebody else's project; choose another BUCKET"
fi
if there gcloud container clusters describe "$CLUSTER" --project "$PROJECT" --region "$REGION"; then
  label=$(gcloud container clusters describe "$CLUSTER" --project "$PROJECT" --region "$REGION" --format='value(resourceLabels.app)')
  [ "$label" = momalisa ] || fail "the cluster name $CLUSTER is taken in $REGION by another application; choose another CLUSTER"
else
  gcloud container clusters create "$CLUSTER" --project "$PROJECT" --region "$REGION" --labels app=momalisa \
    --num-nodes 1 --machine-type e2-standard-4 --release-channel regular --enable-dataplane-v2 --enable-shielded-nodes \
    --enable-private-nodes --enable-ip-alias --gateway-api standard --workload-pool "$PROJECT.svc.id.goog"
fi
there gcloud container node-pools describe gpu --cluster "$CLUSTER" --project "$PROJECT" --region "$REGION" ||
  gcloud container node-pools create gpu --cluster "$CLUSTER" --project "$PROJECT" --region "$REGION" --spot \
    --machine-type "$MACHINE" --accelerator "type=$GPU,count=1,gpu-driver-version=latest" \
    --enable-autoscaling --num-nodes 0 --min-nodes 0 --max-nodes "$MAX_NODES" --disk-size 200 ||
  fail "no GPU pool: is the quota for $GPU in $REGION enough? gcloud compute regions describe $REGION shows it"
gcloud container clusters get-credentials "$CLUSTER" --project "$PROJECT" --region "$REGION"

# Workload Identity: pods of the namespace are this Google account, which may use this bucket and nothing else.
there gcloud iam service-accounts describe "$ACCOUNT" --project "$PROJECT" ||
  gcloud iam service-accounts create momalisa --project "$PROJECT"
gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --member "serviceAccount:$ACCOUNT" --role roles/storage.objectUser
gcloud iam service-accounts add-iam-policy-binding "$ACCOUNT" --project "$PROJECT" --role roles/iam.workloadIdentityUser \
  --member "serviceAccount:$PROJECT.svc.id.goog[$NAMESPACE/momalisa]"

helm repo add kuberay https://ray-project.github.io/kuberay-helm
helm upgrade --install kuberay-operator kuberay/kuberay-operator --namespace kuberay --create-namespace \
  --set 'featureGates[0].name=RayServiceIncrementalUpgrade' --set 'featureGates[0].enabled=true'

# Secrets go through a pipe: they are in no file and in no process list.
there kubectl get namespace "$NAMESPACE" || kubectl create namespace "$NAMESPACE"
there kubectl -n "$NAMESPACE" get secret momalisa-secrets ||
  printf 'REDIS_PASSWORD=%s\nWANDB_API_KEY=%s\n' "$(head -c 32 /dev/urandom | base64 | tr -d '/+=\n')" "${WANDB_API_KEY:-}" |
    kubectl -n "$NAMESPACE" create secret generic momalisa-secrets --from-env-file=/dev/stdin
kubectl apply -k "$HERE/gke/overlays/$OVERLAY"
echo "gke: done. kubectl -n $NAMESPACE get raycluster,rayservice,pods"
