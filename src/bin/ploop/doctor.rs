//! `ploop doctor`: what this machine offers, and what is wrong with devices and disks.

use std::ffi::OsStr;
use std::path::Path;

use ploop::ops::doctor::{self, Finding, Grade};
use serde_json::{Value, json};

use crate::getopt::Parsed;
use crate::{Command, Fail, json, mistake, misuse, result, values};

pub const COMMAND: Command = Command {
    name: "doctor",
    short: "",
    long: &[json::OPTION],
    usage: "\
Usage: ploop doctor [--json] [DiskDescriptor.xml | DEVICE]

Shows what this machine has of what disks need, what is missing and how to get it, the state of every device, and what is
left of devices that were killed. With a disk or device: which level is which file, what has it open, and all that is
wrong with it. What one command mends stands behind a $, for a shell. Nothing is changed.
Exit status 0: all is well; 1: something is missing, or needs a look.

  --json  the same for programs

For example:
  ploop doctor
  ploop doctor /vz/1/DiskDescriptor.xml
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    let (machine, devices, disk) = match &parsed.operands[..] {
        [] => (doctor::machine(), doctor::devices(), doctor::disks_of_devices()),
        [operand] => (Vec::new(), Vec::new(), page(operand)?),
        _ => return misuse(),
    };
    let end = match machine.iter().chain(&devices).chain(&disk).all(|f| f.grade == Grade::Good) {
        true => Ok(()),
        false => Err(Fail::Status(1)),
    };
    if json::wanted(&parsed) {
        let content = json!({
            "machine": for_programs(&machine),
            "devices": for_programs(&devices),
            "disk": for_programs(&disk),
        });
        json::show("doctor", content)?;
        return end;
    }
    show(&machine)?;
    if parsed.operands.is_empty() {
        result(if devices.is_empty() { "\nno devices" } else { "" })?;
        show(&devices)?;
    }
    show(&disk)?;
    end
}

fn page(operand: &OsStr) -> Result<Vec<Finding>, Fail> {
    match Path::new(operand).starts_with("/dev") {
        true => Ok(doctor::device_and_disk(&values::text(operand, "device name")?)?),
        false if values::is_descriptor(operand) => Ok(doctor::disk(Path::new(operand))),
        false => Err(mistake(format!(
            "{} is neither a DiskDescriptor.xml nor a device; of an image ploop check -f -r tells",
            operand.to_string_lossy()
        ))),
    }
}

fn for_programs(findings: &[Finding]) -> Vec<Value> {
    let grade = |g| match g {
        Grade::Good => "good",
        Grade::Warning => "warning",
        Grade::Missing => "missing",
    };
    let one = |f: &Finding| json!({ "subject": f.subject, "grade": grade(f.grade), "text": f.text, "remedy": f.remedy, "cure": f.cure });
    findings.iter().map(one).collect()
}

/// One line each, and more with what to do.
pub fn show(findings: &[Finding]) -> Result<(), Fail> {
    for f in findings {
        let mark = match f.grade {
            Grade::Good => "ok     ",
            Grade::Warning => "LOOK   ",
            Grade::Missing => "MISSING",
        };
        result(format_args!("{mark} {:<14} {}", f.subject, f.text))?;
        if let Some(remedy) = &f.remedy {
            result(format_args!("        {:<14} -> {remedy}", ""))?;
        }
        if let Some(cure) = &f.cure {
            result(format_args!("        {:<14}  $ {cure}", ""))?;
        }
    }
    Ok(())
}
