//! How far long work is, drawn on a terminal. Off until a command asks for it: a library draws nothing on its caller's
//! terminal, and the output of scripts stays as it is.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Work that ends within this is not drawn.
const QUIET: Duration = Duration::from_millis(300);

static WANTED: AtomicBool = AtomicBool::new(false);
/// The bar on the terminal, which messages must not be mixed with.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Draws from now on if standard error is a terminal and the console level is above 0.
pub fn draw_at_level(level: i32) {
    WANTED.store(level > 0 && std::io::stderr().is_terminal(), Ordering::Relaxed);
}

/// One piece of work; dropping it clears the line.
#[derive(Debug)]
pub struct Progress {
    since: Instant,
    what: &'static str,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `what` is done, in a few words.
    pub fn begin(what: &'static str) -> Progress {
        Progress { since: Instant::now(), what, bar: None }
    }

    /// So much of it is done, in any unit.
    pub fn at(&mut self, done: u64, total: u64) {
        if WANTED.load(Ordering::Relaxed) && self.since.elapsed() >= QUIET {
            self.draw(done, total, ProgressDrawTarget::stderr());
        }
    }

    fn draw(&mut self, done: u64, total: u64, target: ProgressDrawTarget) {
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(total), target).with_message(self.what);
            if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:40}] {percent:>3}% {eta}") {
                bar.set_style(style.progress_chars("=> "));
            }
            *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
            bar
        });
        bar.set_length(total);
        bar.set_position(done.min(total));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = None;
            bar.finish_and_clear();
        }
    }
}

/// Prints with the bar out of the way.
pub(super) fn aside(print: impl FnOnce()) {
    let shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match shown {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_drawn_unless_asked_for() {
        draw_at_level(0);
        let mut progress = Progress::begin("merging");
        progress.since -= QUIET;
        progress.at(1, 2);
        assert!(progress.bar.is_none());
        // Drawn on nothing, it moves, and messages get by.
        progress.draw(1, 2, ProgressDrawTarget::hidden());
        progress.draw(9, 4, ProgressDrawTarget::hidden());
        let bar = progress.bar.clone().unwrap();
        assert_eq!((bar.position(), bar.length()), (4, Some(4)));
        let mut printed = false;
        aside(|| printed = true);
        assert!(printed);
        drop(progress);
        assert!(bar.is_finished());
    }
}
