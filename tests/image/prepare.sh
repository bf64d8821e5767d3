#!/usr/bin/env bash
# Install what `make test-image` needs: podman (which builds and runs images without a service) and debootstrap (which
# makes the base image from the host's own Debian mirror).
#
# Exit status: 0 ready, 77 this machine cannot run it, and a line says why.
set -euo pipefail

cannot() {
    echo "make test-image cannot run here: $1"
    exit 77
}

[[ $(id -u) == 0 ]] || cannot "it builds and mounts images and needs root: run it as root, in a virtual machine for instance"
command -v apt-get >/dev/null || cannot "it needs Debian or Ubuntu, whose apt-get installs podman and debootstrap"
unshare --mount true 2>/dev/null || cannot "root may not mount here (no CAP_SYS_ADMIN): use a machine or a privileged container"

# runc runs a container, catatonit is its first process
packages=(podman runc catatonit debootstrap ca-certificates)
missing=()
for package in "${packages[@]}"; do
    # shellcheck disable=SC2016  # dpkg-query replaces ${Status}, not the shell
    [[ $(dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null) == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]})); then
    echo "make test-image needs ${missing[*]}: installing with apt-get"
    install=(apt-get -qq -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends "${missing[@]}")
    export DEBIAN_FRONTEND=noninteractive
    # a list of packages that is there already may do; an old one names files that are gone
    "${install[@]}" >/dev/null 2>&1 || { apt-get -qq update && "${install[@]}" >/dev/null; } \
        || cannot "apt-get could not install ${missing[*]}: see its message above"
fi
