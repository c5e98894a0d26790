//! `ploop snapshot-list`: the tree of a disk.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ploop::ops::snapshot_list::{self, ListParams, Row};
use ploop::report;

use crate::getopt::Parsed;
use crate::{Command, Fail, values, write_out};

pub const COMMAND: Command = Command {
    name: "snapshot-list",
    short: "Ho:u:sh",
    long: &[
        ("no-header", false, 'H'),
        ("output", true, 'o'),
        ("uuid", true, 'u'),
        ("id", true, 'u'),
        ("snapshot", false, 's'),
    ],
    usage: "\
Usage: ploop snapshot-list [-H] [-o FIELD[,FIELD...]] [-s] [-u UUID] DiskDescriptor.xml

One line for each snapshot and for the top, in the descriptor's order; * marks the one that is written to,
! one that an interrupted merge has left half merged.

  -H, --no-header      without the headings
  -o, --output FIELDS  of parent_uuid, current, uuid, fname (these are shown without -o)
  -s, --snapshot       snapshots alone, without the top; * marks the one that the top stands on
  -u, --uuid UUID      this snapshot and what it stands on, down to the base
",
    run,
};

/// The classic's status for every mistake here but a malformed UUID; scripts compare it.
pub const FAILED: u8 = 1;

/// Columns by name; heading, width, whether they stand to the right.
#[derive(Clone, Copy)]
enum Field {
    Uuid,
    Parent,
    Current,
    File,
}

impl Field {
    const ALL: [Field; 4] = [Field::Parent, Field::Current, Field::Uuid, Field::File];

    fn find(name: &str) -> Option<Field> {
        Field::ALL.into_iter().find(|f| f.name().eq_ignore_ascii_case(name))
    }

    fn name(self) -> &'static str {
        match self {
            Field::Uuid => "uuid",
            Field::Parent => "parent_uuid",
            Field::Current => "current",
            Field::File => "fname",
        }
    }

    fn heading(self) -> &'static str {
        match self {
            Field::Uuid => "UUID",
            Field::Parent => "PARENT_UUID",
            Field::Current => "C",
            Field::File => "FNAME",
        }
    }

    fn width(self) -> usize {
        match self {
            Field::Uuid | Field::Parent => 38,
            Field::Current => 1,
            Field::File => 32,
        }
    }

    fn value(self, row: &Row) -> &[u8] {
        match self {
            Field::Uuid => row.guid.as_str().as_bytes(),
            Field::Parent => row.parent.as_str().as_bytes(),
            Field::Current => {
                if row.half_merged {
                    b"!"
                } else if row.current {
                    b"*"
                } else {
                    b""
                }
            }
            Field::File => row.file.as_os_str().as_bytes(),
        }
    }
}

fn run(parsed: Parsed) -> Result<(), Fail> {
    if report::verbose_level() <= crate::CONSOLE {
        report::set_verbose_level(report::verbose_level().min(report::NO_STDOUT));
    }
    let mut fields = Field::ALL.to_vec();
    let mut params = ListParams::default();
    let mut header = true;
    for (option, value) in &parsed.options {
        match option {
            'H' => header = false,
            'o' => fields = fields_of(value)?,
            'u' => params.guid = Some(values::guid(value)?),
            's' => params.snapshots_only = true,
            // As in the classic, on stderr.
            _ => {
                eprint!("{}", COMMAND.usage);
                return Ok(());
            }
        }
    }
    let Some(descriptor) = parsed.operands.first() else {
        eprint!("{}", COMMAND.usage);
        return Err(Fail::Status(FAILED));
    };
    let rows = snapshot_list::snapshots(Path::new(descriptor), &params).map_err(|e| {
        report::error(&e);
        Fail::Status(FAILED)
    })?;
    let mut out = Vec::new();
    if header {
        for field in &fields {
            pad(&mut out, field.heading().as_bytes(), field.width());
            out.push(b' ');
        }
        out.push(b'\n');
    }
    for row in &rows {
        if let Some((last, others)) = fields.split_last() {
            for field in others {
                pad(&mut out, field.value(row), field.width());
                out.push(b' ');
            }
            out.extend_from_slice(last.value(row));
        }
        out.push(b'\n');
    }
    write_out(&out)
}

/// Names separated by commas; nothing after the last one is fine.
fn fields_of(value: &OsStr) -> Result<Vec<Field>, Fail> {
    let text = value.to_string_lossy();
    let names = text.strip_suffix(',').unwrap_or(&text);
    names
        .split(',')
        .map(|name| {
            Field::find(name).ok_or_else(|| {
                eprintln!("Unknown field: {name}; must be one of parent_uuid, current, uuid, fname");
                Fail::Status(FAILED)
            })
        })
        .collect()
}

/// Bytes, as a file name need not be text.
fn pad(out: &mut Vec<u8>, bytes: &[u8], width: usize) {
    out.extend_from_slice(bytes);
    out.extend(std::iter::repeat_n(b' ', width.saturating_sub(bytes.len())));
}
