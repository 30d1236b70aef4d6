//! A search for secrets, of which only hashes are known, in all of a guest that its host can reach.
//!
//! The guest tells of each secret its Adler-32, which a search can carry along from byte to byte, and
//! its SHA-256, which tells whether what has that Adler-32 is the secret.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use adler32::RollingAdler32;
use anyhow::{Context, Result, ensure};
use nix::unistd::{Whence, lseek};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::gdb::Gdb;
use crate::host;
use crate::machine::{Extent, Machine, PAGE};

const SIZE: usize = 32;
/// How much is read at a time.
const PART: u64 = 1 << 20;

/// Where the guest has its secrets, one in each page: a file in its memory.
const FILE: &str = "/secrets";

/// What a shell in the guest does to have them.
pub fn make(count: usize) -> String {
    format!("dd if=/dev/urandom of={FILE} bs={PAGE} count={count} 2>/dev/null")
}

/// Has the driver, which is in the guest's initramfs as well, tell of them: [`tell`].
pub const TELL: &str = "/init tell-secrets";

/// Prints hashes of the secrets, a line for each.
pub fn tell() -> Result<()> {
    for page in fs::read(FILE)?.chunks(PAGE as usize) {
        let secret = &page[..SIZE];
        let adler = RollingAdler32::from_buffer(secret).hash();
        println!("{adler} {}", hex::encode(Sha256::digest(secret)));
    }
    Ok(())
}

type Hash = [u8; SIZE];

pub struct Secrets {
    hashes: HashMap<u32, Vec<Hash>>,
    /// Which upper halves of an Adler-32 there are: most of memory has others.
    upper: Vec<bool>,
    count: usize,
}

impl Secrets {
    /// From what [`tell`] prints.
    pub fn told(text: &str) -> Result<Secrets> {
        let mut secrets = Secrets {
            hashes: HashMap::new(),
            upper: vec![false; 1 << 16],
            count: 0,
        };
        for line in text.lines() {
            let (adler, sha256) = line.split_once(' ').context(line.to_string())?;
            let adler: u32 = adler.parse().context(line.to_string())?;
            let mut hash = Hash::default();
            hex::decode_to_slice(sha256, &mut hash).context(line.to_string())?;
            secrets.upper[adler as usize >> 16] = true;
            secrets.hashes.entry(adler).or_default().push(hash);
            secrets.count += 1;
        }
        Ok(secrets)
    }

    pub fn count(&self) -> usize {
        self.count
    }
}

/// What one way to a guest's memory led to.
pub struct Found {
    pub way: &'static str,
    pub secrets: usize,
    pub bytes: u64,
    /// How often it was refused, and what the first refusal said.
    pub refusals: u64,
    pub refusal: Option<String>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Found {
            way,
            secrets,
            bytes,
            ..
        } = self;
        write!(f, "{way}: {secrets} secrets in {} KiB", bytes >> 10)?;
        match &self.refusal {
            Some(why) => write!(f, ", {} times refused: {why}", self.refusals),
            None => Ok(()),
        }
    }
}

/// A search on one way.
struct Search<'a> {
    secrets: &'a Secrets,
    way: &'static str,
    bytes: u64,
    refusals: u64,
    refusal: Option<String>,
    found: BTreeSet<Hash>,
    /// The last bytes, round and round, and their hash.
    window: [u8; SIZE],
    at: usize,
    adler: RollingAdler32,
}

impl<'a> Search<'a> {
    fn new(secrets: &'a Secrets, way: &'static str) -> Search<'a> {
        Search {
            secrets,
            way,
            bytes: 0,
            refusals: 0,
            refusal: None,
            found: BTreeSet::new(),
            window: [0; SIZE],
            at: 0,
            adler: RollingAdler32::from_buffer(&[0; SIZE]),
        }
    }

    /// More bytes. Those of the last time may have been from elsewhere: no secret comes of that.
    fn take(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        for part in bytes.chunks(PAGE as usize) {
            // Most of memory is unused: what follows upon a window of zeroes are zeroes.
            let unused = part.iter().all(|byte| *byte == 0) && self.window == [0; SIZE];
            if !unused {
                self.look_at(part);
            }
        }
    }

    fn look_at(&mut self, part: &[u8]) {
        for byte in part {
            let gone = std::mem::replace(&mut self.window[self.at], *byte);
            self.at = (self.at + 1) % SIZE;
            self.adler.remove(SIZE, gone);
            self.adler.update(*byte);
            if self.secrets.upper[self.adler.hash() as usize >> 16] {
                self.judge();
            }
        }
    }

    fn judge(&mut self) {
        if let Some(hashes) = self.secrets.hashes.get(&self.adler.hash()) {
            let (end, begin) = self.window.split_at(self.at);
            let hash = Sha256::digest([begin, end].concat()).into();
            if hashes.contains(&hash) {
                self.found.insert(hash);
            }
        }
    }

    /// Nothing is left to look for.
    fn has_all(&self) -> bool {
        self.found.len() == self.secrets.count
    }

    fn refused(&mut self, why: impl ToString) {
        self.refusals += 1;
        self.refusal.get_or_insert_with(|| why.to_string());
    }

    fn end(self) -> Found {
        Found {
            way: self.way,
            secrets: self.found.len(),
            bytes: self.bytes,
            refusals: self.refusals,
            refusal: self.refusal,
        }
    }
}

/// Searches on every way that there is to the memory of a machine, which lies at these
/// guest-physical addresses and is seen by a debugger at this socket.
pub fn search(
    secrets: &Secrets,
    machine: &mut Machine,
    gdb: &str,
    extents: &[Extent],
) -> Result<Vec<Found>> {
    let pid = machine.pid();
    let mut found = Vec::new();
    let mut on = |way, go: &mut dyn FnMut(&mut Search) -> Result<()>| {
        let mut search = Search::new(secrets, way);
        go(&mut search).with_context(|| format!("searching {way}"))?;
        found.push(search.end());
        anyhow::Ok(())
    };
    on("QEMU's memory", &mut |search| search_process(search, pid))?;
    on("files of memory", &mut |search| search_files(search, pid))?;
    on("pmemsave", &mut |search| {
        search_saved(search, machine, extents)
    })?;
    on("dump-guest-memory", &mut |search| {
        search_dump(search, machine)
    })?;
    on("gdbstub", &mut |search| {
        search_with_debugger(search, gdb, extents)
    })?;
    Ok(found)
}

/// Extents in parts of a limited size: address and size of each.
fn parts(extents: &[Extent], limit: u64) -> impl Iterator<Item = (u64, u64)> {
    extents.iter().flat_map(move |extent| {
        let end = extent.offset + extent.size;
        let starts = (extent.offset..end).step_by(limit as usize);
        starts.map(move |addr| (addr, limit.min(end - addr)))
    })
}

/// All pages that the process has, of whatever it has mapped. Others are not read: that would give
/// it a page.
fn search_process(search: &mut Search, pid: u32) -> Result<()> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let pages = File::open(format!("/proc/{pid}/pagemap"))?;
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        let (start, end) = line
            .split_once(' ')
            .and_then(|(range, _)| range.split_once('-'))
            .with_context(|| format!("an odd mapping: {line}"))?;
        let (start, end) = (
            u64::from_str_radix(start, 16)?,
            u64::from_str_radix(end, 16)?,
        );
        for addr in (start..end).step_by(PART as usize) {
            search_mapping(search, &memory, &pages, addr, PART.min(end - addr))?;
        }
    }
    Ok(())
}

fn search_mapping(
    search: &mut Search,
    memory: &File,
    pages: &File,
    addr: u64,
    size: u64,
) -> Result<()> {
    const THERE: u8 = 0b1100_0000; // in memory, or in swap: the upper bits of 64
    let mut entries = vec![0; (size / PAGE * 8) as usize];
    // There are none of what the kernel itself has in every process (vsyscall).
    let known = pages.read_at(&mut entries, addr / PAGE * 8)?;
    let mut page = [0; PAGE as usize];
    for (i, entry) in entries[..known].chunks_exact(8).enumerate() {
        if entry[7] & THERE == 0 {
            continue;
        }
        match memory.read_exact_at(&mut page, addr + i as u64 * PAGE) {
            Ok(()) => search.take(&page),
            Err(e) => search.refused(e),
        }
    }
    Ok(())
}

/// The files in which QEMU has the guest's memory, mapped or not.
fn search_files(search: &mut Search, pid: u32) -> Result<()> {
    for fd in host::fds_of(pid)? {
        let path = format!("/proc/{pid}/fd/{fd}");
        let target = fs::read_link(&path)?;
        let target = target.to_string_lossy();
        if !(target.contains("memfd:") || target.contains("guest_memfd") || target.contains("gmem"))
        {
            continue;
        }
        match File::open(&path) {
            Ok(file) => search_file(search, &file)?,
            Err(e) => search.refused(e),
        }
    }
    Ok(())
}

/// What a file has, without its holes.
fn search_file(search: &mut Search, file: &File) -> Result<()> {
    let mut part = vec![0; PART as usize];
    let mut at = 0;
    // ENXIO tells the end.
    while let Ok(data) = lseek(file, at, Whence::SeekData) {
        let hole = lseek(file, data, Whence::SeekHole)?;
        for offset in (data..hole).step_by(PART as usize) {
            let size = PART.min((hole - offset) as u64) as usize;
            match file.read_exact_at(&mut part[..size], offset as u64) {
                Ok(()) => search.take(&part[..size]),
                Err(e) => search.refused(e),
            }
        }
        at = hole;
    }
    Ok(())
}

fn search_saved(search: &mut Search, machine: &mut Machine, extents: &[Extent]) -> Result<()> {
    let mut parts = parts(extents, PART);
    while let Some((addr, size)) = parts.next().filter(|_| !search.has_all()) {
        match machine.pmemsave(addr, size)? {
            Ok(bytes) => search.take(&bytes),
            Err(why) => search.refused(why),
        }
    }
    Ok(())
}

fn search_dump(search: &mut Search, machine: &mut Machine) -> Result<()> {
    const DUMP: &str = "/tmp/secrets.dump";
    let arguments = json!({ "paging": false, "protocol": format!("file:{DUMP}") });
    machine.qmp.call("dump-guest-memory", arguments)?;
    search_file(search, &File::open(DUMP)?)?;
    fs::remove_file(DUMP)?;
    Ok(())
}

/// Guest-physical memory, as a debugger reads it.
fn search_with_debugger(search: &mut Search, socket: &str, extents: &[Extent]) -> Result<()> {
    let mut gdb = Gdb::connect(socket)?;
    let reply = gdb.ask("Qqemu.PhyMemMode:1")?;
    ensure!(reply == "OK", "the debugger's reply to PhyMemMode: {reply}");
    let mut parts = parts(extents, gdb.memory_limit()?);
    while let Some((addr, size)) = parts.next().filter(|_| !search.has_all()) {
        let reply = gdb.ask(&format!("m{addr:x},{size:x}"))?;
        match hex::decode(&reply) {
            Ok(bytes) if bytes.len() as u64 == size => search.take(&bytes),
            _ => search.refused(reply),
        }
    }
    gdb.detach()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8; SIZE] = b"0123456789abcdef0123456789abcdef";

    fn secrets() -> Result<Secrets> {
        let adler = RollingAdler32::from_buffer(SECRET).hash();
        // sha256sum(1) said so.
        let sha256 = "3eb1bd439947eb762998e566ccc2e099c791118b2f40579cc4f7da2b5061b7f9";
        Secrets::told(&format!(
            "{adler} {sha256}
"
        ))
    }

    #[test]
    fn a_secret_is_found_wherever_it_lies() -> Result<()> {
        let secrets = secrets()?;
        for before in 0..3 * SIZE {
            let noise: Vec<u8> = (0..before).map(|i| (i * 37 + 11) as u8).collect();
            let text = [&noise[..], SECRET, b"after"].concat();
            for cut in 0..text.len() {
                let mut search = Search::new(&secrets, "test");
                search.take(&text[..cut]);
                search.take(&text[cut..]);
                assert_eq!(search.found.len(), 1, "{before} bytes before, cut at {cut}");
            }
        }
        Ok(())
    }

    #[test]
    fn nothing_else_is_found() -> Result<()> {
        let secrets = secrets()?;
        let mut search = Search::new(&secrets, "test");
        search.take(&SECRET[..SIZE - 1]);
        search.take(&vec![0; 3 * PAGE as usize]);
        search.take(&SECRET[1..]);
        search.take(&[0; SIZE]);
        assert_eq!(search.found.len(), 0);
        Ok(())
    }
}
