//! Maintenance states of a device: their names and numbers.

use std::fmt;

/// What is being done to a device's image, or was begun by a program that has ended since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Maintenance {
    #[default]
    Off,
    /// The balloon is being inflated or looked at: its clusters are not given back, or not all.
    Balloon,
    /// The clusters of the balloon are free, the image's file is not shorter yet.
    FreeBlocksLoaded,
    /// What the image's file has at its end is moved into free clusters.
    Relocation,
    Track,
    Discard,
    Merge,
    Grow,
    /// A state of a newer server.
    Unknown,
}

use Maintenance::*;

/// All states with their names and the numbers of the C interface (PLOOP_MNTN_*).
const TABLE: [(Maintenance, &str, u32); 9] = [
    (Off, "OFF", 0),
    (Balloon, "BALLOON", 1),
    (FreeBlocksLoaded, "FBLOADED", 2),
    (Track, "TRACK", 4),
    (Discard, "DISCARD", 5),
    (Merge, "MERGE", 257),
    (Grow, "GROW", 258),
    (Relocation, "RELOC", 259),
    (Unknown, "UNKNOWN", 3),
];

impl Maintenance {
    pub fn all() -> impl Iterator<Item = Maintenance> {
        TABLE.iter().map(|(state, ..)| *state)
    }

    /// Its name, as `ploop balloon status` prints it and as the record has it.
    pub fn word(self) -> &'static str {
        TABLE.iter().find(|(state, ..)| *state == self).map_or("UNKNOWN", |(_, word, _)| word)
    }

    /// PLOOP_MNTN_*.
    pub fn number(self) -> u32 {
        TABLE.iter().find(|(state, ..)| *state == self).map_or(3, |(.., number)| *number)
    }

    /// Of a record; the record of a server that keeps no state has none.
    pub fn from_word(word: &str) -> Maintenance {
        match word {
            "" => Off,
            word => TABLE.iter().find(|(_, known, _)| *known == word).map_or(Unknown, |(state, ..)| *state),
        }
    }
}

impl fmt::Display for Maintenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_written() {
        for state in Maintenance::all() {
            assert_eq!(Maintenance::from_word(state.word()), state);
        }
        assert_eq!([Maintenance::from_word(""), Maintenance::from_word("DEFRAG")], [Off, Unknown]);
    }
}
