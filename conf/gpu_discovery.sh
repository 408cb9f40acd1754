#!/usr/bin/env bash
# Prints this machine's GPUs as Spark wants them: {"name": "gpu", "addresses": ["0", "1"]}.
# For spark.executor.resource.gpu.discoveryScript, and spark.worker.resource.gpu.discoveryScript of standalone workers.
#
# The addresses are names that torch can number: those of CUDA_VISIBLE_DEVICES where it is set, else 0, 1, ...
# Of MIG devices CUDA shows a process one. Where there is one it is "0"; where there are several their UUIDs are printed, and
# each executor needs CUDA_VISIBLE_DEVICES with one of them (on Kubernetes the device plugin gives each pod its own).
set -euo pipefail

print_addresses() {
    local list="" address
    for address in "$@"; do
        list+="${list:+, }\"$address\""
    done
    printf '{"name": "gpu", "addresses": [%s]}\n' "$list"
}

if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    IFS=', ' read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
    case "${visible[0]:-}" in
        "" | -1 | none | void) print_addresses ;;   # what CUDA and the container runtime take for none
        *) print_addresses "${visible[@]}" ;;
    esac
    exit 0
fi

if ! command -v nvidia-smi >/dev/null; then
    printf 'gpu_discovery.sh: nvidia-smi is not on PATH: no GPUs\n' >&2
    print_addresses
    exit 0
fi

# Fails, with its own message, where the driver does not answer: Spark then starts no executor here.
devices="$(nvidia-smi -L)"
mapfile -t mig < <(sed -n 's/^ *MIG .*(UUID: *\(MIG-[^)]*\)).*$/\1/p' <<<"$devices")
mapfile -t gpus < <(sed -n 's/^GPU *\([0-9]*\):.*$/\1/p' <<<"$devices")

if ((${#mig[@]} == 1)); then
    print_addresses 0
elif ((${#mig[@]} > 1)); then
    print_addresses "${mig[@]}"
else
    print_addresses ${gpus[@]+"${gpus[@]}"}
fi
