#!/usr/bin/env bash
# Deletes what create.sh makes, newest first. May run again: what is gone stays gone. APIs stay enabled.
# Give it the configuration that create.sh had.
#
#   teardown.sh [--dry-run] [--keep-data] [--yes] [--config FILE]
#
# --keep-data keeps the bucket and the images; without --yes it asks for the project's name.
set -euo pipefail
# shellcheck source=deploy/gke/cluster/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local config keep_data=false yes=false
  config=$(dirname "${BASH_SOURCE[0]}")/config.env
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) DRY_RUN=true ;;
      --keep-data) keep_data=true ;;
      --yes) yes=true ;;
      --config) config=${2:?--config needs a file} && shift ;;
      *) fail "options are --dry-run, --keep-data, --yes and --config FILE, got $1" ;;
    esac
    shift
  done
  load_config "$config"
  $DRY_RUN || $yes || confirm "$keep_data"
  cluster
  if $MODEL_ARMOR; then model_armor; fi
  if ! $keep_data; then
    drop gcloud storage rm "gs://$BUCKET" --recursive
    drop gcloud artifacts repositories delete "$NAME" --location="$REGION"
  fi
  accounts
  network
}

# confirm KEEP_DATA: goes on only for somebody who types the project's name.
confirm() {
  local typed what="the cluster, gs://$BUCKET with all weights, and all images"
  if $1; then what="the cluster"; fi
  printf 'This deletes %s. Type %s to go on: ' "$what" "$PROJECT" >&2
  read -r typed || typed=
  [ "$typed" = "$PROJECT" ] || fail "the project's name must be typed, got '$typed': nothing was deleted"
}

# The namespace first: its Gateway's load balancer would outlive the cluster, and hold the network.
cluster() {
  if $DRY_RUN || finds gcloud container clusters describe "$NAME" --location="$REGION"; then
    run gcloud container clusters get-credentials "$NAME" --location="$REGION" --dns-endpoint
    run kubectl delete namespace "$NAMESPACE" --ignore-not-found --timeout=15m
  fi
  drop gcloud container clusters delete "$NAME" --location="$REGION"
}

model_armor() {
  local template role
  drop gcloud dns record-sets delete "$ARMOR_HOST." --zone="$ARMOR_ENDPOINT" --type=A
  drop gcloud dns managed-zones delete "$ARMOR_ENDPOINT"
  drop gcloud network-connectivity regional-endpoints delete "$ARMOR_ENDPOINT" --region="$REGION"
  drop gcloud compute addresses delete "$ARMOR_ENDPOINT" --region="$REGION"
  for template in $ARMOR_TEMPLATES; do
    drop gcloud model-armor templates delete "$template" --location="$REGION"
  done
  for role in $ARMOR_ROLES; do
    drop gcloud projects remove-iam-policy-binding "$PROJECT" --member="serviceAccount:$ACCOUNT" \
      --role="$role" --condition=None
  done
}

accounts() {
  drop gcloud projects remove-iam-policy-binding "$PROJECT" --member="serviceAccount:$NODE_ACCOUNT" \
    --role=roles/container.defaultNodeServiceAccount --condition=None
  drop gcloud iam service-accounts delete "$ACCOUNT"
  drop gcloud iam service-accounts delete "$NODE_ACCOUNT"
}

network() {
  drop gcloud compute routers nats delete "$NAME" --router="$NAME" --region="$REGION"
  drop gcloud compute routers delete "$NAME" --region="$REGION"
  drop gcloud compute networks subnets delete "$PROXY_SUBNET" --region="$REGION"
  drop gcloud compute networks subnets delete "$NODES_SUBNET" --region="$REGION"
  drop gcloud compute networks delete "$NAME"
}

main "$@"
