# shellcheck shell=bash
# What create.sh and teardown.sh share: options, the configuration, names, and commands that may run twice.
# For bash 3.2, macOS's, too.

# Cloud names. The manifests know the first two: namespace and Kubernetes service account are cabochon, the Google
# one is cabochon@PROJECT, and images are REGION-docker.pkg.dev/PROJECT/cabochon/cabochon-gpu:TAG.
NAMESPACE=cabochon
NAME=cabochon
NODES_SUBNET=cabochon-nodes
PROXY_SUBNET=cabochon-proxies
ARMOR_ENDPOINT=cabochon-model-armor
ARMOR_TEMPLATES="cabochon-prompt cabochon-response"
ARMOR_ROLES="roles/modelarmor.user roles/modelarmor.viewer"

DRY_RUN=false

# fail MESSAGE: ends with it, as a mistake of whoever called.
fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

# load_config FILE: reads it, checks it, sets what follows from it, and tells gcloud the project.
load_config() {
  [ -r "$1" ] || fail "a configuration must be readable, $1 is not: copy config.example.env to it and edit it"
  # shellcheck source=deploy/gke/cluster/config.example.env
  . "$1"
  local name
  for name in PROJECT REGION ZONES BUCKET GPU_POOLS GPU_MAX_NODES SYSTEM_MACHINE RAY_OPERATOR MODEL_ARMOR \
    NODE_RANGE POD_RANGE SERVICE_RANGE PROXY_RANGE MODEL_ARMOR_ADDRESS; do
    [ -n "${!name:-}" ] || fail "$name must have a value, $1 gives none: see config.example.env"
  done
  one_of RAY_OPERATOR kuberay addon
  one_of MODEL_ARMOR true false
  for name in $GPU_POOLS; do gpu_machine "$name" >/dev/null; done

  ACCOUNT=$NAME@$PROJECT.iam.gserviceaccount.com
  NODE_ACCOUNT=$NAME-nodes@$PROJECT.iam.gserviceaccount.com
  ARMOR_HOST=modelarmor.$REGION.rep.googleapis.com
  say_export CLOUDSDK_CORE_PROJECT "$PROJECT"
  say_export CLOUDSDK_CORE_DISABLE_PROMPTS 1
  # Templates are only at the region's own endpoint.
  say_export CLOUDSDK_API_ENDPOINT_OVERRIDES_MODELARMOR "https://$ARMOR_HOST/"
}

# one_of NAME VALUE...: the variable of that name must be one of the values.
one_of() {
  local name=$1 value=${!1} allowed
  shift
  for allowed; do [ "$value" = "$allowed" ] && return; done
  fail "$name must be one of $*, got $value: edit the configuration"
}

# gpu_machine POOL: the machine type and the accelerator of a node with one GPU.
gpu_machine() {
  case ${1%-spot} in
    l4) echo g2-standard-8 nvidia-l4 ;;
    a100-80gb) echo a2-ultragpu-1g nvidia-a100-80gb ;;
    h100-80gb) echo a3-highgpu-1g nvidia-h100-80gb ;;
    *) fail "GPU_POOLS must be of l4, a100-80gb, h100-80gb, each also with -spot, got $1: edit the configuration" ;;
  esac
}

# say_export NAME VALUE: exports it, and writes so.
say_export() {
  say export "$1=$2"
  export "$1=$2"
}

# say WORD...: writes a command as one could paste it.
say() {
  local word line=
  for word; do
    case $word in
      *[!A-Za-z0-9_./:=@,+%-]*) line="$line '$word'" ;; # no name or value has a quote in it
      *) line="$line $word" ;;
    esac
  done
  printf '%s\n' "${line# }"
}

# run COMMAND...: writes it and runs it; with --dry-run it only writes.
run() {
  say "$@"
  $DRY_RUN || "$@"
}

# ensure COMMAND... -- COMMAND...: runs the second if the first says that there is nothing.
ensure() {
  local looks=()
  while [ "$1" != -- ]; do
    looks+=("$1")
    shift
  done
  shift
  if $DRY_RUN; then
    printf '%s >/dev/null 2>&1 ||\n  ' "$(say "${looks[@]}")"
    say "$@"
  elif finds "${looks[@]}"; then
    printf '# there already: %s\n' "$(say "${looks[@]}")"
  else
    run "$@"
  fi
}

# drop COMMAND...: runs what deletes; that there is nothing to delete is no error.
drop() {
  say "$@"
  $DRY_RUN || finds "$@" || echo '# was not there'
}

# finds COMMAND...: true if it succeeds, false if it says that something does not exist; ends on any other error,
# such as a missing permission, which must not pass for "not there". The words are gcloud's and kubectl's.
finds() {
  local output
  output=$("$@" 2>&1) && return
  printf '%s' "$output" | grep -qiE 'not[ _]?found|does not exist|matched no objects|404' && return 1
  printf '%s\n' "$output" >&2
  exit 1
}
