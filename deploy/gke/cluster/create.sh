#!/usr/bin/env bash
# From an empty project with billing to a private GKE cluster for Cabochon. May run again: what is there stays.
#
#   create.sh [--dry-run] [--config FILE]
#
# Needs gcloud, kubectl with git (CRDs come from their projects' tags), and the right to do all this.
# Flags are those of gcloud 528, whose parser a test asks; no project has been made with them yet.
set -euo pipefail
# shellcheck source=deploy/gke/cluster/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local config
  config=$(dirname "${BASH_SOURCE[0]}")/config.env
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) DRY_RUN=true ;;
      --config) config=${2:?--config needs a file} && shift ;;
      *) fail "options are --dry-run and --config FILE, got $1" ;;
    esac
    shift
  done
  load_config "$config"
  services
  network
  accounts
  registry_and_bucket
  cluster
  gpu_pools
  workload_identity
  if $MODEL_ARMOR; then
    templates
    private_endpoint
  fi
  inside_the_cluster
}

services() {
  local names=(artifactregistry compute container iam logging monitoring networkservices storage)
  if $MODEL_ARMOR; then names+=(dns modelarmor networkconnectivity); fi
  run gcloud services enable "${names[@]/%/.googleapis.com}"
}

# Nodes have no public address: NAT lets them out, to the Hub and to registries that are not Google's.
network() {
  ensure gcloud compute networks describe "$NAME" -- \
    gcloud compute networks create "$NAME" --subnet-mode=custom
  ensure gcloud compute networks subnets describe "$NODES_SUBNET" --region="$REGION" -- \
    gcloud compute networks subnets create "$NODES_SUBNET" --region="$REGION" --network="$NAME" \
    --range="$NODE_RANGE" --secondary-range="pods=$POD_RANGE,services=$SERVICE_RANGE" \
    --enable-private-ip-google-access
  # A regional Application Load Balancer, which the Inference Gateway is, has its proxies in a subnet of their own.
  ensure gcloud compute networks subnets describe "$PROXY_SUBNET" --region="$REGION" -- \
    gcloud compute networks subnets create "$PROXY_SUBNET" --region="$REGION" --network="$NAME" \
    --range="$PROXY_RANGE" --purpose=REGIONAL_MANAGED_PROXY --role=ACTIVE
  ensure gcloud compute routers describe "$NAME" --region="$REGION" -- \
    gcloud compute routers create "$NAME" --region="$REGION" --network="$NAME"
  ensure gcloud compute routers nats describe "$NAME" --router="$NAME" --region="$REGION" -- \
    gcloud compute routers nats create "$NAME" --router="$NAME" --region="$REGION" \
    --nat-all-subnet-ip-ranges --auto-allocate-nat-external-ips
}

# One for the nodes: logs, metrics (Managed Prometheus's collectors write as the node), images. One for the pods.
accounts() {
  local role
  ensure gcloud iam service-accounts describe "$NODE_ACCOUNT" -- \
    gcloud iam service-accounts create "$NAME-nodes" --display-name="Nodes of the Cabochon cluster"
  run gcloud projects add-iam-policy-binding "$PROJECT" --member="serviceAccount:$NODE_ACCOUNT" \
    --role=roles/container.defaultNodeServiceAccount --condition=None
  ensure gcloud iam service-accounts describe "$ACCOUNT" -- \
    gcloud iam service-accounts create "$NAME" --display-name="Pods of Cabochon"
  if $MODEL_ARMOR; then
    # viewer: to read a template. If nobody can tell that it rewrites nothing, each prompt waits for its check.
    for role in $ARMOR_ROLES; do
      run gcloud projects add-iam-policy-binding "$PROJECT" --member="serviceAccount:$ACCOUNT" \
        --role="$role" --condition=None
    done
  fi
}

registry_and_bucket() {
  ensure gcloud artifacts repositories describe "$NAME" --location="$REGION" -- \
    gcloud artifacts repositories create "$NAME" --location="$REGION" --repository-format=docker
  run gcloud artifacts repositories add-iam-policy-binding "$NAME" --location="$REGION" \
    --member="serviceAccount:$NODE_ACCOUNT" --role=roles/artifactregistry.reader
  ensure gcloud storage buckets describe "gs://$BUCKET" -- \
    gcloud storage buckets create "gs://$BUCKET" --location="$REGION" \
    --uniform-bucket-level-access --public-access-prevention
  run gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --member="serviceAccount:$ACCOUNT" \
    --role=roles/storage.objectViewer
}

# Dataplane V2 enforces NetworkPolicies. The control plane has a DNS name, open to who IAM lets in, and no address.
# The Gateway's InferencePool comes with GKE 1.34.0-gke.1626000 and newer.
cluster() {
  local addons=HttpLoadBalancing,HorizontalPodAutoscaling,GcePersistentDiskCsiDriver,GcsFuseCsiDriver
  if [ "$RAY_OPERATOR" = addon ]; then addons=$addons,RayOperator; fi
  ensure gcloud container clusters describe "$NAME" --location="$REGION" -- \
    gcloud container clusters create "$NAME" --location="$REGION" --node-locations="$ZONES" \
    --release-channel=regular --network="$NAME" --subnetwork="$NODES_SUBNET" --enable-ip-alias \
    --cluster-secondary-range-name=pods --services-secondary-range-name=services \
    --enable-private-nodes --enable-dns-access --no-enable-ip-access --enable-dataplane-v2 \
    --gateway-api=standard --addons="$addons" --workload-pool="$PROJECT.svc.id.goog" \
    --enable-managed-prometheus --monitoring=SYSTEM,DCGM --enable-shielded-nodes \
    --service-account="$NODE_ACCOUNT" --machine-type="$SYSTEM_MACHINE" --num-nodes=1 \
    --enable-autoscaling --total-min-nodes=1 --total-max-nodes=3 --enable-image-streaming
}

# GKE taints GPU nodes with nvidia.com/gpu and labels them cloud.google.com/gke-accelerator; GPU drivers are its own.
# torch brings CUDA 13, which needs driver 580 or newer. Which ways of buying an H100 machine has depends on the zone.
gpu_pools() {
  local pool machine accelerator
  for pool in $GPU_POOLS; do
    read -r machine accelerator <<<"$(gpu_machine "$pool")"
    local spot=()
    case $pool in *-spot) spot=(--spot) ;; esac
    ensure gcloud container node-pools describe "$pool" --cluster="$NAME" --location="$REGION" -- \
      gcloud container node-pools create "$pool" --cluster="$NAME" --location="$REGION" \
      --node-locations="$ZONES" --machine-type="$machine" \
      --accelerator="type=$accelerator,count=1,gpu-driver-version=latest" \
      --num-nodes=0 --enable-autoscaling --total-min-nodes=0 --total-max-nodes="$GPU_MAX_NODES" \
      --location-policy=ANY --disk-type=pd-balanced --disk-size=200 --enable-image-streaming \
      --workload-metadata=GKE_METADATA --service-account="$NODE_ACCOUNT" ${spot[@]+"${spot[@]}"}
  done
}

# Pods of the Kubernetes service account act as the Google one. The pool of identities exists since the first cluster.
workload_identity() {
  run gcloud iam service-accounts add-iam-policy-binding "$ACCOUNT" --role=roles/iam.workloadIdentityUser \
    --member="serviceAccount:$PROJECT.svc.id.goog[$NAMESPACE/$NAME]" --condition=None
}

# The same filters for prompts and answers to begin with; two templates, so that each can be changed alone.
templates() {
  local template level=MEDIUM_AND_ABOVE type rai=
  for type in HATE_SPEECH HARASSMENT SEXUALLY_EXPLICIT DANGEROUS; do
    rai="$rai${rai:+,}{\"filterType\":\"$type\",\"confidenceLevel\":\"$level\"}"
  done
  for template in $ARMOR_TEMPLATES; do
    ensure gcloud model-armor templates describe "$template" --location="$REGION" -- \
      gcloud model-armor templates create "$template" --location="$REGION" \
      --pi-and-jailbreak-filter-settings-enforcement=enabled \
      --pi-and-jailbreak-filter-settings-confidence-level=medium-and-above \
      --malicious-uri-filter-settings-enforcement=enabled --basic-config-filter-enforcement=enabled \
      --rai-settings-filters="[$rai]"
  done
}

# Prompts on their way to Model Armor stay in the network: Private Service Connect under the service's own name.
private_endpoint() {
  local here=projects/$PROJECT/regions/$REGION
  ensure gcloud compute addresses describe "$ARMOR_ENDPOINT" --region="$REGION" -- \
    gcloud compute addresses create "$ARMOR_ENDPOINT" --region="$REGION" --subnet="$NODES_SUBNET" \
    --addresses="$MODEL_ARMOR_ADDRESS"
  ensure gcloud network-connectivity regional-endpoints describe "$ARMOR_ENDPOINT" --region="$REGION" -- \
    gcloud network-connectivity regional-endpoints create "$ARMOR_ENDPOINT" --region="$REGION" \
    --target-google-api="$ARMOR_HOST" --network="projects/$PROJECT/global/networks/$NAME" \
    --subnetwork="$here/subnetworks/$NODES_SUBNET" --address="$here/addresses/$ARMOR_ENDPOINT"
  ensure gcloud dns managed-zones describe "$ARMOR_ENDPOINT" -- \
    gcloud dns managed-zones create "$ARMOR_ENDPOINT" --dns-name="$ARMOR_HOST." --visibility=private \
    --networks="$NAME" --description="Model Armor, privately"
  ensure gcloud dns record-sets describe "$ARMOR_HOST." --zone="$ARMOR_ENDPOINT" --type=A -- \
    gcloud dns record-sets create "$ARMOR_HOST." --zone="$ARMOR_ENDPOINT" --type=A --ttl=300 \
    --rrdatas="$MODEL_ARMOR_ADDRESS"
}

# KubeRay and the CRDs of llm-d's endpoint picker. Server side: KubeRay's are too large for an annotation.
inside_the_cluster() {
  run gcloud container clusters get-credentials "$NAME" --location="$REGION" --dns-endpoint
  if [ "$RAY_OPERATOR" = kuberay ]; then
    run kubectl apply --server-side --kustomize \
      "https://github.com/ray-project/kuberay/ray-operator/config/default?ref=v1.7.0"
  fi
  ensure kubectl get crd inferencepools.inference.networking.k8s.io -- \
    kubectl apply --server-side --kustomize \
    "https://github.com/kubernetes-sigs/gateway-api-inference-extension/config/crd?ref=v1.5.0"
  run kubectl apply --server-side --kustomize "https://github.com/llm-d/llm-d-router/config/crd?ref=v0.10.0"
}

main "$@"
