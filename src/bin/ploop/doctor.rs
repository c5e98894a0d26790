//! `ploop doctor`: what this machine offers, and what is wrong with devices.

use ploop::ops::doctor::{self, Finding, Grade};
use serde_json::{Value, json};

use crate::getopt::Parsed;
use crate::{Command, Fail, json, misuse, result};

pub const COMMAND: Command = Command {
    name: "doctor",
    short: "",
    long: &[json::OPTION],
    usage: "\
Usage: ploop doctor [--json]

Shows what this machine has of what disks need, what is missing and how to get it, and the state of every device.
Exit status 0: all is well; 1: something is missing, or a device needs a look.

  --json  the same for programs

For example:
  ploop doctor
",
    run,
};

fn run(parsed: Parsed) -> Result<(), Fail> {
    if !parsed.operands.is_empty() {
        return misuse();
    }
    let machine = doctor::machine();
    let devices = doctor::devices();
    let end = match machine.iter().chain(&devices).all(|f| f.grade == Grade::Good) {
        true => Ok(()),
        false => Err(Fail::Status(1)),
    };
    if json::wanted(&parsed) {
        json::show("doctor", json!({ "machine": for_programs(&machine), "devices": for_programs(&devices) }))?;
        return end;
    }
    show(&machine)?;
    match devices.is_empty() {
        true => result("\nno devices")?,
        false => {
            result("")?;
            show(&devices)?;
        }
    }
    end
}

fn for_programs(findings: &[Finding]) -> Vec<Value> {
    let grade = |g| match g {
        Grade::Good => "good",
        Grade::Warning => "warning",
        Grade::Missing => "missing",
    };
    let one =
        |f: &Finding| json!({ "subject": f.subject, "grade": grade(f.grade), "text": f.text, "remedy": f.remedy });
    findings.iter().map(one).collect()
}

/// One line each, and one more with what to do.
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
    }
    Ok(())
}
