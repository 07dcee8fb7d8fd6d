#!/usr/bin/env bash
# Run a command where only this machine can be reached: Orthanc listens on every address. Installs what it needs first.
set -euo pipefail

missing=()
for package in iproute2 orthanc orthanc-dicomweb chromium dcmtk dicom3tools; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]} && EUID == 0)) && command -v apt-get >/dev/null; then
    policy=/usr/sbin/policy-rc.d # keeps Debian from starting Orthanc as a service
    if [[ ! -e $policy ]]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"; } ||
        echo "Not installed: ${missing[*]}. Tests that need them will be skipped." >&2
fi

if unshare --net true 2>/dev/null; then
    unshare --net bash -c 'ip link set lo up && exec "$@"' bash "$@"
else
    echo "No network namespace can be made here (root may): the tests will be skipped." >&2
    "$@"
fi
