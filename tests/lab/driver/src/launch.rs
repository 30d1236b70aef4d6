//! Launches of TDX and SEV-SNP guests, on MODELS of the TDX module and of the SEV-SNP firmware
//! (`tests/lab/firmware`): no hardware is used, and none is vouched for. What QEMU gives them for
//! a memory-backend-private, through the library, must be what it gives them by itself for a
//! memory-backend-memfd, in the same order.

use std::arch::x86_64::__cpuid;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Lab;
use crate::machine::{Launch, Machine, PAGE};
use crate::scenarios::{Scenario, same};

const FIRMWARE: &str = "/tmp/confidential.fd";
const FIRMWARE_SIZE: usize = 256 << 10;
const LOG: &str = "/tmp/launch.log";
const MODELS: &str = "/tests/liblab_firmware.so";
const RAM: u64 = 64 << 20;
const OURS: &str = "memory-backend-private";

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::guest("tdx-launch-model", "tdx-guest", "10.2", tdx_launch),
        Scenario::guest(
            "tdx-launch-refused-model",
            "tdx-guest",
            "10.2",
            tdx_launch_refused,
        ),
        Scenario::new("snp-launch-model", snp_launch),
        Scenario::new("snp-launch-refused-model", snp_launch_refused),
        Scenario::new("one-guest-one-private-memory", mixed_memory),
        Scenario::new("launched-guest-starts-private", starts_private),
        Scenario::new("host-without-the-vm-type", host_without_the_type),
    ]
}

fn tdx_launch(lab: &Lab) -> Result<()> {
    write_firmware(TDX_SECTIONS, SNP_DESCRIPTORS)?;
    let (own, _) = launch(tdx(lab, "memory-backend-memfd"))?;
    let (ours, mut machine) = launch(tdx(lab, OURS))?;
    same_sequence(&own, &ours)?;
    let commands = |name| ours.iter().filter(move |line| line["command"] == name);
    ensure!(
        commands("KVM_TDX_INIT_MEM_REGION").any(|line| line["errno"] != 0),
        "no command was interrupted: {ours:?}"
    );
    same(
        "ends of the launch",
        commands("KVM_TDX_FINALIZE_VM").count(),
        1,
    )?;
    all_private(&mut machine, "tdx", &["pc.bios"])
}

fn snp_launch(lab: &Lab) -> Result<()> {
    write_firmware(TDX_SECTIONS, SNP_DESCRIPTORS)?;
    let (own, _) = launch(snp(lab, "memory-backend-memfd"))?;
    let (ours, mut machine) = launch(snp(lab, OURS))?;
    same_sequence(&own, &ours)?;
    let of_type = |number: u64| ours.iter().filter(move |line| line["type"] == number);
    for (name, number) in [("NORMAL", 1), ("ZERO", 3), ("SECRETS", 5), ("CPUID", 6)] {
        ensure!(
            of_type(number).count() > 0,
            "no page of type {name}: {ours:?}"
        );
    }
    ensure!(
        of_type(1).any(|line| line["left"] != 0),
        "no command was interrupted: {ours:?}"
    );
    all_private(&mut machine, "sev-snp", &["pc.bios", "pc.rom"])
}

/// Two sections want the same page. QEMU names it and ends.
fn tdx_launch_refused(lab: &Lab) -> Result<()> {
    let twice = [TDX_SECTIONS, &[section(TEMP_MEM, 0x80_a000, 0x1000)]].concat();
    write_firmware(&twice, SNP_DESCRIPTORS)?;
    refused(tdx(lab, OURS), &["KVM_TDX_INIT_MEM_REGION", "0x80a000"])
}

fn snp_launch_refused(lab: &Lab) -> Result<()> {
    let twice = [SNP_DESCRIPTORS, &[(0x80_d000, 0x1000, SECRETS)]].concat();
    write_firmware(TDX_SECTIONS, &twice)?;
    let mut machine = snp(lab, OURS).with("-S").start()?;
    // QEMU ends in the middle of the command.
    let _ = machine.qmp.execute("cont", &json!({}));
    let said = machine.ended()?;
    ensure!(
        said.contains("KVM_SEV_SNP_LAUNCH_UPDATE") && said.contains("0x80d000"),
        "the message names neither command nor page: {said}"
    );
    Ok(())
}

fn mixed_memory(lab: &Lab) -> Result<()> {
    write_firmware(TDX_SECTIONS, SNP_DESCRIPTORS)?;
    let nodes = "-object memory-backend-memfd,id=ram1,size=64M,share=on -m 128M \
                 -numa node,memdev=ram0 -numa node,memdev=ram1";
    let mixed = snp(lab, OURS).with(nodes);
    refused(
        mixed,
        &["ram1", "make all RAM of the machine memory-backend-private"],
    )
}

fn starts_private(lab: &Lab) -> Result<()> {
    write_firmware(TDX_SECTIONS, SNP_DESCRIPTORS)?;
    let shared = guest(lab, SNP_MACHINE, OURS, ",initial-state=shared").arg("-object");
    refused(
        shared.arg(&snp_object()),
        &["initial-state", "leave the property out"],
    )
}

/// A host with ordinary VMs only, as KVM would say.
fn host_without_the_type(lab: &Lab) -> Result<()> {
    let launch = Launch::private(lab)
        .env("LD_PRELOAD", MODELS)
        .env("LAB_KVM_VM_TYPES", "1");
    let says = [
        "needs KVM VM type sw-protected",
        "default (0)",
        "CONFIG_KVM_SW_PROTECTED_VM",
    ];
    refused(launch, &says)
}

fn refused(launch: Launch, says: &[&str]) -> Result<()> {
    let text = launch.refused()?;
    for needle in says {
        ensure!(
            text.contains(needle),
            "the message does not contain '{needle}': {text}"
        );
    }
    Ok(())
}

const TDX_MACHINE: &str = "-object tdx-guest,id=cgs0 \
    -machine q35,smm=off,kernel-irqchip=split,confidential-guest-support=cgs0";
const SNP_MACHINE: &str = "-machine q35,smm=off,confidential-guest-support=cgs0";

fn tdx(lab: &Lab, backend: &str) -> Launch {
    guest(lab, TDX_MACHINE, backend, "").with("-machine memory-backend=ram0")
}

fn snp(lab: &Lab, backend: &str) -> Launch {
    let launch = guest(lab, SNP_MACHINE, backend, "")
        .arg("-object")
        .arg(&snp_object());
    launch.with("-machine memory-backend=ram0")
}

/// The models answer for the device, whatever it is.
fn snp_object() -> String {
    let cbitpos = __cpuid(0x8000_001f).ebx & 0x3f;
    format!("sev-snp-guest,id=cgs0,sev-device=/dev/null,cbitpos={cbitpos},reduced-phys-bits=1")
}

fn guest(lab: &Lab, machine: &str, backend: &str, options: &str) -> Launch {
    // A log of its own for each launch.
    let _ = fs::remove_file(LOG);
    Launch::kvm(lab)
        .with(&format!("-m {}M {machine}", RAM >> 20))
        .with(&format!(
            "-object {backend},id=ram0,share=on,size={RAM}{options} -bios {FIRMWARE}"
        ))
        .env("LD_PRELOAD", MODELS)
        .env("LAB_FIRMWARE_LOG", LOG)
}

/// Starts the guest as far as its launch goes. What it runs then is not there: the models measure
/// contents, and do not put them into KVM's memory.
fn launch(launch: Launch) -> Result<(Vec<Value>, Machine)> {
    let mut machine = launch.with("-S").start()?;
    machine.qmp.call("cont", json!({}))?;
    machine.qmp.call("stop", json!({}))?;
    let log = fs::read_to_string(LOG).context(LOG)?;
    let lines = log.lines().map(serde_json::from_str);
    Ok((lines.collect::<Result<_, _>>()?, machine))
}

fn same_sequence(own: &[Value], ours: &[Value]) -> Result<()> {
    for (number, pair) in own.iter().zip(ours).enumerate() {
        ensure!(
            pair.0 == pair.1,
            "command {number}: QEMU's own path says {}, the library {}",
            pair.0,
            pair.1
        );
    }
    println!(
        "  {} commands in the same order on both paths (models)",
        ours.len()
    );
    same("commands", ours.len(), own.len())
}

/// Nothing that was only there to be measured is held any more. What the board made by itself is
/// listed, too, after the backend.
fn all_private(machine: &mut Machine, agent: &str, board: &[&str]) -> Result<()> {
    let all = machine.private_memory()?;
    let listed: Vec<_> = all.iter().map(|info| info.id.as_str()).collect();
    same("private memory", listed, [&["ram0"], board].concat())?;
    for info in &all {
        println!("  {info:?}");
        same("backend", info.backend, info.id == "ram0")?;
        same("agent", info.agent.as_str(), agent)?;
        same("private", info.private, info.size)?;
        same("shared-held", info.shared_held, Some(0))?;
        same("held-twice", info.held_twice, Some(0))?;
    }
    let shown = machine.hmp("info private-memory")?;
    for id in board {
        let heading = format!("{id} ({agent}, the board's own)");
        ensure!(shown.contains(&heading), "no '{heading}' in: {shown}");
        let asked = json!({"id": id, "limit": 1});
        let answer = machine.qmp.call("query-private-memory", asked)?;
        same("by its id", answer[0]["id"].as_str(), Some(*id))?;
    }
    Ok(())
}

// ---- A firmware image with the tables that QEMU looks for: OVMF's, at its end ----

/// Type, guest-physical address, size, offset of its contents in the image, attributes.
type Section = (u32, u64, u64, u32, u32);

const BFV: u32 = 0;
const CFV: u32 = 1;
const TD_HOB: u32 = 2;
const TEMP_MEM: u32 = 3;
const MR_EXTEND: u32 = 1;

const fn section(kind: u32, address: u64, size: u64) -> Section {
    (kind, address, size, 0, 0)
}

/// As in OVMF: the measured code last in memory, variables before it, and scratch memory.
const TDX_SECTIONS: &[Section] = &[
    (BFV, 0xffff_0000, 0x1_0000, 0x3_0000, MR_EXTEND),
    (CFV, 0xfffc_0000, 0x3_0000, 0, 0),
    section(TD_HOB, 0x80_9000, 0x2000),
    section(TEMP_MEM, 0x81_0000, 0x1_0000),
];

const SEC_MEM: u32 = 1;
const SECRETS: u32 = 2;
const CPUID: u32 = 3;

/// Guest-physical address, size, type.
const SNP_DESCRIPTORS: &[(u32, u32, u32)] = &[
    (0x80_0000, 0x9000, SEC_MEM),
    (0x80_d000, 0x1000, SECRETS),
    (0x80_e000, 0x1000, CPUID),
    (0x81_1000, 0xf000, SEC_MEM),
];

/// GUIDs in the order of bytes in memory.
const TABLE_FOOTER: u128 = 0x96b582de_1fb2_45f7_baea_a366c55a082d;
const TDX_METADATA: u128 = 0xe47a6535_984a_4798_865e_4685a7bf8ec2;
/// Where other processors than the first begin.
const SEV_INFO_BLOCK: u128 = 0x00f771de_1a7e_4fcb_890e_68c77e2fb44e;
const SEV_METADATA: u128 = 0xdc886566_984a_4798_a75e_5585a7bf67cc;

/// Little-endian, but for the last eight bytes, which are as they are written.
fn guid(number: u128) -> [u8; 16] {
    let mut bytes = number.to_be_bytes();
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// What both kinds of guest want to know lies before the last 4 KiB, where the table points to it.
fn write_firmware(sections: &[Section], descriptors: &[(u32, u32, u32)]) -> Result<()> {
    let mut image: Vec<u8> = (0..FIRMWARE_SIZE)
        .map(|at| (at / PAGE as usize) as u8)
        .collect();
    let mut place = |from_end: usize, bytes: &[u8]| {
        let start = FIRMWARE_SIZE - from_end;
        image[start..start + bytes.len()].copy_from_slice(bytes);
    };
    place(0x2000, &tdvf(sections));
    place(0x1800, &asev(descriptors));
    let entries = [
        (TDX_METADATA, 0x2000),
        (SEV_INFO_BLOCK, 0xffff_f000),
        (SEV_METADATA, 0x1800),
    ];
    let table = entries.map(|(name, value)| entry(name, value)).concat();
    let length = (table.len() + 18) as u16;
    let footer = [&length.to_le_bytes()[..], &guid(TABLE_FOOTER)].concat();
    place(32 + footer.len() + table.len(), &[table, footer].concat());
    fs::write(FIRMWARE, image).context(FIRMWARE)
}

/// An entry of the table: a number (for metadata its place before the image's end), its own
/// length, its GUID.
fn entry(name: u128, value: u32) -> Vec<u8> {
    [&value.to_le_bytes()[..], &22u16.to_le_bytes(), &guid(name)].concat()
}

fn tdvf(sections: &[Section]) -> Vec<u8> {
    let length = 16 + 32 * sections.len() as u32;
    let mut bytes = b"TDVF".to_vec();
    for word in [length, 1, sections.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    for &(kind, address, size, offset, attributes) in sections {
        let data = if kind <= CFV { size as u32 } else { 0 };
        bytes.extend([offset.to_le_bytes(), data.to_le_bytes()].concat());
        bytes.extend([address.to_le_bytes(), size.to_le_bytes()].concat());
        bytes.extend([kind.to_le_bytes(), attributes.to_le_bytes()].concat());
    }
    bytes
}

fn asev(descriptors: &[(u32, u32, u32)]) -> Vec<u8> {
    let length = 16 + 12 * descriptors.len() as u32;
    let mut bytes = b"ASEV".to_vec();
    for word in [length, 1, descriptors.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    for &(base, size, kind) in descriptors {
        bytes.extend([base, size, kind].map(u32::to_le_bytes).concat());
    }
    bytes
}
