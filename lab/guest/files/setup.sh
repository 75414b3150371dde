#!/bin/sh
# Runs on the host as a hook of mmdebstrap. $1 is the root of the guest, $2 the
# file system's UUID.
set -eu
root=$1 uuid=$2
echo forerun-guest >"$root/etc/hostname"
printf '127.0.0.1 localhost forerun-guest\n' >"$root/etc/hosts"
printf 'UUID=%s / ext4 errors=remount-ro 0 1\n' "$uuid" >"$root/etc/fstab"
printf '0123456789abcdef0123456789abcdef\n' >"$root/etc/machine-id"
chroot "$root" passwd -d root
mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
cat >"$root/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf" <<'X'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I $TERM
X
systemctl --root="$root" enable forerun-ready.service
systemctl --root="$root" set-default forerun.target
for unit in apt-daily.timer apt-daily-upgrade.timer man-db.timer e2scrub_all.timer e2scrub_reap.service \
	fstrim.timer dpkg-db-backup.timer logrotate.timer; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/boot/extlinux"
cat >"$root/boot/extlinux/extlinux.conf" <<X
SERIAL 0 115200
DEFAULT linux
TIMEOUT 0
PROMPT 0
LABEL linux
  KERNEL /vmlinuz
  INITRD /initrd.img
  APPEND root=UUID=$uuid ro console=ttyS0,115200 quiet net.ifnames=0
X
