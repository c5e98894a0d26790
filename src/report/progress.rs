//! How far long work is: a bar on a terminal, a line now and then, or objects for programs. Off until a command asks for
//! it: a library shows nothing to its caller's terminal, and the output of scripts stays as it is.
//!
//! Whatever does long work begins a [`Progress`], tells it how far it is, and drops it at the end; the operations in the
//! server tell their caller, which does the same.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::sys::stdio::{self, Stream};

/// Work that ends within this is not drawn.
const QUIET: Duration = Duration::from_millis(300);
/// Between two lines.
const LINES: Duration = Duration::from_secs(10);
/// Between two objects for programs.
const OBJECTS: Duration = Duration::from_secs(1);
/// The rate is that of the last one to two of these.
const WINDOW: Duration = Duration::from_secs(5);
/// The console level from which on lines are printed.
const VERBOSE: i32 = 4;

/// What the user asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Wanted {
    /// A bar where standard error is a terminal, else lines if the console level is that of `-v`.
    #[default]
    Fitting,
    /// One JSON object a line, on standard error.
    Objects,
    Nothing,
}

const OFF: u8 = 0;
const BAR: u8 = 1;
const LINE: u8 = 2;
const OBJECT: u8 = 3;

static SHOW: AtomicU8 = AtomicU8::new(OFF);
/// The bar on the terminal, which messages must not be mixed with.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Shows progress from now on, as is wanted and fits the console level.
pub fn show(wanted: Wanted, level: i32) {
    SHOW.store(fitting(wanted, level, std::io::stderr().is_terminal()), Ordering::Relaxed);
}

fn fitting(wanted: Wanted, level: i32, terminal: bool) -> u8 {
    match wanted {
        Wanted::Nothing => OFF,
        Wanted::Objects => OBJECT,
        Wanted::Fitting if terminal && level > 0 => BAR,
        Wanted::Fitting if !terminal && level >= VERBOSE => LINE,
        Wanted::Fitting => OFF,
    }
}

/// Whether any is shown: else what is told need not be found out.
pub fn is_shown() -> bool {
    SHOW.load(Ordering::Relaxed) != OFF
}

/// One piece of work; dropping it ends what is shown of it.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    /// Bytes of what is counted.
    unit: u64,
    since: Instant,
    told: Option<Instant>,
    /// Where it was at two times, the older one first.
    marks: [(Instant, u64); 2],
    now: (u64, u64),
    bar: Option<ProgressBar>,
}

/// The object for programs. Within a version keys are only added.
#[derive(Serialize)]
struct Object {
    schema: &'static str,
    operation: &'static str,
    /// Bytes.
    done: u64,
    total: u64,
    /// Bytes in a second; none: not known yet.
    rate: Option<u64>,
    seconds_left: Option<u64>,
    seconds: f64,
    /// The last object of this piece of work; it was finished if `done` is `total`.
    end: bool,
}

impl Progress {
    /// `what` is done, in a few words; it is counted in bytes.
    pub fn begin(what: &'static str) -> Progress {
        Progress::in_units(what, 1)
    }

    /// The same, counted in units of so many bytes, such as clusters.
    pub fn in_units(what: &'static str, bytes: u64) -> Progress {
        let now = Instant::now();
        Progress { what, unit: bytes, since: now, told: None, marks: [(now, 0); 2], now: (0, 0), bar: None }
    }

    /// So much of it is done.
    pub fn at(&mut self, done: u64, total: u64) {
        let show = SHOW.load(Ordering::Relaxed);
        if show != OFF {
            self.note(done.min(total), total, Instant::now());
            match show {
                BAR if self.since.elapsed() >= QUIET => self.draw(ProgressDrawTarget::stderr()),
                LINE if self.is_due(LINES) => super::say(VERBOSE, self.line()),
                OBJECT if self.told.is_none() || self.is_due(OBJECTS) => self.tell(false),
                _ => {}
            }
        }
    }

    /// All of it is done, whatever was told last.
    pub fn finish(mut self) {
        self.now.0 = self.now.1;
    }

    fn note(&mut self, done: u64, total: u64, time: Instant) {
        let (done, total) = (done.saturating_mul(self.unit), total.saturating_mul(self.unit));
        if self.now == (0, 0) {
            // What an earlier run has done is no work of this one.
            self.marks = [(self.since, done); 2];
        }
        self.now = (done, total);
        if time.saturating_duration_since(self.marks[1].0) >= WINDOW {
            self.marks = [self.marks[1], (time, done)];
        }
    }

    /// Whether so much time has passed since the last line, or since the beginning. The next one counts from now.
    fn is_due(&mut self, pause: Duration) -> bool {
        let due = self.told.unwrap_or(self.since).elapsed() >= pause;
        if due {
            self.told = Some(Instant::now());
        }
        due
    }

    /// Bytes in a second.
    fn rate(&self, time: Instant) -> Option<u64> {
        let (since, from) = self.marks[0];
        let seconds = time.saturating_duration_since(since).as_secs_f64();
        let moved = self.now.0.saturating_sub(from);
        (moved > 0 && seconds >= 0.1).then_some((moved as f64 / seconds) as u64)
    }

    fn seconds_left(&self, rate: Option<u64>) -> Option<u64> {
        rate.filter(|rate| *rate > 0).map(|rate| self.now.1.saturating_sub(self.now.0).div_ceil(rate))
    }

    fn line(&self) -> String {
        let (done, total) = self.now;
        let rate = self.rate(Instant::now());
        let percent = if total == 0 { 100 } else { u128::from(done) * 100 / u128::from(total) };
        let mut line = format!("{}: {percent} % ({} of {} MiB)", self.what, done >> 20, total >> 20);
        if let (Some(rate), Some(left)) = (rate, self.seconds_left(rate)) {
            line += &format!(", {} MiB/s, {left} s left", rate >> 20);
        }
        line
    }

    fn tell(&mut self, end: bool) {
        let time = Instant::now();
        self.told = Some(time);
        if let Ok(line) = serde_json::to_string(&self.object(time, end)) {
            stdio::print(Stream::Err, &(line + "\n"));
        }
    }

    fn object(&self, time: Instant, end: bool) -> Object {
        let rate = self.rate(time);
        Object {
            schema: "ploop-progress-1",
            operation: self.what,
            done: self.now.0,
            total: self.now.1,
            rate,
            seconds_left: self.seconds_left(rate),
            seconds: (time.saturating_duration_since(self.since).as_secs_f64() * 1000.0).round() / 1000.0,
            end,
        }
    }

    fn draw(&mut self, target: ProgressDrawTarget) {
        let (done, total) = self.now;
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(total), target).with_message(self.what).with_position(done);
            let template =
                "{msg} [{wide_bar}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
            bar
        });
        bar.set_length(total);
        bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = None;
            bar.finish_and_clear();
        }
        if self.told.is_some() && SHOW.load(Ordering::Relaxed) == OBJECT {
            self.tell(true);
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
    fn what_is_shown_where() {
        for (wanted, level, terminal, show) in [
            (Wanted::Fitting, 3, true, BAR),
            (Wanted::Fitting, 4, true, BAR),
            (Wanted::Fitting, 0, true, OFF),
            (Wanted::Fitting, 3, false, OFF),
            (Wanted::Fitting, 4, false, LINE),
            (Wanted::Objects, -1, false, OBJECT),
            (Wanted::Objects, 3, true, OBJECT),
            (Wanted::Nothing, 4, true, OFF),
        ] {
            assert_eq!(fitting(wanted, level, terminal), show, "{wanted:?} {level} {terminal}");
        }
    }

    #[test]
    fn nothing_is_drawn_unless_asked_for() {
        let mut progress = Progress::begin("merging");
        progress.since -= QUIET;
        progress.at(1, 2);
        assert!(progress.bar.is_none() && progress.told.is_none());
        // Drawn on nothing, it moves, and messages get by.
        progress.note(1, 2, Instant::now());
        progress.draw(ProgressDrawTarget::hidden());
        progress.note(4, 4, Instant::now());
        progress.draw(ProgressDrawTarget::hidden());
        let bar = progress.bar.clone().unwrap();
        assert_eq!((bar.position(), bar.length()), (4, Some(4)));
        let mut printed = false;
        aside(|| printed = true);
        assert!(printed);
        drop(progress);
        assert!(bar.is_finished());
    }

    #[test]
    fn rate_and_time_left_are_those_of_the_last_seconds_in_bytes() {
        let mut progress = Progress::in_units("merging", 1 << 20);
        let second = |n| Duration::from_secs(n);
        let begin = progress.since;
        // Resumed: what was done before is no work of this run.
        progress.note(100, 1000, begin);
        assert_eq!((progress.rate(begin), progress.seconds_left(None)), (None, None));
        progress.note(110, 1000, begin + second(1));
        assert_eq!(progress.rate(begin + second(1)), Some(10 << 20));
        assert_eq!(progress.seconds_left(progress.rate(begin + second(1))), Some(89));
        // Slower from here on: after two windows the first seconds do not count any more.
        for n in 2..=20 {
            progress.note(110 + n, 1000, begin + second(n));
        }
        assert_eq!(progress.rate(begin + second(20)), Some(1 << 20));
        assert!(progress.line().starts_with("merging: 13 % (130 of 1000 MiB)"), "{}", progress.line());
        let text = serde_json::to_value(progress.object(begin + second(20), true)).unwrap();
        let keys: Vec<&String> = text.as_object().unwrap().keys().collect();
        let known = ["done", "end", "operation", "rate", "schema", "seconds", "seconds_left", "total"];
        assert_eq!(keys.iter().map(|k| k.as_str()).collect::<std::collections::BTreeSet<_>>(), known.into());
        assert_eq!(
            (&text["done"], &text["seconds_left"], &text["end"]),
            (&(130u64 << 20).into(), &870.into(), &true.into())
        );
    }

    #[test]
    fn lines_come_with_a_pause() {
        let mut progress = Progress::begin("merging");
        assert!(!progress.is_due(LINES));
        progress.since -= LINES;
        assert!(progress.is_due(LINES) && !progress.is_due(LINES));
        progress.told = progress.told.map(|t| t - LINES);
        assert!(progress.is_due(LINES));
    }
}
