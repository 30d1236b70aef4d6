#!/bin/sh
# Builds a ROM of the lab: build.sh OUT SOURCE [FLAGS] writes an image for `qemu -bios`. SOURCE is main.c, our own guest
# (with -DSTART_PRIVATE for a machine whose RAM is private at first), or loader.c with -DLOADER.
set -eu
here=$(dirname "$0")
out=${1:?usage: build.sh OUT SOURCE [FLAGS]}
source=${2:?usage: build.sh OUT SOURCE [FLAGS]}
shift 2
"${CC:-gcc}" -std=gnu11 -O2 -Wall -Wextra -Werror -m64 -ffreestanding -fno-pic -no-pie -static \
    -nostdlib -mno-red-zone -mgeneral-regs-only -fno-stack-protector -fcf-protection=none \
    -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns \
    -Wl,--build-id=none,-z,max-page-size=4096,--no-warn-rwx-segments -T "$here/guest.ld" \
    "$@" -o "$out.elf" "$here/start.S" "$here/$source"
"${OBJCOPY:-objcopy}" -O binary --only-section=.text --only-section=.reset "$out.elf" "$out"
rm "$out.elf"
