#!/usr/bin/env bash
# Install what `make test-slurm` needs: SLURM's daemons and commands, and MUNGE. No service is started by that.
#
# Exit status: 0 ready, 77 this machine cannot run it, and a line says why.
set -euo pipefail

cannot() {
    echo "make test-slurm cannot run here: $1"
    exit 77
}

missing() {
    local program
    for program in munged slurmctld slurmd sbatch srun scontrol; do
        # daemons lie where only root looks
        PATH=$PATH:/usr/sbin:/usr/local/sbin command -v "$program" >/dev/null || echo "$program"
    done
}

[[ -n $(missing) ]] || exit 0
packages=(slurmctld slurmd slurm-client munge)
[[ $(id -u) == 0 ]] || cannot "it needs ${packages[*]}: install them, or run it as root on Debian"
command -v apt-get >/dev/null || cannot "it needs Debian or Ubuntu, whose apt-get installs ${packages[*]}"
echo "make test-slurm needs ${packages[*]}: installing with apt-get"
install=(apt-get -qq -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends "${packages[@]}")
# in runlevel 1 Debian's packages start no services: the test starts daemons of its own, and no others
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
# a list of packages that is there already may do; an old one names files that are gone
"${install[@]}" >/dev/null 2>&1 || { apt-get -qq update && "${install[@]}" >/dev/null; } \
    || cannot "apt-get could not install ${packages[*]}: see its message above"
[[ -z $(missing) ]] || cannot "the packages lack $(missing | xargs)"
