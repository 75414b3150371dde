#!/usr/bin/env bash
# Installs the Debian packages that the tests and the lab need and that are missing.
set -euo pipefail
need=(qemu-system-x86 qemu-utils nbdkit libnbd-bin python3-libnbd fio mmdebstrap e2fsprogs xfsprogs ntfs-3g
      zstd openssl iproute2 iperf3 extlinux syslinux-common fdisk util-linux mount kmod fuse3 postgresql gcc libc6-dev)
missing=()
for p in "${need[@]}"; do
  dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
  echo "these Debian packages are missing: ${missing[*]}; run as root: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# The tests run clusters of their own; one that starts with the machine would only be in the way.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
  mkdir -p /etc/postgresql-common
  echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "${missing[@]}" >/dev/null
