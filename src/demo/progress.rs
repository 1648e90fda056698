//! What the demo is doing: bars on a terminal, plain lines elsewhere. All of it goes to standard error.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two plain lines about the same step.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Shows one step at a time.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
    step: Option<Step>,
}

#[derive(Debug)]
struct Step {
    title: String,
    began: Instant,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Progress {
    /// Bars if standard error is a terminal.
    pub fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), step: None }
    }

    /// Ends the step before and begins another.
    pub fn begin(&mut self, title: &str) {
        self.end(None);
        let bar = self.terminal.then(|| {
            let bar = ProgressBar::new_spinner().with_message(title.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        if bar.is_none() {
            eprintln!("demo: {title}");
        }
        self.step = Some(Step { title: title.to_owned(), began: Instant::now(), bar, last_line: Instant::now() });
    }

    /// How far the step is, and in words.
    pub fn update(&mut self, done: u64, of: u64, words: &str) {
        let Some(step) = &mut self.step else { return };
        match &step.bar {
            Some(bar) => {
                if of > 0 && bar.length() != Some(of) {
                    bar.set_length(of);
                    bar.set_style(bar_style());
                }
                bar.set_position(done);
                bar.set_message(format!("{}: {words}", step.title));
            }
            None if step.last_line.elapsed() >= PLAIN_INTERVAL => {
                step.last_line = Instant::now();
                eprintln!("demo: {}: {words}", step.title);
            }
            None => {}
        }
    }

    /// Ends the step; `words` say what came of it.
    pub fn end(&mut self, words: Option<&str>) {
        let Some(step) = self.step.take() else { return };
        let seconds = step.began.elapsed().as_secs_f64();
        let words = words.map(|words| format!(": {words}")).unwrap_or_default();
        match step.bar {
            Some(bar) => {
                bar.set_style(ProgressStyle::with_template("✓ {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.finish_with_message(format!("{}{words} ({seconds:.1} s)", step.title));
            }
            None if !words.is_empty() => eprintln!("demo: {}{words} ({seconds:.1} s)", step.title),
            None => {}
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar())
}
