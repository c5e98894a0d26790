//! `ploop send` and `ploop receive`: a disk with all its snapshots, to another machine.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::Path;

use ploop::error::{Error, Kind};
use ploop::ops::copy::chain::{self, Options};

use crate::copy::descriptor;
use crate::getopt::Parsed;
use crate::{Command, Fail, misuse, values};

pub const SEND: Command = Command {
    name: "send",
    short: "F:o:z",
    long: &[("compress", false, 'z'), ("kept", true, 'k')],
    usage: "\
Usage: ploop send [-F COMMAND] [-z] [--kept FILE] [-o FD] DiskDescriptor.xml

Sends a disk with all its snapshots to ploop receive on another machine, while it is in use or not. Frozen images go first,
then the top, in rounds; the file systems are frozen for the last round alone. The disk goes on, and nothing of it is changed.
Each block is sent with its BLAKE3 sum.

  -F COMMAND     for the shell; it ends what writes to the disk. If it fails nothing has arrived (12)
  -z, --compress  with zstd
  --kept FILE    the list of ploop receive --kept: blocks that an interrupted try has left there are not sent again
  -o FD          the descriptor that the disk goes to, a pipe, a socket or a file (standard output)

For example, with the disk /vz/1/DiskDescriptor.xml; and once more when the connection broke:
  ploop send /vz/1 | ssh HOST ploop receive /vz/1
  ploop send --kept <(ssh HOST ploop receive --kept /vz/1) /vz/1 | ssh HOST ploop receive /vz/1
",
    run: send,
};

pub const RECEIVE: Command = Command {
    name: "receive",
    short: "i:",
    long: &[("kept", false, 'k')],
    usage: "\
Usage: ploop receive [-i FD] DIR
       ploop receive --kept DIR

Receives a disk with its snapshots, which ploop send sends, as the new folder DIR. It grows as DIR.receiving, and is DIR when
all of it has come, was compared with its sums and is durable. What an interrupted try has left is used by the next one.

  -i FD   the descriptor that the disk comes from (standard input)
  --kept  print the list of what an interrupted try has left in DIR.receiving, for ploop send --kept

For example, for the disk of another machine:
  ssh HOST ploop send /vz/1 | ploop receive /vz/1
",
    run: receive,
};

fn send(parsed: Parsed) -> Result<(), Fail> {
    let mut options = Options::default();
    let mut output = 1;
    for (option, value) in &parsed.options {
        match option {
            'F' => options.stop = Some(value.as_os_str()),
            'o' => output = descriptor("send", value)?,
            'z' => options.compress = true,
            'k' => options.kept = Some(Path::new(value)),
            _ => return misuse(),
        }
    }
    let [disk] = &parsed.operands[..] else { return misuse() };
    if !values::is_descriptor(disk) {
        return misuse();
    }
    chain::send_by_number(Path::new(disk), output, &options)?;
    Ok(())
}

fn receive(parsed: Parsed) -> Result<(), Fail> {
    let (mut input, mut list) = (0, false);
    for (option, value) in &parsed.options {
        match option {
            'i' => input = descriptor("receive", value)?,
            'k' => list = true,
            _ => return misuse(),
        }
    }
    let [dir] = &parsed.operands[..] else { return misuse() };
    if dir == OsStr::new("") {
        return misuse();
    }
    match list {
        true => print_kept(Path::new(dir)),
        false => chain::receive_by_number(Path::new(dir), input).map(|_| ()).map_err(Fail::from),
    }
}

fn print_kept(dir: &Path) -> Result<(), Fail> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    chain::list_kept(dir, &mut out)?;
    out.flush().map_err(|e| Error::with(Kind::Write, "standard output cannot be written", e).into())
}
