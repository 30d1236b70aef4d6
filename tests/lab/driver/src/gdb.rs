//! A client of QEMU's gdbstub, as far as it reads and writes memory. The machine stands still while
//! it is connected.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};

use crate::qmp::DEADLINE;

pub struct Gdb(BufReader<UnixStream>);

impl Gdb {
    /// To a machine with `-gdb unix:PATH,server=on,wait=off`.
    pub fn connect(path: &str) -> Result<Gdb> {
        let socket = UnixStream::connect(path).context(path.to_string())?;
        socket.set_read_timeout(Some(DEADLINE))?;
        Ok(Gdb(BufReader::new(socket)))
    }

    /// One packet of the GDB remote protocol, `$text#checksum`, and the text of the reply.
    pub fn ask(&mut self, request: &str) -> Result<String> {
        let sum = request.bytes().fold(0u8, u8::wrapping_add);
        write!(self.0.get_mut(), "${request}#{sum:02x}")?;
        let mut reply = Vec::new();
        self.0.read_until(b'#', &mut reply)?;
        self.0.read_exact(&mut [0; 2])?;
        self.0.get_mut().write_all(b"+")?;
        ensure!(reply.pop() == Some(b'#'), "the debugger's connection ended");
        let start = reply.iter().position(|byte| *byte == b'$');
        let text = reply.split_off(start.context("no packet")? + 1);
        Ok(String::from_utf8(text)?)
    }

    /// The most bytes of memory that one packet asks for, a power of two: a reply tells each in two
    /// digits. QEMU 10.0 has packets of 4 KiB, 10.2 of 128 KiB.
    pub fn memory_limit(&mut self) -> Result<u64> {
        let features = self.ask("qSupported")?;
        let packet = features
            .split(';')
            .find_map(|feature| feature.strip_prefix("PacketSize="))
            .with_context(|| format!("no size of packets: {features}"))?;
        let bytes = u64::from_str_radix(packet, 16)? / 2;
        let bits = bytes.checked_ilog2().context("packets of no bytes")?;
        Ok(1 << bits)
    }

    /// Lets the machine go on.
    pub fn detach(mut self) -> Result<()> {
        let reply = self.ask("D")?;
        ensure!(reply == "OK", "the debugger does not let go: {reply}");
        Ok(())
    }
}
