//! What the seed of a life decides at its beginning.

/// What a life is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub operations: usize,
    /// Of 1000 operations, so many have a process killed.
    pub kills: u32,
    /// Of 1000 operations, so many are ended by a power cut.
    pub power: u32,
}

/// Every second life has one kind of process killed at one step of one kind of operation: every step has its turn.
#[derive(Clone, Copy)]
pub struct Focus {
    pub operation: &'static str,
    pub modes: &'static [&'static str],
    pub steps: u64,
}

impl Focus {
    pub fn new(n: u64) -> Focus {
        let operations = ["umount", "snapshot", "merge", "merge", "reload"];
        let modes: [&[&str]; 2] = [&["worker"], &["supervise", "adopted", "resumed"]];
        let (operation, rest) = (operations[n as usize % operations.len()], n / operations.len() as u64);
        let operation = match n % 16 {
            7 => "grow",
            15 => "give back",
            11 => "stop and start",
            _ => operation,
        };
        let steps = 1 + rest / 2 % 20;
        // A worker that is killed some time after a reload depends on what the new supervisor has kept.
        let steps = if operation == "reload" { steps * 3 } else { steps };
        Focus { operation, modes: modes[rest as usize % 2], steps }
    }
}
