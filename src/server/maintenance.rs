//! The change of a device's maintenance state, as a message. The supervisor keeps the state in the device's record, so that
//! it outlives the caller and both processes of the device.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::format::maintenance::Maintenance;

/// A change of the state, by words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaintenanceChange {
    /// States that may be left.
    pub from: Vec<String>,
    pub to: String,
}

impl MaintenanceChange {
    pub fn new(from: &[Maintenance], to: Maintenance) -> MaintenanceChange {
        MaintenanceChange { from: from.iter().map(|s| s.word().to_owned()).collect(), to: to.word().to_owned() }
    }

    pub fn may_leave(&self, now: Maintenance) -> bool {
        self.from.iter().any(|word| Maintenance::from_word(word) == now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Maintenance::{Balloon, Merge, Off};

    #[test]
    fn only_the_named_states_may_be_left() {
        let change = MaintenanceChange::new(&[Off, Balloon], Balloon);
        assert!(change.may_leave(Off) && change.may_leave(Balloon));
        assert!(!change.may_leave(Merge) && !change.may_leave(Maintenance::Unknown));
    }
}
