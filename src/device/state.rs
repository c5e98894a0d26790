//! What a device is doing.

use std::fmt;

/// What a device is doing. A record has one of the words `starting`, `running`, `stopped`, `failed` and `stalled`.
/// [`NoSpace`](State::NoSpace) is the supervisor's answer; [`Dead`](State::Dead) means that there is no process to
/// answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    /// Being attached; not to be used yet.
    Starting,
    Running,
    /// Running; writes wait for space on the file system of the image.
    NoSpace,
    /// A process that serves it does not answer (stopped or stuck): I/O waits.
    Stalled,
    /// No worker can serve it, or its writes can no longer be made durable.
    Failed,
    /// The block device is gone, the image is being closed.
    Stopped,
    /// Its server is gone (killed, or of an earlier boot): only [`clean`](crate::device::clean) helps.
    Dead,
    /// A state word that this version does not know, of a newer server. Never taken for running.
    Unknown(String),
}

impl State {
    /// The state that a record's word names.
    pub fn from_word(word: &str) -> State {
        match word {
            "starting" => State::Starting,
            "running" => State::Running,
            "stopped" => State::Stopped,
            "failed" => State::Failed,
            "stalled" => State::Stalled,
            other => State::Unknown(other.into()),
        }
    }

    /// One word for lists.
    pub fn as_str(&self) -> &str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::NoSpace => "no-space",
            State::Stalled => "stalled",
            State::Failed => "failed",
            State::Stopped => "stopped",
            State::Dead => "dead",
            State::Unknown(word) if word.is_empty() => "unknown",
            State::Unknown(word) => word,
        }
    }

    /// The device exists for its users, though it may wait for space or refuse writes.
    pub fn runs(&self) -> bool {
        matches!(self, State::Running | State::NoSpace | State::Stalled | State::Failed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_written_and_unknown_ones_are_not_running() {
        for state in [State::Starting, State::Running, State::Stopped, State::Failed, State::Stalled] {
            assert_eq!(State::from_word(state.as_str()), state);
        }
        for word in ["relocating", "", "Running", "running "] {
            let state = State::from_word(word);
            assert_eq!(state, State::Unknown(word.into()));
            assert!(!state.runs() && state != State::Running);
        }
        assert_eq!(State::from_word("").as_str(), "unknown");
        assert_eq!(State::from_word("relocating").to_string(), "relocating");
    }
}
