//! The text format of Prometheus ("Exposition formats" in its documentation, version 0.0.4).

use std::{
    fmt::{Display, Write},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// What the format is called in `Content-Type`.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A page of metrics.
#[derive(Debug, Default)]
pub(crate) struct Page(String);

/// What kind of metric a family is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Goes up only.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by their size.
    Histogram,
}

impl Page {
    /// Begins a family of samples.
    pub(crate) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Nothing fails that is written to a string, here and below.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A sample of the family that was begun last.
    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (at, (label, text)) in labels.iter().enumerate() {
            let opening = if at == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{opening}{label}=\"{}\"", escaped(text));
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    /// A family of one sample.
    pub(crate) fn single(&mut self, name: &str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// The samples of a histogram.
    pub(crate) fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        let mut count = 0;
        let bounds = histogram.bounds.iter().map(ToString::to_string);
        for (bound, observed) in bounds.chain(["+Inf".to_owned()]).zip(&histogram.buckets) {
            count += observed.load(Relaxed);
            let labels = [labels, &[("le", &bound)]].concat();
            self.sample(&bucket, &labels, count);
        }
        let sum = Duration::from_micros(histogram.sum_micros.load(Relaxed));
        self.sample(&format!("{name}_sum"), labels, sum.as_secs_f64());
        self.sample(&format!("{name}_count"), labels, count);
    }

    /// The page's text.
    pub(crate) fn into_text(self) -> String {
        self.0
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// How many observations there were of each length of time. Counting takes no lock.
#[derive(Debug)]
pub(crate) struct Histogram {
    /// The upper bounds of the buckets, in seconds.
    bounds: &'static [f64],
    /// One more than there are bounds.
    buckets: Vec<AtomicU64>,
    sum_micros: AtomicU64,
}

impl Histogram {
    /// Without observations.
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            buckets: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum_micros: AtomicU64::new(0),
        }
    }

    /// Counts an observation.
    pub(crate) fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.sum_micros.fetch_add(micros, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_what_is_at_most_each_bound() {
        let histogram = Histogram::new(&[0.1, 1.0]);
        for millis in [50, 100, 101, 5_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut page = Page::default();
        page.family("t", Kind::Histogram, "Time.");
        page.histogram("t", &[("of", "a\"b\\c\nd")], &histogram);
        assert_eq!(
            page.into_text(),
            "# HELP t Time.\n# TYPE t histogram\n\
             t_bucket{of=\"a\\\"b\\\\c\\nd\",le=\"0.1\"} 2\n\
             t_bucket{of=\"a\\\"b\\\\c\\nd\",le=\"1\"} 3\n\
             t_bucket{of=\"a\\\"b\\\\c\\nd\",le=\"+Inf\"} 4\n\
             t_sum{of=\"a\\\"b\\\\c\\nd\"} 5.251\n\
             t_count{of=\"a\\\"b\\\\c\\nd\"} 4\n"
        );
    }
}
