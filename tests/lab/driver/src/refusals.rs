//! Command lines that QEMU must refuse, each with what the message must say.

use anyhow::{Result, ensure};

use crate::Lab;
use crate::machine::{Launch, OUR_GUEST};

/// QEMU must end with status 1; its message must contain each of `says` (`a|b`: either).
pub struct Refusal {
    pub name: &'static str,
    args: &'static str,
    says: &'static [&'static str],
}

pub const REFUSALS: &[Refusal] = &[
    Refusal {
        name: "refuse-vm-without-private-memory",
        args: "-accel kvm -cpu host -m 256M -object memory-backend-private,id=ram0,size=256M \
               -machine q35,smm=off,memory-backend=ram0",
        says: &[
            "ram0",
            "this VM has no private memory",
            "sw-protected-guest",
        ],
    },
    Refusal {
        name: "refuse-tcg",
        args: "-accel tcg -m 256M -object memory-backend-private,id=ram0,size=256M \
               -machine q35,smm=off,memory-backend=ram0",
        says: &["ram0", "needs KVM: use -accel kvm", "emulate=on"],
    },
    Refusal {
        name: "refuse-smm",
        args: "-accel kvm -cpu host -m 256M -object sw-protected-guest,id=cgs0 \
               -object memory-backend-private,id=ram0,size=256M \
               -machine q35,smm=on,confidential-guest-support=cgs0,memory-backend=ram0",
        says: &["does not support SMM", "smm=off"],
    },
    Refusal {
        name: "refuse-emulate-with-confidential-guest",
        args: "-accel kvm -cpu host -m 256M -object sw-protected-guest,id=cgs0 \
               -object memory-backend-private,id=ram0,size=256M,emulate=on \
               -machine q35,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
        says: &["ram0", "emulate"],
    },
    Refusal {
        name: "refuse-beside-qemus-own",
        args: "-accel kvm -cpu host -m 256M \
               -object sw-protected-guest,id=cgs0,x-require-guest-memfd=on \
               -object memory-backend-private,id=ram0,size=256M \
               -machine q35,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
        says: &["ram0", "x-require-guest-memfd", "leave the property out"],
    },
    Refusal {
        name: "refuse-virtio-gpu-blob",
        args: "-accel kvm -cpu host -m 256M -object sw-protected-guest,id=cgs0 \
               -object memory-backend-private,id=ram0,size=256M \
               -machine q35,smm=off,confidential-guest-support=cgs0,memory-backend=ram0 \
               -device virtio-gpu-pci,blob=on",
        says: &[
            "virtio-gpu with blob=on cannot be used beside memory-backend-private",
            "use blob=off",
        ],
    },
    Refusal {
        name: "refuse-share-off",
        args: "-accel kvm -cpu host -m 256M -object sw-protected-guest,id=cgs0 \
               -object memory-backend-private,id=ram0,size=256M,share=off \
               -machine q35,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
        says: &["ram0|memory-backend-private", "share"],
    },
    Refusal {
        name: "refuse-size-0",
        args: "-accel kvm -cpu host -object memory-backend-private,id=ram0,size=0 -machine q35,smm=off",
        says: &["ram0|memory-backend-private", "size"],
    },
    Refusal {
        name: "refuse-no-size",
        args: "-accel kvm -cpu host -object memory-backend-private,id=ram0 -machine q35,smm=off",
        says: &["ram0|memory-backend-private", "size"],
    },
    Refusal {
        name: "refuse-size-unaligned",
        args: "-accel kvm -cpu host -m 256M -object sw-protected-guest,id=cgs0 \
               -object memory-backend-private,id=ram0,size=268436000 \
               -machine q35,smm=off,confidential-guest-support=cgs0",
        says: &["ram0|memory-backend-private", "size", "4096|4 KiB"],
    },
    Refusal {
        name: "refuse-object-used-twice",
        args: "-accel kvm -cpu host -m 512M -object sw-protected-guest,id=cgs0 \
               -object memory-backend-private,id=ram0,size=256M \
               -machine q35,smm=off,confidential-guest-support=cgs0 \
               -numa node,memdev=ram0 -numa node,memdev=ram0",
        says: &["ram0"],
    },
];

impl Refusal {
    pub fn check(&self, lab: &Lab) -> Result<()> {
        let text = Launch::bare(lab)
            .with(self.args)
            .with(OUR_GUEST)
            .refused()?;
        for &needle in self.says {
            let found = needle.split('|').any(|either| text.contains(either));
            ensure!(found, "the message does not contain '{needle}': {text}");
        }
        Ok(())
    }
}
