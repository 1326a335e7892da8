#!/usr/bin/env bash
# Stands in for the build script of Dynamo 0.7.x: the same options, the same two steps, the same tags and logs.
# What it builds is small and needs no network. The text is the project's own.
set -e

SOURCE_DIR="$(dirname "$(readlink -f "$0")")"
BUILD_CONTEXT="$(dirname "$SOURCE_DIR")"
BUILD_LOG_DIR="$BUILD_CONTEXT/build-logs"
PLATFORM=linux/amd64
FRAMEWORK=VLLM
TARGET=dev
TAG=()
BUILD_ARGS=()
PASSED=()
NO_TAG_LATEST=""
RUN_PREFIX=""
BASE_IMAGE=nvcr.io/nvidia/pytorch
BASE_IMAGE_TAG=25.10-py3
DEFAULT_TENSORRTLLM_PIP_WHEEL="tensorrt-llm==1.2.0rc3"
DEFAULT_TENSORRTLLM_INDEX_URL="https://pypi.nvidia.com/"
TENSORRTLLM_PIP_WHEEL=""
TENSORRTLLM_INDEX_URL=""
TENSORRTLLM_PIP_WHEEL_DIR=""
TRTLLM_GIT_URL=""

error() { printf '%s %s\n' "$1" "$2" >&2; exit 1; }
needs() { [ -n "$2" ] || error "ERROR: option requires an argument:" "$1"; }

get_options() {
    while [ $# -gt 0 ]; do
        case "$1" in
            -h|--help) echo "usage: build.sh [--framework F] [--tensorrtllm-pip-wheel W] [--target T] [--tag T] ..."; exit 0 ;;
            --platform) needs "$1" "$2"; PLATFORM=$2; shift ;;
            --framework) needs "$1" "$2"; FRAMEWORK=${2^^}; shift ;;
            --tensorrtllm-pip-wheel) needs "$1" "$2"; TENSORRTLLM_PIP_WHEEL=$2; shift ;;
            --tensorrtllm-index-url) needs "$1" "$2"; TENSORRTLLM_INDEX_URL=$2; shift ;;
            --tensorrtllm-pip-wheel-dir) needs "$1" "$2"; TENSORRTLLM_PIP_WHEEL_DIR=$2; shift ;;
            --tensorrtllm-git-url) needs "$1" "$2"; TRTLLM_GIT_URL=$2; shift ;;
            --base-image) needs "$1" "$2"; BASE_IMAGE=$2; shift ;;
            --base-image-tag) needs "$1" "$2"; BASE_IMAGE_TAG=$2; shift ;;
            --target) needs "$1" "$2"; TARGET=$2; shift ;;
            --tag) needs "$1" "$2"; TAG=(--tag "$2"); shift ;;
            --build-arg) needs "$1" "$2"; BUILD_ARGS+=(--build-arg "$2"); shift ;;
            --build-context|--cache-from|--cache-to) needs "$1" "$2"; PASSED+=("$1" "$2"); shift ;;
            --tensorrtllm-commit|--dev-image|--uid|--gid|--sccache-bucket|--sccache-region|--vllm-max-jobs) needs "$1" "$2"; shift ;;
            --enable-kvbm|--make-efa|--use-sccache) ;;
            --no-cache) PASSED+=(--no-cache) ;;
            --no-tag-latest) NO_TAG_LATEST=true ;;
            --dry-run) RUN_PREFIX=echo ;;
            *) error 'ERROR: Unknown option: ' "$1" ;;
        esac
        shift
    done
}

get_options "$@"

commit_id=${commit_id:-$(git -C "$BUILD_CONTEXT" rev-parse --short HEAD)} || error "ERROR:" "a git checkout is needed"
current_tag=${current_tag:-$(git -C "$BUILD_CONTEXT" describe --tags --exact-match 2>/dev/null | sed 's/^v//' || true)}
latest_tag=${latest_tag:-$(git -C "$BUILD_CONTEXT" describe --tags --abbrev=0 2>/dev/null | sed 's/^v//' || true)}
VERSION="v${current_tag:-${latest_tag}.dev.${commit_id}}"

case "$FRAMEWORK" in
    TRTLLM|VLLM|SGLANG|NONE) ;;
    *) error 'ERROR: Unknown framework: ' "$FRAMEWORK" ;;
esac
[ "$FRAMEWORK" = TRTLLM ] || error "ERROR:" "this stand-in knows the framework TRTLLM only"

# Exactly one way to come by the wheel: download, install from a folder, or build from source.
intents=0
[ -n "$TENSORRTLLM_PIP_WHEEL$TENSORRTLLM_INDEX_URL" ] && intents=$((intents + 1))
[ -n "$TENSORRTLLM_PIP_WHEEL_DIR" ] && intents=$((intents + 1))
[ -n "$TRTLLM_GIT_URL" ] && intents=$((intents + 1))
[ "$intents" -le 1 ] || error "ERROR:" "only one of download, install and build of the TensorRT-LLM wheel can be asked for"
[ -z "$TRTLLM_GIT_URL" ] || error "ERROR:" "this stand-in builds no wheel"
TENSORRTLLM_PIP_WHEEL=${TENSORRTLLM_PIP_WHEEL:-$DEFAULT_TENSORRTLLM_PIP_WHEEL}
TENSORRTLLM_INDEX_URL=${TENSORRTLLM_INDEX_URL:-$DEFAULT_TENSORRTLLM_INDEX_URL}

suffix=""
[ "$TARGET" = dev ] || suffix="-$TARGET"
[ "${#TAG[@]}" -gt 0 ] || TAG=(--tag "dynamo:${VERSION}-trtllm${suffix}")
[ -n "$NO_TAG_LATEST" ] || TAG+=(--tag "dynamo:latest-trtllm${suffix}")
DYNAMO_BASE_IMAGE="dynamo-base:${VERSION}-trtllm"

build() {
    if docker buildx version >/dev/null 2>&1; then
        $RUN_PREFIX docker buildx build --progress=plain --load "$@"
    elif [ "${DOCKER_BUILDKIT:-1}" = 0 ]; then
        $RUN_PREFIX docker build "$@"
    else
        DOCKER_BUILDKIT=1 $RUN_PREFIX docker build --progress=plain "$@"
    fi
}

mkdir -p "$BUILD_LOG_DIR"
cd "$BUILD_CONTEXT"
set -o pipefail
echo "Building Dynamo image: ${TAG[*]}"
build -f container/Dockerfile --target runtime --platform "$PLATFORM" \
    --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "BASE_IMAGE_TAG=$BASE_IMAGE_TAG" \
    "${BUILD_ARGS[@]}" "${PASSED[@]}" --tag "$DYNAMO_BASE_IMAGE" . 2>&1 | tee "$BUILD_LOG_DIR/base-image-build.log"
build -f container/Dockerfile.trtllm --target "$TARGET" --platform "$PLATFORM" \
    --build-arg "DYNAMO_BASE_IMAGE=$DYNAMO_BASE_IMAGE" --build-arg "DYNAMO_COMMIT_SHA=$commit_id" \
    --build-arg "TENSORRTLLM_PIP_WHEEL=$TENSORRTLLM_PIP_WHEEL" --build-arg "TENSORRTLLM_INDEX_URL=$TENSORRTLLM_INDEX_URL" \
    "${BUILD_ARGS[@]}" "${PASSED[@]}" "${TAG[@]}" . 2>&1 | tee "$BUILD_LOG_DIR/framework-trtllm-build.log"
echo "Build logs: $BUILD_LOG_DIR"
