//! `ploop snapshot-list`: the tree of a disk.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ploop::ops::snapshot_list::{self, ListParams, Row, Space};
use ploop::report;
use ploop::sys::calendar::format_local;
use serde_json::json;

use crate::getopt::Parsed;
use crate::{Command, Fail, json, values, write_out};

pub const COMMAND: Command = Command {
    name: "snapshot-list",
    short: "Ho:u:sh",
    long: &[
        ("no-header", false, 'H'),
        ("output", true, 'o'),
        ("uuid", true, 'u'),
        ("id", true, 'u'),
        ("snapshot", false, 's'),
        json::OPTION,
    ],
    usage: "\
Usage: ploop snapshot-list [-H] [-o FIELD[,FIELD...]] [-s] [-u UUID] [--json] DiskDescriptor.xml

One line for each snapshot and for the top, in the descriptor's order; * marks the one that is written to,
! one that an interrupted merge has left half merged.

  -H, --no-header      without the headings
  -o, --output FIELDS  of parent_uuid, current, uuid, fname (these are shown without -o), size, used (bytes of the image
                       file, and of the host's space that it takes), date (of its last change)
  -s, --snapshot       snapshots alone, without the top; * marks the one that the top stands on
  -u, --uuid UUID      this snapshot and what it stands on, down to the base
  --json               all of it for programs

For example:
  ploop snapshot-list -H -o uuid,fname /vz/1/DiskDescriptor.xml
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
    Size,
    Used,
    Date,
}

impl Field {
    /// What is shown without `-o`.
    const USUAL: [Field; 4] = [Field::Parent, Field::Current, Field::Uuid, Field::File];
    const MORE: [Field; 3] = [Field::Size, Field::Used, Field::Date];

    fn find(name: &str) -> Option<Field> {
        Field::USUAL.into_iter().chain(Field::MORE).find(|f| f.name().eq_ignore_ascii_case(name))
    }

    fn name(self) -> &'static str {
        match self {
            Field::Uuid => "uuid",
            Field::Parent => "parent_uuid",
            Field::Current => "current",
            Field::File => "fname",
            Field::Size => "size",
            Field::Used => "used",
            Field::Date => "date",
        }
    }

    fn heading(self) -> &'static str {
        match self {
            Field::Uuid => "UUID",
            Field::Parent => "PARENT_UUID",
            Field::Current => "C",
            Field::File => "FNAME",
            Field::Size => "SIZE",
            Field::Used => "USED",
            Field::Date => "DATE",
        }
    }

    fn width(self) -> usize {
        match self {
            Field::Uuid | Field::Parent => 38,
            Field::Current => 1,
            Field::File => 32,
            Field::Size | Field::Used => 15,
            Field::Date => 24,
        }
    }

    fn value(self, row: &Row) -> Vec<u8> {
        let of_file = |text: &dyn Fn(&Space) -> String| row.space.as_ref().map_or("-".into(), text).into_bytes();
        match self {
            Field::Uuid => row.guid.as_str().into(),
            Field::Parent => row.parent.as_str().into(),
            Field::Current if row.half_merged => "!".into(),
            Field::Current => if row.current { "*" } else { "" }.into(),
            Field::File => row.file.as_os_str().as_bytes().into(),
            Field::Size => of_file(&|s| s.size.to_string()),
            Field::Used => of_file(&|s| s.used.to_string()),
            Field::Date => of_file(&|s| format_local(s.date)),
        }
    }
}

fn run(parsed: Parsed) -> Result<(), Fail> {
    if report::verbose_level() <= crate::CONSOLE {
        report::set_verbose_level(report::verbose_level().min(report::NO_STDOUT));
    }
    let mut fields = Field::USUAL.to_vec();
    let mut params = ListParams::default();
    let mut header = true;
    let mut for_programs = false;
    for (option, value) in &parsed.options {
        match option {
            'H' => header = false,
            'o' => fields = fields_of(value)?,
            'u' => params.guid = Some(values::guid(value)?),
            's' => params.snapshots_only = true,
            &json::LETTER => for_programs = true,
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
    if for_programs {
        return show(&rows);
    }
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
                pad(&mut out, &field.value(row), field.width());
                out.push(b' ');
            }
            out.extend(last.value(row));
        }
        out.push(b'\n');
    }
    write_out(&out)
}

fn show(rows: &[Row]) -> Result<(), Fail> {
    let one = |row: &Row| {
        json!({
            "uuid": row.guid.as_str(),
            "parent_uuid": (!row.parent.is_none()).then(|| row.parent.as_str()),
            "current": row.current,
            "temporary": row.temporary,
            "file": json::path(&row.file),
            "size": row.space.map(|s| s.size),
            "used": row.space.map(|s| s.used),
            "date": row.space.map(|s| format_local(s.date)),
        })
    };
    json::show("snapshot-list", json!({ "snapshots": rows.iter().map(one).collect::<Vec<_>>() }))
}

/// Names separated by commas; nothing after the last one is fine.
fn fields_of(value: &OsStr) -> Result<Vec<Field>, Fail> {
    let text = value.to_string_lossy();
    let names = text.strip_suffix(',').unwrap_or(&text);
    names
        .split(',')
        .map(|name| {
            Field::find(name).ok_or_else(|| {
                eprintln!("Unknown field: {name}; must be one of parent_uuid, current, uuid, fname, size, used, date");
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
